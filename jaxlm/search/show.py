"""What a study found: a table, the best config as a file, and a picture. Home of matplotlib, beside aot/show.py (pip install 'jaxlm[plot]')."""

import importlib.util
import math
import pathlib
import shlex
from collections.abc import Callable
from typing import Any

from jaxlm import config as configs
from jaxlm.search import space as spaces
from jaxlm.search import study as studies
from jaxlm.search.study import Row, Study
from jaxlm.search.trials import describe, short
from jaxlm.train import best, report

BEST, PICTURE = "best.py", "search.png"


def summary(study: Study, note: Callable[[str], None]) -> None:
    """Says what the study knows so far, and writes the best config and the picture."""
    rows = studies.rows(study)
    note("\n" + table(study, rows))
    found = studies.best_row(study, rows)
    if found is None:
        return note(f"no trial is complete yet, so there is no best one: {_counts(rows)}")
    path = study.folder / BEST
    metric, steps = study.config.checkpoint.metric, last_step(study, found.number)
    text = (f"The best of {sum(row.state == 'complete' for row in rows)} complete trials of {study.folder}: trial {found.number}, validation {metric} "
            f"{found.figure:.4f} after {steps} steps.\n\n    {describe(study, found.values)}\n")
    path.write_text(configs.to_recipe(studies.trial_config(*study[:3], found.values), text), encoding="utf-8")
    note(f"best: trial {found.number}, {metric} {found.figure:.4f}, {describe(study, found.values)}\n"
         f"its run is in {studies.workdir(study, found.number)}, its config in {path}")
    if importlib.util.find_spec("matplotlib") is None:
        note("for a picture of the study: pip install 'jaxlm[plot]'")
    else:
        picture(study, rows, study.folder / PICTURE)
        note(f"picture in {study.folder / PICTURE}")
    again = ["jaxlm", "train", f"--config={path}", f"--workdir={study.folder / 'best'}", f"--config.train.steps={10 * steps} steps"]
    note(f"ten times longer:\n  {shlex.join(again)}")


def table(study: Study, rows: list[Row], most: int = 20) -> str:
    """The trials, best first, then those that are not complete by how far they came."""
    sign = 1 if best.lower(study.config) else -1
    order = {"complete": 0, "running": 1, "pruned": 2, "waiting": 3, "failed": 4}
    ranked = sorted(rows, key=lambda row: (order[row.state], 0 if row.state == "complete" else -len(row.curve), math.inf if row.figure is None else
                                           sign * row.figure))
    keys = list(study.space)
    cells = [["trial", "state", study.config.checkpoint.metric, "steps", *keys]]
    cells += [[str(row.number), row.state, "" if row.figure is None else f"{row.figure:.4f}", str(last_step(study, row.number) or ""),
               *(short(study, key, row.values[key]) if key in row.values else "" for key in keys)] for row in ranked[:most]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)) for line in cells]
    if len(ranked) > most:
        lines.append(f"and {len(ranked) - most} more")
    lines += [f"trial {row.number} failed: {row.note}" for row in ranked if row.state == "failed"]
    return "\n".join([*lines, f"{_counts(rows)}; {steps(study, rows):,} steps in all"])


def last_step(study: Study, number: int) -> int:
    """How far a trial's run came, from its log."""
    return max((row["step"] for row in report.read_metrics(studies.workdir(study, number))), default=0)


def steps(study: Study, rows: list[Row]) -> int:
    """Steps of all trials."""
    return sum(last_step(study, row.number) for row in rows)


def _counts(rows: list[Row]) -> str:
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no trials"


def picture(study: Study, rows: list[Row], path: pathlib.Path) -> None:
    """Four views of a study, as PNG: figures by trial, learning curves, importances, figures by value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys, metric = list(study.space), study.config.checkpoint.metric
    figure = Figure(figsize=(11, 6.5 + 2.8 * math.ceil(len(keys) / 4)), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.6, max(1, math.ceil(len(keys) / 4))])
    history, curves, shares = upper.subplots(1, 3)
    found = studies.best_row(study, rows)
    _history(study, rows, history)
    for row in rows:
        if row.curve:
            chosen = found is not None and row.number == found.number
            curves.plot(range(1, len(row.curve) + 1), row.curve, color="tab:red" if chosen else "tab:blue", alpha=1 if chosen else 0.35,
                        marker="x" if row.state == "pruned" else "", markevery=[-1], zorder=3 if chosen else 1)
    curves.set(title="Learning curves (red: the best)", xlabel="evaluation", ylabel=metric)
    _focus(study, curves, [value for row in rows for value in row.curve])
    try:
        index, importance = studies.importances(study, rows)
    except ImportError:  # scikit-learn, which fits the forest
        index, importance = 0, {}
    shares.set_title(f"Importance at evaluation {index} (fANOVA)" if importance else "Importance")
    if importance:
        names = sorted(importance, key=importance.get)
        shares.barh(names, [importance[name] for name in names], color="tab:blue")
        shares.set(xlim=(0, 1), xlabel="share of the variation")
    else:
        shares.set_axis_off()
        shares.text(0.5, 0.5, "needs 4 trials, 2 keys\nand scikit-learn", ha="center", va="center", transform=shares.transAxes)
    slices = lower.subplots(math.ceil(len(keys) / 4), min(len(keys), 4), squeeze=False).flat
    for key, axes in zip(keys, slices):
        _slice(study, rows, key, axes)
    for axes in list(slices)[len(keys):]:
        axes.set_axis_off()
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)


def _history(study: Study, rows: list[Row], axes: Any) -> None:
    for state, colour, mark in (("complete", "tab:blue", "o"), ("pruned", "tab:orange", "x")):
        some = [row for row in rows if row.state == state and row.figure is not None]
        axes.scatter([row.number for row in some], [row.figure for row in some], color=colour, marker=mark, label=f"{state} ({len(some)})")
    so_far, line = None, []
    for row in (row for row in rows if row.state == "complete"):
        better = so_far is None or (row.figure < so_far) == best.lower(study.config)
        so_far = row.figure if better else so_far
        line.append((row.number, so_far))
    axes.step(*zip(*line) if line else ([], []), where="post", color="tab:red", label="best so far")
    axes.set(title="Trials", xlabel="trial", ylabel=study.config.checkpoint.metric)
    _focus(study, axes, [row.figure for row in rows if row.figure is not None])
    axes.legend(fontsize="small")


def _slice(study: Study, rows: list[Row], key: str, axes: Any) -> None:
    from matplotlib import ticker

    given, shown = study.space[key], [row for row in rows if row.figure is not None]
    place = (lambda value: given.values.index(value)) if isinstance(given, spaces.Choice) else float
    for state, colour, mark in (("complete", "tab:blue", "o"), ("pruned", "tab:orange", "x")):
        some = [row for row in shown if row.state == state]
        axes.scatter([place(row.values[key]) for row in some], [row.figure for row in some], color=colour, marker=mark)
    if isinstance(given, spaces.Choice):
        axes.set_xticks(range(len(given.values)), given.values)
    elif given.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set(xlabel=key, ylabel=study.config.checkpoint.metric)
    _focus(study, axes, [row.figure for row in shown])


def _focus(study: Study, axes: Any, values: list[float]) -> None:
    """Leaves out of sight what is far worse than the most: one trial that diverged would press all others into a line."""
    if len(values) > 3:
        ordered = sorted(values)
        low, high = ordered[len(values) // 4], ordered[3 * len(values) // 4]
        reach = 3 * (high - low) or 1.0
        bottom, top = (ordered[0], min(ordered[-1], high + reach)) if best.lower(study.config) else (max(ordered[0], low - reach), ordered[-1])
        margin = 0.05 * (top - bottom) or 1.0
        axes.set_ylim(bottom - margin, top + margin)
