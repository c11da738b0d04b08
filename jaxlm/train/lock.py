"""One writer per workdir."""

import datetime
import fcntl
import json
import os
import socket
from collections.abc import Callable

from jaxlm.sharding import first
from jaxlm.train import durable


class Locked(ValueError):
    """Another process writes this workdir."""


class Lock:
    """The right to write a workdir, which it creates: `with Lock(workdir) as lock`. Entered together; held by process 0.

    An flock on `<workdir>/LOCK`, which the kernel releases when the process ends, however it ends: a stale lock does not exist. Where the
    file system knows no flock (object stores), the run goes on and one line says that nothing keeps a second one out.

    Raises:
      Locked: one line with host, process id and start time of the process that holds it.
      OSError: one line, when the workdir cannot be created or written.
    """

    def __init__(self, workdir: os.PathLike | str, *, log: Callable[[str], None] = print):
        self.workdir = durable.path_of(workdir)
        self._log = log
        self._descriptor: int | None = None
        # An flock belongs to the open file: a forked child that outlives us would hold on to it.
        os.register_at_fork(after_in_child=self._close)

    def __enter__(self) -> "Lock":
        first(self._take)
        return self

    def __exit__(self, *_) -> None:
        if self.held:
            os.ftruncate(self._descriptor, 0)
        self._close()

    @property
    def held(self) -> bool:
        """Whether this process holds it."""
        return self._descriptor is not None

    def _take(self) -> None:
        path = self.workdir / "LOCK"
        try:
            durable.make(self.workdir)
            if durable.remote(path):
                return self._log(f"{self.workdir} has no locks: make sure that no second run writes there")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _owner(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                raise Locked(f"{self.workdir} is in use: {owner}; wait for it to end, stop it, or choose another workdir") from None
            except OSError as error:
                self._log(f"{path} cannot be locked ({error.strerror}): make sure that no second run writes there")
            self._descriptor = descriptor
            since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode(), 0)
        except OSError as error:
            self._close()
            raise OSError(f"{self.workdir} cannot be written: {durable.reason(error)}; choose another workdir") from error

    def _close(self) -> None:
        if self.held:
            os.close(self._descriptor)
            self._descriptor = None


def _owner(content: bytes) -> str:
    try:
        owner = json.loads(content)
        return f"process {owner['pid']} on {owner['host']} has been writing it since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process writes it"  # and has not yet written who it is
