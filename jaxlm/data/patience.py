"""Storage that does not answer for a moment: a network file system that fails over, a mount that is made again. Tried again, with a warning, a bounded time."""

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new try
# What passes; a full disk, a missing permission or a wrong name does not.
PASSING = frozenset(getattr(errno, name) for name in (
    "EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EAGAIN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED",
    "EREMOTEIO") if hasattr(errno, name))


def patiently(work: Callable[[], T], what: str, passing: frozenset[int] = PASSING) -> T:
    """The result of `work`, which is done again after an error that may pass, up to five times within 31 s, each with a line on stderr.

    Args:
      what: for the line: "PATH cannot be read".
      passing: numbers of errors that may pass.

    Raises:
      OSError: the last one.
    """
    for number, seconds in enumerate(WAITS, 1):
        try:
            return work()
        except OSError as error:
            if error.errno not in passing:
                raise
            print(f"jaxlm: warning: {what} ({error.strerror}); trying again in {seconds:g} s ({number} of {len(WAITS)})", file=sys.stderr, flush=True)
            time.sleep(seconds)
    return work()
