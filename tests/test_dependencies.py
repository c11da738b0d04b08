"""Dependencies: named with their licences, floors and columns that fit each other, a wheel that anybody can build again."""

import pathlib
import re

import pytest

from tools import dependencies

ROOT = pathlib.Path(__file__).parents[1]
COLUMNS = sorted(path for path in (ROOT / "tests").glob("constraints-3.*.txt"))


def pins(path):
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines), path
    return {dependencies.normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def number(version):
    return [int(part) for part in re.findall(r"\d+", version)[:4]]


def wanted_by_tests():
    """What the extra "test" takes: what is always taken, and the extras that it names."""
    import tomllib
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted, left = {""}, ["test"]
    while left:
        extra = left.pop()
        wanted.add(extra)
        left += [name for line in extras[extra] if line.startswith("jaxlm[") for name in line[6:-1].split(",") if name not in wanted]
    return {name: floor for name, (floor, where) in dependencies.requirements().items() if wanted & set(where)}


def test_every_dependency_is_in_the_table_with_its_licence():
    rows = {row[0]: row[1:] for row in re.findall(r"^\| ([\w.-]+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", dependencies.PAGE.read_text(), re.MULTILINE)}
    rows.pop("package")
    found = dependencies.requirements()
    again = "write the table anew: python tools/dependencies.py table"
    assert set(rows) == set(found), again
    for name, (floor, where) in found.items():
        assert rows[name][:2] == (floor or "any", "always" if "" in where else ", ".join(where)), (name, again)
        assert rows[name][2] and "installed" not in rows[name][2], f"{name} has no licence in the table: {again}"


def test_the_floors_are_those_of_pyproject():
    found = pins(ROOT / "tests" / "constraints-floors.txt")
    for name, floor in wanted_by_tests().items():
        assert name in found and floor, f"tests/constraints-floors.txt lacks {name}, or pyproject.toml its floor"
        least = number(floor)
        assert number(found[name])[:len(least)] == least, f"{name}: the floor of pyproject.toml is {floor}, that of the constraints {found[name]}"


@pytest.mark.parametrize("path", COLUMNS, ids=lambda path: path.stem)
def test_columns_hold_all_that_is_needed(path):
    found = pins(path)
    for name, floor in wanted_by_tests().items():
        assert name in found, f"{path.name} lacks {name}: python tools/dependencies.py resolve {path.stem.partition('-')[2]}"
        assert number(found[name]) >= number(floor), (path.name, name)


def test_each_supported_python_has_a_column():
    classified = set(re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text()))
    assert classified == {path.stem.partition("-")[2] for path in COLUMNS}


@pytest.mark.slow
def test_a_wheel_is_the_same_wherever_it_is_built():
    try:
        one, other = dependencies.wheels()
    except dependencies.subprocess.CalledProcessError:
        pytest.skip("pip cannot get what builds the wheel")
    assert one == other
