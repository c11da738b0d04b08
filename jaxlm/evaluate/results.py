"""The files of an evaluation: one JSON of figures, and beside it a line for each item, from which every figure can be computed again.

  WORKDIR/results/step-400/hellaswag.json           what was asked, of which model, on which data; `metrics`: value, interval, standard error
                           hellaswag.items.jsonl    of each item: what was asked and answered, and `columns`, per metric the numbers that add up to it
                           hellaswag.part.jsonl     while it runs: what is scored already

Both are written whole or not at all; the figures last, so a result that is there is complete.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.evaluate import answers, follow, uncertainty

FORMAT = 1
FOLDER = "results"


def folder(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """Where the results of a checkpoint lie."""
    return workdir / FOLDER / f"step-{step}"


def write(path: pathlib.Path, result: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
    """Writes `path` (NAME.json) and the items beside it, synced; numbers that JSON does not know become null."""
    beside = items_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(beside, "".join(json.dumps(clean(item), ensure_ascii=False) + "\n" for item in items))
    replace(path, json_text({"format": FORMAT, **result, "files": {"items": beside.name}}))


def json_text(value: Mapping[str, Any]) -> str:
    """A result as the text of its file."""
    return json.dumps(clean(value), indent=1, ensure_ascii=False) + "\n"


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file whole, synced, or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def items_of(path: pathlib.Path) -> pathlib.Path:
    """The file of single items beside a result's."""
    return path.with_name(path.name.removesuffix(".json") + ".items.jsonl")


def clean(value: Any) -> Any:
    """JSON values for what numpy and dataclasses hold; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: clean(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(part) for part in value]
    if isinstance(value, (bool, str, int)) or value is None:
        return value
    if isinstance(value, np.ndarray):
        return clean(value.tolist())
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """A result; None where there is none, or what is there is none of ours."""
    found = read_json(path)
    return found if isinstance(found, dict) and found.get("format") == FORMAT and "metrics" in found else None


def read_json(path: pathlib.Path) -> Any:
    """A JSON file's value; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def found(place: pathlib.Path) -> dict[str, pathlib.Path]:
    """Results by their names: of a result's own file, a step's folder, or a workdir, of each task that of the newest step.

    Raises:
      ValueError: one line: there are none.
    """
    if place.is_file():
        files = [place]
    elif (place / FOLDER).is_dir():
        steps = [int(p.name.removeprefix("step-")) for p in (place / FOLDER).glob("step-*") if p.name.removeprefix("step-").isdigit()]
        files = [path for step in sorted(steps) for path in sorted(folder(place, step).glob("*.json"))]
    else:
        files = sorted(place.glob("*.json")) if place.is_dir() else []
    results = {path.name.removesuffix(".json"): path for path in files if read(path)}
    if not results:
        raise ValueError(f"{place} holds no results: give a workdir, a folder WORKDIR/results/step-N or a result's .json file; they are made by "
                         "jaxlm eval --workdir=... [--tasks=...]")
    return results


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Figures with their intervals, as lines to print."""
    lines = [f"  {'task':<20} {'metric':<16} {'value':>9}   {'95 % interval':<20} {'items':>7}"]
    for result in results:
        name = result["task"] + f", {result['shots']} shot{'s' * (result['shots'] > 1)}" * bool(result.get("shots"))
        for metric, row in result["metrics"].items():
            between = f"{number(row['low'])} to {number(row['high'])}" if row.get("low") is not None else "none (one item)"
            lines.append(f"  {name:<20} {metric:<16} {number(row['value']):>9}   {between:<20} {result['items']:>7,}")
            name = ""
        lines += [f"  {'':<20} ({note})" for note in result.get("notes", ())]
    return "\n".join(lines)


def number(value: float | None) -> str:
    """For tables: four decimals, of large numbers two."""
    return "none" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:,.2f}"


def compared(a: pathlib.Path, b: pathlib.Path, log=lambda line: None) -> list[dict[str, Any]]:
    """The paired test of each metric that both have on the same items, p corrected for their number (Holm).

    Returns:
      Rows of `task`, `metric`, `a`, `b`, and what `uncertainty.Comparison` holds.

    Raises:
      ValueError: one line: nothing to compare.
    """
    one, two = found(a), found(b)
    rows, tests, higher = [], [], []
    for name in sorted(one.keys() & two.keys()):
        first, second = read(one[name]), read(two[name])
        if first["items_sha256"] != second["items_sha256"]:
            log(f"{name}: left out, the two were asked different items")
            continue
        left, right = (follow.read(items_of(results[name])) for results in (one, two))
        for metric in first["metrics"]:
            if metric in second["metrics"] and metric in answers.METRICS:
                tests.append(answers.compare(metric, *(np.array([item["columns"][metric] for item in items]) for items in (left, right))))
                higher.append(answers.METRICS[metric].higher_is_better)
                rows.append({"task": name, "metric": metric, "a": first["metrics"][metric]["value"], "b": second["metrics"][metric]["value"]})
    if not rows:
        raise ValueError(f"{a} and {b} share no result on the same items: the first has {', '.join(one)}, the second {', '.join(two)}")
    return [row | test._asdict() for row, test in zip(rows, uncertainty.decided(tests, higher_is_better=higher))]


def comparison_table(rows: Sequence[Mapping[str, Any]], a: str, b: str) -> str:
    """Rows of a paired comparison of A and B, for people."""
    lines = [f"A = {a}", f"B = {b}", f"  {'task':<20} {'metric':<16} {'A':>9} {'B':>9} {'A - B':>9}   {'95 % interval':<20} {'p':>7}  A is"]
    for row in rows:
        verdict = row["verdict"]
        if verdict == "cannot tell":
            verdict += f" ({row['needed']:,} items would be needed, there are {row['items']:,})" if row["needed"] and row["needed"] > row["items"] else ""
        lines.append(f"  {row['task']:<20} {row['metric']:<16} {number(row['a']):>9} {number(row['b']):>9} {row['difference']:>+9.4f}   "
                     f"{row['low']:+.4f} to {row['high']:+.4f}   {row['p']:>7.4f}  {verdict}")
    return "\n".join([*lines, "p: the chance of so large a difference between two equal models, corrected for the number of tests (Holm)."])
