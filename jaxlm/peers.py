"""Whether the other processes of a run are alive. A process that dies, stops or raises would leave the others waiting inside a collective, which nothing
can interrupt from Python; so all say that they live, process 0 looks, and one line says why all end.

It goes over jax's own coordinator, a key-value store in process 0: `jaxlm/alive/I` is written by process I, `jaxlm/verdict/` by whoever knows why the run
must end. jax has a heartbeat too, but what it finds ends a process inside C++ with a page of text, as SIGABRT; it is told to wait longer than we do.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

AGAIN = 75  # a launcher may start all processes again (EX_TEMPFAIL)
_ALIVE, _VERDICT = "jaxlm/alive/", "jaxlm/verdict/"
_BEATS = 5  # of each process in the time after which it counts as missing
# What the errors of jax begin with that a missing peer may cause, as well as other things.
_STATUS = re.compile(r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION)\b")

_current: "Peers | None" = None


@contextlib.contextmanager
def joined(seconds: float, is_mistake: Callable[[BaseException], bool]) -> Iterator[None]:
    """Around the work that the processes of a run do together; nothing happens in a run of one process.

    Args:
      seconds: after which a process that says nothing is missing.
      is_mistake: whether an error is the user's: this process then ends with code 2 instead of 1.

    While it lasts, a process that not heard of for `seconds`, or has raised, ends all others: one line on stderr, exit code 75. An error that looks
    as if another process had caused it is held back until that is known. Leaving in order waits until all others leave or are missing.
    """
    global _current
    if jax.process_count() == 1:
        yield
        return
    _current = peers = Peers(seconds, is_mistake)
    try:
        yield
    except BaseException as error:
        peers.failed(error)
        raise
    else:
        peers.leave()
    finally:
        _current = None


def worked() -> None:
    """This process has come a bit further: a batch, a step, its part of what all do."""
    if _current is not None:
        _current.steps += 1


def end(line: str) -> None:
    """Ends a process that is stuck with code 75: the stacks of its threads, then one line. In a run of several the line also says which process is behind,
    and all others end in the same way."""
    if _current is not None:
        _current.end(line)
    faulthandler.dump_traceback(all_threads=True)
    print(f"jaxlm: {line}; its stacks are above, it ends with code {AGAIN}", file=sys.stderr, flush=True)
    os._exit(AGAIN)


class Peers:
    """The heartbeat of this process, and the eyes on the others: see `joined`."""

    def __init__(self, seconds: float, is_mistake: Callable[[BaseException], bool]):
        from jax._src import distributed  # jax has no public name for it; Orbax takes it from here too
        self.steps, self._is_mistake = 0, is_mistake
        self._client, self._address = distributed.global_state.client, distributed.global_state.coordinator_address
        self._index, self._count, self._seconds = jax.process_index(), jax.process_count(), seconds
        self._who = {"host": socket.gethostname(), "pid": os.getpid()}
        self._done = self._settled = False  # this process has done its work; it ends by itself whatever others say
        self._beats, self._period = 0, min(1.0, seconds / _BEATS)
        self._first = ""
        self._answered = time.monotonic()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._turn_aborts()
        for work in (self._live, self._watch):
            threading.Thread(target=work, daemon=True, name=f"peers{work.__name__}").start()

    # --- what other threads ask ---

    def end(self, line: str) -> None:
        """`end` of this module, in a run of several."""
        self._settled = True
        why = f"{line}{self._behind()}"
        self._condemn(why, stacks=True)
        self._finish(why, stacks=True)

    def failed(self, error: BaseException) -> None:
        """After an error in this process: tells the others, unless one of them caused it, and leaves jax's end of the world out."""
        if _may_be_a_peers(error):
            self._ended.wait(self._seconds + 6 * self._period)  # a thread that learns the cause ends the process
        self._settled = True
        text = " ".join(str(error).split())[:300]
        self._condemn(f"{self._name(self._index, self._who)} failed: {type(error).__name__}{': ' * bool(text)}{text}")
        code = error.code if isinstance(error, SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else 2 if self._is_mistake(error) else 1
        atexit.register(self._depart, code if isinstance(code, int) else 1)

    def leave(self) -> None:
        """Waits for the others, watching them, so that none is left behind in jax's own farewell."""
        self._done = True
        self._ended.wait()
        self._libc.signal(signal.SIGABRT, ctypes.c_void_p(0))

    # --- threads ---

    def _live(self) -> None:
        """Says that this process lives, and hears whether all should end. In process 0 also looks at the others."""
        ages = dict.fromkeys(range(self._count), 0.0)
        seen: dict[int, Any] = {}
        last = time.monotonic()
        while not self._ended.is_set():
            try:
                self._beats += 1
                done, row = self._done, {"beat": self._beats, "steps": self.steps, **self._who}
                self._client.key_value_set(f"{_ALIVE}{self._index}", json.dumps({**row, "done": done}), allow_overwrite=True)
                verdict = dict(self._client.key_value_dir_get(_VERDICT))
                rows = self._rows() if self._index == 0 or not self._first else {}
            except Exception:
                if self._done:  # process 0 has left, as it may
                    return self._ended.set()
                self._lost_coordinator("has ended")
                return None
            now = time.monotonic()
            self._answered, elapsed, last = now, now - last, now
            if 0 in rows:
                self._first = self._name(0, rows[0])
            if verdict:
                return self._obey(**json.loads(next(iter(verdict.values()))))
            if self._index == 0:
                # Time in which this process did not run, stopped or starved, is not held against the others.
                self._judge(rows, seen, ages, min(elapsed, 2 * self._period))
            time.sleep(self._period)
        return None

    def _judge(self, rows: dict[int, dict], seen: dict[int, Any], ages: dict[int, float], elapsed: float) -> None:
        for index in range(1, self._count):
            row = rows.get(index, {})
            fresh = row.get("beat") != seen.get(index) or row.get("done")
            ages[index], seen[index] = 0.0 if fresh else ages[index] + elapsed, row.get("beat")
        missing = [index for index in range(1, self._count) if ages[index] > self._seconds]
        if missing:
            names = ", ".join(self._name(index, rows.get(index, {})) for index in missing)
            self._condemn(f"{names}: not heard of for {self._seconds:g} s (train.peer_seconds)")
        elif self._done and all(rows.get(index, {}).get("done") for index in range(1, self._count)):
            self._condemn("")

    def _obey(self, why: str, stacks: bool) -> None:
        if not why:  # all have done their work
            return self._ended.set()
        time.sleep(self._period)  # what ended the other one may come to this one too
        if not self._settled:
            self._finish(why, stacks)
        return None

    def _watch(self) -> None:
        """Process 0 may be stopped: the store then says nothing, not even no."""
        waited, last = 0.0, time.monotonic()
        while not self._ended.wait(self._period):
            now = time.monotonic()
            waited = 0.0 if self._answered >= last else waited + min(now - last, 2 * self._period)
            last = now
            if waited > self._seconds:
                self._lost_coordinator(f"not heard of for {self._seconds:g} s (train.peer_seconds)")

    # --- ends ---

    def _condemn(self, why: str, stacks: bool = False) -> None:
        """Tells the others why all must end ("": because all have done their work); who says it first is believed."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_VERDICT}why", json.dumps({"why": why, "stacks": stacks}))

    def _finish(self, why: str, stacks: bool = False) -> None:
        with self._lock:
            if stacks:
                faulthandler.dump_traceback(all_threads=True)
            print(f"jaxlm: {why}; {self._name(self._index, self._who)} ends with code {AGAIN}: start all again, they go on from the last checkpoint",
                  file=sys.stderr, flush=True)
            self._linger()
            os._exit(AGAIN)

    def _linger(self) -> None:
        """What process 0 does before it ends: with it goes the store that the others read."""
        if self._index == 0:
            time.sleep(max(2.0, 3 * self._period))

    def _lost_coordinator(self, how: str) -> None:
        self._finish(f"{self._first or self._name(0, {})}, the coordinator at {self._address}: {how}")

    def _depart(self, code: int) -> None:
        """At the end of a failed process, before jax would wait minutes for the others to come to the same end."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._linger()
        os._exit(code)

    def _turn_aborts(self) -> None:
        """Where process 0 is gone jax's C++ threads may see it first: they abort. That too ends with the line and the code, if the coordinator is gone."""
        def aborted(number: int) -> None:
            if not self._coordinator_answers():
                self._lost_coordinator("has ended")
            self._libc.signal(signal.SIGABRT, ctypes.c_void_p(0))  # the default: any other abort is what it was

        self._libc, self._handler = ctypes.CDLL(None), ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
        self._libc.signal(signal.SIGABRT, self._handler)

    def _coordinator_answers(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return True
        except OSError:
            return False

    # --- words ---

    def _behind(self) -> str:
        """"; behind: process 1 of 4": those that have done least, when not all have done the same."""
        with contextlib.suppress(Exception):
            rows = self._rows()
            least = min(row["steps"] for row in rows.values())
            late = [self._name(index, row) for index, row in sorted(rows.items()) if row["steps"] == least]
            return f"; behind: {', '.join(late)}" if len(late) < len(rows) else ""
        return ""

    def _rows(self) -> dict[int, dict]:
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in self._client.key_value_dir_get(_ALIVE)}

    def _name(self, index: int, row: dict) -> str:
        where = f" (host {row['host']}, pid {row['pid']})" if row else ""
        return f"process {index} of {self._count}{where}"


def _may_be_a_peers(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is a status from jax's runtime: what a broken collective gives in the processes that are left."""
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.search(str(error)[:200]):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
