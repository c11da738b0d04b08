"""SHA256SUMS: what tells a damaged file of an exported folder: safetensors, JSON and SentencePiece have no checksum. `sha256sum -c` reads it too."""

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

FILE = "SHA256SUMS"


def write(folder: Path | str, names: Iterable[str] | None = None) -> None:
    """Writes SHA256SUMS for these files of a folder, or for all but texts for people (.md): those may be edited."""
    folder = Path(folder)
    chosen = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != FILE and path.suffix != ".md") if names is None else sorted(names)
    (folder / FILE).write_text("".join(f"{_sum(folder / name)}  {name}\n" for name in chosen), encoding="utf-8")


def check(folder: Path | str, wanted: Callable[[str], bool]) -> None:
    """Compares the files that are wanted with SHA256SUMS; where there is none, nothing is known and nothing is said.

    Raises:
      ValueError: one line that names the file: changed, missing, or not listed.
    """
    folder = Path(folder)
    try:
        lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    listed = dict(reversed(line.split("  ", 1)) for line in lines if re.fullmatch(r"[0-9a-f]{64}  .+", line))
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(name for name in present | listed.keys() if wanted(name) and name != FILE):
        if name not in present:
            wrong = "is missing"
        elif name not in listed:
            wrong = f"is not named in {FILE}"
        else:
            wrong = "" if _sum(folder / name) == listed[name] else f"is damaged: its sha256 is not the one in {FILE}"
        if wrong:
            raise ValueError(f"{folder / name} {wrong}; write it again or fetch it again, or, if you changed it yourself, remove {folder / FILE}")


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
