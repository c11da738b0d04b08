"""Tokenizers in GGUF metadata: token lists, merges, scores and special ids, both ways."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.data import tokenizer as tokenizers
from jaxlm.data import tokenizer_json
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_json import SPACE, Piece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_PREFIX = "tokenizer.ggml."


def read(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """The tokenizer of a file's metadata; `name` is for messages.

    Raises:
      ValueError: one line: none, of a kind that is not known here, or inconsistent.
    """
    kind, tokens = metadata.get(_PREFIX + "model"), metadata.get(_PREFIX + "tokens")
    if not isinstance(kind, str) or not isinstance(tokens, list) or not tokens:
        raise ValueError(f"{name} holds no tokenizer: it has no {_PREFIX}model or no {_PREFIX}tokens")
    types = np.asarray(metadata.get(_PREFIX + "token_type", np.ones(len(tokens), np.int32)))
    scores = np.asarray(metadata.get(_PREFIX + "scores", np.zeros(len(tokens), np.float32)))
    if len(types) != len(tokens) or len(scores) != len(tokens) or types.dtype.kind not in "iu" or scores.dtype.kind != "f":
        raise ValueError(f"{name}: its tokenizer has {len(tokens)} tokens, {len(types)} types and {len(scores)} scores")
    used = max((i + 1 for i in range(len(tokens)) if types[i] != UNUSED), default=0)  # the rest only fills the embedding's rows
    pieces = [Piece(tokens[i], float(scores[i]), int(types[i])) for i in range(used)]
    special = {key: metadata.get(f"{_PREFIX}{key}_token_id") for key in _SPECIAL}
    for key, i in special.items():
        if i is not None and not (type(i) is int and 0 <= i < used):
            raise ValueError(f"{name}: {_PREFIX}{key}_token_id={i!r} is not one of its {used} tokens")
    if special["eos"] is None:
        raise ValueError(f"{name} names no end-of-text token ({_PREFIX}eos_token_id), which must follow every document")
    splitter = metadata.get(_PREFIX + "pre", "gpt-2")
    adds = metadata.get(_PREFIX + "add_bos_token", kind == "llama" or splitter in ("llama-bpe", "llama3", "llama-v3"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(adds) and special["bos"] is not None,
              **{key: tokens[special[short]] for short, key in _SPECIAL.items() if special[short] is not None}, "clean_up_tokenization_spaces": False}
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    files = {"tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=1) + "\n").encode()}
    if kind in ("llama", "t5"):
        return _sentencepiece(metadata, pieces, special, files, bpe=kind == "llama", name=name)
    if kind != "gpt2":
        raise ValueError(f"{name}: its tokenizer is of the kind {kind!r}; known: llama, t5 (SentencePiece) and gpt2 (byte-level BPE)")
    return _byte_level(metadata, pieces, special, files, splitter, config["add_bos_token"], name)


def _sentencepiece(metadata: Mapping[str, Any], pieces: list[Piece], special: Mapping[str, int | None], files: dict[str, bytes], *, bpe: bool,
                   name: str) -> Tokenizer:
    # llama.cpp wants the spaces of whole-matched tokens as spaces, SentencePiece as U+2581; and exactly one piece must be unknown.
    pieces = [piece._replace(text=piece.text.replace(" ", SPACE)) if piece.type == USER_DEFINED else piece for piece in pieces]
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == UNKNOWN), special["unknown"])
    if unknown is None:
        raise ValueError(f"{name}: its tokenizer has no unknown token")
    pieces[unknown] = pieces[unknown]._replace(type=UNKNOWN)
    ids = {key: -1 if i is None else i for key, i in special.items()}
    charsmap = np.asarray(metadata.get(_PREFIX + "precompiled_charsmap", ()), np.uint8).tobytes()
    try:
        return tokenizers.from_pieces(
            pieces, bpe=bpe, add_space=bool(metadata.get(_PREFIX + "add_space_prefix", True)), charsmap=charsmap,
            squeeze=bool(metadata.get(_PREFIX + "remove_extra_whitespaces", False)), bos=ids["bos"], eos=ids["eos"], pad=ids["padding"], files=files)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _byte_level(metadata: Mapping[str, Any], pieces: list[Piece], special: Mapping[str, int | None], files: dict[str, bytes], splitter: Any,
                adds_bos: bool, name: str) -> Tokenizer:
    merges = metadata.get(_PREFIX + "merges")
    if not isinstance(merges, list):
        raise ValueError(f"{name}: its byte-level tokenizer has no merges")
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError(f"{name}: its tokenizer has {len(pieces) - len(vocab)} tokens twice")
    bos = (pieces[special["bos"]].text, special["bos"]) if adds_bos else None
    try:
        tree = tokenizer_json.byte_level(
            vocab, [merge.split(" ", 1) for merge in merges], splitter=splitter, bos=bos,
            special={piece.text: i for i, piece in enumerate(pieces) if piece.type == CONTROL},
            added={piece.text: i for i, piece in enumerate(pieces) if piece.type == USER_DEFINED})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return tokenizers.from_files({"tokenizer.json": (json.dumps(tree, ensure_ascii=False) + "\n").encode(), **files}, name=f"the tokenizer of {name}")


def write(tok: Tokenizer, rows: int) -> dict[str, Any]:
    """Metadata of a tokenizer for a model whose embedding has `rows` rows.

    A unigram model is written as llama.cpp's "t5", which has no byte fallback: what the vocabulary does not cover becomes the unknown token
    there.

    Raises:
      ValueError: one line, for a tokenizer that GGUF has no form for.
    """
    if tok.kind == "bytes":
        raise ValueError("GGUF has no form for a tokenizer of plain bytes: train with tokenizer.kind=bpe, or export safetensors")
    found: dict[str, Any] = {}
    tree = tok.tree() if tok.kind == "huggingface" else {}
    if tok.kind == "sentencepiece":
        pieces, settings = tok.sentencepiece()
        found |= {"model": "llama" if settings["bpe"] else "t5", "pre": "default", "add_space_prefix": settings["add_space"],
                  "remove_extra_whitespaces": settings["squeeze"]}
        if settings["charsmap"]:
            found["precompiled_charsmap"] = np.frombuffer(base64.b64decode(settings["charsmap"]), np.uint8)
        pieces = [piece._replace(text=piece.text.replace(SPACE, " ")) if piece.type == USER_DEFINED else piece for piece in pieces]
    elif tree["model"].get("type") == "BPE" and tree["model"].get("byte_fallback"):
        pieces, add_space = _ranked(tree)
        found |= {"model": "llama", "pre": "default", "add_space_prefix": add_space}
    else:
        pieces = _listed(tree)
        splitter = tokenizer_json.splitter_of(tree) if tree["model"].get("type") == "BPE" else None
        if splitter is None:
            raise ValueError(f"GGUF has no form known here for this tokenizer ({tree['model'].get('type')} with its way of cutting text): byte-level BPE "
                             f"that cuts as {', '.join(tokenizer_json.SPLITTERS)} and SentencePiece can be written; export safetensors instead")
        found |= {"model": "gpt2", "pre": splitter, "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in tree["model"]["merges"]]}
    if len(pieces) > rows:
        raise ValueError(f"the tokenizer has {len(pieces)} tokens, but the model's embedding has {rows} rows")
    pieces = pieces + [Piece(f"[PAD{i}]", -10000.0, UNUSED) for i in range(len(pieces), rows)]
    found["tokens"], found["token_type"] = [piece.text for piece in pieces], np.array([piece.type for piece in pieces], np.int32)
    if found["model"] != "gpt2":
        found["scores"] = np.array([piece.score for piece in pieces], np.float32)
    found |= {"bos_token_id": tok.bos, "eos_token_id": tok.eos, "padding_token_id": tok.pad, "add_bos_token": tok.adds_bos}
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == UNKNOWN), None)
    if unknown is not None:
        found["unknown_token_id"] = unknown
    metadata = {_PREFIX + key: value for key, value in found.items()}
    return metadata | ({"tokenizer.chat_template": tok.chat_template} if tok.chat_template else {})


def _listed(tree: Mapping[str, Any]) -> list[Piece]:
    """The tokens of a tokenizer.json in order of ids; holes are unused."""
    ids = tokenizer_json.vocabulary(tree)
    added = {token["id"]: CONTROL if token.get("special") else USER_DEFINED for token in tree.get("added_tokens") or ()}
    texts = {i: text for text, i in ids.items()}
    return [Piece(texts.get(i, f"[PAD{i}]"), 0.0, added.get(i, NORMAL) if i in texts else UNUSED) for i in range(max(texts) + 1)]


def _ranked(tree: Mapping[str, Any]) -> tuple[list[Piece], bool]:
    """A SentencePiece BPE that came as tokenizer.json: what merges first has the best score; and whether it puts a space before a text."""
    model, pieces = tree["model"], _listed(tree)
    pairs = (pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"])
    ranks: dict[str, int] = {}
    for rank, (a, b) in enumerate(pairs):
        ranks.setdefault(a + b, rank)
    unknown = model.get("unk_token")

    def piece(old: Piece) -> Piece:
        if old.text == unknown:
            return old._replace(type=UNKNOWN)
        if tokenizer_json.BYTE_PIECE.fullmatch(old.text):
            return old._replace(type=6)
        if old.type == NORMAL:
            return old._replace(score=-float(ranks.get(old.text, len(ranks))))
        return old._replace(text=old.text.replace(SPACE, " ")) if old.type == USER_DEFINED else old

    return [piece(old) for old in pieces], tokenizer_json.byte_table(tree, 0)[1]
