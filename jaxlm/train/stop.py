"""How a run ends early: signals that ask for a last checkpoint, and a watchdog for a run that no longer moves."""

import faulthandler
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether someone asked the run to end: SIGTERM (a TPU preemption notice) or Ctrl-C; a second Ctrl-C leaves at once.

    Until `arm` is called nothing is worth saving and a signal simply ends the process.
    """

    def __init__(self):
        self.signal: int | None = None
        self._armed = self._agreed = False
        self._alone = jax.process_count() == 1
        signal.signal(signal.SIGINT, self._handle)
        if self._alone:  # with several processes jax owns SIGTERM: it makes all of them stop at one step
            signal.signal(signal.SIGTERM, self._handle)

    def arm(self) -> None:
        """From now on a signal is a request that the loop will see."""
        self._armed = True

    def _handle(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(130)
        self.signal = number
        if not self._armed:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
        os.write(sys.stderr.fileno(), b"\nstopping after this step, with a checkpoint; Ctrl-C again leaves at once\n")

    def now(self) -> bool:
        """Whether this process was asked; for places that other processes do not share."""
        return self._alone and self.signal is not None

    def at(self, step: int) -> bool:
        """Whether all processes stop after this step: each must ask at each step. Latched, since jax says it once only."""
        if self._alone:
            return self.signal is not None
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(step)
        return self._agreed

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, else 0: a preempted run has done as it was told."""
        return 130 if self.signal == signal.SIGINT else 0


class Watchdog:
    """Ends the process with code 75 (a launcher may try again) and all stacks on stderr when nothing has beaten for `seconds`.

    A process that hangs in a collective cannot be interrupted from Python, and its peers hang with it; a thread can still leave.
    """

    def __init__(self, seconds: float):
        self._seconds, self._last, self._ended = seconds, time.monotonic(), threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """Says that a step was done."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                print(f"\njaxlm: nothing finished for {self._seconds:g} s (train.watchdog_seconds), the process ends with code 75; its stacks:",
                      file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(75)
