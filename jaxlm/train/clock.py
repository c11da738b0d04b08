"""Where a run's wall time goes, over all its restarts, time per step, and a word when the data is slow. By a clock that never jumps."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxlm.train import report

# Steps; before the first one (corpus, parameters); the compiler; waiting for a batch; saving; evaluating; done and then lost, since the process ended after its
# last checkpoint.
PARTS = {"steps": "steps", "start": "start", "compile": "compile", "data": "waiting for data", "checkpoint": "checkpoints", "evaluation": "evaluation",
         "lost": "lost to restarts"}

_SLOW_SECONDS = 60.0  # without a batch, after which a line says so
_SLOW_SHARE = 1 / 3  # of the time between two lines of the log
_ENOUGH = 20  # steps before a share says something


class Clock:
    """Always runs for one of PARTS. What passes while no process of the run lives counts for none.

    Args:
      note: shows a line.
    """

    def __init__(self, note: Callable[[str], None] = print):
        self._note, self._where, self._told, self._waits = note, "", False, None
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "start", time.perf_counter()
        self._steps: collections.deque[float] = collections.deque(maxlen=20)
        self._last, self._waited, self._worked, self._count = self._since, 0.0, 0.0, 0
        self._ended = threading.Event()

    def __enter__(self) -> "Clock":
        threading.Thread(target=self._watch, daemon=True, name="slow data").start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def resume(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Goes on from the rows of metrics.jsonl of the processes before; what they did after the checkpoint of `step` is lost."""
        told = [row for row in rows if "time/steps" in row]
        kept = next((row for row in reversed(told) if row["step"] <= step), {})
        for part in PARTS:
            self._seconds[part] += kept.get(f"time/{part}", 0.0)
        if told:
            self._seconds["lost"] += max(0.0, sum(told[-1].get(f"time/{part}", 0.0) - kept.get(f"time/{part}", 0.0) for part in PARTS))

    def begin(self, where: str = "") -> None:
        """From now on it is steps, but for what `spent` says. `where`: what the data is read from, for the line about slow data."""
        self._where = where
        self._turn("steps")
        self._last = self._since

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """The time of a block is that part's, and none of a step's but for waiting for data."""
        before, start = self._turn(part), self._since
        self._waits = start if part == "data" else None
        try:
            yield
        finally:
            self._waits = None
            self._turn(before)
            if part == "data":
                self._waited += self._since - start
            else:
                self._last = self._since

    def _turn(self, part: str) -> str:
        now, before = time.perf_counter(), self._part
        self._seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def row(self) -> dict[str, float]:
        """`time/PART`, seconds since the run's beginning, and `time/goodput`, the share of steps."""
        self._turn(self._part)
        total = sum(self._seconds.values())
        return {f"time/{part}": seconds for part, seconds in self._seconds.items()} | {"time/goodput": self._seconds["steps"] / total}

    @property
    def step_seconds(self) -> float:
        """Mean of the last 20 steps, without evaluations and saves."""
        return sum(self._steps) / len(self._steps)

    def finished(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._worked += now - self._last
        self._last = now
        self._count += 1

    def wait_share(self) -> float:
        """Share of the steps' time, since it was last asked, that waited for data. The first time that it is long, a line says what to do."""
        share, enough = self._waited / self._worked, self._count >= _ENOUGH
        self._waited = self._worked = 0.0
        if enough and share > _SLOW_SHARE and not self._told:
            self._told = True
            self._note(f"warning: the devices waited {share:.0%} of the time for data from {self._where} (perf/data_wait): try a larger data.threads or "
                       "data.prefetch, or copy the corpus to a disk of this machine")
        return share

    def _watch(self) -> None:
        told = None
        while not self._ended.wait(min(5.0, _SLOW_SECONDS / 4)):
            since = self._waits
            if since is not None and since != told and time.perf_counter() - since > _SLOW_SECONDS:
                told = since
                self._note(f"warning: no batch for {_SLOW_SECONDS:g} s: does {self._where} answer? train.watchdog_seconds says when the run ends")


def told(row: Mapping[str, float]) -> list[tuple[str, str]]:
    """Of a row with `time/PART`: how long it took and what for, as people read it; [] for a row without."""
    seconds = {part: row.get(f"time/{part}", 0.0) for part in PARTS}
    total = sum(seconds.values())
    parts = ", ".join(f"{PARTS[part]} {value / total:.1%}" for part, value in seconds.items()) if total else ""
    return [("time", f"{report.duration(total)}: {parts}")] if total else []
