"""From raw text to a prepared corpus: read, split by the text's own hash, train the tokenizer on the training split, write shards.

The same text and config give the same bytes, wherever and whenever; memory does not grow with the corpus, but for some 40 bytes a document.
"""

import dataclasses
import hashlib
import heapq
import json
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import jaxlm
from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import corpora, shards, tokenizer

SPLITS = ("train", "validation", "test")
_BATCH_BYTES = 1 << 20  # of text that is tokenised at a time
_PROGRESS_SECONDS = 5.0


def prepare(data: DataConfig, tokenizer_cfg: TokenizerConfig, folder: str | Path, *, log: Callable[[str], None] = print) -> shards.Corpus:
    """Prepares `data.source` in `folder`, or opens what was prepared there from the same config.

    Args:
      data: what to read and how to split it.
      tokenizer_cfg: the tokenizer to train or to load.
      folder: made whole or not at all; not there yet, empty, or prepared from the same config.
      log: receives progress, a line at a time.

    Raises:
      ValueError: one line: bad input (see `corpora.documents`), nothing to train on, or a folder that holds something else.
      OSError: the disk is full or must not be written.
    """
    folder = Path(folder)
    made_from = _made_from(data, tokenizer_cfg)
    if (folder / shards.MANIFEST).exists():
        return _reuse(folder, made_from, data, log)
    with shards.replacing(folder) as temporary:
        started = time.monotonic()
        tok = make_tokenizer(data, tokenizer_cfg, log=log)
        writers = {split: shards.ShardWriter(temporary, split, tok.vocab_size, data.shard_bytes, corpora.sources(data)) for split in SPLITS}
        progress = _Progress("tokenised", log)
        dropped, id_hashes = 0, array("Q")
        for batch in _batches(_documents(data)):
            kept = [(document, split, size) for document, split, size in map(lambda d: (d, *_place(d.text, data)), batch) if size]
            dropped += len(batch) - len(kept)
            if data.id_key:
                id_hashes.extend(corpora.id_hash(document.id) for document in batch)
            for (document, split, size), ids in zip(kept, tok.encode_batch([document.text for document, _, _ in kept])):
                writers[split].add(document.id, np.concatenate([[tok.bos], ids, [tok.eos]]), size, document.source, document.licence)
            progress.add(len(kept), sum(size for _, _, size in kept))
        corpora.check_ids(np.array(id_hashes, np.uint64), data)
        manifest = {
            "jaxlm": jaxlm.__version__,
            "made_from": made_from,
            "source": corpora.size_on_disk(data),
            "empty_documents_dropped": dropped,
            "tokenizer": shards.file_entry(tok.save(temporary)) | {k: getattr(tok, k) for k in ("kind", "vocab_size", "bos", "eos", "pad")},
            "splits": {split: writer.close() for split, writer in writers.items()},
        }
        _need_training_text(manifest["splits"], data)
        shards.write_manifest(temporary, manifest)
    log(summary(manifest))
    log(f"prepared {folder} in {time.monotonic() - started:.1f} s")
    return shards.open_corpus(folder)


def make_tokenizer(data: DataConfig, cfg: TokenizerConfig, *, log: Callable[[str], None] = print) -> tokenizer.Tokenizer:
    """The tokenizer of a config: bytes, a file, or one trained on at most `cfg.train_bytes` of the training split.

    Where there is more text than that, the training documents with the smallest hashes are taken: a fair sample of all files.
    """
    if cfg.kind == "bytes":
        return tokenizer.train((), cfg)
    if cfg.path:
        return tokenizer.load(Path(cfg.path).expanduser())
    started = time.monotonic()
    counts = dict.fromkeys(SPLITS, 0)
    progress = _Progress("read", log)
    sample, sample_bytes = [], 0  # a heap: the largest hash on top
    for order, document in enumerate(_documents(data)):
        split, size = _place(document.text, data)
        progress.add(1, size)
        counts[split] += size > 0
        if split != "train" or not size:
            continue
        heapq.heappush(sample, (-_fraction(document.text, 8), order, size, document.text))
        sample_bytes += size
        while sample_bytes > cfg.train_bytes and len(sample) > 1:
            sample_bytes -= heapq.heappop(sample)[2]
    _need_training_text({split: {"documents": count} for split, count in counts.items()}, data)
    tok = tokenizer.train((text for _, _, _, text in sorted(sample, key=lambda item: item[1])), cfg)
    log(f"tokenizer: {cfg.kind}, {tok.vocab_size} pieces, trained on {sample_bytes / 1e6:.1f} MB in {time.monotonic() - started:.1f} s")
    return tok


def summary(manifest: Mapping[str, Any]) -> str:
    """A table of the splits."""
    lines = [f"{'split':<10} {'documents':>12} {'text bytes':>16} {'tokens':>16} {'bytes/token':>12} {'shards':>7}"]
    for name, split in manifest["splits"].items():
        ratio = split["text_bytes"] / max(split["tokens"] - 2 * split["documents"], 1)
        counts = f"{split['documents']:>12,} {split['text_bytes']:>16,} {split['tokens']:>16,}"
        lines.append(f"{name:<10} {counts} {ratio:>12.2f} {len(split['shards']):>7,}")
    if manifest["empty_documents_dropped"]:
        lines.append(f"dropped: {manifest['empty_documents_dropped']:,} empty documents")
    return "\n".join(lines)


def _made_from(data: DataConfig, cfg: TokenizerConfig) -> dict[str, Any]:
    keys = ("source", "text_key", "id_key", "licence_key", "licences", "on_error", "validation", "test", "shard_bytes")
    made_from = {f"data.{key}": getattr(data, key) for key in keys}
    made_from |= {f"tokenizer.{key}": value for key, value in dataclasses.asdict(cfg).items()}
    return json.loads(json.dumps(made_from))  # as the manifest gives it back


def _reuse(folder: Path, made_from: Mapping[str, Any], data: DataConfig, log: Callable[[str], None]) -> shards.Corpus:
    corpus = shards.open_corpus(folder)
    old = corpus.manifest["made_from"]
    changes = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in made_from.items() if old.get(key) != value]
    file = Path(made_from["tokenizer.path"]).expanduser()
    if not changes and file.is_file() and tokenizer.load(file).fingerprint != corpus.manifest["tokenizer"]["sha256"]:
        changes = [f"tokenizer.path: {file} has changed"]
    if changes:
        raise ValueError(f"{folder} was prepared from another config ({'; '.join(changes)}): choose another data.dir, or delete it")
    log(f"using the corpus prepared in {folder}")
    try:
        now = corpora.size_on_disk(data)
    except ValueError:  # shards may be used where the raw text is not
        return corpus
    if now != corpus.manifest["source"]:
        before = corpus.manifest["source"]
        log(f"note: the source has changed since then ({before['files']} files, {before['bytes']:,} bytes -> {now['files']} files, "
            f"{now['bytes']:,} bytes); delete {folder} to prepare it again")
    return corpus


def _need_training_text(splits: Mapping[str, Mapping[str, int]], data: DataConfig) -> None:
    counts = {name: split["documents"] for name, split in splits.items()}
    if not sum(counts.values()):
        raise ValueError(f"data.source={list(data.source)} holds no text: every document is empty")
    if not counts["train"]:
        raise ValueError(f"no training document: all {sum(counts.values())} fell to validation ({counts['validation']}) and test "
                         f"({counts['test']}); give more documents, or lower data.validation and data.test")


def _place(text: str, data: DataConfig) -> tuple[str, int]:
    """The split of a document, by its text alone so that equal texts are never apart, and its size as UTF-8; size 0 if it is blank."""
    if not text or text.isspace():
        return "train", 0
    share = _fraction(text, 0)
    return "test" if share < data.test else "validation" if share < data.test + data.validation else "train", len(text.encode())


def _fraction(text: str, offset: int) -> float:
    """Eight bytes of the text's sha256 as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[offset:offset + 8], "big") / 2**64


def _documents(data: DataConfig) -> Iterator[corpora.Document]:
    for document in corpora.documents(data):
        if isinstance(document.text, bytes) or document.html:
            raise ValueError(f"{document.id}: {'HTML' if document.html else 'not UTF-8'}, which cannot be read yet: convert it")
        yield document


def _batches(documents: Iterator[corpora.Document]) -> Iterator[list[corpora.Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Progress:
    def __init__(self, verb: str, log: Callable[[str], None]):
        self._verb, self._log, self._documents, self._bytes = verb, log, 0, 0
        self._started = self._shown = 0.0

    def add(self, documents: int, size: int) -> None:
        self._documents += documents
        self._bytes += size
        now = time.monotonic()
        self._started = self._started or now  # with the first documents: the standard library takes seconds to parse
        self._shown = self._shown or now
        if now - self._shown >= _PROGRESS_SECONDS:
            seconds, self._shown = now - self._started, now
            self._log(f"{self._verb} {self._documents:,} documents, {self._bytes / 1e6:,.1f} MB "
                      f"({self._documents / seconds:,.0f} documents/s, {self._bytes / seconds / 1e6:.1f} MB/s)")
