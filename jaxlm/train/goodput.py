"""Where a run's wall time goes: steps, and all that is not steps, over all its restarts."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxlm.train import report

# Steps; before the first one (corpus, parameters); the compiler; waiting for a batch; saving; evaluating; done and then lost, since the process ended after its
# last checkpoint.
PARTS = ("steps", "start", "compile", "data", "checkpoint", "evaluation", "lost")
NAMES = {"data": "waiting for data", "lost": "lost to restarts"}
_STEPS = 20  # that the speed is a mean of


class Goodput:
    """A clock that always runs for one of PARTS. What passes while no process of the run lives counts for none."""

    def __init__(self):
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "start", time.perf_counter()
        self._steps: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self._last, self._waited, self._worked = self._since, 0.0, 0.0

    def resume(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Goes on from the rows of metrics.jsonl of the processes before; what they did after the checkpoint of `step` is lost."""
        told = [row for row in rows if "time/steps" in row]
        kept = next((row for row in reversed(told) if row["step"] <= step), {})
        for part in PARTS:
            self._seconds[part] += kept.get(f"time/{part}", 0.0)
        if told:
            self._seconds["lost"] += max(0.0, sum(told[-1].get(f"time/{part}", 0.0) - kept.get(f"time/{part}", 0.0) for part in PARTS))

    def begin(self) -> None:
        """From now on it is steps, but for what `spent` says."""
        self._turn("steps")
        self._last = self._since

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """The time of a block is that part's, and none of a step's but for waiting for data."""
        before, start = self._turn(part), self._since
        try:
            yield
        finally:
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

    def finished(self) -> None:
        """A step was done."""
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._worked += now - self._last
        self._last = now

    @property
    def step_seconds(self) -> float:
        """Of one of the last steps, without evaluations and saves."""
        return sum(self._steps) / len(self._steps)

    def wait_share(self) -> float:
        """Share of the steps' time, since it was last asked, that went into waiting for data."""
        share = self._waited / self._worked
        self._waited = self._worked = 0.0
        return share

    def row(self) -> dict[str, float]:
        """`time/PART`, seconds since the run's beginning, and `time/goodput`, the share of steps."""
        self._turn(self._part)
        total = sum(self._seconds.values())
        return {f"time/{part}": seconds for part, seconds in self._seconds.items()} | {"time/goodput": self._seconds["steps"] / total}


def told(row: Mapping[str, float]) -> list[tuple[str, str]]:
    """Of a row with `time/PART`: how long it took and what for, as people read it; [] for a row without."""
    seconds = {part: row.get(f"time/{part}", 0.0) for part in PARTS}
    total = sum(seconds.values())
    parts = ", ".join(f"{NAMES.get(part, part)} {value / total:.1%}" for part, value in seconds.items()) if total else ""
    return [("time", f"{report.duration(total)}: {parts}")] if total else []
