"""The rows of metrics.jsonl for Weights & Biases, MLflow and trackio too, each by its own package and settings (WANDB_MODE, MLFLOW_TRACKING_URI, ...)."""

import json
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.train import durable

FILE = "writers.json"  # of a workdir: writer -> the run's id there, so that a resumed run goes on in it
_PROJECT = "jaxlm"


class Writer(NamedTuple):
    """One of them."""
    scalars: Callable[[int, dict[str, float]], Any]  # step, figures
    close: Callable[[], Any]


def _wandb(workdir: pathlib.Path, config: Mapping[str, Any], ident: str) -> tuple[Writer, str]:
    import wandb
    ident = ident or uuid.uuid4().hex[:16]
    run = wandb.init(project=_PROJECT, name=workdir.name, id=ident, resume="allow", dir=str(workdir), config=dict(config))
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # its own count never goes back; that of a resumed run does
    return Writer(lambda step, values: run.log({"step": step, **values}), run.finish), ident


def _mlflow(workdir: pathlib.Path, config: Mapping[str, Any], ident: str) -> tuple[Writer, str]:
    import mlflow
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow 3.17 wants to hear; a database needs more packages
        mlflow.set_tracking_uri((workdir / "mlruns").as_uri())
    mlflow.set_experiment(_PROJECT)
    run = mlflow.start_run(run_id=ident or None, run_name=None if ident else workdir.name)
    mlflow.log_dict(dict(config), "config.json")
    return Writer(lambda step, values: mlflow.log_metrics(values, step=step), mlflow.end_run), run.info.run_id


def _trackio(workdir: pathlib.Path, config: Mapping[str, Any], ident: str) -> tuple[Writer, str]:
    import trackio
    ident = ident or f"{workdir.name}-{uuid.uuid4().hex[:6]}"
    trackio.init(project=_PROJECT, name=ident, resume="allow", config=dict(config))
    return Writer(lambda step, values: trackio.log(values, step=step), trackio.finish), ident


_MAKE = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


def check(names: Sequence[str]) -> None:
    """Raises ValueError, one line, for a package that is not here."""
    for name in names:
        try:
            __import__(name)
        except ImportError as error:
            raise ValueError(f"train.writers={name} needs a package that is not here: pip install 'jaxlm[{name}]'") from error


class Writers:
    """All that `train.writers` names; one that fails is left out from then on, with a line.

    Args:
      config: the run's, by part and key.
      note: shows a line.
    """

    def __init__(self, names: Sequence[str], workdir: pathlib.Path, config: Mapping[str, Any], note: Callable[[str], None]):
        self._note, self._writers = note, {}
        workdir, path = workdir.resolve(), workdir / FILE
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in names:
            try:
                self._writers[name], known[name] = _MAKE[name](workdir, config, known.get(name, ""))
            except Exception as error:  # its network, account or disk, not ours
                self._failed(name, error)
        if names:
            durable.rewrite(path, json.dumps(known) + "\n")

    def _failed(self, name: str, error: Exception) -> None:
        self._note(f"warning: {name} is left out: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        for name, writer in list(self._writers.items()):
            try:
                writer.scalars(step, dict(values))
            except Exception as error:
                del self._writers[name]
                self._failed(name, error)

    def close(self) -> None:
        """Says that the process ends."""
        for name, writer in self._writers.items():
            try:
                writer.close()
            except Exception as error:
                self._failed(name, error)
