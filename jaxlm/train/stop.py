"""How a run ends early: signals that ask for a last checkpoint, and a watchdog for a run that no longer moves."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from jaxlm import peers


_LEAVE = 5.0  # seconds that a process has to end in order when there is nothing to save


_abandoned: list[object] = []


def abandon(reader: object) -> None:
    """Keeps an iterator whose threads may hang for as long as the process lives: closing it, as its last reference would, waits for them."""
    _abandoned.append(reader)


def depart(code: int) -> int:
    """What a finished or stopped run does last, when all is saved: from here on nothing keeps the process from ending with `code`, neither a second notice
    of a preemption nor a thread that waits for a disk that hangs. In a process that goes on, as a notebook does, nothing happens."""
    ends = threading.Event()

    def wait() -> None:
        ends.wait()
        time.sleep(_LEAVE)
        os._exit(code)

    threading._register_atexit(ends.set)  # not atexit: the interpreter waits for the threads of pools before it comes to those
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True, name="depart").start()
    return code


class Stopped(Exception):
    """The run was asked to end while it waited for something that may never come."""


class StopRequest:
    """Whether someone asked the run to end: SIGTERM (a TPU preemption notice) or Ctrl-C; a second Ctrl-C leaves at once.

    Until `arm` is called nothing is worth saving and a signal simply ends the process, within 5 seconds even from inside a compile.
    """

    def __init__(self):
        self.signal: int | None = None
        self._armed = self._agreed = self._waits = False
        self._alone, self._wakes = jax.process_count() == 1, None
        signal.signal(signal.SIGINT, self._handle)
        if self._alone:  # with several processes jax owns SIGTERM: it makes all of them stop at one step
            signal.signal(signal.SIGTERM, self._handle)
            self._leave_compiles()

    def arm(self) -> None:
        """From now on a signal is a request that the loop will see."""
        self._armed = True
        self.close()

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Signals no longer end the process from inside a compile."""
        if self._wakes is not None:
            signal.set_wakeup_fd(self._wakes)
            os.close(self._write)  # and with it ends the thread
            self._wakes = None

    def _handle(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(130)
        self.signal = number
        if not self._armed:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
        if self._waits:
            raise Stopped
        os.write(sys.stderr.fileno(), b"\nstopping after this step, with a checkpoint; Ctrl-C again leaves at once\n")

    def _leave_compiles(self) -> None:
        """Python runs a handler between two of its own instructions, which a compile may keep from coming for minutes; the byte below comes at once."""
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakes = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

        def leave() -> None:
            while number := os.read(read, 1):  # until `close`
                if number[0] in (signal.SIGTERM, signal.SIGINT):
                    time.sleep(_LEAVE)
                    if self._wakes is not None:
                        os._exit(0 if number[0] == signal.SIGTERM else 130)
            os.close(read)

        threading.Thread(target=leave, daemon=True, name="signals").start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait that has no end of its own: a request to stop, also one that came before, ends it.

        Raises:
          Stopped: in a run of one process.
        """
        self._waits = self._alone
        try:
            if self.now():
                raise Stopped
            yield
        finally:
            self._waits = False

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
        peers.worked()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                peers.end(f"nothing finished for {self._seconds:g} s (train.watchdog_seconds)")
