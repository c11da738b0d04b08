"""How healthy a run's steps are: which were skipped, which are spikes, and what lay in their batches."""

import collections
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import metrics as figures
from jaxlm.config import TrainConfig
from jaxlm.data import audit
from jaxlm.data.audit import Occupant
from jaxlm.train import durable, report

FILE = "bad_steps.jsonl"
RECENT = "recent.json"  # of a checkpoint: the figures of the last steps, from which the next ones' limits follow

_WINDOW, _LEAST = 128, 32  # steps that a limit looks back on, and how many it needs
_LAG = 2  # the limits of a step follow from the steps up to the one before the last: while it begins, the last one's figures are still on the device
_LISTED = 200  # documents of a step in bad_steps.jsonl
_NAMED = 4  # in a message


class Diverged(ValueError):
    """Too many bad steps in a row."""


class Recent:
    """Loss and gradient norm of the last steps, and the limits that follow for the next ones.

    A value is a spike when it lies more than `spike` robust deviations above the median of the last 128 values: 1.4826 times the median distance from the
    median, as in Iglewicz & Hoaglin 1993, at least 1 % of the median. (OLMo 2, arXiv:2501.00656, skips by mean and standard deviation of as many steps, which
    one spike moves.) Spikes join the window, so that a level that stays becomes the usual one; what is not finite does not.
    """

    def __init__(self, spike: float, saved: bytes | None = None):
        """`saved`: from `files` of the checkpoint that the run goes on from."""
        self._spike = spike
        self._last: collections.deque[tuple[int, float, float]] = collections.deque(map(tuple, json.loads(saved) if saved else ()), maxlen=_WINDOW + _LAG)

    def add(self, step: int, loss: float, norm: float) -> None:
        """Steps in order, each once."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._last.append((step, loss, norm))

    def limits(self, step: int) -> np.ndarray:
        """The largest mean loss and gradient norm of a step that are no spike: float32 [2], infinite while too little is known."""
        values = np.array([entry[1:] for entry in self._last if entry[0] <= step - _LAG][-_WINDOW:], np.float64).reshape(-1, 2)
        if len(values) < _LEAST or not self._spike:
            return np.full(2, np.inf, np.float32)
        middle = np.median(values, axis=0)
        deviation = np.maximum(1.4826 * np.median(np.abs(values - middle), axis=0), 0.01 * np.abs(middle))
        return (middle + self._spike * deviation).astype(np.float32)

    def files(self) -> dict[str, bytes]:
        """What a checkpoint keeps of it."""
        return {RECENT: json.dumps(list(self._last)).encode()} if self._spike else {}


class Bad(NamedTuple):
    """A step that was skipped, or is a spike."""
    why: str  # "not finite" or "spike"
    skipped: bool
    loss: float
    grad_norm: float
    limits: np.ndarray  # see `Recent.limits`


def judge(step: int, values: Mapping[str, Any], recent: Recent) -> Bad | None:
    """What is wrong with a step; None: nothing. `values` are the step's metrics on the host. Adds them to `recent`."""
    loss, norm, skipped = figures.means(values["sums"])["loss"], float(values["grad_norm"]), bool(values["skipped"])
    limits = recent.limits(step)
    recent.add(step, loss, norm)
    if not skipped and not (loss > limits[0] or norm > limits[1]):
        return None
    return Bad("spike" if math.isfinite(norm) and math.isfinite(loss) else "not finite", skipped, loss, norm, limits)


def skips(cfg: TrainConfig) -> bool:
    """Whether a run skips spikes, so that its step takes limits."""
    return cfg.spike > 0 and cfg.on_spike == "skip"


def on_devices(mesh: Mesh, limits: np.ndarray) -> jax.Array:
    """The same on each device; every process has them."""
    return jax.make_array_from_callback(limits.shape, NamedSharding(mesh, PartitionSpec()), lambda index: limits[index])


class Health:
    """Looks at each step's figures, keeps count of those that are bad, and ends a run that has too many in a row.

    Args:
      workdir: where `bad_steps.jsonl` lies, a line for each bad step; what an interrupted process wrote past step `start` is taken back.
      rows: of one step, the size of the batch.
      occupants: step -> what lay in its batch.
      newest: the newest checkpoint, None for none.
      note: shows a line.
      primary: this process writes.
    """

    def __init__(self, cfg: TrainConfig, workdir: pathlib.Path, start: int, recent: Recent, *, rows: int, occupants: Callable[[int], list[Occupant]],
                 newest: Callable[[], int | None], note: Callable[[str], None], tolerance: durable.Tolerance, primary: bool):
        self.recent, self._cfg, self._workdir, self._rows, self._occupants, self._newest = recent, cfg, workdir, rows, occupants, newest
        self._note, self._tolerance, self._primary, self._in_a_row = note, tolerance, primary, 0
        before = [row for row in report.read_metrics(workdir, FILE) if row["step"] <= start]
        self.skipped, self.spikes = sum(row["skipped"] for row in before), sum(row["why"] == "spike" for row in before)
        if primary:
            report.drop_rows_after(workdir / FILE, start)

    def check(self, step: int, values: Mapping[str, Any]) -> None:
        """Looks at the metrics of one step, on the host.

        Raises:
          Diverged: one line: too many bad steps in a row.
        """
        bad = judge(step, values, self.recent)
        self._in_a_row = self._in_a_row + 1 if bad and bad.skipped else 0
        if not bad:
            return
        self.skipped += bad.skipped
        self.spikes += bad.why == "spike"
        ends = self._in_a_row >= self._cfg.bad_steps
        if not self._primary and not ends:
            return
        found = self._occupants(step)
        if self._primary:
            self._write(step, bad, found)
        where = f"rows {(step - 1) * self._rows} to {step * self._rows - 1} of the token stream"
        held = f"{_named(found)} ({self._workdir / FILE} lists them)"
        replay = f"jaxlm replay --workdir={self._workdir} --step="
        if not ends:
            made = "skipped" if bad.skipped else "made all the same (train.on_spike=warn)"
            return self._note(f"step {step}: {_what(bad)}; the update was {made}; in its rows: {held}; which of them it was: {replay}{step}")
        newest, first = self._newest(), step - self._in_a_row + 1
        raise Diverged(
            f"the loss or gradient was {bad.why.replace('spike', 'a spike')} in {self._in_a_row} steps in a row (train.bad_steps), the first at "
            f"step {first}, the last at step {step}, {where}: {held}; those updates were skipped; {replay}{first} says in which layer and with "
            f"which document it began; try a lower optim.lr or optim.clip; "
            f"{'there is no checkpoint yet' if newest is None else f'the newest checkpoint is step {newest}'}")

    def _write(self, step: int, bad: Bad, found: list[Occupant]) -> None:
        number = lambda value: value if math.isfinite(value) else str(value)
        row = {"step": step, "why": bad.why, "skipped": bad.skipped, "loss": number(bad.loss), "grad_norm": number(bad.grad_norm),
               "rows": [(step - 1) * self._rows, step * self._rows - 1],
               "documents": [{"row": one.row, "source": one.source, "id": one.id} for one in found[:_LISTED]], "more": max(len(found) - _LISTED, 0)}
        with self._tolerance():
            durable.append(self._workdir / FILE, json.dumps(row) + "\n")


def _what(bad: Bad) -> str:
    if bad.why == "not finite":
        return f"loss {bad.loss:.4g} and gradient norm {bad.grad_norm:.4g} are not finite"
    over = [f"{name} {value:.4g}, usual is up to {limit:.4g}" for name, value, limit in
            (("loss", bad.loss, bad.limits[0]), ("gradient norm", bad.grad_norm, bad.limits[1])) if value > limit]
    return f"a spike ({' and '.join(over)}; train.spike)"


def _named(found: list[Occupant]) -> str:
    names = list(dict.fromkeys(map(audit.name, found)))
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more documents" if len(names) > _NAMED else "")

