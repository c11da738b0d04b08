"""The prepared corpus on disk: documents of token ids in ArrayRecord shards, found by number. Home of array_record.

A folder holds, for each split, shards and two indexes (lengths, with source and licence, and ids), the tokenizer's file, two files that make it a TFDS
data set, and `manifest.json`, which lists every other file (but the reports) with its size and sha256. A record holds up to `RECORD_TOKENS` ids of one
document: a row of training that needs a part of a very long document reads that part only. Every record carries a checksum of its own and says what it is
(records.py), so no damage, exchange or truncation of a file is ever read as different tokens. The folder appears whole or not at all.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from array_record.python import array_record_module

from jaxlm.data import labels, manifest as manifests, records
from jaxlm.data.patience import PASSING, patiently

FORMAT = 2
MANIFEST = "manifest.json"
RECORD_TOKENS = 1 << 12

_WRITER = "group_size:1,uncompressed"
_OPEN_SHARDS = 256  # file handles kept; the kernel's usual limit is 1,024


class ShardWriter:
    """Writes one split. A shard is closed when its ids reach `shard_bytes` and the document ends."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_bytes: int, sources: Sequence[str] = ("",)):
        """`sources`: the names of all sources of the corpus; the same for each split."""
        self._folder, self._split, self._vocab_size, self._shard_bytes = folder, split, vocab_size, shard_bytes
        self._dtype = token_dtype(vocab_size)
        self._writer, self._shards = None, []
        self._tokens, self._text_bytes, self._ids, self._id_ends = array("i"), array("q"), bytearray(), array("q")
        self._numbers = {name: number for number, name in enumerate(sources)}
        self._sources, self._licences, self._licence_numbers = array("i"), array("i"), {}
        self._begins, self._sizes, self._checksums = array("q"), array("i"), []
        self._inputs, self._turns, self._turn_ends = array("i"), array("i"), array("q")
        self._examples: list[tuple[bytes, bytes, bytes, np.ndarray]] = []

    def add(self, document_id: str, tokens: np.ndarray, text_bytes: int, source: str = "", licence: str = "", inputs: int = 0,
            turns: Sequence[int] = (), example: tuple[bytes, bytes, bytes, np.ndarray] | None = None) -> None:
        """Appends a document of `tokens` (whole numbers in [0, vocab_size)) whose text has `text_bytes` bytes as UTF-8. Of a pair the first `inputs` tokens,
        eos included, are what an encoder reads, of a preference those of the chat with the chosen answer. `turns`: places where what an assistant says
        begins and ends, in turn. `example`: of a labelled document its text, label and fields (JSON), and the places of its words."""
        assert len(tokens) and 0 <= tokens.min() and tokens.max() < self._vocab_size, "token id out of range"
        if self._writer is None:
            self._shard = dict.fromkeys(("documents", "records", "tokens", "text_bytes"), 0)
            self._path = self._folder / f"{self._split}-{len(self._shards):05d}.array_record"
            self._writer = array_record_module.ArrayRecordWriter(str(self._path), _WRITER)
        for start in range(0, len(tokens), RECORD_TOKENS):
            part = tokens[start:start + RECORD_TOKENS].astype(self._dtype)
            record = records.encode(part, len(self._tokens), start, text_bytes, document_id, source)
            self._checksums.append(zlib.crc32(record))
            with self._naming_disk_errors():
                self._writer.write(record)
            self._shard["records"] += 1
        for key, value in (("documents", 1), ("tokens", len(tokens)), ("text_bytes", text_bytes)):
            self._shard[key] += value
        self._tokens.append(len(tokens))
        self._text_bytes.append(text_bytes)
        self._inputs.append(inputs)
        self._turns.extend(map(int, turns))
        self._turn_ends.append(len(self._turns))
        if example is not None:
            self._examples.append(example)
        self._sources.append(self._numbers[source])
        self._licences.append(self._licence_numbers.setdefault(licence, len(self._licence_numbers)))
        self._ids += document_id.encode("utf-8", "surrogateescape")
        self._id_ends.append(len(self._ids))
        if self._shard["tokens"] * self._dtype.itemsize >= self._shard_bytes:
            self._close_shard()

    def close(self) -> dict[str, Any]:
        """Finishes the last shard, writes the indexes and returns the split's part of the manifest."""
        if self._writer is not None:
            self._close_shard()
        lengths, ids = f"lengths-{self._split}.npz", f"ids-{self._split}.npz"
        pairs = {"inputs": np.array(self._inputs, np.int32)} if any(self._inputs) else {}
        if self._turns:
            pairs |= {"turns": np.array(self._turns, np.int32), "turn_ends": np.array(self._turn_ends, np.int64)}
        np.savez(self._folder / lengths, **pairs, tokens=np.array(self._tokens, np.int32), text_bytes=np.array(self._text_bytes, np.int64),
                 sources=np.array(self._sources, np.int32), licences=np.array(self._licences, np.int32),
                 record_begins=np.array(self._begins, np.int64), record_sizes=np.array(self._sizes, np.int32))
        np.savez(self._folder / ids, text=np.frombuffer(bytes(self._ids), np.uint8), ends=np.array(self._id_ends, np.int64))
        labelled = {"examples": self._save_examples()} if self._examples else {}
        totals = {key: sum(shard[key] for shard in self._shards) for key in ("documents", "tokens", "text_bytes")}
        return totals | {"sources": self._by_source(), "licences": list(self._licence_numbers), "lengths": file_entry(self._folder / lengths),
                         "ids": file_entry(self._folder / ids), "shards": self._shards} | labelled

    def _save_examples(self) -> dict[str, Any]:
        path = self._folder / f"examples-{self._split}.npz"
        packed: dict[str, np.ndarray] = {}
        for key, values in zip(("texts", "labels", "fields"), zip(*(example[:3] for example in self._examples))):
            packed |= {key: np.frombuffer(b"".join(values), np.uint8), f"{key}_ends": np.cumsum([len(value) for value in values], dtype=np.int64)}
        words = [example[3] for example in self._examples]
        np.savez(path, **packed, words=np.concatenate(words).astype(np.int32), words_ends=np.cumsum([len(found) for found in words], dtype=np.int64))
        return file_entry(path)

    def _by_source(self) -> dict[str, dict[str, Any]]:
        """Of each source, in the order of their numbers: documents, tokens, bytes of text, and documents of each licence."""
        of, names = np.array(self._sources, np.int64), list(self._licence_numbers)
        counts = lambda values: [int(np.array(values, np.int64)[of == number].sum()) for number in range(len(self._numbers))]
        licences = [Counter(names[i] for i in np.array(self._licences, np.int64)[of == number].tolist()) for number in range(len(self._numbers))]
        columns = zip(self._numbers, counts(np.ones(len(of))), counts(self._tokens), counts(self._text_bytes), licences)
        return {name: {"documents": documents, "tokens": tokens, "text_bytes": size, "licences": dict(sorted(found.items()))}
                for name, documents, tokens, size, found in columns}

    def _close_shard(self) -> None:
        with self._naming_disk_errors():
            self._writer.close()
        begins, sizes = records.places(self._path, self._checksums)
        self._begins.extend(begins)
        self._sizes.extend(sizes)
        self._checksums.clear()
        self._shards.append(file_entry(self._path) | self._shard)
        self._writer = None

    @contextlib.contextmanager
    def _naming_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise OSError(f"writing {self._path} failed: {' '.join(str(error).split())}") from None


def token_dtype(vocab_size: int) -> np.dtype:
    """How ids are stored: 2 bytes where they fit, else 4, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its name, size and sha256."""
    with open(path, "rb") as file:
        return {"file": path.name, "size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes `manifest` with its own checksum and the format's version, and the files with which TFDS reads the folder."""
    described = records.descriptions("jaxlm_corpus", token_dtype(manifest["tokenizer"]["vocab_size"]), manifest["splits"])
    for name, content in described.items():
        (folder / name).write_bytes(content)
    manifest = {"format": FORMAT, **manifest, "tfds": [file_entry(folder / name) for name in described]}
    text = json.dumps({**manifest, "sha256": _canonical_sha256(manifest)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(folder: Path, made_from: Mapping[str, Any], log: Callable[[str], None] = print) -> Iterator[tuple[Path, Path]]:
    """Two temporary folders beside `folder`: the second takes its name when the block ends well, after everything is on the disk.

    The first holds work that a later call goes on with if this one is killed or interrupted; only what was made from the same things, a JSON
    value, is kept. Where the block ends with an error that the user must mend, nothing is left.

    Raises:
      ValueError: `folder` is there and not empty, or another process is writing it now.
    """
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    work = parent / f".{folder.name}.preparing"
    with _lock(work, folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            shutil.rmtree(work)
            raise ValueError(f"{folder} is there already and holds no prepared corpus: choose another folder, or remove it")
        corpus = work / "corpus"
        _begin(work, json.dumps(made_from, sort_keys=True), log)
        corpus.mkdir()
        try:
            yield work, corpus
            for path in [*corpus.iterdir(), corpus]:
                _fsync(path)
            os.rename(corpus, folder)
            _fsync(parent)
        except (ValueError, OSError):
            shutil.rmtree(work)
            raise
        shutil.rmtree(work)


def remove_leftover(folder: Path) -> None:
    """Removes the work that a writer left which was killed after `folder` had its name."""
    work = folder.absolute().parent / f".{folder.name}.preparing"
    if work.exists():
        with _lock(work, folder):
            shutil.rmtree(work)


def _begin(work: Path, made_from: str, log: Callable[[str], None]) -> None:
    """Removes what cannot be gone on with."""
    note = work / "made_from.json"
    old = note.read_text(encoding="utf-8") if note.exists() else ""
    for path in work.iterdir():
        if path.name == "corpus" or path.name != "lock" and old != made_from:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if old == made_from:
        log(f"going on with the work that was interrupted in {work}")
    else:
        if old:
            log(f"the files or the config have changed since the work that was interrupted in {work}: it starts anew")
        note.write_text(made_from, encoding="utf-8")


def _lock(work: Path, folder: Path) -> TextIO:
    """Takes `work/lock`, which the kernel lets go of however this process ends."""
    while True:
        work.mkdir(exist_ok=True)
        lock = open(work / "lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(work / "lock")):
                return lock
        except BlockingIOError:
            lock.close()
            raise ValueError(f"another process is preparing {folder} now ({work}): wait for it, or choose another folder") from None
        except FileNotFoundError:  # its last owner has just removed it
            pass
        lock.close()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Split:
    """Index of one split: where each document lies, and what is known of it."""

    tokens: np.ndarray  # int32 [documents], with bos and eos
    text_bytes: np.ndarray  # int64 [documents], of the text as UTF-8
    sources: np.ndarray  # int32 [documents], numbers into `Corpus.sources`
    licences: np.ndarray  # int32 [documents], numbers into the list "licences" of the split in the manifest
    first_record: np.ndarray  # int64 [documents + 1], counted over all shards
    record_begins: np.ndarray  # int64 [records], place in the shard, see `records.places`
    record_sizes: np.ndarray  # int32 [records], bytes
    shard_ends: tuple[int, ...]  # one past the last record of each shard, counted likewise
    inputs: np.ndarray | None = None  # int32 [documents] of pairs: tokens of the input, eos included; of preferences: of the chosen chat; None: neither
    turns: np.ndarray | None = None  # int32, of chats: places in their documents where what the assistant says begins and ends, in turn; None: no chats
    turn_ends: np.ndarray | None = None  # int64 [documents]: turns up to the end of each

    def said(self, document: int, start: int, stop: int) -> np.ndarray:
        """Whether the assistant says each of the tokens [start, stop) of a chat: bool."""
        places = self.turns[self.turn_ends[document - 1] if document else 0:self.turn_ends[document]]
        return np.searchsorted(places, np.arange(start, stop), side="right") % 2 == 1


class Corpus:
    """A prepared corpus. Reading is thread-safe; shards are opened when they are first needed.

    Attributes:
      folder: where it lies.
      manifest: the whole of manifest.json.
      splits: "train", "validation" and "test".
      sources: names of the sources.
      fingerprint: sha256 over the tokens and the tokenizer (of chats also over who says them). With a seed and a step it determines every batch.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], splits: Mapping[str, Split]):
        self.folder, self.manifest, self.splits = folder, manifest, splits
        self.fingerprint = _canonical_sha256([manifest["tokenizer"]["sha256"], {
            name: [shard["sha256"] for shard in split["shards"]] + [split["lengths"]["sha256"]] * ("chat_template" in manifest)
            + ([split["examples"]["sha256"]] if "examples" in split else []) for name, split in manifest["splits"].items()}])
        self.examples = functools.cache(self._load_examples)
        self._dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
        self.sources = list(next(iter(manifest["splits"].values()))["sources"])
        self._shard = functools.lru_cache(_OPEN_SHARDS)(lambda split, number: open(self._path(split, number), "rb", buffering=0))
        self._ids = functools.cache(self._load_ids)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.folder / self.manifest["tokenizer"]["file"]

    @property
    def vocab_size(self) -> int:
        """Pieces of the tokenizer."""
        return self.manifest["tokenizer"]["vocab_size"]

    def read(self, split: str, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids of a document, or its tokens [start, stop): int32 [stop - start].

        Raises:
          ValueError: the record is damaged or not the one that was written; names the shard's file and the record.
        """
        index, document = self.splits[split], int(document)
        length = int(index.tokens[document])
        stop = length if stop is None else stop
        assert 0 <= start < stop <= length, (start, stop, length)
        first, last = start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS
        parts = [self._record(split, index, document, part, length) for part in range(first, last + 1)]
        offset = first * RECORD_TOKENS
        return (np.concatenate(parts) if last > first else parts[0])[start - offset:stop - offset].astype(np.int32)

    def document_id(self, split: str, document: int) -> str:
        """Where the document came from: "path:line"."""
        text, ends = self._ids(split)
        return bytes(text[ends[document - 1] if document else 0:ends[document]]).decode("utf-8", "surrogateescape")

    def document_ids(self, split: str) -> list[str]:
        """Where each document came from."""
        text, ends = self._ids(split)
        data, ends = text.tobytes(), ends.tolist()
        return [data[start:end].decode("utf-8", "surrogateescape") for start, end in zip([0, *ends], ends)]

    def licence(self, split: str, document: int) -> str:
        """The licence of a document, "" where none is known."""
        return self.manifest["splits"][split]["licences"][self.splits[split].licences[document]]

    def _path(self, split: str, shard: int) -> Path:
        return self.folder / self.manifest["splits"][split]["shards"][shard]["file"]

    def _record(self, split: str, index: Split, document: int, part: int, length: int) -> np.ndarray:
        record = int(index.first_record[document]) + part
        shard = bisect_right(index.shard_ends, record)
        start = part * RECORD_TOKENS
        def read() -> bytes:
            try:
                file = self._shard(split, shard)  # kept open while it is read, whatever other threads open
                return records.read(file.fileno(), int(index.record_begins[record]), int(index.record_sizes[record]))
            except OSError:
                self._shard.cache_clear()  # after a failover or a new mount the old handle is stale
                raise

        try:
            data = patiently(read, f"{self._path(split, shard)} cannot be read", PASSING | {errno.ENOENT})
            found = records.decode(data, document, start, min(RECORD_TOKENS, length - start), self._dtype)
        except OSError as error:
            found = str(error)
        if isinstance(found, str):
            record -= index.shard_ends[shard - 1] if shard else 0
            raise ValueError(f"{self._path(split, shard)}, record {record} is damaged ({found}): check with jaxlm prepare --verify --out={self.folder}, "
                             "then prepare again")
        return found

    def _load_examples(self, split: str) -> labels.Examples:
        """What a labelled corpus keeps of a split's documents besides their tokens; empty where it has none."""
        entry = self.manifest["splits"][split].get("examples")
        if entry is None:
            return labels.Examples([], [], [], [])
        index, path, documents = _load_index(self.folder, entry), self.folder / entry["file"], len(self.splits[split].tokens)

        def parts(key: str) -> list[np.ndarray]:
            values, ends = manifests.parts(index, key, documents, path)
            return np.split(values, ends[:-1])

        try:
            texts, found, fields = ([part.tobytes().decode() for part in parts(key)] for key in ("texts", "labels", "fields"))
            return labels.Examples(texts, found, [json.loads(text) for text in fields], parts("words"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): prepare the corpus again") from None

    def _load_ids(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        entry = self.manifest["splits"][split]["ids"]
        return manifests.parts(_load_index(self.folder, entry), "text", len(self.splits[split].tokens), self.folder / entry["file"], "ends")


def open_corpus(folder: str | Path) -> Corpus:
    """Opens a prepared folder; checks the manifest, the size of every file and the sha256 of the small ones.

    Raises:
      ValueError: there is none, or a file is missing, cut off, damaged or from another corpus; names the file.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for entry in manifests.entries(manifest):
        path = folder / entry["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing, which {MANIFEST} lists: prepare the corpus again")
        if path.stat().st_size != entry["size"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {entry['size']}: it is cut off or damaged; "
                             "prepare the corpus again")
    for entry in (manifest["tokenizer"], *manifest["tfds"]):
        _checked_bytes(folder, entry)
    splits = {}
    for name, split in manifest["splits"].items():
        lengths = _load_index(folder, split["lengths"])
        manifests.check_lengths(lengths, split, RECORD_TOKENS, folder / split["lengths"]["file"])
        tokens = lengths["tokens"]
        parts = -(-tokens.astype(np.int64) // RECORD_TOKENS)
        splits[name] = Split(tokens, lengths["text_bytes"], lengths["sources"], lengths["licences"], np.concatenate([[0], np.cumsum(parts)]).astype(np.int64),
                             lengths["record_begins"], lengths["record_sizes"], tuple(itertools.accumulate(shard["records"] for shard in split["shards"])),
                             lengths.get("inputs"), lengths.get("turns"), lengths.get("turn_ends"))
    return Corpus(folder, manifest, splits)


def verify(folder: str | Path) -> int:
    """Reads every file of a prepared folder and compares its sha256 with the manifest's; returns the number of bytes read.

    Raises:
      ValueError: names every file that differs.
    """
    folder = Path(folder)
    entries = manifests.entries(_read_manifest(folder))
    paths = [(folder / entry["file"], entry["sha256"]) for entry in entries]
    bad = [str(path) for path, sha256 in paths if not path.is_file() or file_entry(path)["sha256"] != sha256]
    if bad:
        raise ValueError(f"{len(bad)} of {len(entries)} files are missing or damaged: {', '.join(bad)}; prepare the corpus again")
    open_corpus(folder)
    return sum(entry["size"] for entry in entries)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no prepared corpus (no {MANIFEST}): make one with jaxlm prepare --config=... --out={folder}")
    try:
        manifest = json.loads(path.read_bytes())
        version, checksum = manifest["format"], manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: prepare the corpus again") from None
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this jaxlm reads format {FORMAT}: prepare the corpus again")
    if checksum != _canonical_sha256(manifest):
        raise ValueError(f"{path} is damaged (its checksum is wrong): prepare the corpus again")
    manifests.check(manifest, path)
    return manifest


def _load_index(folder: Path, entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return manifests.arrays(_checked_bytes(folder, entry), folder / entry["file"])


def _checked_bytes(folder: Path, entry: Mapping[str, Any]) -> bytes:
    data = (folder / entry["file"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{folder / entry['file']} is damaged or belongs to another corpus (its sha256 is not the one in {MANIFEST}): "
                         "prepare the corpus again")
    return data


def _canonical_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
