"""What a batch is: a dict of numpy arrays on the host, of jax arrays on the devices, all [B, T].

  key        dtype    meaning
  tokens     int32    inputs; 0 in padding
  targets    int32    the token that follows each input in its document; 0 in padding
  weights    float32  1 where the target counts, else 0 (padding, and what an earlier window of the same document has counted)
  positions  int32    place in the segment, from 0
  segments   int32    0 in padding, 1, 2, ... for the pieces of documents in a row; attention never leaves a segment
  documents  int32    evaluation only: the document's number in its split, -1 in padding

A document is bos, its text's tokens, eos. Every token after bos is a target, exactly once in an epoch or an evaluation.

With masked tokens (`mask_batch`) the target is the token itself, hidden in the inputs or not, and the weight is 1 where it was chosen to be told. The eos
that ends a document is then never an input.

Of chats (objectives sft and preference) the weights are 1 where the assistant speaks. Of a preference the chat with the chosen answer has an odd segment and
that with the rejected one the next.

For an encoder-decoder (`pair_batch`) the keys above are the decoder's, [B, T], and these the encoder's, [B, S]; a decoder token attends to the encoder's
tokens with its own segment number.

  encoder_tokens, encoder_positions, encoder_segments   int32

The decoder's first input is the model's start, its targets are a text with eos (`seq2seq`: the second text of a pair), or hidden spans (`span_corruption`).
A pair in the corpus is one document: the input's tokens, eos, the target's tokens, eos.

Of labelled texts (`text_batch`) a row holds one, whole. The weight is not 0 at the token from whose state the label is read: the first of a text, for decoders
the last, or the first of each word with a tag; there it is the weight of the class.

  targets    int32    the tag, where the weight is not 0 (`tag_words`)
  labels     float32  [B, classes], instead of targets: 1 for the class or classes of the text; or [B, 1], its number (`label_texts`)
  types      int32    with a pair: 1 in the second text
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.config import ObjectiveConfig
from jaxlm.data.pack import Piece, hashed
from jaxlm.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


def next_token_batch(rows: Sequence[Sequence[Piece]], read: Callable[[int, int, int], np.ndarray], sequence_length: int) -> Batch:
    """Fills a batch with the pieces planned for each of its rows.

    Args:
      rows: the pieces of each row; none for a row of padding.
      read: `(document, start, stop)` -> tokens [stop - start] of a document.
      sequence_length: T.

    Returns:
      All the keys above, [len(rows), T].
    """
    shape = (len(rows), sequence_length)
    batch = {key: np.zeros(shape, np.int32) for key in ("tokens", "targets", "positions", "segments")}
    batch |= {"weights": np.zeros(shape, np.float32), "documents": np.full(shape, -1, np.int32)}
    for row, pieces in enumerate(rows):
        column = 0
        for segment, (document, start, stop, seen) in enumerate(pieces, 1):
            tokens = read(document, start, stop + 1)
            place = row, slice(column, column + stop - start)
            batch["tokens"][place] = tokens[:-1]
            batch["targets"][place] = tokens[1:]
            batch["weights"][row, column + seen:place[1].stop] = 1
            batch["positions"][place] = np.arange(stop - start)
            batch["segments"][place] = segment
            batch["documents"][place] = document
            column = place[1].stop
    return batch


class Masking(NamedTuple):
    """How tokens are chosen and hidden; see `ObjectiveConfig`."""
    cfg: ObjectiveConfig
    mask: int  # id that stands for a hidden token
    plain: np.ndarray  # int32, ids that are not special, of which random ones are drawn
    special: np.ndarray  # bool [V]: never chosen
    begins_word: np.ndarray  # bool [V]


def masking(cfg: ObjectiveConfig, tokenizer: Tokenizer) -> Masking | None:
    """What `mask_batch` needs of a tokenizer; None if the objective hides nothing.

    Raises:
      ValueError: see `mask_token`.
    """
    if cfg.name != "masked_token":
        return None
    named, mask = tokenizer.special_tokens, mask_token(tokenizer)
    special = np.zeros(tokenizer.vocab_size, bool)
    special[[i for i in (*named.values(), tokenizer.bos, tokenizer.eos, tokenizer.pad, mask) if i < tokenizer.vocab_size]] = True
    return Masking(cfg, mask, np.flatnonzero(~special).astype(np.int32), special, tokenizer.begins_word)


def mask_token(tokenizer: Tokenizer) -> int:
    """The id that hides a token. Without a mask token, padding, which no text holds, stands for one.

    Raises:
      ValueError: one line: the tokenizer has neither.
    """
    named = tokenizer.special_tokens
    mask = next((named[name] for name in ("[MASK]", "<mask>") if name in named), tokenizer.pad)
    if mask in (tokenizer.bos, tokenizer.eos):
        raise ValueError("hiding tokens (objective.name=masked_token) needs a tokenizer with the special token [MASK] or <mask>, or with one for padding: "
                         "this one has neither")
    return mask


def mask_batch(batch: Batch, how: Masking, numbers: np.ndarray, *key: object) -> Batch:
    """A batch of `next_token_batch` made into one of masked tokens.

    What happens to a token follows from `key` and its number alone. Of those chosen, some become the mask, some any token, some stay (Devlin et al. 2019).

    Args:
      numbers: uint64 `[B, T]`, different for each token that is not padding.
    """
    original, segments = batch["tokens"], batch["segments"]
    draw = lambda name: (hashed(numbers, name, *key) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    chance = draw("choose")
    if how.cfg.mask_whole_words:  # a word shares the chance of its first piece; special tokens are words of their own
        edge = np.concatenate([np.full_like(segments[:, :1], -1), segments[:, :-1]], axis=1) != segments
        special = how.special[original]
        after = np.concatenate([np.zeros_like(special[:, :1]), special[:, :-1]], axis=1)
        begins = edge | how.begins_word[original] | special | after
        first = np.maximum.accumulate(np.where(begins, np.arange(original.shape[1]), 0), axis=1)
        chance = np.take_along_axis(chance, first, axis=1)
    chosen = (chance < how.cfg.mask_rate) & (segments > 0) & ~how.special[original]
    fate = draw("fate")
    anything = how.plain[(hashed(numbers, "token", *key) % np.uint64(len(how.plain))).astype(np.int64)]
    hidden = np.where(fate < how.cfg.mask_keep, original, np.where(fate < how.cfg.mask_keep + how.cfg.mask_random, anything, how.mask))
    return batch | {"tokens": np.where(chosen, hidden, original).astype(np.int32), "targets": original,
                    "weights": np.where(chosen, batch["weights"], 0).astype(np.float32)}


def pair_batch(counts_R: np.ndarray, read: np.ndarray, read_sizes: np.ndarray, said: np.ndarray, said_sizes: np.ndarray, documents: np.ndarray, *,
               encoder_length: int, decoder_length: int, start: int) -> Batch:
    """A batch for an encoder-decoder: each row holds pairs of what the encoder reads and what the decoder should say, one segment each.

    Args:
      counts_R: pairs of each row; together P.
      read: token ids of what the encoder reads, pair after pair; said: likewise of what the decoder should say.
      read_sizes, said_sizes: [P], tokens of each pair; both sides of a row must fit.
      documents: [P], each pair's document.
      start: id with which the decoder begins, before the first target.

    Returns:
      All the keys above: of the decoder [R, decoder_length], of the encoder [R, encoder_length].
    """
    pairs, rows = len(read_sizes), len(counts_R)
    row = np.repeat(np.arange(rows), counts_R)
    first = np.repeat(np.cumsum(counts_R) - counts_R, counts_R)  # of each pair, the first one in its row
    batch = {}
    for side, length, sizes in (("encoder_", encoder_length, read_sizes), ("", decoder_length, said_sizes)):
        begins = np.cumsum(sizes) - sizes
        of = np.repeat(np.arange(pairs), sizes)
        place = np.arange(len(of)) - begins[first[of]]
        assert not len(of) or place.max() < length, "a row is too long"
        positions = np.arange(len(of)) - begins[of]
        shifted = np.where(positions > 0, np.concatenate([[0], said[:-1]]), start) if not side and len(of) else read
        filled = {"tokens": shifted, "positions": positions, "segments": of - first[of] + 1}
        if not side:
            filled |= {"targets": said, "weights": 1, "documents": np.asarray(documents)[of]}
        for key, values in filled.items():
            out = np.full((rows, length), -1 if key == "documents" else 0, np.float32 if key == "weights" else np.int32)
            out[row[of], place] = values
            batch[side + key] = out
    return batch


def text_batch(texts: Sequence[tuple[np.ndarray, int]], documents: np.ndarray, length: int, *, last: bool, types: bool) -> Batch:
    """Rows of one text each.

    Args:
      texts: token ids, at most `length`, none for a row of padding; and how many of them are the first text of a pair, 0 for no pair.
      documents: [B], -1 for padding.
      last: the label stands at the last token, not the first.
      types: with the key "types".
    """
    shape = (len(texts), length)
    batch = {key: np.zeros(shape, np.int32) for key in ("tokens", "positions", "segments", *(["types"] if types else []))}
    batch |= {"weights": np.zeros(shape, np.float32), "documents": np.full(shape, -1, np.int32)}
    for row, (tokens, first) in enumerate(texts):
        size = len(tokens)
        batch["tokens"][row, :size] = tokens
        batch["positions"][row, :size] = np.arange(size)
        batch["segments"][row, :size] = 1
        batch["documents"][row, :size] = documents[row]
        if size:
            batch["weights"][row, size - 1 if last else 0] = 1
        if types and first:
            batch["types"][row, first:size] = 1
    return batch


def label_texts(batch: Batch, documents: np.ndarray, classes: np.ndarray, factors: np.ndarray | None) -> Batch:
    """A `text_batch` with `labels` from `classes` [documents of the split, C]; `factors` [C] weigh rows by their class."""
    found = np.where(documents[:, None] >= 0, classes[documents], 0).astype(np.float32)
    weights = batch["weights"] if factors is None else batch["weights"] * (found @ factors)[:, None]
    return batch | {"labels": found, "weights": weights.astype(np.float32)}


def tag_words(batch: Batch, documents: np.ndarray, words: Sequence[np.ndarray], tags: Sequence[np.ndarray], factors: np.ndarray | None) -> Batch:
    """A `text_batch` with `targets` and weights at the first token of each word; words beyond the row are left out."""
    targets, weights, length = np.zeros_like(batch["tokens"]), np.zeros_like(batch["weights"]), batch["tokens"].shape[1]
    for row, document in enumerate(documents):
        if document >= 0:
            inside = words[document] < max(1, min(length, int(batch["segments"][row].sum())) - 1)  # not the closing token of a text that was cut
            places, found = words[document][inside], tags[document][inside]
            targets[row, places] = found
            weights[row, places] = 1 if factors is None else factors[found]
    return batch | {"targets": targets, "weights": weights}


def span_sizes(sizes: np.ndarray, rate: float, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Of texts of `sizes` tokens, at least one: how many are hidden, in how many spans; both at least 1 (Raffel et al. 2020)."""
    hidden = np.clip(np.rint(sizes * rate), 1, np.maximum(sizes - 1, 1)).astype(np.int64)
    spans = np.clip(np.rint(hidden / length), 1, np.maximum(np.minimum(hidden, sizes - hidden), 1)).astype(np.int64)
    return hidden, spans


def span_corruption(tokens: np.ndarray, sizes: np.ndarray, numbers: np.ndarray, sentinels: np.ndarray, eos: int, *key: object, rate: float = 0.15,
                    length: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """T5's task (Raffel et al. 2020): spans of a text are replaced by sentinels, and said after them. A pure function of its arguments.

    Args:
      tokens: ids of the texts without eos, one after the other.
      sizes: [N], tokens of each text, at least one.
      numbers: uint64 [N]; with `key` each decides where the spans of its text lie.
      sentinels: ids of <extra_id_0>, <extra_id_1>, ..., no fewer than the spans of a text.
      rate: share of the tokens that is hidden.
      length: mean length of a span, in tokens.

    Returns:
      What the encoder reads and the tokens of each text in it, what the decoder should say and likewise: text and sentinels in turn, beginning with text,
      and the same beginning with the first sentinel; each ends with eos. Of a single token nothing is left to read.
    """
    hidden, spans = span_sizes(sizes, rate, length)
    first = np.cumsum(spans) - spans
    kept, gone = (_spans(total, spans, hashed(numbers, name, *key)) for name, total in (("kept", sizes - hidden), ("hidden", hidden)))
    out = np.repeat(np.tile([False, True], len(kept)), np.stack([kept, gone], axis=1).reshape(-1))
    after = first + spans  # the span that follows each text: eos goes before it
    marks = np.insert(sentinels[np.arange(len(kept)) - np.repeat(first, spans)], after, eos)
    insert = lambda ids, at, ends: np.insert(ids, np.insert(at, after, ends[after - 1]), marks).astype(np.int32)
    read = insert(tokens[~out], np.cumsum(kept), np.cumsum(kept))
    said = insert(tokens[out], np.cumsum(gone) - gone, np.cumsum(gone))
    return read, sizes - hidden + spans + 1, said, hidden + spans + 1


def _spans(totals: np.ndarray, spans: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Lengths of the spans into which totals [N] are cut at different places, text after text: int64 [spans.sum()], each at least 1 where there is room."""
    places = np.maximum(totals - 1, 0)
    of = np.repeat(np.arange(len(totals)), places)
    place = np.arange(len(of)) - np.repeat(np.cumsum(places) - places, places)
    chance = hashed(draws[of] + place.astype(np.uint64), "place")
    cut = np.zeros(len(of), bool)
    cut[np.lexsort((chance, of))[place < (spans - 1)[of]]] = True  # the first of each text in the order of chance
    ends = np.insert(place[cut] + 1, np.cumsum(spans - 1), totals)
    begins = np.concatenate([[0], ends[:-1]])
    begins[np.cumsum(spans) - spans] = 0
    return ends - begins
