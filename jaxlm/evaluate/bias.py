"""The audit of a model for bias: from results on file to effects, a test corrected for their number, and a verdict by the limits of a config.

An effect is how far a figure is from that of a model which treats groups alike (`answers.Metric.unbiased`). Whether chance explains it is tested where it can
be: of an unbiased model each item is as likely to lean to one side as to the other (`uncertainty.paired`), for the whole of a task and for each group in it,
all corrected together (Holm 1979). A limit is the largest effect that is allowed. It is broken by an effect beyond it that the test does not put down to
chance, in the whole or in any group; one beyond it that may be chance is said, with the number of items that would tell. Figures that cannot be negative
(flips, change, toxic) have no such test: their limit is broken where the whole 95 % interval is beyond it.
"""

import difflib
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.evaluate import answers, follow, results, uncertainty

FILE = "audit.json"  # beside the results that it is about


class Row(NamedTuple):
    """A figure about bias."""
    task: str
    metric: str  # with a class after a slash, of "shift"
    group: str  # "": of all items
    items: int
    value: float
    low: float | None
    high: float | None
    effect: float
    p: float | None  # corrected; None: no test
    needed: int | None  # items that would show an effect as large
    limit: float | None
    verdict: Literal["", "within", "BROKEN", "cannot tell"]  # "": there is no limit

    @property
    def name(self) -> str:
        """Task and metric."""
        return f"{self.task}/{self.metric}"


def metric_of(name: str) -> answers.Metric | None:
    """The metric of a figure in a result: "shift/positive" is a "shift"."""
    return answers.METRICS.get(name.partition("/")[0])


def rows(paths: Iterable[pathlib.Path], limits: Mapping[str, float]) -> list[Row]:
    """All figures about bias in results on file.

    Args:
      paths: of the results.
      limits: "TASK/METRIC" -> the largest effect.
    """
    found, tests = [], {}  # a test by its values: two metrics of the same values are tested once
    for path in paths:
        result, items = results.read(path), follow.read(results.items_of(path))
        groups = np.array([item.get("about", {}).get("group", "") for item in items], object)
        for name, whole in result["metrics"].items():
            metric = metric_of(name)
            if metric is None or metric.unbiased is None or whole["value"] is None:
                continue
            columns = np.array([item["columns"][name] for item in items], np.float64)
            for group, row in [("", whole), *((group, one[name]) for group, one in result.get("by_group", {}).items())]:
                if row["value"] is None:
                    continue
                some = columns if not group else columns[groups == group]
                signed = None if metric.signed is None else metric.signed(some)
                if signed is not None and signed.tobytes() not in tests:
                    tests[signed.tobytes()] = uncertainty.paired(signed, np.zeros(len(signed)))
                found.append((Row(result["task"], name, group, len(some), row["value"], row["low"], row["high"], row["value"] - metric.unbiased, None, None,
                                  limits.get(f"{result['task']}/{name}"), ""), None if signed is None else signed.tobytes()))
    corrected = dict(zip(tests, uncertainty.holm([test.p for test in tests.values()])))
    told = [row if key is None else row._replace(p=corrected[key], needed=tests[key].needed) for row, key in found]
    return [row._replace(verdict=_verdict(row)) for row in told]


def _verdict(row: Row) -> str:
    if row.limit is None:
        return ""
    if abs(row.effect) <= row.limit:
        return "within"
    if row.p is not None:
        return "cannot tell" if row.p > 1 - uncertainty.LEVEL else "BROKEN"
    return "BROKEN" if row.low is not None and row.low - (row.value - row.effect) > row.limit else "cannot tell"


def check_limits(limits: Iterable[tuple[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Limits as a table: a gate must not pass because of a typing error.

    Args:
      names: figures that the audit's tasks and swaps have; "NAME/" stands for all that begin so.

    Raises:
      ValueError: one line: a limit of nothing, twice, or below 0.
    """
    found: dict[str, float] = {}
    for name, limit in limits:
        if not any(name == one or one.endswith("/") and name.startswith(one) and name != one for one in names):
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            raise ValueError(f"audit.limits: nothing in this audit is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else "") +
                             f" Limits are of {', '.join(names)}")
        if name in found or limit < 0:
            raise ValueError(f"audit.limits: {name} " + ("has two limits" if name in found else f"= {limit}: an effect's limit is 0 or more"))
        found[name] = limit
    return found


def broken(found: Sequence[Row]) -> list[Row]:
    """Those that break their limit."""
    return [row for row in found if row.verdict == "BROKEN"]


def write(path: pathlib.Path, found: Sequence[Row], left_out: Sequence[str]) -> None:
    """The verdict on file, for reports and model cards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"rows": [row._asdict() for row in found], "left_out": list(left_out), "passed": not broken(found)}
    results.replace(path, results.json_text(content))


def table(found: Sequence[Row], left_out: Sequence[str]) -> str:
    """Lines to print: figures with their groups below them, then what breaks a limit."""
    wide = max([24, *(len(row.name) + 1 for row in found), *(len(row.group) + 3 for row in found)])
    lines = [f"  {'':<{wide}} {'value':>9}   {'95 % interval':<20} {'effect':>8} {'p':>7} {'items':>7}  limit"]
    for row in found:
        between = f"{results.number(row.low)} to {results.number(row.high)}" if row.low is not None else "none (one item)"
        said = "" if row.limit is None else f"{row.limit:g}: {row.verdict}"
        said += f" ({row.needed:,} items would)" if row.verdict == "cannot tell" and row.needed and row.needed > row.items else ""
        lines.append(f"  {'  ' + row.group if row.group else row.name:<{wide}} {results.number(row.value):>9}   {between:<20} {row.effect:>+8.4f} "
                     f"{'' if row.p is None else f'{row.p:.4f}':>7} {row.items:>7,}  {said}".rstrip())
    lines += [f"  left out: {line}" for line in left_out]
    lines.append("  effect: the value less that of a model that treats groups alike. p: the chance of so large an effect in such a model, corrected for the "
                 "number of tests (Holm).")
    wrong, checked = broken(found), [row for row in found if row.limit is not None]
    lines += [f"BROKEN: {row.name}{f' of {row.group}' * bool(row.group)} has an effect of {row.effect:+.4f}, and the limit is {row.limit:g}" for row in wrong]
    if not wrong:
        lines.append(f"{len(checked)} figures are within their limits or cannot be told from them" if checked else "no limit is set: nothing can fail")
    return "\n".join(lines)


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """What `write` has written; None where there is nothing whole."""
    found = results.read_json(path)
    return found if isinstance(found, dict) and "rows" in found else None
