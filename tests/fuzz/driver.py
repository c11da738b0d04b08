"""Feeds one target with changed inputs and says what broke a promise: an exception that no user should see, a slow or large input, a file or a program
outside the folder."""

import json
import os
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.fuzz import mutate
from tests.fuzz.targets import TARGETS, allowed

SECONDS = 5.0  # of CPU, for one input
MEMORY = 1 << 30  # bytes that one input may need besides what the process has when it begins
_NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "pickle.find_class",
          "urllib.Request", "ftplib.connect", "webbrowser.open", "ctypes.dlopen", "shutil.unpack_archive")
_PATHS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.copyfile",
          "shutil.move", "shutil.rmtree")


class Finding(NamedTuple):
    target: str
    number: int  # of the input: it is made again from it
    what: str  # one line
    where: str


class Watch:
    """Python's audit events outside `folder` and the process, while an input is fed."""

    def __init__(self):
        self.folder, self.seen = "", []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.folder:
            return
        if event in _NEVER and arguments != (None,):  # dlopen(None) is this process
            self.seen.append(f"{event}{arguments!r:.200}")
        elif event in _PATHS:
            paths = [os.fsdecode(value) for value in arguments[:2] if isinstance(value, (str, bytes))]
            writes = event != "open" or (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")) or (
                isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            paths = paths[:1] if event == "open" else paths
            kept = os.environ.get("JAX_COMPILATION_CACHE_DIR", "/dev/null")
            outside = [path for path in paths if not os.path.abspath(path).startswith((self.folder, "/dev/null", kept)) and "jaxlm-fuzz-http-" not in path]
            if writes and outside:
                self.seen.append(f"{event} {outside}")


_watch: list[Watch] = []


def feed(name: str, files: mutate.Files, number: int = -1) -> Finding | None:
    """Feeds one input to a target; what was wrong."""
    if not _watch:
        _watch.append(Watch())
    watch = _watch[0]
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"jaxlm-fuzz-{name}-")).resolve()
    try:
        for file, data in files.items():
            (folder / file).write_bytes(data)
        watch.seen, begun, peak = [], time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        watch.folder = str(folder)
        try:
            TARGETS[name].feed(folder)
        except BaseException as error:
            watch.folder = ""
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            if not allowed(error):
                frames = [frame for frame in traceback.extract_tb(error.__traceback__)]
                ours = [frame for frame in frames if "/jaxlm/" in frame.filename] or frames
                return Finding(name, number, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                               " < ".join(f"{pathlib.Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-2:], frames[-1]]))
        finally:
            watch.folder = ""
        spent, more = time.process_time() - begun, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        if spent > SECONDS:
            return Finding(name, number, f"slow: {spent:.1f} s of CPU", "time")
        if more > MEMORY:
            return Finding(name, number, f"large: {more >> 20:,} MiB more", "memory")
        if watch.seen:
            return Finding(name, number, f"reached outside: {watch.seen[0]}", "outside")
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def made(name: str, number: int, seeds: Sequence[mutate.Files]) -> dict[str, bytes]:
    """Input `number` of a target: the first are the seeds themselves."""
    if number < len(seeds):
        return dict(seeds[number])
    draw = random.Random(f"{name} {number}")
    return mutate.mutated(draw, seeds[draw.randrange(len(seeds))], seeds)


def run(name: str, first: int, count: int, progress: int) -> Iterator[Finding]:
    """Inputs [first, first + count); `progress`: the number of an open file in which the present one is noted."""
    seeds = TARGETS[name].seeds()
    for files in seeds[:3]:  # what is imported, compiled and kept by the first use is no input's own
        feed(name, files)
    status = pathlib.Path("/proc/self/statm").read_text().split()
    resource.setrlimit(resource.RLIMIT_AS, (int(status[0]) * os.sysconf("SC_PAGE_SIZE") + 2 * MEMORY,) * 2)
    for number in range(first, first + count):
        os.pwrite(progress, f"{number:12}".encode(), 0)
        found = feed(name, made(name, number, seeds), number)
        if found:
            yield found


def main() -> None:
    """The process that tools/fuzz.py starts: TARGET FIRST COUNT PROGRESS-FILE; writes findings as JSON lines."""
    name, first, count, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    sys.dont_write_bytecode = True
    with open(path, "r+b", buffering=0) as progress:
        for found in run(name, first, count, progress.fileno()):
            print(json.dumps(found._asdict()), flush=True)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


if __name__ == "__main__":
    main()
