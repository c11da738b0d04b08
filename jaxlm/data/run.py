"""Work over many processes of one machine: tasks in, one finished file each out; progress; what a user did wrong, through the pool unharmed."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

_SECONDS = 5.0  # between two lines of progress
_WAITING = 2  # tasks in flight for each worker: so much text lies in memory


class Work(NamedTuple):
    """One stage: `function` on every task that `expand` makes of every unit. All are pickled; results are files that `function` writes."""

    verb: str  # "cleaned": what progress says
    folder: Path  # where the files go, which all workers see
    units: list[Any]
    expand: Callable[[Any], Iterable[Any]]
    function: Callable[[Any], tuple[int, int]]  # task -> documents and bytes of text that were dealt with
    size: Callable[[Any], int]  # bytes of a unit, for the time left
    reading: Callable[[Any], Iterable[str]] = lambda unit: ()  # files that `expand` may have open


Runner = Callable[[Work, Callable[[str], None]], None]


@contextlib.contextmanager
def local(workers: int) -> Iterator[Runner]:
    """A runner: tasks are made in this process and done by `workers` others, or by this one if that is 1.

    Memory is bounded: at most 2 tasks for each worker exist at a time. Workers end with this process, however it ends.
    """
    if workers == 1:
        yield _here
        return
    # Spawned, not forked: the parent may have threads (jax). The workers are started with the first tasks and serve all stages.
    pool = futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_live_with_parent)
    try:
        yield functools.partial(_in_pool, pool, workers)
    except BrokenProcessPool:
        raise RuntimeError(f"a worker process ended without a word, most likely for lack of memory ({workers} workers): run the same command again, it goes "
                           "on from here; fewer workers (config.data.workers) need less") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _here(work: Work, log: Callable[[str], None]) -> None:
    progress = _Progress(work, log)
    for task in progress.tasks():
        progress.add(*work.function(task))


def _in_pool(pool: futures.Executor, workers: int, work: Work, log: Callable[[str], None]) -> None:
    progress = _Progress(work, log)
    waiting: set[futures.Future] = set()

    def take(most: int) -> None:
        """Waits until at most so many tasks are in flight."""
        nonlocal waiting
        while len(waiting) > most:
            done, waiting = futures.wait(waiting, return_when=futures.FIRST_COMPLETED)
            for future in done:
                documents, size, mistake = future.result()
                if mistake is not None:
                    raise mistake
                progress.add(documents, size)

    for task in progress.tasks():
        take(_WAITING * workers - 1)
        waiting.add(pool.submit(_guarded, work.function, task))
    take(0)


def _guarded(function: Callable[[Any], tuple[int, int]], task: Any) -> tuple[int, int, Exception | None]:
    try:
        return *function(task), None
    except (ValueError, OSError) as error:
        if not is_mistake(error):
            raise
        return 0, 0, (OSError if isinstance(error, OSError) else ValueError)(str(error))


def is_mistake(error: BaseException) -> bool:
    """Whether an error tells the user what to change: the system's, or a ValueError that jaxlm itself raised; any other is our fault."""
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = bool(frames) and Path(frames[-1][0].f_code.co_filename).is_relative_to(Path(__file__).parents[1])
    return isinstance(error, OSError) or isinstance(error, ValueError) and ours


def _live_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends the work in order
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: connection.wait([sentinel]) and os._exit(1), daemon=True).start()


class _Progress:
    """Counts what is done and says so every few seconds."""

    def __init__(self, work: Work, log: Callable[[str], None]):
        self._work, self._log = work, log
        self._documents = self._bytes = self._read = self._position = 0
        self._unit = None
        self._total = sum(map(work.size, work.units))
        self._started = self._shown = time.monotonic()

    def tasks(self) -> Iterator[Any]:
        for unit in self._work.units:
            self._unit = unit
            yield from self._work.expand(unit)
            self._read += self._work.size(unit)
        self._unit = None

    def add(self, documents: int, size: int) -> None:
        self._documents += documents
        self._bytes += size
        now = time.monotonic()
        if now - self._shown >= _SECONDS:
            seconds, self._shown = now - self._started, now
            self._position = max(self._position, self._read + (_position(list(self._work.reading(self._unit))) if self._unit is not None else 0))
            read = self._position
            left = f", {read / self._total:.0%}, {_duration(seconds * (self._total - read) / read)} left" if 0 < read < self._total else ""
            self._log(f"{self._work.verb} {self._documents:,} documents, {self._bytes / 1e6:,.1f} MB "
                      f"({self._documents / seconds:,.0f} documents/s, {self._bytes / seconds / 1e6:.1f} MB/s{left})")


def _position(paths: list[str]) -> int:
    """How far this process has read files that it opens one after the other, in bytes, as Linux knows; 0 elsewhere, and between two files."""
    opened = {}
    with contextlib.suppress(OSError):
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                opened[os.readlink(f"/proc/self/fd/{descriptor}")] = descriptor
    for number, path in reversed(list(enumerate(paths))):
        with contextlib.suppress(OSError):
            if descriptor := opened.get(os.path.realpath(path)):
                with open(f"/proc/self/fdinfo/{descriptor}") as info:
                    return int(info.readline().split()[1]) + sum(os.path.getsize(before) for before in paths[:number] if os.path.exists(before))
    return 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
