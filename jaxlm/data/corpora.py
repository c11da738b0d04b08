"""Raw text: every readable source as one stream of documents, in an order that depends on nothing but the config and the files' names."""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data import hub, mixture, python_docs, readers, tfds, web
from jaxlm.data.readers import Fault, Keys, Record

PYTHON_DOCS = "python_docs"
_LINES = {**dict.fromkeys((".jsonl", ".ndjson", ".json"), readers.json_lines), ".csv": readers.table, ".tsv": readers.table, ".txt": readers.text}
_READERS: dict[str, Callable[[str, Keys], Iterator[Record | Fault]]] = {
    **_LINES, **{name + packed: reader for name, reader in _LINES.items() for packed in (".gz", ".zst")},
    ".html": web.page, ".htm": web.page, ".warc": web.warc, ".warc.gz": web.warc, ".warc.wet": web.warc, ".warc.wet.gz": web.warc,
    ".parquet": readers.parquet, ".arrow": readers.arrow,
}
SUFFIXES = tuple(_READERS)
_KINDS = ".txt .jsonl .json .csv .tsv (each also .gz .zst), .html .warc[.gz] .parquet .arrow"
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


class Document(NamedTuple):
    """One document as its source gives it, before any cleaning."""

    id: str  # "path:line", "path:row" or "path:piece", counted from 1, or the value of data.id_key; unique in its corpus
    source: str  # the name in data.source ("web" of "web=crawl/"), else the entry as it is given
    text: str | bytes  # bytes: an HTML page, or a text file that is not UTF-8; of a pair (data.input_key) both sides, see `readers.PAIR`
    licence: str = ""  # the value of data.licence_key, else that of data.licences for the source
    html: bool = False
    label: str = ""  # as it was read, as JSON; see labels.py
    fields: str = ""  # values of data.slice_keys, likewise


class Skipped(NamedTuple):
    """A record that could not be read, and why."""

    id: str
    source: str
    reason: str  # one line, with the file's name


class SourceFile(NamedTuple):
    """One input: a file, or a named set."""

    source: str
    path: str  # of a file, or "python_docs", "tfds:name/config:split"
    size: int  # bytes on the disk; 0 where that is not known


def sources(data: DataConfig) -> tuple[str, ...]:
    """The names of all sources, in the order of `data.source`."""
    return tuple(dict.fromkeys(_name(entry)[0] for entry in data.source))


def files(data: DataConfig) -> list[SourceFile]:
    """All files of `data.source` in the order given, those of a folder or glob sorted; one that is named twice counts where it is named first.

    Raises:
      ValueError: one line: what does not exist, cannot be read as text, or has no source of that name.
    """
    if not data.source:
        raise ValueError(f"data.source is empty: name files, folders or globs of {_KINDS}, tfds:NAME, or {PYTHON_DOCS!r}")
    found = {}
    for entry in data.source:
        name, given = _name(entry)
        for path, size in _expand(given, data):
            found.setdefault(path if size is None else os.path.realpath(path), SourceFile(name, path, size or 0))
    for key in ("licences", "weights", "epochs"):
        mixture.known(f"data.{key}", getattr(data, key), sources(data))
    return list(found.values())


def left_out(data: DataConfig) -> dict[str, int]:
    """How many files in the folders of `data.source` are not read, by the suffix of their names, most first."""
    counts = Counter()
    for path in (os.path.expanduser(_name(entry)[1]) for entry in data.source):
        if os.path.isdir(path) and not hub.is_dataset(path):
            counts.update(os.path.splitext(name)[1].lower() for name in _walk(path, lambda name: not _in_folder(name)))
    return dict(counts.most_common())


def documents(data: DataConfig) -> Iterator[Document]:
    """All documents of all files; see `files` and `read`."""
    for file in files(data):
        yield from (document for document in read(file, data) if isinstance(document, Document))


def read(file: SourceFile, data: DataConfig) -> Iterator[Document | Skipped]:
    """The documents of one file in the file's own order; a pure function of the file.

    A .txt file is one document; one above 64 KiB is divided at blank lines into documents of 4 to 16 Ki characters, none lost.

    Yields:
      Skipped for broken records of a WARC, and, with `data.on_error="skip"`, for everything else that cannot be read.

    Raises:
      ValueError: one line that names the file, and the line or row, that cannot be read.
    """
    return (document for _, document in placed(file, data))


def placed(file: SourceFile, data: DataConfig) -> Iterator[tuple[str, Document | Skipped]]:
    """`read`, each with its place in the file ("path:line"), which is its id unless the file gives one."""
    licence = dict(data.licences).get(file.source, "")
    try:
        for record in _records(file, data):
            place = f"{file.path}:{record.place}"
            if isinstance(record, Record):
                yield place, Document(record.id or place, file.source, record.text, record.licence or licence, record.html, record.label, record.fields)
            elif isinstance(record, web.Broken) or data.on_error == "skip":
                yield place, Skipped(place, file.source, str(record))
            else:
                raise record
    except (Fault, OSError) as error:
        fault = error if isinstance(error, Fault) else Fault(f"{file.path} cannot be read: {error.strerror or error}")
        if data.on_error != "skip":
            raise fault from None
        yield file.path, Skipped(file.path, file.source, str(fault))


def id_hash(document_id: str) -> int:
    """64 bits for `check_ids`."""
    return int.from_bytes(hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def check_ids(hashes: np.ndarray, data: DataConfig) -> None:
    """Looks for an id that two documents share; only if there seems to be one, the sources are read again to find both.

    Args:
      hashes: uint64 [documents], `id_hash` of each, in any order.

    Raises:
      ValueError: one line with the id and both places.
    """
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    first = {}
    for file in files(data) if suspects else ():
        for place, document in placed(file, data):
            if isinstance(document, Document) and id_hash(document.id) in suspects:
                if document.id in first:
                    raise ValueError(f"two documents have the id {document.id!r}: {first[document.id]} and {place}; the values of data.id_key={data.id_key!r} "
                                     "must differ: choose another field, or ''")
                first[document.id] = place


def _records(file: SourceFile, data: DataConfig) -> Iterator[Record | Fault]:
    keys = Keys(data.text_key, data.id_key, data.licence_key, data.input_key, "" if data.format == "text" else data.format, data.label_key, data.slice_keys)
    reader = _READERS.get(max((suffix for suffix in SUFFIXES if file.path.lower().endswith(suffix)), key=len, default=""))
    if keys.form and reader is not readers.json_lines:
        raise ValueError(f"{file.path}: data.format={data.format} reads JSON only: .jsonl with one record a line, or .json with a list of them")
    if (keys.input or keys.label) and (file.path == PYTHON_DOCS or reader in (readers.text, web.page, web.warc)):
        key = f"data.label_key={keys.label!r}" if keys.label else f"data.input_key={keys.input!r}"
        raise ValueError(f"{file.path} has no fields: {key} needs JSON lines, CSV, Parquet, Arrow, datasets or TFDS")
    if file.path == PYTHON_DOCS:
        return (Record(name, text) for name, text in python_docs.texts())
    if file.path.startswith(tfds.PREFIX):
        return tfds.records(file.path, keys, data.tfds_dir)
    return reader(file.path, keys)


def _name(entry: str) -> tuple[str, str]:
    """"web=crawl/" -> ("web", "crawl/"); what has no name is named as it is given. A file or folder that is there ("lang=en/*.parquet") is no name."""
    match = _NAMED.fullmatch(entry)
    return match.groups() if match and not any(glob.iglob(os.path.expanduser(entry))) else (entry, entry)


def _expand(given: str, data: DataConfig) -> list[tuple[str, int | None]]:
    """The files of one entry with their sizes; None: not a file."""
    if given == PYTHON_DOCS:
        return [(given, None)]
    if given.startswith(tfds.PREFIX):
        return [(path, None) for path in tfds.expand(given, data.tfds_dir)]
    path = os.path.expanduser(given)
    if os.path.isdir(path):
        found = hub.files(path) if hub.is_dataset(path) else _walk(path, _in_folder)
        if not found:
            raise ValueError(f"{path} holds no file that ends in {_KINDS}")
    elif os.path.exists(path):
        if not _readable(path):
            raise ValueError(f"{path} cannot be read as text: its name must end in {_KINDS}")
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} is empty")
        found = [path]
    elif glob.has_magic(path):
        found = [f for p in sorted(glob.glob(path, recursive=True)) for f in (_walk(p, _in_folder) if os.path.isdir(p) else [p]) if _readable(f)]
        if not found:
            raise ValueError(f"data.source={given!r} matches no file that ends in {_KINDS}")
    else:
        raise ValueError(f"data.source={given!r} does not exist (working folder: {os.getcwd()})")
    return [(name, os.path.getsize(name)) for name in found]


def _walk(folder: str, wanted: Callable[[str], bool]) -> list[str]:
    """Files of a folder and its subfolders, sorted, hidden ones left out; a folder of Hugging Face `datasets` gives the files that it lists."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if hub.is_dataset(parent):
            folders.clear()
            found += [name for name in hub.files(parent) if wanted(name)]
        else:
            found += [os.path.join(parent, name) for name in names if not name.startswith(".") and wanted(name)]
    return sorted(found)


def _readable(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _in_folder(name: str) -> bool:
    """A .json that lies in a folder is most often about the data: it is read only when it is named."""
    return _readable(name) and not name.lower().endswith(".json")
