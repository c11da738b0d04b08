"""The log of evaluations, and following a run that is still writing checkpoints."""

import fcntl
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Opened = TypeVar("Opened")


def follow(look: Callable[[set[int]], tuple[int | None, bool]], open_step: Callable[[int], Opened], evaluate: Callable[[Opened], None], *,
           done: set[int], mark: Callable[[int], str | None], interval: float, sleep: Callable[[float], None] = time.sleep,
           log: Callable[[str], None] = print) -> int:
    """Evaluates each checkpoint once, as it appears, until the run has ended and nothing is left. No clock is read: steps and what is there decide.

    Args:
      look: given the steps that are done, the next one, if any, and whether the run had ended before it looked.
      open_step: reads a checkpoint. It may fail: a run deletes old ones, and files get damaged. That is said, and the next one follows.
      evaluate: what to do with one; its errors end the watch.
      done: steps not to be evaluated.
      mark: which checkpoint of a step is saved, for a run that comes back to a step saves another one; None: none is.
      interval: seconds between two looks.

    Returns:
      The number of damaged checkpoints that were passed over.
    """
    done, damaged, waiting, gone = set(done), {}, False, None
    while True:
        bad = {step for step, seen in damaged.items() if mark(step) == seen}
        step, ended = look(done | bad)
        if step is None:
            if ended:
                return len(bad)
            if not waiting:
                log("waiting for the next checkpoint; Ctrl-C ends this")
            waiting = True
            sleep(interval)
            continue
        waiting, seen = False, mark(step)
        try:
            opened = open_step(step)
        except Exception as error:
            if mark(step) is None or mark(step) != seen:  # reading what is being deleted or replaced may fail in any way
                log(f"step {step} was deleted before it could be read; going on")
                if gone == step:  # and it is there again, or half of it
                    sleep(interval)
                gone = step
                continue
            if not isinstance(error, (ValueError, OSError)):
                raise
            damaged[step] = seen
            log(f"step {step} is passed over: {' '.join(str(error).split())}")
            continue
        evaluate(opened)
        done.add(step)
        del opened  # the next one needs its room


def append(path: pathlib.Path, *rows: Mapping[str, Any]) -> None:
    """Adds a line of JSON for each row, all whole and synced or none; numbers that JSON does not know become null. What a killed writer left of a
    line is removed first.

    Raises:
      OSError: one line, when it cannot be written.
    """
    clean = ({key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()} for row in rows)
    line = "".join(json.dumps(row, allow_nan=False) + "\n" for row in clean).encode()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # another evaluation may be mending or appending
            size = _whole(descriptor)
            os.ftruncate(descriptor, size)
            written = os.write(descriptor, line)
            if written != len(line):
                os.ftruncate(descriptor, size)
                raise OSError(f"{written} of {len(line)} bytes were written: is the disk full?")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def _whole(descriptor: int) -> int:
    """Bytes up to the end of the last whole line."""
    size = os.fstat(descriptor).st_size
    while size:
        start = max(0, size - 4096)
        newline = os.pread(descriptor, size - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        size = start
    return 0


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows, in order; a torn line is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
