"""Hugging Face's tokenizer.json as a tree: made from vocabularies of other formats, and read for what decoding and framing need.

Pure Python; the tree is run by the `tokenizers` package, in data/tokenizer.py. Nothing here is ever executed: chat templates stay text.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SPACE = "\u2581"  # SentencePiece's stand-in for the space
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_FAR = -1e6  # score of a unigram piece that must not be found in a text
_PADS = ("[PAD]", "<pad>", "<|pad|>")
_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")  # of families whose files do not name their end of text

# How a byte-level tokenizer cuts text before it merges, by the names that GGUF (llama.cpp) uses: regexes applied one after the other.
# "gpt-2" is the cut built into the ByteLevel step.
_WORDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WORDS
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(add_prefix_space: bool = False, use_regex: bool = True) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict:
    steps = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, _byte_level(use_regex=False)]
    return {"type": "Sequence", "pretokenizers": steps}


SPLITTERS: dict[str, dict] = {
    "gpt-2": {"normalizer": None, "pre_tokenizer": _byte_level(), "ignore_merges": False},
    "smollm": {"normalizer": None, "ignore_merges": False,
               "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level()]}},
    "qwen2": {"normalizer": {"type": "NFC"}, "pre_tokenizer": _split(_QWEN2), "ignore_merges": False},
    "llama-bpe": {"normalizer": None, "pre_tokenizer": _split(_LLAMA3), "ignore_merges": True},
}
# Names under which llama.cpp cuts in the same way.
SAME_SPLITTER = {"gpt2": "gpt-2", "phi-2": "gpt-2", "mpt": "gpt-2", "roberta-bpe": "gpt-2", "starcoder": "smollm", "refact": "smollm",
                 "codeshell": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary, in order of ids."""
    text: str
    score: float
    type: int  # 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte: SentencePiece's and GGUF's numbers


class Framing(NamedTuple):
    """Ids of the tokens around a document."""
    bos: int
    eos: int
    pad: int
    adds_bos: bool  # whether the model saw bos before each text


@functools.cache
def byte_characters() -> tuple[str, ...]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


def _added(text: str, i: int, special: bool) -> dict:
    return {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


def _template(before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]) -> dict | None:
    """The step that puts tokens around a text (and around a pair of texts), as `transformers` applies it."""
    if not before and not after:
        return None
    token = lambda name, kind: {"SpecialToken": {"id": name, "type_id": kind}}
    single = [*(token(name, 0) for name, _ in before), {"Sequence": {"id": "A", "type_id": 0}}, *(token(name, 0) for name, _ in after)]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, *(token(name, 1) for name, _ in after)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair,
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in [*before, *after]}}


def _tree(model: dict, *, added: Iterable[dict], normalizer=None, pre_tokenizer=None, decoder=None, post_processor=None) -> dict:
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": sorted(added, key=lambda token: token["id"]),
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model}


def byte_level(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], *, splitter: str = "gpt-2", special: Mapping[str, int] = {},
               added: Mapping[str, int] = {}, bos: tuple[str, int] | None = None, add_prefix_space: bool = False) -> dict:
    """A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen).

    Args:
      vocab: piece, spelled with `byte_characters`, -> id.
      merges: pairs of pieces, the first to merge first.
      splitter: a name in `SPLITTERS` or `SAME_SPLITTER`.
      special, added: tokens that are found whole in a text; special ones only where a text may hold them, and they decode to nothing.
      bos: put before each text by `transformers`.

    Raises:
      ValueError: a splitter that is not known here.
    """
    cut = SPLITTERS.get(SAME_SPLITTER.get(splitter, splitter))
    if cut is None:
        raise ValueError(f"the tokenizer cuts text in the way called {splitter!r}, which is not known here; known: "
                         + ", ".join([*SPLITTERS, *SAME_SPLITTER]))
    before = cut["pre_tokenizer"] | ({"add_prefix_space": True} if add_prefix_space else {})
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
             "byte_fallback": False, "ignore_merges": cut["ignore_merges"], "vocab": dict(vocab), "merges": [list(pair) for pair in merges]}
    tokens = [_added(text, i, True) for text, i in special.items()] + [_added(text, i, False) for text, i in added.items()]
    return _tree(model, added=tokens, normalizer=cut["normalizer"], pre_tokenizer=before, decoder=_byte_level(),
                 post_processor=_template([bos], []) if bos else None)


def word_piece(vocab: Mapping[str, int], *, lower: bool, strip_accents: bool | None, chinese: bool, names: Mapping[str, str]) -> dict:
    """BERT's tokenizer; `names` are the texts of unk_token, cls_token, sep_token, pad_token, mask_token."""
    special = {name: vocab[name] for name in names.values() if name in vocab}
    frame = [[(names[key], vocab[names[key]])] if names[key] in vocab else [] for key in ("cls_token", "sep_token")]
    model = {"type": "WordPiece", "unk_token": names["unk_token"], "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
             "vocab": dict(vocab)}
    return _tree(model, added=[_added(text, i, True) for text, i in special.items()], post_processor=_template(*frame),
                 normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": chinese, "strip_accents": strip_accents,
                             "lowercase": lower},
                 pre_tokenizer={"type": "BertPreTokenizer"}, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})


def plain_bytes(names: Mapping[str, int]) -> dict:
    """One token for each byte of UTF-8, and the special tokens in `names`, bos among them as "<s>"."""
    return byte_level({character: byte for byte, character in enumerate(byte_characters())}, [], special=names, bos=("<s>", names["<s>"]))


def from_pieces(pieces: Sequence[Piece], *, bpe: bool, add_space: bool, squeeze: bool, charsmap: str,
                before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]) -> dict:
    """A SentencePiece vocabulary as a tokenizer.json with the same ids.

    Args:
      bpe: merges by score; else unigram.
      add_space: a space is put before the text.
      squeeze: spaces at the ends go, several become one.
      charsmap: SentencePiece's normalisation table in base64; empty: none.
      before, after: tokens around each text, for `transformers`.
    """
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    byte_fallback = any(piece.type == 6 for piece in pieces)
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == 2), None)
    tokens = [_added(piece.text, i, piece.type != 4) for i, piece in enumerate(pieces) if piece.type in (2, 3, 4)]
    if bpe:
        model = {"type": "BPE", "dropout": None, "unk_token": None if unknown is None else pieces[unknown].text, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": byte_fallback, "ignore_merges": False,
                 "vocab": ids, "merges": merges_of(pieces)}
    else:  # "<0x41>" in a text should not be taken for the byte, whose score SentencePiece does not use (it still is where "<" has no piece)
        model = {"type": "Unigram", "unk_id": unknown, "byte_fallback": byte_fallback,
                 "vocab": [[piece.text, _FAR if piece.type in (3, 6) else piece.score] for piece in pieces]}
    replace = lambda pattern, content: {"type": "Replace", "pattern": pattern, "content": content}
    normal = [{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else []
    if squeeze:
        normal += [{"type": "Strip", "strip_left": True, "strip_right": True}, replace({"Regex": " {2,}"}, " ")]
    normal += [{"type": "Prepend", "prepend": SPACE}] if add_space else []  # Metaspace would not, before a space
    decoders = [replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if add_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _tree(model, added=tokens, normalizer={"type": "Sequence", "normalizers": [*normal, replace({"String": " "}, SPACE)]},
                 decoder={"type": "Sequence", "decoders": decoders}, post_processor=_template(before, after))


def merges_of(pieces: Sequence[Piece]) -> list[list[str]]:
    """SentencePiece BPE joins the pair whose piece scores best: the pairs of all pieces, best first."""
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.type == 1}
    found = []
    for text, i in ids.items():
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        found += [(-pieces[i].score, ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
    return [[a, b] for *_, a, b in sorted(found)]


def vocabulary(tree: Mapping[str, Any]) -> dict[str, int]:
    """Every piece and added token -> id.

    Raises:
      ValueError: one line: no vocabulary in it, or an id that is none.
    """
    try:
        model = tree["model"]["vocab"]
        pieces = dict(model) if isinstance(model, Mapping) else {piece[0]: i for i, piece in enumerate(model)}
        pieces |= {token["content"]: token["id"] for token in tree.get("added_tokens") or ()}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError("it has no vocabulary (model.vocab)") from None
    if not pieces or not all(type(i) is int and 0 <= i < 1 << 24 and isinstance(text, str) for text, i in pieces.items()):
        raise ValueError("its vocabulary is empty or has an id that is not a whole number below 2^24")
    return pieces


def splitter_of(tree: Mapping[str, Any]) -> str | None:
    """The GGUF name of a byte-level tokenizer's way of cutting; None if it has none of those in `SPLITTERS`."""
    def plain(step):  # without what has no influence on ids
        if isinstance(step, Mapping):
            return {key: plain(value) for key, value in step.items() if key not in ("trim_offsets", "version")}
        return [plain(item) for item in step] if isinstance(step, list) else step

    ours = plain(tree.get("pre_tokenizer")), plain(tree.get("normalizer"))
    return next((name for name, cut in SPLITTERS.items() if ours == (plain(cut["pre_tokenizer"]), plain(cut["normalizer"]))), None)


def byte_table(tree: Mapping[str, Any], size: int) -> tuple[tuple[bytes, ...], bool]:
    """The bytes that each id in [0, size) stands for, and whether a space at the very beginning is to be dropped.

    Raises:
      ValueError: one line, for a way of decoding that is not known here.
    """
    added = {token["id"]: token for token in tree.get("added_tokens") or ()}
    texts = {i: text for text, i in vocabulary(tree).items()}
    spell, strip = _speller(tree.get("decoder"))

    def entry(i: int) -> bytes:
        if i in added:
            return b"" if added[i].get("special") else added[i]["content"].encode()
        return spell(texts[i]) if i in texts else b""

    return tuple(map(entry, range(size))), strip


def _speller(decoder: Mapping[str, Any] | None):
    """(piece -> bytes, whether to drop a first space) of a tokenizer.json's decoder."""
    steps = [] if decoder is None else decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        table = {character: byte for byte, character in enumerate(byte_characters())}
        return (lambda piece: bytes(map(table.__getitem__, piece)) if table.keys() >= set(piece) else piece.encode()), False
    if kinds == ["WordPiece"]:
        return functools.partial(_spell_word_piece, steps[0]["prefix"], steps[0].get("cleanup", True)), True
    if not steps:
        return (lambda piece: b" " + piece.encode()), True
    swaps, strip, fallback = [], False, "ByteFallback" in kinds
    for step, kind in zip(steps, kinds):
        if kind == "Replace" and "String" in step["pattern"]:
            swaps.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            swaps.append((step.get("replacement", SPACE), " "))
            strip |= step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        elif kind == "Strip" and (step["content"], step["stop"]) == (" ", 0):
            strip |= step["start"] > 0
        elif kind not in ("ByteFallback", "Fuse"):
            raise ValueError(f"it decodes by {' then '.join(map(str, kinds))}, which is not known here")

    def spell(piece: str) -> bytes:
        match = BYTE_PIECE.fullmatch(piece) if fallback else None
        if match:
            return bytes([int(match[1], 16)])
        for old, new in swaps:
            piece = piece.replace(old, new)
        return piece.encode()

    return spell, strip


def _spell_word_piece(prefix: str, cleanup: bool, piece: str) -> bytes:
    text = piece.removeprefix(prefix) if piece.startswith(prefix) else " " + piece
    if cleanup:  # as the tokenizers package does, piece by piece
        for old, new in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" do not", " don't"),
                         (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):
            text = text.replace(old, new)
    return text.encode()


def framing(tree: Mapping[str, Any], names: Mapping[str, Any]) -> Framing:
    """How documents are framed: `[bos] text [eos]`.

    bos is bos_token, else the token that the tokenizer puts first, else cls_token, else eos. eos is eos_token, else sep_token, else the token
    that the tokenizer puts last, else a usual name. pad is pad_token or a usual name, else eos. So GPT-2 has <|endoftext|> for both ends, BERT [CLS] and [SEP],
    T5 </s> for both.

    Args:
      names: special_tokens_map.json and tokenizer_config.json in one.

    Raises:
      ValueError: one line: no end of text.
    """
    ids = vocabulary(tree)

    def named(key: str) -> int | None:
        value = names.get(key)
        text = value.get("content") if isinstance(value, Mapping) else value
        return ids.get(text) if isinstance(text, str) else None

    first, last = _ends(tree.get("post_processor"), ids)
    usual = next((ids[text] for text in _ENDS if text in ids), None)
    eos = next((i for i in (named("eos_token"), named("sep_token"), last, usual) if i is not None), None)
    if eos is None:
        raise ValueError("it has no end-of-text token, which must follow every document: name one as eos_token in tokenizer_config.json")
    bos = next((i for i in (named("bos_token"), first, named("cls_token"), eos) if i is not None))
    pad = next((i for i in (named("pad_token"), *map(ids.get, _PADS), eos) if i is not None))
    adds = names.get("add_bos_token")
    return Framing(bos, eos, pad, adds if isinstance(adds, bool) else first is not None)


def separators(step: Mapping[str, Any] | None) -> int:
    """How many tokens a post-processor puts between the two texts of a pair: RoBERTa two, BERT one; 1 where it does not say."""
    kind = step.get("type") if isinstance(step, Mapping) else None
    if kind == "Sequence":
        return max((separators(part) for part in step.get("processors", ())), default=1)
    if kind == "RobertaProcessing":
        return 2
    if kind == "TemplateProcessing":
        texts = [i for i, part in enumerate(step.get("pair") or ()) if "Sequence" in part]
        return max(1, texts[1] - texts[0] - 1) if len(texts) == 2 else 1
    return 1


def with_special(tree: dict[str, Any], ids: Iterable[int]) -> dict[str, Any]:
    """The tree with these pieces among its special tokens, as older files expect of whoever reads them."""
    texts = {i: text for text, i in vocabulary(tree).items()}
    special = set(special_tokens(tree).values())
    kept = [token for token in tree.get("added_tokens") or () if token["id"] in special or token["id"] not in ids]
    return tree | {"added_tokens": sorted(kept + [_added(texts[i], i, True) for i in set(ids) - special], key=lambda token: token["id"])}


def special_tokens(tree: Mapping[str, Any]) -> dict[str, int]:
    """Special tokens of a tokenizer.json and their numbers."""
    return {token["content"]: token["id"] for token in tree.get("added_tokens") or () if token.get("special")}


def without_special(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the special tokens out of a text's reach when it runs with `encode_special_tokens`. That is not enough for a unigram model,
    which finds "</s>" as it finds any piece: there they get names with a space, which no text has when the model sees it. They are not
    taken out, for `tokenizers` counts the ids of added tokens by their place."""
    model = tree["model"]
    if model.get("type") != "Unigram":
        return tree
    far = {i: f" {i}" for i in special_tokens(tree).values()}
    return tree | {"added_tokens": [token | {"content": far.get(token["id"], token["content"])} for token in tree["added_tokens"]],
                   "model": model | {"vocab": [[far.get(i, text), score] for i, (text, score) in enumerate(model["vocab"])]}}


def _ends(step: Mapping[str, Any] | None, ids: Mapping[str, int]) -> tuple[int | None, int | None]:
    """The tokens that a post-processor puts before and after a text."""
    kind = step.get("type") if isinstance(step, Mapping) else None
    if kind == "Sequence":
        found = [_ends(part, ids) for part in step.get("processors", ())]
        return next((a for a, _ in found if a is not None), None), next((b for _, b in found if b is not None), None)
    if kind in ("BertProcessing", "RobertaProcessing"):
        return step["cls"][1], step["sep"][1]
    if kind == "TemplateProcessing" and step["single"]:
        first, last = (ids.get(part.get("SpecialToken", {}).get("id")) for part in (step["single"][0], step["single"][-1]))
        return first, last
    return None, None
