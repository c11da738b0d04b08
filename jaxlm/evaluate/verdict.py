"""Which checkpoints of a run are best, by paired tests on the same items: written by `jaxlm eval --watch`, read by the run.

WORKDIR/verdict.json is all that the two share: no clock, no lock, no process. The watcher alone writes it, whole or not at all; the run reads it when it
evaluates, and an absent or damaged one means nothing. A later checkpoint is "better" than an earlier one only if the test says so (5 % false alarms each), so
noise neither moves the best nor shortens a run's patience; many small gains add up against a best that stays.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxlm.evaluate import answers, follow, results

FILE = "verdict.json"


class Verdict(NamedTuple):
    """What a run's evaluations say of its checkpoints so far."""
    metric: str  # "validation/loss": name of the result and its metric
    keep_best: int  # how many checkpoints are kept
    best: int  # step that no earlier one matched: the test called it better than the best before it
    without_gain: int  # checkpoints since then
    keep: tuple[int, ...]  # best first; the run does not delete these
    regressed: tuple[int, ...]  # steps that the test called worse than the best before them
    ranking: tuple[dict[str, Any], ...]  # each checkpoint's step, value, low, high, and verdict and p against the best of its time; best value first


def read(workdir: pathlib.Path) -> Verdict | None:
    """None: nobody has judged this run."""
    try:
        found = json.loads((pathlib.Path(workdir) / FILE).read_text(encoding="utf-8"))
        return Verdict(**{name: tuple(found[name]) if isinstance(found[name], list) else found[name] for name in Verdict._fields})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def exhausted(workdir: pathlib.Path, patience: int) -> bool:
    """Whether a run that gives up after `patience` evaluations without a gain (0: never) should, by what its watcher found."""
    found = read(workdir) if patience else None
    return found is not None and found.without_gain >= patience


def write(workdir: pathlib.Path, verdict: Verdict) -> None:
    """Writes it into the workdir, in place of the last one."""
    results.replace(pathlib.Path(workdir) / FILE, json.dumps(results.clean(verdict._asdict()), indent=1) + "\n")


def after(before: Verdict | None, metric: str, step: int, row: dict[str, Any], columns: Callable[[int], np.ndarray], *, keep_best: int) -> Verdict:
    """The verdict once one more checkpoint is evaluated; a checkpoint that was judged before changes nothing.

    Args:
      before: the verdict so far; None, or one on another metric, begins anew.
      metric: "RESULT/METRIC".
      row: the figure of this checkpoint (`answers.figures`).
      columns: step -> its `[N, K]` of the metric, on the same items for all steps.
    """
    row = {"step": step, **{key: row.get(key) for key in ("value", "low", "high")}}
    if before is None or before.metric != metric:
        return Verdict(metric, keep_best, step, 0, (step,) if keep_best else (), (), (row | {"verdict": "first", "p": None},))
    if step in (one["step"] for one in before.ranking):
        return before._replace(keep_best=keep_best, keep=before.keep[:keep_best])
    name = metric.rpartition("/")[2]
    test = answers.compare(name, columns(step), columns(before.best))
    sign = 1 if answers.METRICS[name].higher_is_better else -1
    ranking = tuple(sorted((*before.ranking, row | {"verdict": test.verdict, "p": test.p}), key=lambda one: (-sign * one["value"], one["step"])))
    better = test.verdict == "better"
    return before._replace(
        keep_best=keep_best, best=step if better else before.best, without_gain=0 if better else before.without_gain + 1, ranking=ranking,
        regressed=(*before.regressed, step) if test.verdict == "worse" else before.regressed,
        keep=_kept(before.keep, step, name, columns, [one["step"] for one in ranking], keep_best))


def _kept(kept: tuple[int, ...], step: int, name: str, columns: Callable[[int], np.ndarray], ranked: list[int], keep_best: int) -> tuple[int, ...]:
    """A new checkpoint takes a free place, or that of the last one if the test calls it better."""
    full = keep_best and len(kept) >= keep_best
    if full and answers.compare(name, columns(step), columns(kept[keep_best - 1])).verdict == "better":
        kept = kept[:keep_best - 1]
    return tuple(sorted((*kept, step) if len(kept) < keep_best else kept[:keep_best], key=ranked.index))


def columns_of(path: pathlib.Path, metric: str) -> np.ndarray:
    """`[N, K]` of a result's items."""
    return np.array([item["columns"][metric] for item in follow.read(results.items_of(path))], np.float64)


def show(verdict: Verdict, step: int) -> str:
    """One line about the newest checkpoint."""
    row = next(one for one in verdict.ranking if one["step"] == step)
    said = {"first": "the first", "better": "better than all before it", "worse": "WORSE than the best before it: a regression",
            "cannot tell": "no different from the best, as far as these items can tell"}[row["verdict"]]
    return (f"step {step}: {verdict.metric} {results.number(row['value'])}, {said}" + (f" (p = {row['p']:.4f})" if row["p"] is not None else "") +
            f"; best: step {verdict.best}; kept: {', '.join(map(str, verdict.keep)) or 'none'}")
