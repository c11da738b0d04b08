"""Time per step, the share of it that the devices waited for data, and a word when that is long. By a clock that never jumps."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_SLOW_SECONDS = 60.0  # without a batch, after which a line says so
_SLOW_SHARE = 1 / 3  # of the time between two lines of the log
_ENOUGH = 20  # steps before a share says something


class Clock:
    """Time per step without evaluations and saves.

    Args:
      note: shows a line.
      where: what the data is read from, for that line.
    """

    def __init__(self, note: Callable[[str], None] = print, where: str = ""):
        self._note, self._where, self._told, self._since = note, where, False, None
        self._steps: collections.deque[float] = collections.deque(maxlen=20)
        self._last, self._waited, self._worked, self._count = time.perf_counter(), 0.0, 0.0, 0
        self._ended = threading.Event()

    def __enter__(self) -> "Clock":
        threading.Thread(target=self._watch, daemon=True, name="slow data").start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    @property
    def step_seconds(self) -> float:
        """Mean of the last 20 steps."""
        return sum(self._steps) / len(self._steps)

    def finished(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._worked += now - self._last
        self._last = now
        self._count += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for a batch."""
        self._since = start = time.perf_counter()
        yield
        self._since = None
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step."""
        yield
        self._last = time.perf_counter()

    def wait_share(self) -> float:
        """Of the time since it was last asked. The first time that it is long, a line says what to do."""
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
            since = self._since
            if since is not None and since != told and time.perf_counter() - since > _SLOW_SECONDS:
                told = since
                self._note(f"warning: no batch for {_SLOW_SECONDS:g} s: does {self._where} answer? train.watchdog_seconds says when the run ends")
