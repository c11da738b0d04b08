"""Which checkpoint of a run is best, and when a run gains nothing more: `checkpoint.metric` and `train.patience`."""

import difflib
import math
import pathlib
from collections.abc import Mapping, Sequence

from jaxlm import sharding
from jaxlm.config import LABELLED, Config
from jaxlm.evaluate import classification, likelihood, verdict
from jaxlm.train import checkpoint, report


def chooses(config: Config) -> bool:
    """Whether evaluation and use begin with the best checkpoint, not the newest: runs with labels, and those that say what is best."""
    return config.objective.name in LABELLED or config.checkpoint.metric != "loss" or config.train.patience > 0


def check(config: Config) -> None:
    """Raises ValueError, one line, for a checkpoint.metric that the run's evaluations do not have."""
    name, metric = config.objective.name, config.checkpoint.metric
    known = list(classification.FIGURES[name] if name in LABELLED else likelihood.UNITS[name])
    if metric not in known:
        guess = difflib.get_close_matches(metric, known, n=1)
        raise ValueError(f"checkpoint.metric={metric!r} is not known for objective.name={name};{f' did you mean {guess[0]!r}?' if guess else ''} "
                         f"known: {', '.join(known)}")


def figure(config: Config, summary: Mapping[str, float] | None) -> float | None:
    """The figure of an evaluation by which checkpoints and runs are compared, `checkpoint.metric`; None for none."""
    value = None if summary is None else summary.get(config.checkpoint.metric)
    return value if value is not None and math.isfinite(value) else None


def lower(config: Config) -> bool:
    """Whether less of `checkpoint.metric` is better."""
    return config.checkpoint.metric in classification.LOWER_IS_BETTER


def cost(config: Config, summary: Mapping[str, float] | None) -> float | None:
    """`figure`, so that less is better."""
    value = figure(config, summary)
    return value if value is None or lower(config) else -value


def figures(config: Config, workdir: pathlib.Path) -> dict[int, float]:
    """step -> `figure` of each evaluation, from the run's own log."""
    key = f"eval/{config.checkpoint.metric}"
    found = {row["step"]: figure(config, {config.checkpoint.metric: row[key]}) for row in report.read_metrics(workdir) if key in row}
    return {step: value for step, value in found.items() if value is not None}


def history(config: Config, workdir: pathlib.Path, step: int) -> list[float]:
    """`cost` of the evaluations up to a step, from the run's own log."""
    return [value if lower(config) else -value for at, value in figures(config, workdir).items() if at <= step]


def exhausted(costs: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` evaluations brought nothing better than those before; never with a patience of 0."""
    return 0 < patience < len(costs) and min(costs[-patience:]) >= min(costs[:-patience])


def ends(config: Config, workdir: pathlib.Path, costs: Sequence[float]) -> bool:
    """Whether train.patience is used up: by the run's own evaluations, or those of a watcher beside it (jaxlm eval --watch). Called together."""
    patience = config.train.patience
    watched = sharding.first(lambda: int(patience > 0 and verdict.exhausted(workdir, patience)))
    return exhausted(costs, patience) or bool(watched)


def step(workdir: pathlib.Path) -> int | None:
    """The saved checkpoint of the least `cost`, of equals the newest, that is whole; None where none was evaluated."""
    costs = {step: checkpoint.loss(workdir, step) for step in checkpoint.steps(workdir)}
    for _, negative in sorted((value, -step) for step, value in costs.items() if value is not None):
        try:
            checkpoint.verify(workdir, -negative)
            return -negative
        except ValueError:
            continue
    return None
