"""What jaxlm depends on: the table in docs/dependencies.md and the constraints files of the tested columns.

  python tools/dependencies.py table            # writes the table anew, from the packages that are installed here (pip install -e '.[test]' first)
  python tools/dependencies.py resolve 3.12     # tests/constraints-3.12.txt: what is newest for '.[test]' on that Python
  python tools/dependencies.py wheel            # builds the release's wheel twice, in two folders, and compares the bytes

`resolve` needs uv (pip install uv); `wheel` gets its build requirement from the network.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "dependencies.md"
BEGIN, END = "<!-- table: tools/dependencies.py table -->", "<!-- end of table -->"
_SHORT = {"Apache Software License": "Apache-2.0", "Apache License 2.0": "Apache-2.0", "Apache 2.0": "Apache-2.0", "Apache": "Apache-2.0", "Apache License": "Apache-2.0", "MIT License": "MIT",
          "BSD License": "BSD", "Apache License, Version 2.0": "Apache-2.0", "Python Software Foundation License": "PSF-2.0",
          "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> dict[str, tuple[str, list[str]]]:
    """Of each package that pyproject.toml names: its floor ("" where there is none) and where it is named: "" (always), or extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, tuple[str, list[str]]] = {}
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            name, floor = re.match(r"([\w.-]+)(?:\[[\w,]*\])?(?:>=([\w.]+))?", line).groups()
            if normal(name) != "jaxlm":
                old, where = found.get(normal(name), ("", []))
                found[normal(name)] = (floor or old, [*where, extra])
    return found


def licence(name: str) -> str:
    """As the installed package's metadata has it; "" where it is not installed."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    said = metadata.get("License-Expression") or ""
    classified = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or () if line.startswith("License ::")]
    first = (metadata.get("License") or "").strip().split("\n")[0]
    said = said or " or ".join(one for one in classified if one != "OSI Approved") or first
    return _SHORT.get(said, said)[:60]


def table() -> str:
    """The table of what pyproject.toml names. A licence that cannot be looked up here stays as it was."""
    old = dict(re.findall(r"^\| ([\w.-]+) \|[^|]*\|[^|]*\| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE)) if PAGE.exists() else {}
    rows = ["| package | oldest tested | for | licence |", "|---|---|---|---|"]
    for name, (floor, where) in sorted(requirements().items()):
        rows.append(f"| {name} | {floor or 'any'} | {'always' if '' in where else ', '.join(where)} | {licence(name) or old.get(name, 'not installed here')} |")
    return "\n".join(rows)


def resolve(version: str) -> str:
    """What a Python gets for '.[test]' now, as lines of a constraints file."""
    command = ["uv", "pip", "compile", "-q", "pyproject.toml", "--extra", "test", "--python-version", version, "--no-header", "--no-annotate"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def wheel(folder: pathlib.Path) -> pathlib.Path:
    """A wheel of a copy of the repository's tracked files, with the time of the last commit."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    for name in filter(None, files):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    when = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", f"--wheel-dir={folder}", str(tree)], check=True,
                   env={**os.environ, "SOURCE_DATE_EPOCH": when})
    return next(folder.glob("*.whl"))


def wheels() -> list[str]:
    """sha256 of two wheels, built in folders of other names at other times."""
    with tempfile.TemporaryDirectory() as folder:
        return [hashlib.sha256(wheel(pathlib.Path(folder) / name).read_bytes()).hexdigest() for name in ("one", "another/place")]


def main() -> int:
    what = sys.argv[1:2]
    if what == ["table"]:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
    elif what == ["resolve"] and len(sys.argv) == 3:
        path = ROOT / "tests" / f"constraints-{sys.argv[2]}.txt"
        first = path.read_text().split("\n")[0] if path.exists() else f"# Python {sys.argv[2]}"
        path.write_text(f"{first}\n{resolve(sys.argv[2])}")
    elif what == ["wheel"]:
        sums = wheels()
        print("\n".join(sums))
        return len(set(sums)) - 1
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
