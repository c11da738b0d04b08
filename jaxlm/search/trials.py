"""The trials that this process does: each is a run in a workdir of its own, on a corpus that all share."""

import contextlib
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.search import space as spaces
from jaxlm.search import study as studies
from jaxlm.search.space import Space
from jaxlm.search.study import Study, Taken
from jaxlm.train import best, health, loop

FAILURES = 3  # trials in a row that may fail before a search gives up


def run(study: Study, sampler: str, pruner: str, trials: int, seed: int, note: Callable[[str], None]) -> int:
    """Takes trials and does them until there are no more, or a signal asks to stop; the trial is then left to whoever goes on.

    Returns:
      The exit code: 0, or 130 after Ctrl-C.

    Raises:
      ValueError, OSError: one line: what keeps all trials from running.
    """
    with studies.holding(study.lock):
        prepare(study.config, study.space, study.folder, note)
    failures = 0
    while (taken := studies.take(study, sampler, pruner, trials, seed)) is not None:
        number = taken.number
        again = f"  (again: process {taken.attempt - 1} ended over it)" if taken.attempt > 1 else "  (goes on)" if best.figures(
            study.config, studies.workdir(study, number)) else ""
        note(f"trial {number}  {describe(study, taken.values)}{again}")
        try:
            code, word = _one(study, taken)
        except (KeyboardInterrupt, SystemExit):  # before the run's first step
            studies.leave(taken)
            raise
        finally:
            taken.lock.__exit__()
            jax.clear_caches()
        if word is None:
            studies.leave(taken)
            note(f"trial {number}  stopped with a checkpoint; the same command goes on with it")
            return code
        note(f"trial {number}  {word}")
        failures = failures + 1 if word.startswith("failed") else 0
        if failures >= FAILURES and not any(row.state == "complete" for row in studies.rows(study)):
            raise ValueError(f"{FAILURES} trials in a row failed and none was complete; the last: {word.removeprefix('failed: ')}")
    return 0


def prepare(config: Config, space: Space, folder: pathlib.Path, note: Callable[[str], None]) -> None:
    """Prepares what all trials of a search in `folder` learn from, where they share it.

    Raises:
      ValueError, OSError: one line: no corpus, or none to compare trials on.
    """
    if spaces.shares_corpus(space):
        config = studies.trial_config(config, space, folder, {})
        corpus = loop.open_corpus(config, pathlib.Path(config.data.dir), note)
        if not len(corpus.splits["validation"].tokens):
            raise ValueError("trials are compared on the validation split, and there is none: set data.validation, such as --config.data.validation=0.05")


def describe(study: Study, values: dict[str, Any]) -> str:
    """A trial's values on one line."""
    return "  ".join(f"{key}={study.space[key].text(value) if isinstance(value, str) else short(study, key, value)}" for key, value in values.items())


def short(study: Study, key: str, value: Any) -> str:
    """A value as people read it: numbers of a range in four digits."""
    given = study.space[key]
    return given.text(value) if isinstance(given, spaces.Choice) or given.whole else given.text(float(f"{value:.4g}"))


def result(config: Config, workdir: pathlib.Path) -> float | None:
    """The figure of a finished run, from its log: of its best evaluation where the run ends with its best checkpoint, else of the last."""
    figures = list(best.figures(config, workdir).values())
    choose = (min if best.lower(config) else max) if best.chooses(config) else lambda found: found[-1]
    return choose(figures) if figures else None


def _one(study: Study, taken: Taken) -> tuple[int, str | None]:
    """Does a trial; returns the run's exit code and how the trial ended, None where it did not."""
    number, metric = taken.number, study.config.checkpoint.metric
    workdir, ended = studies.workdir(study, number), []

    def judge(step: int, figure: float | None) -> bool:
        curve = [value for at, value in best.figures(config, workdir).items() if at <= step]
        if figure is None or studies.judge(study, taken, curve):
            ended.append(f"not finite at step {step}" if figure is None else f"{metric} {figure:.4f} at step {step}")
        return bool(ended)

    try:
        config = studies.trial_config(*study[:3], taken.values)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.py").write_text(configs.to_recipe(config, f"Trial {number} of {study.folder}: {describe(study, taken.values)}"), encoding="utf-8")
        with open(workdir / "log.txt", "a", encoding="utf-8") as file, contextlib.redirect_stdout(file), _signals():
            code = loop.run(config, workdir, judge)
    except health.Diverged as error:
        studies.finish(study, taken, pruned=True, note=f"not finite: {error}")
        return 0, f"ends early: {error}"
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, ValueError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error) if isinstance(error, ValueError) else f"out of memory ({str(error).splitlines()[0][:200]})"
        studies.finish(study, taken, note=line)
        return 0, f"failed: {line}"
    figure = result(config, workdir)
    if (workdir / "FINISHED").exists() and figure is not None:
        studies.finish(study, taken, figure=figure)
        first = studies.best_row(study, studies.rows(study)).number == number
        return code, f"{metric} {figure:.4f}" + " (the best so far)" * first
    if ended:
        studies.finish(study, taken, pruned=True, note=ended[-1])
        return code, f"ends early: {ended[-1]}"
    return code, None


@contextlib.contextmanager
def _signals():
    """A run handles Ctrl-C and SIGTERM as requests to save; between runs they end the process as always."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
