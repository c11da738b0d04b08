"""Whether a corpus's manifest and its indexes can be what `shards.py` writes. Checksums find faults; whoever makes a corpus for others writes its checksums too."""

import io
import itertools
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

_SHA256 = re.compile("[0-9a-f]{64}")
_MOST = 1 << 40  # of any number


def check(manifest: Mapping[str, Any], path: pathlib.Path) -> None:
    """Looks at all that is used later on.

    Raises:
      ValueError: one line: something is missing, of another kind, or names a file outside the folder.
    """
    try:
        for entry in entries(manifest):
            name = entry["file"]
            if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\\" in name or "\0" in name or name in ("", ".", ".."):
                raise ValueError(f"{path} names the file {name!r}, which is not a plain name inside the folder: do not trust this corpus")
            _need(_count(entry["size"]) and isinstance(entry["sha256"], str) and _SHA256.fullmatch(entry["sha256"]), f"its entry of {name}")
        _need(0 < manifest["tokenizer"]["vocab_size"] <= 1 << 24, "tokenizer.vocab_size")
        for name, split in manifest["splits"].items():
            _need(all(isinstance(licence, str) for licence in split["licences"]), f"the licences of {name}")
            _need(isinstance(split["sources"], dict), f"the sources of {name}")
            for shard in split["shards"]:
                _need(all(_count(shard[key]) for key in ("documents", "records", "tokens", "text_bytes")), f"a shard of {name}")
        _need({"train", "validation", "test"} <= manifest["splits"].keys(), "the splits")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest that jaxlm wrote ({type(error).__name__}: {str(error)[:100]}): prepare the corpus again") from None


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _need(ok: Any, what: str) -> None:
    if not ok:
        raise TypeError(what)


def entries(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of every file that the manifest lists."""
    found = [manifest["tokenizer"], *manifest["tfds"]]
    for split in manifest["splits"].values():
        found += [split["lengths"], split["ids"], *([split["examples"]] if "examples" in split else []), *split["shards"]]
    return found


def arrays(data: bytes, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, one-dimensional, of numbers, not packed.

    Raises:
      ValueError: one line: it is none, or says that it holds more than it does.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if sum(entry.file_size for entry in file.infolist()) > len(data):
                raise ValueError("it would unpack to more than it is")
        with np.load(io.BytesIO(data), allow_pickle=False) as index:
            found = {str(key): index[key] for key in index.files}
    except (ValueError, KeyError, TypeError, OSError, EOFError, RuntimeError, MemoryError, OverflowError, SyntaxError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())[:100] or type(error).__name__}): prepare the corpus again") from None
    if not all(array.ndim == 1 and array.dtype.kind in "iu" for array in found.values()):
        raise ValueError(f"{path} holds an array that is not a list of whole numbers: prepare the corpus again")
    return found


def check_lengths(found: Mapping[str, np.ndarray], split: Mapping[str, Any], record_tokens: int, path: pathlib.Path) -> None:
    """Whether the index of a split fits itself and the split's part of the manifest.

    Args:
      found: arrays of "lengths": tokens, text_bytes, sources, licences [documents], record_begins, record_sizes [records].
      record_tokens: of one record, at most.

    Raises:
      ValueError: one line.
    """
    def need(ok: Any, what: str) -> None:
        if not ok:
            raise ValueError(f"{path} is damaged ({what}): prepare the corpus again")

    names = ("tokens", "text_bytes", "sources", "licences", "record_begins", "record_sizes")
    need(set(names) <= found.keys(), "a list is missing")
    tokens, text_bytes, sources, licences, begins, sizes = (found[name] for name in names)
    need(len({len(tokens), len(text_bytes), len(sources), len(licences)}) == 1 and not (tokens < 1).any(), "its lists do not fit each other")
    records = int((-(-tokens.astype(np.int64) // record_tokens)).sum())
    need(len(begins) == len(sizes) == records == sum(shard["records"] for shard in split["shards"]), "its records are not those of the shards")
    inside = lambda values, most: not len(values) or (values.min() >= 0 and values.max() < most)
    need(inside(sources, len(split["sources"])) and inside(licences, len(split["licences"])), "a source or licence that is not in the manifest")
    first = list(itertools.accumulate((shard["records"] for shard in split["shards"]), initial=0))
    for shard, start, stop in zip(split["shards"], first, first[1:]):
        need(inside(begins[start:stop], shard["size"]) and inside(sizes[start:stop], shard["size"]), "a record beyond its shard")
    for name in ("inputs", "turn_ends"):
        need(name not in found or len(found[name]) == len(tokens), f"its {name}")
    if "turn_ends" in found:
        need("turns" in found and ends(found["turn_ends"], len(found["turns"])), "its turns")


def ends(values: np.ndarray, total: int) -> bool:
    """Whether `values` are places, in order, at which parts of a list of `total` end."""
    return bool((not len(values) or values[0] >= 0) and (values[1:] >= values[:-1]).all() and (not len(values) or values[-1] <= total))


def parts(found: Mapping[str, np.ndarray], key: str, documents: int, path: pathlib.Path, ends_key: str = "") -> tuple[np.ndarray, np.ndarray]:
    """A list of all documents' entries and where each document's end.

    Raises:
      ValueError: one line: they do not fit each other, or are of another number of documents.
    """
    places = found.get(ends_key or f"{key}_ends")
    if key not in found or places is None or len(places) != documents or not ends(places, len(found[key])):
        raise ValueError(f"{path} is damaged (its {key}): prepare the corpus again")
    return found[key], places
