"""Text to token ids and back: SentencePiece (unigram or BPE) with byte fallback, or plain UTF-8 bytes. Home of sentencepiece.

`decode(encode(text)) == text` holds for every text with the tokenizers that are trained here. A tokenizer is its file's bytes: they lie
beside the shards and in every checkpoint, and their sha256 is the tokenizer's fingerprint.
"""

import codecs
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from jaxlm.config import TokenizerConfig

_BYTES_FILE = b'{"kind": "bytes"}\n'
_SPACE = "\u2581"  # SentencePiece's stand-in for the space; as a character of the text it is spelled in bytes
_UNKNOWN = " \u2047 "  # how SentencePiece prints what a tokenizer without byte fallback could not encode
# Trainer input: no line ends (a symbol of their own), nothing that it refuses (NUL, U+2585), at most 4,000 bytes (its limit is 4,192).
_SENTENCE = re.compile("[^\n\0\u2585]{1,1000}(?= )|[^\n\0\u2585]{1,1000}")


@dataclass(frozen=True)
class Tokenizer:
    """Ids are in [0, vocab_size). `bos`, `eos` and `pad` are never the result of `encode` and decode to nothing."""

    model: bytes = field(repr=False)  # the file, as written by `save`
    kind: Literal["sentencepiece", "bytes"]
    vocab_size: int
    bos: int
    eos: int
    pad: int
    _processor: sentencepiece.SentencePieceProcessor | None = field(default=None, repr=False, compare=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.model).hexdigest()

    @property
    def filename(self) -> str:
        return "tokenizer.json" if self.kind == "bytes" else "tokenizer.model"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array for each text; SentencePiece uses all cores.

        Raises:
          ValueError: a text has half of a surrogate pair, as a command-line argument that is not UTF-8 has.
        """
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has no UTF-8 form: character {error.start} ({error.object[error.start]!r}) is half of a surrogate "
                             "pair") from None
        if self.kind == "bytes":
            return [np.frombuffer(text, np.uint8).astype(np.int32) for text in encoded]
        ids = self._processor.encode(list(texts), num_threads=-1)
        for i, text in enumerate(texts):
            if _SPACE in text and self._space:
                ids[i] = self._encode_spelled(text)
        return [np.array(row, np.int32) for row in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8, which a model may well produce, become U+FFFD."""
        return self.stream_decoder()(ids, final=True)

    def stream_decoder(self) -> Callable[..., str]:
        """A function `(ids, final=False) -> str` that decodes a sequence in parts, holding back the bytes of an unfinished character."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        table, strip = self._table, self._adds_space

        def decode(ids: Iterable[int], final: bool = False) -> str:
            nonlocal strip
            data = b"".join(table[i] if 0 <= i < len(table) else b"" for i in ids)  # a model's vocabulary may be padded
            if strip and data:
                data, strip = data.removeprefix(b" "), False
            return utf8.decode(data, final)

        return decode

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id as people can read it: the piece with its spaces, <0x0A> for a byte, <s> for a special token."""
        if self.kind == "sentencepiece":
            return [self._processor.id_to_piece(int(i)).replace(_SPACE, " ") for i in ids]
        names = {self.pad: "<pad>", self.bos: "<s>", self.eos: "</s>"}
        return [names.get(i) or (chr(i) if 32 <= i < 127 else f"<0x{i:02X}>") for i in ids]

    def save(self, folder: str | Path) -> Path:
        """Writes tokenizer.model or tokenizer.json and returns its path."""
        path = Path(folder) / self.filename
        path.write_bytes(self.model)
        return path

    @functools.cached_property
    def _table(self) -> tuple[bytes, ...]:
        """The bytes that each id stands for."""
        if self.kind == "bytes":
            return *(bytes([i]) for i in range(256)), b"", b"", b""
        sp = self._processor
        return tuple(
            bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else b"" if sp.is_control(i) else _UNKNOWN.encode() if sp.is_unknown(i)
            else piece.replace(_SPACE, " ").encode() for i, piece in enumerate(map(sp.id_to_piece, range(sp.vocab_size()))))

    @functools.cached_property
    def _space(self) -> list[int]:
        """The bytes of U+2581 as ids; empty where the tokenizer has no byte fallback."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        return ids if all(map(self._processor.is_byte, ids)) else []

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before the text (not one of ours)."""
        return self.kind == "sentencepiece" and self._processor.encode("a", out_type=str)[0].startswith(_SPACE)

    def _encode_spelled(self, text: str) -> list[int]:
        """SentencePiece takes U+2581 in a text for a space, so it is encoded around it."""
        parts = self._processor.encode(text.split(_SPACE))
        return [i for k, part in enumerate(parts) for i in ((self._space if k else []) + part)]


def train(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """Trains a tokenizer on the first `cfg.train_bytes` of `texts`; the same on every machine. `cfg.path` is not looked at.

    Raises:
      ValueError: one line: no text, a vocabulary that is too large or too small for it, an impossible special token.
    """
    if cfg.kind == "bytes":
        return from_bytes(_BYTES_FILE)
    reserved = ("", "\n", "<unk>", "<s>", "</s>", "<pad>")
    for token in cfg.special_tokens:
        if token in reserved or cfg.special_tokens.count(token) > 1 or _SPACE in token or " " in token:
            raise ValueError(f"tokenizer.special_tokens: {token!r} is reserved, empty, there twice or has a space")
    size, failures, model = 0, [], io.BytesIO()

    def sentences() -> Iterator[str]:
        nonlocal size
        try:
            for text in texts:
                for match in _SENTENCE.finditer(text):
                    size += len(match[0].encode())
                    if size > cfg.train_bytes:
                        return
                    yield match[0]
        except Exception as error:  # the trainer would turn it into a RuntimeError
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, model_type=cfg.kind, vocab_size=cfg.vocab_size,
            user_defined_symbols=["\n", *cfg.special_tokens], byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            num_threads=16,  # the order in which the unigram trainer adds up depends on it, so it is not the number of cores
            minloglevel=2)
    except (RuntimeError, SystemError) as error:
        if failures:
            raise failures[0] from None
        raise ValueError(_trainer_error(str(error), cfg, size)) from None
    return from_bytes(model.getvalue())


def _trainer_error(message: str, cfg: TokenizerConfig, size: int) -> str:
    if not size:
        return "there is no text to train a tokenizer on"
    largest = re.search(r"set it to a value <= (\d+)", message)
    if largest:
        change = f"set tokenizer.vocab_size={largest[1]}" if int(largest[1]) >= 300 else "set tokenizer.kind=bytes"
        return (f"tokenizer.vocab_size={cfg.vocab_size} is too large for {size} bytes of text, from which {largest[1]} is the most: "
                f"{change} or give more text")
    least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if least:
        return (f"tokenizer.vocab_size={cfg.vocab_size} is too small for the characters of this text: "
                f"set tokenizer.vocab_size={least[1]} or more")
    return f"SentencePiece could not train the tokenizer: {' '.join(message.split())}"


def from_bytes(model: bytes, name: str = "the tokenizer") -> Tokenizer:
    """The tokenizer whose file has these bytes; `name` is for the error message."""
    if model.strip() == _BYTES_FILE.strip():
        return Tokenizer(model, "bytes", vocab_size=259, pad=256, bos=257, eos=258)
    if model.lstrip()[:1] == b"{":
        kind = "Hugging Face's tokenizer.json" if b'"model"' in model else "JSON"
        raise ValueError(f"{name} is {kind}, not a SentencePiece model or {json.dumps(json.loads(_BYTES_FILE))}")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        processor = None
    if not model or processor is None:
        raise ValueError(f"{name} is not a SentencePiece model ({len(model)} bytes)")
    eos = processor.eos_id()
    if eos < 0:
        raise ValueError(f"{name} has no end-of-text token (eos), which must follow every document")
    bos, pad = processor.bos_id(), processor.pad_id()
    return Tokenizer(model, "sentencepiece", processor.vocab_size(), bos=bos if bos >= 0 else eos, eos=eos, pad=pad if pad >= 0 else eos,
                     _processor=processor)


def load(path: str | Path) -> Tokenizer:
    """Reads a .model or .json file, or the one in a folder."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if len(found) != 1:
            raise ValueError(f"{path} must hold tokenizer.model or tokenizer.json, one of them; it holds {'both' if found else 'neither'}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path}: there is no such tokenizer file")
    return from_bytes(path.read_bytes(), str(path))
