"""Text to token ids and back: SentencePiece (unigram or BPE), any tokenizer of Hugging Face, or plain UTF-8 bytes.

`decode(encode(text)) == text` holds for every text with the tokenizers that are trained here. A tokenizer is its file's bytes: they lie
beside the shards and in every checkpoint, and their sha256 is the tokenizer's fingerprint. What came from a Hugging Face folder is kept as
the folder's own files inside that one file (chat template and special tokens among them) and is written back as they were.

Home of sentencepiece and of tokenizers, which is imported where it is used: pip install 'jaxlm[hf]'.
"""

import base64
import codecs
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from jaxlm.config import TokenizerConfig
from jaxlm.data import sums, tokenizer_json
from jaxlm.data.tokenizer_json import SPACE, Piece

_BYTES_FILE = b'{"kind": "bytes"}\n'
_BYTES_FRAME = {"pad": 256, "bos": 257, "eos": 258}
_BYTES_SPECIAL = {"<pad>": 256, "<s>": 257, "</s>": 258}
_HOLDER = "tokenizer.hf.json"  # holds the files of a Hugging Face folder
_DESCRIPTIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_MODELS = ("tokenizer.model", "spiece.model")  # SentencePiece
# What a folder may hold, the first found is used.
_VOCABULARIES = ((_HOLDER,), ("tokenizer.json",), *((name,) for name in _MODELS), ("vocab.json", "merges.txt"), ("vocab.txt",))
_FILES = frozenset(name for names in _VOCABULARIES[1:] for name in names) | frozenset(_DESCRIPTIONS)  # all that is ever kept and written
_LIMIT = 512 * 2**20  # bytes of a tokenizer's file; the largest published ones have some 40 MB
_UNKNOWN = " \u2047 "  # how SentencePiece prints what a tokenizer without byte fallback could not encode
# Trainer input: no line ends (a symbol of their own), nothing that it refuses (NUL, U+2585), at most 4,000 bytes (its limit is 4,192).
_SENTENCE = re.compile("[^\n\0\u2585]{1,1000}(?= )|[^\n\0\u2585]{1,1000}")


@dataclass(frozen=True)
class Tokenizer:
    """Ids are in [0, vocab_size). A text that only looks like `bos`, `eos`, `pad` or another special token is text: `encode` never returns
    these ids unless it is told to. They decode to nothing."""

    model: bytes = field(repr=False)  # the file, as written by `save`
    kind: Literal["sentencepiece", "bytes", "huggingface"]
    vocab_size: int
    bos: int
    eos: int
    pad: int
    adds_bos: bool = True  # whether the model saw bos before each text, so that a prompt should begin with it
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)  # of the Hugging Face folder it came from
    _processor: Any = field(default=None, repr=False, compare=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model's bytes, hex."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def filename(self) -> str:
        """The name of its file, by its kind."""
        return "tokenizer.json" if self.kind == "bytes" else _HOLDER if self.model[:1] == b"{" else "tokenizer.model"

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of every token that stands for no text."""
        if self.kind == "bytes":
            return dict(_BYTES_SPECIAL)
        if self.kind == "sentencepiece":
            sp = self._processor
            return {sp.id_to_piece(i): i for i in range(sp.vocab_size()) if sp.is_control(i)}
        return tokenizer_json.special_tokens(self.tree())

    @functools.cached_property
    def separators(self) -> int:
        """How often `eos` stands between the two texts of a pair."""
        return tokenizer_json.separators(self.tree().get("post_processor")) if self.kind == "huggingface" else 1

    @functools.cached_property
    def chat_template(self) -> str:
        """The Jinja text that came with the tokenizer, empty if none did. It is carried, not run."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        template = _names(self.files, "the tokenizer").get("chat_template")
        if isinstance(template, list):
            template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}.get("default")
        return template if isinstance(template, str) else ""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without bos and eos."""
        return self.encode_batch([text], special)[0].tolist()

    def encode_batch(self, texts: Sequence[str], special: bool = False, threads: int = -1) -> list[np.ndarray]:
        """One int32 array for each text; SentencePiece and tokenizers use all cores.

        Args:
          special: special tokens spelled out in the texts become their ids. Only for texts of one's own making, such as a filled-in chat
            template: in text from outside they would let anybody end a document.

        Raises:
          ValueError: a text has half of a surrogate pair, as a command-line argument that is not UTF-8 has.
        """
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has no UTF-8 form: character {error.start} ({error.object[error.start]!r}) is half of a surrogate "
                             "pair") from None
        if self.kind == "huggingface":
            run = self._parsing if special else self._processor
            rows = _tried(lambda: run.encode_batch(list(texts), add_special_tokens=False), "the tokenizer cannot encode this text")
            return [np.array(row.ids, np.int32) for row in rows]
        if special:
            return [self._encode_special(text) for text in texts]
        if self.kind == "bytes":
            return [np.frombuffer(text, np.uint8).astype(np.int32) for text in encoded]
        ids = self._processor.encode(list(texts), num_threads=threads)
        for i, text in enumerate(texts):
            if SPACE in text and self._space:
                ids[i] = self._encode_spelled(self._processor, text)
        return [np.array(row, np.int32) for row in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8, which a model may well produce, become U+FFFD."""
        return self.stream_decoder()(ids, final=True)

    def stream_decoder(self) -> Callable[..., str]:
        """A function `(ids, final=False) -> str` that decodes a sequence in parts, holding back the bytes of an unfinished character."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        table, strip = self._table

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
            size = self._processor.vocab_size()
            return [self._processor.id_to_piece(int(i)).replace(SPACE, " ") if 0 <= i < size else f"<{i}>" for i in ids]
        names = {i: text for text, i in self.special_tokens.items()}
        if self.kind == "bytes":
            return [names.get(i) or (chr(i) if 32 <= i < 127 else f"<0x{i:02X}>") for i in ids]
        return [names.get(i) or _readable(self._table[0][i] if 0 <= i < self.vocab_size else b"") or f"<{i}>"
                for i in map(int, ids)]

    def save(self, folder: str | Path) -> Path:
        """Writes the tokenizer's one file, whose name begins with "tokenizer.", and returns its path."""
        path = Path(folder) / self.filename
        path.write_bytes(self.model)
        return path

    def write_huggingface(self, folder: str | Path) -> list[Path]:
        """Writes the files that `transformers.AutoTokenizer.from_pretrained` loads, with the same ids for a text; returns their paths.

        Files that came from Hugging Face are written as they were, and what `transformers` also wants is added. It takes special tokens
        in any text for what they are called, and with a SentencePiece model the character U+2581 for a space: there its ids differ.
        """
        files = dict(self.files)
        if self.kind == "sentencepiece" and not files.keys() & set(_MODELS):
            files["tokenizer.model"] = self._processor.serialized_model_proto()
        if "tokenizer.json" not in files:
            files["tokenizer.json"] = json.dumps(self.tree(), ensure_ascii=False).encode()
        if "tokenizer_config.json" not in files:
            names = {i: text for text, i in tokenizer_json.vocabulary(self.tree()).items()}
            special = {"bos_token": names[self.bos], "eos_token": names[self.eos], "pad_token": names[self.pad]}
            files["special_tokens_map.json"] = _pretty(special)
            files["tokenizer_config.json"] = _pretty({
                "tokenizer_class": "PreTrainedTokenizerFast", **special, "add_bos_token": self.adds_bos, "clean_up_tokenization_spaces": False})
        paths = [Path(folder) / name for name in files]
        for path in paths:
            path.write_bytes(files[path.name])
        return paths

    def tree(self) -> dict[str, Any]:
        """The tokenizer as Hugging Face's tokenizer.json."""
        if self.kind == "bytes":
            return tokenizer_json.plain_bytes(_BYTES_SPECIAL)
        if self.kind == "huggingface":
            return _tree(self.files, self.vocab_size, _names(self.files, "the tokenizer"), "the tokenizer")[0]
        pieces, settings = self.sentencepiece()
        bos, eos = ((pieces[i].text, i) for i in (self.bos, self.eos))
        return tokenizer_json.from_pieces(pieces, **settings, before=[bos] if self.adds_bos else [], after=[] if self.adds_bos else [eos])

    def sentencepiece(self) -> tuple[list[Piece], dict[str, Any]]:
        """The pieces of a SentencePiece tokenizer and the settings with which `from_pieces` makes it."""
        assert self.kind == "sentencepiece"
        proto = _proto(self._processor.serialized_model_proto())
        normal = proto.normalizer_spec
        return [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces], {
            "bpe": proto.trainer_spec.model_type == 2, "add_space": normal.add_dummy_prefix, "squeeze": normal.remove_extra_whitespaces,
            "charsmap": base64.b64encode(normal.precompiled_charsmap).decode()}

    @functools.cached_property
    def _table(self) -> tuple[tuple[bytes, ...], bool]:
        """The bytes that each id stands for, and whether a first space is not part of the text."""
        if self.kind == "bytes":
            return (*(bytes([i]) for i in range(256)), b"", b"", b""), False
        if self.kind == "huggingface":
            return tokenizer_json.byte_table(self.tree(), self.vocab_size)
        sp = self._processor
        return tuple(
            bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else b"" if sp.is_control(i) else _UNKNOWN.encode() if sp.is_unknown(i)
            else piece.replace(SPACE, " ").encode() for i, piece in enumerate(map(sp.id_to_piece, range(sp.vocab_size())))
        ), sp.encode("a", out_type=str)[0].startswith(SPACE)

    @functools.cached_property
    def begins_word(self) -> np.ndarray:
        """Whether each id begins a word, as its text begins with a space or another blank (or, WordPiece, has no ##): bool [vocab_size]."""
        if self.kind == "huggingface" and self.tree()["model"].get("type") == "WordPiece":
            prefix, texts = self.tree()["model"].get("continuing_subword_prefix", "##"), tokenizer_json.vocabulary(self.tree())
            found = np.ones(self.vocab_size, bool)
            found[[i for text, i in texts.items() if text.startswith(prefix)]] = False
            return found
        return np.array([piece[:1].isspace() for piece in self._table[0]])

    @functools.cached_property
    def _space(self) -> list[int]:
        """The bytes of U+2581 as ids; empty where the tokenizer has no byte fallback."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return ids if all(map(self._processor.is_byte, ids)) else []

    @functools.cached_property
    def _parsing(self) -> Any:
        """The `tokenizers` object that finds special tokens in texts."""
        return _run(self.tree(), "the tokenizer")

    def _encode_spelled(self, processor: Any, text: str) -> list[int]:
        """SentencePiece takes U+2581 in a text for a space, so it is encoded around it."""
        parts = processor.encode(text.split(SPACE) if self._space else [text])
        return [i for k, part in enumerate(parts) for i in ((self._space if k else []) + part)]

    def _encode_special(self, text: str) -> np.ndarray:
        """Encodes the text around its special tokens, the longest first; only the very beginning gets SentencePiece's extra space."""
        names = sorted(self.special_tokens, key=len, reverse=True)
        first, *rest = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = self.encode(first)
        for name, part in zip(rest[::2], rest[1::2]):
            ids += [self.special_tokens[name], *(self._encode_spelled(self._without_space, part) if self.kind == "sentencepiece" else part.encode())]
        return np.array(ids, np.int32)

    @functools.cached_property
    def _without_space(self) -> Any:
        """The SentencePiece processor that puts no space before a text."""
        proto = _proto(self._processor.serialized_model_proto())
        proto.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString(deterministic=True))


def train(texts: Iterable[str], cfg: TokenizerConfig) -> Tokenizer:
    """Trains a tokenizer on the first `cfg.train_bytes` of `texts`; the same on every machine. `cfg.path` is not looked at.

    Raises:
      ValueError: one line: no text, a vocabulary that is too large or too small for it, an impossible special token.
    """
    if cfg.kind == "bytes":
        return from_bytes(_BYTES_FILE)
    reserved = ("", "\n", "<unk>", "<s>", "</s>", "<pad>")
    for token in cfg.special_tokens:
        if token in reserved or cfg.special_tokens.count(token) > 1 or SPACE in token or " " in token:
            raise ValueError(f"tokenizer.special_tokens: {token!r} is reserved, empty, there twice or has a space")
    sentinels = [f"<extra_id_{i}>" for i in range(cfg.sentinels)]
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
            user_defined_symbols=["\n", *cfg.special_tokens], control_symbols=sentinels, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
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
    """The tokenizer whose file has these bytes: a SentencePiece model, a tokenizer.json, or what `save` wrote; `name` is for the error message.

    Raises:
      ValueError: one line: it is none of these, it is damaged, or it has no end-of-text token.
    """
    if model.strip() == _BYTES_FILE.strip():
        return Tokenizer(model, "bytes", vocab_size=259, **_BYTES_FRAME)
    if model.lstrip()[:1] != b"{":
        return from_files({"tokenizer.model": model}, name=name)
    tree = _json(model, name)
    if "model" in tree:
        return from_files({"tokenizer.json": model}, name=name)
    try:
        files = {str(key): base64.b64decode(value["base64"], validate=True) if isinstance(value, dict) else value.encode()
                 for key, value in tree["files"].items()}
        size = int(tree.get("vocab_size", 0))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise ValueError(f"{name} is JSON, but neither Hugging Face's tokenizer.json nor {_BYTES_FILE.decode().strip()}") from None
    return from_files(files, vocab_size=size, name=name)


def load(path: str | Path, vocab_size: int = 0) -> Tokenizer:
    """Reads a tokenizer's file, or looks for it in a folder; in a Hugging Face folder its other files are taken along.

    Args:
      path: a file, or a folder with one of tokenizer.json, a SentencePiece tokenizer.model or spiece.model, vocab.json and merges.txt
        (byte-level BPE), vocab.txt (WordPiece); the first found in this order is used.
      vocab_size: rows of the model's embedding; special tokens beyond them, of which the model knows nothing, are left out. 0: none are.

    Raises:
      ValueError: one line: nothing there, or not a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        folder = path
        chosen = next((names for names in _VOCABULARIES if all((folder / name).is_file() for name in names)), None)
        if chosen is None:
            raise ValueError(f"{path} holds no tokenizer; looked for {', '.join(' with '.join(names) for names in _VOCABULARIES[1:])}")
    else:
        folder, chosen = path.parent, next((names for names in _VOCABULARIES if path.name in names), (path.name,))
    for name in chosen:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: there is no such tokenizer file")
    sums.check(folder, lambda name: name in chosen)
    files = {name: _read(folder / name) for name in chosen}
    first = files[chosen[0]]
    bytes_too = first.strip() == _BYTES_FILE.strip()
    if bytes_too and path.is_dir() and (path / "tokenizer.model").is_file():
        raise ValueError(f"{path} holds both tokenizer.model and a tokenizer.json for plain bytes: give one of the files")
    if bytes_too or chosen == (_HOLDER,) or chosen not in _VOCABULARIES or (chosen == ("tokenizer.json",) and b'"model"' not in first):
        return from_bytes(first, str(folder / chosen[0]))
    beside = (*_DESCRIPTIONS, *(_MODELS if chosen == ("tokenizer.json",) else ()))
    sums.check(folder, lambda name: name in beside)
    return from_files(files | {name: _read(folder / name) for name in beside if (folder / name).is_file()}, vocab_size=vocab_size, name=str(path))


def from_files(files: Mapping[str, bytes], *, vocab_size: int = 0, name: str = "the tokenizer") -> Tokenizer:
    """The tokenizer of a Hugging Face folder, whose files are given as bytes by name; see `load`."""
    strange = next((key for key in files if key not in _FILES), None)
    if strange is not None:  # it would be written to that path by an export
        raise ValueError(f"{name} holds the file {strange[:60]!r}, which is none of a tokenizer's ({', '.join(sorted(_FILES))}): do not trust it")
    names = _names(files, name)
    model = next((key for key in _MODELS if key in files), None)
    if "tokenizer.json" not in files and model is not None:
        return _from_sentencepiece(files, model, names, name)
    files = dict(files)
    if not files.keys() & {"tokenizer.json", "vocab.json", "vocab.txt"}:
        raise ValueError(f"{name} holds none of the files of a tokenizer, only {', '.join(files) or 'nothing'}")
    try:
        if "vocab.json" in files and "tokenizer.json" not in files:
            files["tokenizer.json"] = _pretty(_byte_level_tree(files, names, name))
        elif "vocab.txt" in files and "tokenizer.json" not in files:
            files["tokenizer.json"] = _pretty(_word_piece_tree(files["vocab.txt"], names))
        tree, size, frame = _tree(files, vocab_size, names, name)
        tokenizer_json.byte_table(tree, 0)  # refuses what could not be decoded
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name} is not a tokenizer that can be used: {error}") from None
    processor = _run(tokenizer_json.without_special(tree), name)
    processor.encode_special_tokens = True
    held = _hold("huggingface", files, vocab_size)
    return Tokenizer(held, "huggingface", size, **frame._asdict(), files=files, _processor=processor)


def from_pieces(pieces: Sequence[Piece], *, bpe: bool, add_space: bool, squeeze: bool = False, charsmap: bytes = b"", bos: int, eos: int, pad: int,
                files: Mapping[str, bytes] = {}) -> Tokenizer:
    """A SentencePiece tokenizer from its vocabulary, as a GGUF file has it.

    Args:
      pieces: in order of ids.
      bpe: merges by score; else unigram.
      add_space: put a space before the text.
      squeeze: drop spaces at the ends and make one of several.
      charsmap: SentencePiece's compiled normalisation table.
      bos, eos, pad: ids; -1: there is none.
      files: descriptions to carry, such as tokenizer_config.json.
    """
    proto = _proto(b"")
    proto.pieces.extend([type(proto).SentencePiece(piece=piece.text, score=piece.score, type=piece.type) for piece in pieces])
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == 2), 0)
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = 2 if bpe else 1, len(pieces), any(piece.type == 6 for piece in pieces)
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id, spec.unk_piece = unknown, bos, eos, pad, pieces[unknown].text
    for key, i in (("bos_piece", bos), ("eos_piece", eos), ("pad_piece", pad)):
        if i >= 0:
            setattr(spec, key, pieces[i].text)
    normal.name, normal.add_dummy_prefix, normal.remove_extra_whitespaces = "identity", add_space, squeeze
    normal.precompiled_charsmap = charsmap
    return from_files({"tokenizer.model": proto.SerializeToString(deterministic=True), **files})


def _read(path: Path) -> bytes:
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than the {_LIMIT:,} that a tokenizer's file may have")
    return path.read_bytes()


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON, or not all of it ({len(data)} bytes): {str(error) or type(error).__name__}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{name} is JSON, but not a tokenizer: it holds a {type(tree).__name__}")
    return tree


def _pretty(tree: Any) -> bytes:
    return (json.dumps(tree, ensure_ascii=False, indent=1) + "\n").encode()


def _hold(kind: str, files: Mapping[str, bytes], vocab_size: int = 0) -> bytes:
    """Files of a Hugging Face folder as one, the same bytes for the same files."""
    texts = {name: {"base64": base64.b64encode(data).decode()} if name in _MODELS else data.decode() for name, data in sorted(files.items())}
    return _pretty({"kind": kind, "vocab_size": vocab_size, "files": texts})


def _names(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """special_tokens_map.json and tokenizer_config.json in one; what is null counts as absent."""
    names: dict[str, Any] = {}
    for key in ("special_tokens_map.json", "tokenizer_config.json"):
        if key in files:
            names |= {k: v for k, v in _json(files[key], f"{key} of {name}").items() if v is not None}
    return names


def _run(tree: Mapping[str, Any], name: str) -> Any:
    """The tree as an object of the `tokenizers` package that neither cuts nor pads."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{name} needs the package tokenizers: pip install 'jaxlm[hf]'") from None
    refused = f"{name} is not a tokenizer that can be used"
    run = _tried(lambda: tokenizers.Tokenizer.from_str(json.dumps(tree)), refused)
    run.no_truncation()
    run.no_padding()
    _tried(lambda: run.encode("A text\n with \u0378, which no vocabulary has."), refused)
    return run


def _tried(work: Callable[[], Any], refused: str) -> Any:
    """What `work` returns; whatever the package `tokenizers` says of a file or a text as one line that begins with `refused`."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust code is not an Exception
        raise ValueError(f"{refused}: {' '.join(str(error).split())[:300]}") from None


def _tree(files: Mapping[str, bytes], vocab_size: int, names: Mapping[str, Any], name: str) -> tuple[dict[str, Any], int, tokenizer_json.Framing]:
    """tokenizer.json with its framing tokens special, the size of its vocabulary, and the framing."""
    tree, size = _without_tokens_beyond(_json(files["tokenizer.json"], name), vocab_size)
    frame = tokenizer_json.framing(tree, names)
    return tokenizer_json.with_special(tree, frame[:3]), size, frame


def _without_tokens_beyond(tree: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], int]:
    """The tree without special tokens whose id is `vocab_size` or more, and the size of its vocabulary."""
    size = max(tokenizer_json.vocabulary(tree).values()) + 1
    if not vocab_size or size <= vocab_size:
        return tree, size
    tree = tree | {"added_tokens": [token for token in tree["added_tokens"] if token["id"] < vocab_size or not token.get("special")]}
    size = max(tokenizer_json.vocabulary(tree).values()) + 1
    if size > vocab_size:
        raise ValueError(f"it has {size} tokens, but the model's embedding has {vocab_size} rows")
    return tree, size


def _readable(piece: bytes) -> str:
    """The text of a piece, or its bytes as <0xE2> if they are a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in piece)


def _token_text(value: Any) -> str:
    """The text of a special token, however it is described; "" where it has none."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def _byte_level_tree(files: Mapping[str, bytes], names: Mapping[str, Any], name: str) -> dict[str, Any]:
    """vocab.json and merges.txt as GPT-2 and RoBERTa read them."""
    kind = str(names.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast").removesuffix("Tokenizer")
    splitters = {"GPT2": "gpt-2", "Roberta": "gpt-2", "Bart": "gpt-2", "Qwen2": "qwen2"}
    if kind not in splitters:
        raise ValueError(f"vocab.json and merges.txt of a {kind}Tokenizer are not known here, only of {', '.join(splitters)}: save a tokenizer.json "
                         "with transformers")
    vocab = _json(files["vocab.json"], f"vocab.json of {name}")
    lines = files["merges.txt"].decode().split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in merges):
        raise ValueError("merges.txt has a line that is not two pieces")
    extra = _json(files["added_tokens.json"], f"added_tokens.json of {name}") if "added_tokens.json" in files else {}
    usual = {"<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>"}
    stated = {_token_text(value) for key, value in names.items() if key.endswith("_token") and value and not isinstance(value, bool)}
    stated |= {_token_text(value) for value in names.get("additional_special_tokens", ())}
    special = {text: i for text, i in (vocab | extra).items() if text in usual | stated}
    first, last = ((text, special[text]) if text in special else None for text in ("<s>", "</s>"))
    tree = tokenizer_json.byte_level(vocab, merges, splitter=splitters[kind], special=special, add_prefix_space=bool(names.get("add_prefix_space")),
                                     added={text: i for text, i in extra.items() if text not in special})
    if kind in ("Roberta", "Bart") and first and last:
        tree["post_processor"] = {"type": "RobertaProcessing", "sep": last, "cls": first, "trim_offsets": True, "add_prefix_space": False}
    return tree


def _word_piece_tree(vocab: bytes, names: Mapping[str, Any]) -> dict[str, Any]:
    """vocab.txt as BERT reads it: a piece on each line."""
    lines = vocab.decode().removesuffix("\n").split("\n")
    usual = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    return tokenizer_json.word_piece(
        {line.removesuffix("\r"): i for i, line in enumerate(lines)}, lower=names.get("do_lower_case", True), strip_accents=names.get("strip_accents"),
        chinese=names.get("tokenize_chinese_chars", True), names={key: _token_text(names.get(key, text)) for key, text in usual.items()})


def _proto(model: bytes) -> Any:
    """A SentencePiece model file as an object to read and change.

    Raises:
      ValueError: one line: it is none, or protobuf here is older than the one that sentencepiece was made with (Apache Beam wants it so).
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # protobuf's own, which older ones do not have
        raise ValueError(f"sentencepiece and protobuf do not go together here ({' '.join(str(error).split())[:160]}): pip install -U protobuf") from None
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ValueError(f"a SentencePiece model is damaged ({error})") from None
    return proto


def _from_sentencepiece(files: Mapping[str, bytes], key: str, names: Mapping[str, Any], name: str) -> Tokenizer:
    """A SentencePiece model, with the tokens that Hugging Face's descriptions add to it as pieces of their own."""
    model = files[key]
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        for i in range(processor.vocab_size()):  # a piece may not be UTF-8
            processor.id_to_piece(i)
    except (RuntimeError, UnicodeDecodeError):
        processor = None
    if not model or processor is None:
        raise ValueError(f"{name} is not a SentencePiece model, or a damaged one ({len(model)} bytes)")
    added = _added_to_sentencepiece(files, names, processor.vocab_size(), name)
    if added:
        proto = _proto(model)
        try:
            proto.pieces.extend([type(proto).SentencePiece(piece=piece.text, score=piece.score, type=piece.type) for piece in added])
            processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString(deterministic=True))
        except (RuntimeError, TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"{name} adds tokens that a SentencePiece model cannot have: {' '.join(str(error).split())[:200]}") from None

    def named(key: str, usual: int) -> int:
        i = processor.piece_to_id(_token_text(names[key])) if isinstance(names.get(key), (str, Mapping)) else -1
        return usual if i < 0 or processor.is_unknown(i) else i

    bos, eos, pad = named("bos_token", processor.bos_id()), named("eos_token", processor.eos_id()), named("pad_token", processor.pad_id())
    if eos < 0:
        raise ValueError(f"{name} has no end-of-text token (eos), which must follow every document")
    adds = names.get("add_bos_token")
    return Tokenizer(model if len(files) == 1 else _hold("sentencepiece", files), "sentencepiece", processor.vocab_size(),
                     bos=bos if bos >= 0 else eos, eos=eos, pad=pad if pad >= 0 else eos, adds_bos=adds if isinstance(adds, bool) else bos >= 0,
                     files={} if len(files) == 1 else dict(files), _processor=processor)


def _added_to_sentencepiece(files: Mapping[str, bytes], names: Mapping[str, Any], size: int, name: str) -> list[Piece]:
    """The tokens after the model's own `size` pieces: special ones are control pieces, others are user-defined; holes are unused."""
    added: dict[int, tuple[str, bool]] = {}
    try:
        if "added_tokens.json" in files:
            added |= {int(i): (text, True) for text, i in _json(files["added_tokens.json"], f"added_tokens.json of {name}").items()}
        added |= {int(i): (token["content"], bool(token.get("special"))) for i, token in names.get("added_tokens_decoder", {}).items()}
        if not added and str(names.get("tokenizer_class", "")).startswith("T5"):  # <extra_id_99> comes first
            count = int(names.get("extra_ids", 100))
            added |= {size + count - 1 - k: (f"<extra_id_{k}>", True) for k in range(count)}
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ValueError(f"{name}: the added tokens in tokenizer_config.json or added_tokens.json are not a table of ids") from None
    added = {i: token for i, token in added.items() if i >= size}
    last = max(added, default=size - 1)
    if last - size > 1 << 16:
        raise ValueError(f"{name} adds a token with the id {last} to {size} pieces: such a hole is not believable")
    return [Piece(*(added[i][:1] if i in added else (f"[PAD{i}]",)), 0.0, (3 if added[i][1] else 4) if i in added else 5) for i in range(size, last + 1)]
