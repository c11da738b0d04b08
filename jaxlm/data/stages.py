"""What a worker does to one batch of documents: clean it, sign it for de-duplication, tokenise what is left of it.

A *unit* is a run of files, a *batch* some 4 MB of a unit's text; both depend on the files and the config alone. Each stage writes one file for
a batch, whole or not at all, so a killed run finds what is done; any runner that calls these functions in any order makes the same files:

    clean/UNIT-BATCH.npz    texts, ids, origins, digests, hashes of long lines, and what was read, changed and removed (counts.py)
    signed/UNIT-BATCH.npz   digests, sizes and MinHash bands of the documents that live, without the lines that do not
    tokens/UNIT-BATCH.npz   their tokens, their number in each document and in the input of each pair, the turns of chats, how often each id occurs
"""

import functools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.config import Config
from jaxlm.data import chat, clean, conversations, corpora, counts, dedup, labels, shards, tokenizer
from jaxlm.data.readers import PAIR

UNIT_BYTES = 32 << 20  # of files that are read together
BATCH_BYTES = 4 << 20  # of text


class Unit(NamedTuple):
    """Input files that are read in one go."""

    number: int
    files: tuple[corpora.SourceFile, ...]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(file.size for file in self.files)


class Raw(NamedTuple):
    """A batch as it was read."""

    unit: int
    batch: int
    documents: tuple[corpora.Document | corpora.Skipped, ...]


class Living(NamedTuple):
    """A batch of `clean/` and what lives of it, as packed bits: of its documents, and of the long lines of all its documents those that died."""

    unit: int
    batch: int
    documents: bytes
    dead_lines: bytes = b""


def units(files: Iterable[corpora.SourceFile]) -> list[Unit]:
    """Consecutive files up to `UNIT_BYTES` together; a larger file is a unit of its own."""
    groups, size = [], 0
    for file in files:
        if not groups or size + file.size > UNIT_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    return [Unit(number, tuple(group)) for number, group in enumerate(groups)]


def name(folder: Path, stage: str, unit: int, batch: int) -> Path:
    """Where a stage leaves what it made of one batch."""
    return folder / stage / f"{unit:06d}-{batch:06d}.npz"


def batches_of(folder: Path, unit: int) -> int | None:
    """How many batches a unit has, if it was read to its end."""
    try:
        return json.loads((folder / "clean" / f"{unit:06d}.json").read_bytes())["batches"]
    except FileNotFoundError:
        return None


def read(data, folder: Path, unit: Unit) -> Iterator[Raw]:
    """Those batches of a unit that are not in `clean/` yet; when the unit is read, its number of batches is noted there."""
    count = batches_of(folder, unit.number)
    if count is not None and all(name(folder, "clean", unit.number, batch).exists() for batch in range(count)):
        return
    number = 0
    for documents in _batches(document for file in unit.files for document in corpora.read(file, data)):
        if not name(folder, "clean", unit.number, number).exists():
            yield Raw(unit.number, number, documents)
        number += 1
    if count is None:
        _replace(folder / "clean" / f"{unit.number:06d}.json", lambda file: file.write(json.dumps({"batches": number}).encode()))


def _batches(documents: Iterable[corpora.Document | corpora.Skipped]) -> Iterator[tuple[corpora.Document | corpora.Skipped, ...]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text if isinstance(document, corpora.Document) else document.reason)
        if size >= BATCH_BYTES:
            yield tuple(batch)
            batch, size = [], 0
    if batch:
        yield tuple(batch)


def clean_batch(config: Config, folder: Path, raw: Raw) -> tuple[int, int]:
    """Cleans the documents and writes `clean/`; returns their number and the bytes that were read."""
    clean_one = _cleaner(config)
    report, kept, origins, labelled = counts.Counts(), [], {}, []
    for document in raw.documents:
        if isinstance(document, corpora.Skipped):
            report.skipped(document)
            continue
        label = ""
        if config.data.label_key:
            try:
                label = _label(config, document)
            except ValueError as error:
                if config.data.on_error != "skip":
                    raise
                report.skipped(corpora.Skipped(document.id, document.source, str(error)))
                continue
        cleaned = _clean_pair(clean_one, document) if config.data.input_key else clean_one(document)
        size, digest = len(cleaned.text.encode()), digest_of(config, cleaned.text, label)
        rule = cleaned.removed_by or ("clean.empty" if not cleaned.text or cleaned.text.isspace() else "")
        report.document(document, cleaned, size, rule, digest)
        if not rule:
            origin = origins.setdefault((document.source, document.licence), len(origins))
            kept.append((document.id, cleaned.text, size, digest, origin))
            labelled.append((label, document.fields))
    kinds = [("label", 0), ("fields", 1)] if config.data.label_key else []
    beside = {key: array for part, column in kinds for key, array in _pack(part, (values[column].encode() for values in labelled)).items()}
    lines = [dedup.line_hashes(text, config.dedup.line_length) if config.dedup.line_length else () for _, text, _, _, _ in kept]
    _save(
        name(folder, "clean", raw.unit, raw.batch),
        **_pack("text", (text.encode() for _, text, _, _, _ in kept)), **_pack("id", (i.encode("utf-8", "surrogateescape") for i, _, _, _, _ in kept)),
        digests=np.frombuffer(b"".join(digest for _, _, _, digest, _ in kept), ">u8").astype(np.uint64).reshape(-1, 2),
        **beside, origin=np.array([origin for *_, origin in kept], np.int32),
        lines=np.array([value for values in lines for value in values], np.uint64), line_counts=np.array([len(values) for values in lines], np.int64),
        id_hashes=np.array([corpora.id_hash(i) for i, *_ in kept] if config.data.id_key else [], np.uint64),
        report=np.frombuffer(json.dumps({"origins": list(origins), "counts": report.to_dict()}).encode(), np.uint8))
    return len(raw.documents), report.bytes_read


def _label(config: Config, document: corpora.Document) -> str:
    """The label in the form of labels.py, which must go with the text."""
    objective = config.objective.name
    try:
        label = labels.parse(objective, document.label)
    except ValueError as error:
        raise ValueError(f"{document.id}: the label {config.data.label_key!r} {error}; mend or remove it, or set data.on_error=skip") from None
    if objective == "token_classify" and isinstance(document.text, str) and len(document.text.split()) != len(label.split()):
        raise ValueError(f"{document.id}: {len(document.text.split())} words in {config.data.text_key!r} and {len(label.split())} tags in "
                         f"{config.data.label_key!r}; each word needs one")
    return label


def _clean_pair(clean_one: Callable[[corpora.Document], clean.Cleaned], document: corpora.Document) -> clean.Cleaned:
    """Each side is cleaned and judged by itself, and a pair lives if both do; an input may be empty. Its language is that of the target."""
    sides = [clean_one(document._replace(text=side)) if side.strip() or number else clean.Cleaned(side, "", 0.0, "", {})
             for number, side in enumerate(document.text.split(PAIR))]
    read, said = sides
    died = next((side for side in sides if side.removed_by), said)
    rule = died.removed_by or ("" if said.text.strip() else "clean.empty")
    found = {what: read.counts.get(what, 0) + said.counts.get(what, 0) for what in {**read.counts, **said.counts}}
    return clean.Cleaned(f"{read.text}{PAIR}{said.text}", rule, died.value, said.language, found)


def digest_of(config: Config, text: str, label: str = "") -> bytes:
    """16 bytes that tell texts apart; the first 8 decide the split, so those of a pair follow from its input: equal inputs are never apart. Those of a labelled
    text follow from the text alone, the others from its label too: equal texts with other labels are kept, and stay together."""
    whole = dedup.digest(text)
    if config.data.label_key:
        return whole[:8] + dedup.digest(f"{text}\0{label}")[:8]
    return dedup.digest(text.partition(PAIR)[0])[:8] + whole[:8] if config.data.input_key else whole


def sign_batch(config: Config, folder: Path, living: Living) -> tuple[int, int]:
    """Writes `signed/`: of each document that lives the digest, size and MinHash signature of the text without its dead lines."""
    texts = list(texts_of(folder, living, config.dedup.line_length))
    names = [label.decode() for label in labels_of(folder, living)] if config.data.label_key else [""] * len(texts)
    arrays = {
        "digests": np.frombuffer(b"".join(digest_of(config, text, label) for text, label in zip(texts, names)), ">u8").astype(np.uint64).reshape(-1, 2),
        "sizes": np.array([0 if text.isspace() else len(text.encode()) for text in texts], np.int64),
    }
    if config.dedup.near:
        hashes = dedup.MinHash(config.dedup.permutations, config.dedup.shingle)
        signatures = np.array([hashes.signature(text) for text in texts], np.uint32).reshape(-1, config.dedup.permutations)
        keys = dedup.band_keys(signatures, dedup.rows_of_a_band(config.dedup.near, config.dedup.permutations))
        arrays |= {"signatures": signatures} | {f"band{band}": key for band, key in enumerate(keys)}
    _save(name(folder, "signed", living.unit, living.batch), **arrays)
    return len(texts), int(arrays["sizes"].sum())


def tokenise_batch(config: Config, folder: Path, fingerprint: str, living: Living) -> tuple[int, int]:
    """Writes `tokens/` with the tokenizer that lies in `folder/tokenizer` and has this fingerprint: bos, text, eos; of a pair input, eos, target, eos; of a
    chat what its template writes, of a preference that of both chats. `turns`: places where what the assistant says begins and ends, in turn."""
    tok = _tokenizer(folder, fingerprint)
    texts = list(texts_of(folder, living, config.dedup.line_length))
    turns = [np.zeros(0, np.int64)] * len(texts)
    words: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
    if config.objective.name == "token_classify":
        sequences, words, inputs = *words_of(tok, texts), [0] * len(texts)
    elif config.data.input_key and config.data.label_key:
        sides = tok.encode_batch([side for text in texts for side in text.split(PAIR)])
        sequences, inputs = map(list, zip(*(pair_of(tok, a, b) for a, b in zip(sides[::2], sides[1::2])))) if sides else ([], [])
    elif config.data.format != "text":
        chats = [[_template(config, tok).encode_spans(tok, side) for side in conversations.sides(text)] for text in texts]
        sequences = [np.concatenate([ids for ids, _ in sides]) for sides in chats]
        inputs = [len(sides[0][0]) if len(sides) > 1 else 0 for sides in chats]
        turns = [np.flatnonzero(np.diff(np.concatenate([[False], *(said for _, said in sides), [False]]))) for sides in chats]
    elif config.data.input_key:
        sides = tok.encode_batch([side for text in texts for side in text.split(PAIR)])
        sequences = [np.concatenate([read, [tok.eos], said, [tok.eos]]) for read, said in zip(sides[::2], sides[1::2])]
        inputs = [len(read) + 1 for read in sides[::2]]
    else:
        sequences = [np.concatenate([[tok.bos], ids, [tok.eos]]) for ids in tok.encode_batch(texts)]
        inputs = [0] * len(texts)
    sizes = [len(text.encode()) - (len(PAIR) if config.data.input_key else 0) for text in texts]
    tokens = np.concatenate([np.zeros(0, np.int64), *sequences])
    assert not len(tokens) or 0 <= tokens.min() and tokens.max() < tok.vocab_size, "token id out of range"
    _save(name(folder, "tokens", living.unit, living.batch), tokens=tokens.astype(shards.token_dtype(tok.vocab_size)),
          lengths=np.array([len(ids) for ids in sequences], np.int64), inputs=np.array(inputs, np.int64), sizes=np.array(sizes, np.int64),
          words=np.concatenate([np.zeros(0, np.int32), *words]), word_counts=np.array([len(found) for found in words], np.int64),
          turns=np.concatenate([np.zeros(0, np.int64), *turns]), turn_counts=np.array([len(places) for places in turns], np.int64),
          occurrences=np.bincount(tokens.astype(np.int64), minlength=tok.vocab_size))
    return len(texts), sum(sizes)


def pair_of(tok: tokenizer.Tokenizer, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, int]:
    """The tokens of two texts as one sequence, [bos] first [eos] second [eos], RoBERTa with two eos between, and how many come before the second."""
    before = np.concatenate([[tok.bos], first, [tok.eos] * tok.separators])
    return np.concatenate([before, second, [tok.eos]]).astype(np.int64), len(before)


def words_of(tok: tokenizer.Tokenizer, texts: Sequence[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens of texts that are encoded word by word, with bos and eos, and where each word begins among them. A word of no token (there are characters that
    BERT's tokenizers take out) is padding, so that it has a place."""
    split = [text.split() for text in texts]
    encoded = iter(tok.encode_batch([" " * (number > 0) + word for some in split for number, word in enumerate(some)]))
    sequences, begins = [], []
    for some in split:
        parts = [ids if len(ids) else np.array([tok.pad]) for ids in (next(encoded) for _ in some)]
        sequences.append(np.concatenate([[tok.bos], *parts, [tok.eos]]))
        begins.append(np.cumsum([1, *(len(part) for part in parts[:-1])]).astype(np.int32))
    return sequences, begins


def labels_of(folder: Path, living: Living, key: str = "label") -> list[bytes]:
    """Labels (or fields) of the texts of a batch that live, in order."""
    with load(folder, "clean", living.unit, living.batch) as batch:
        found = strings(batch, key)
    return [found[number] for number in np.flatnonzero(bits(living.documents, len(found)))]


def texts_of(folder: Path, living: Living, line_length: int) -> Iterator[str]:
    """The texts of a batch that live, without their dead lines, in order."""
    with load(folder, "clean", living.unit, living.batch) as batch:
        texts, line_ends = strings(batch, "text"), np.concatenate([[0], np.cumsum(batch["line_counts"])])
    lives, dead = bits(living.documents, len(texts)), bits(living.dead_lines, int(line_ends[-1]))
    for number in np.flatnonzero(lives):
        text = texts[number].decode()
        died = dead[line_ends[number]:line_ends[number + 1]]
        yield dedup.without_lines(text, line_length, died) if died.any() else text


def bits(packed: bytes, count: int) -> np.ndarray:
    """bool [count]; of no bytes all are False."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool) if packed else np.zeros(count, bool)


def strings(batch, key: str) -> Sequence[bytes]:
    """Byte strings [n] that were stored as one array and their ends."""
    data, ends = batch[key].tobytes(), batch[f"{key}_ends"].tolist()
    return [data[start:end] for start, end in zip([0, *ends], ends)]


def _pack(key: str, values: Iterable[bytes]) -> dict[str, np.ndarray]:
    values = list(values)
    return {key: np.frombuffer(b"".join(values), np.uint8), f"{key}_ends": np.cumsum([len(value) for value in values], dtype=np.int64)}


def load(folder: Path, stage: str, unit: int, batch: int):
    """Opens what a stage wrote for a batch; arrays are read, and their checksums compared, when they are asked for."""
    return np.load(name(folder, stage, unit, batch), allow_pickle=False)


def _save(path: Path, **arrays: np.ndarray) -> None:
    _replace(path, lambda file: np.savez(file, **arrays))


def _replace(path: Path, write) -> None:
    """The file is there whole or not at all, also after a power cut; several processes may write the same one."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    path.parent.mkdir(exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"writing {path} failed: {error.strerror or error}") from None
        raise


@functools.lru_cache(maxsize=1)
def _cleaner(config: Config):
    return clean.cleaner(config)


@functools.lru_cache(maxsize=1)
def _template(config: Config, tok: tokenizer.Tokenizer) -> chat.Template:
    return chat.template(config.data.chat_template, tok)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, fingerprint: str) -> tokenizer.Tokenizer:
    tok = tokenizer.load(folder / "tokenizer")
    assert tok.fingerprint == fingerprint, "another tokenizer than the one that was trained"
    return tok
