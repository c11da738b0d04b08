"""Files and folders that survive a power cut, and what to say when they cannot be written."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator

from etils import epath

from jaxlm.data.patience import patiently


def path_of(workdir) -> epath.Path:
    """A workdir as an absolute path, or as the URL that it is (gs://...)."""
    path = epath.Path(workdir)
    return path if remote(path) else epath.Path(os.path.abspath(os.path.expanduser(path)))


def remote(path) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(path)


def make(folder: epath.Path) -> None:
    """Creates a folder and its parents for good: a new folder is an entry of its parent, which needs a sync of its own."""
    if remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.exists():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def walk(folder: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """All files in a folder, and all folders, inner ones first, itself last."""
    files, folders = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            below = walk(path)
            files += below[0]
            folders += below[1]
        else:
            files.append(path)
    return files, [*folders, folder]


def sync(path: epath.Path) -> None:
    """Has the system write a file or folder to the disk itself; remote stores do that when they answer."""
    if remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems have no sync of folders
            raise
    finally:
        os.close(descriptor)


def append(path: os.PathLike | str, text: str) -> None:
    """Adds to a local file, whole or not at all: what a full disk took of it is cut off again, so that a later line does not continue half a one.

    Raises:
      OSError: one line that names the file.
    """
    def add() -> None:
        left = memoryview(text.encode())
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[file.write(left):]
            except OSError:
                file.truncate(size)
                raise

    try:
        patiently(add, f"{path} cannot be written")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {reason(error)}") from error


def rewrite(path: os.PathLike | str, text: str) -> None:
    """Gives a local file other content, whole or not at all, also after a power cut.

    Raises:
      OSError: one line that names the file, which is as it was.
    """
    path = epath.Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{path} cannot be written: {reason(error)}") from error


class Tolerance:
    """What a run does when its folder cannot be written: it ends, or says so once for each message and goes on. `with tolerance(): ...`

    Args:
      goes_on: as checkpoint.on_error says.
      note: shows a line.
    """

    def __init__(self, goes_on: bool, note: Callable[[str], None]):
        self._goes_on, self._note, self._said, self.failed = goes_on, note, set(), 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._goes_on:
                raise
            self.failed += 1
            if str(error) not in self._said:
                self._note(f"warning: {error}; going on (checkpoint.on_error=go_on)")
            self._said.add(str(error))


def checksum(path: epath.Path) -> dict:
    """Size and SHA-256 of a file, as the manifest of a checkpoint holds them."""
    def read() -> dict:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while chunk := file.read(2**20):  # hashing so much at a time runs outside of the GIL: files are summed in parallel
                digest.update(chunk)
                size += len(chunk)
        return {"bytes": size, "sha256": digest.hexdigest()}

    return patiently(read, f"{path} cannot be read")


_REASONS = [os.strerror(getattr(errno, name)) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EIO", "ENOTDIR")]


def reason(error: Exception) -> str:
    """Why, in a few words: TensorStore reports the system's error somewhere in the middle of a page."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = [reason for reason in _REASONS if reason in text]
    return known[0] if known else f"{type(error).__name__}: {text[:300]}"
