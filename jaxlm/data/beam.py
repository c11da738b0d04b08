"""The stages of preparation as Apache Beam pipelines: the same functions on another runner's workers. Home of apache_beam.

Workers and the driver must see the folder of the corpus and the sources under the same paths (a network file system; with Dataflow, Spark and
Flink a mounted bucket), and have jaxlm installed. The driver de-duplicates and writes the shards; everything that touches text runs on workers.
"""

import contextlib
import functools
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.data import run

RUNNERS = ("DirectRunner", "DataflowRunner", "SparkRunner", "FlinkRunner")


def runner(name: str, options: str = "") -> run.Runner:
    """A runner of `RUNNERS`.

    Args:
      name: of the runner.
      options: further options of the pipeline, as on a command line: "--project=p --region=r --temp_location=gs://b/t".

    Raises:
      ValueError: no such runner, or Beam is not installed.
    """
    if name not in RUNNERS:
        raise ValueError(f"--runner={name} is not known; allowed: {', '.join(RUNNERS)}, or none for the processes of this machine")
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ValueError(f"--runner={name} needs Apache Beam: pip install 'jaxlm[beam]'") from None

    def go(work: run.Work, log: Callable[[str], None]) -> None:
        note = work.folder / "mistake.txt"
        note.unlink(missing_ok=True)
        log(f"{name}: {len(work.units):,} units to be {work.verb}")
        try:
            with apache_beam.Pipeline(options=PipelineOptions([f"--runner={name}", *shlex.split(options)])) as pipeline:
                units = pipeline | "units" >> apache_beam.Create(work.units) | "spread units" >> apache_beam.Reshuffle()
                tasks = units | "tasks" >> apache_beam.FlatMap(functools.partial(_expand, work.expand, note)) | "spread tasks" >> apache_beam.Reshuffle()
                tasks | work.verb >> apache_beam.Map(functools.partial(_call, work.function, note))
        except Exception:  # each runner wraps a worker's exception in one of its own
            if note.exists():
                raise ValueError(note.read_text(encoding="utf-8")) from None
            raise

    return go


def _expand(expand: Callable[[Any], Iterator[Any]], note: Path, unit: Any) -> Iterator[Any]:
    with _noted(note):
        yield from expand(unit)


def _call(function: Callable[[Any], Any], note: Path, task: Any) -> Any:
    with _noted(note):
        return function(task)


@contextlib.contextmanager
def _noted(note: Path) -> Iterator[None]:
    """What the user did wrong is told to the driver in a file."""
    try:
        yield
    except (ValueError, OSError) as error:
        if run.is_mistake(error):
            note.write_text(str(error), encoding="utf-8")
        raise
