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
    """What `mask_batch` needs of a tokenizer; None if the objective hides nothing. Without a mask token, padding, which no text holds, stands for one.

    Raises:
      ValueError: one line: the tokenizer has neither.
    """
    if cfg.name != "masked_token":
        return None
    named = tokenizer.special_tokens
    mask = next((named[name] for name in ("[MASK]", "<mask>") if name in named), tokenizer.pad)
    if mask in (tokenizer.bos, tokenizer.eos):
        raise ValueError("objective.name=masked_token needs a tokenizer with the special token [MASK] or <mask>, or with one for padding: this one has neither")
    special = np.zeros(tokenizer.vocab_size, bool)
    special[[i for i in (*named.values(), tokenizer.bos, tokenizer.eos, tokenizer.pad, mask) if i < tokenizer.vocab_size]] = True
    return Masking(cfg, mask, np.flatnonzero(~special).astype(np.int32), special, tokenizer.begins_word)


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


def seq2seq_batch(rows: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], encoder_length: int, decoder_length: int, start: int) -> Batch:
    """A batch for an encoder-decoder: each row holds pairs of what the encoder reads and what the decoder should say, one segment each.

    Args:
      rows: the pairs of each row, as token ids; both sides of a row must fit.
      start: id with which the decoder begins, before the first target.

    Returns:
      tokens, targets, weights, positions, segments [len(rows), decoder_length] of the decoder, and encoder_tokens, encoder_positions,
      encoder_segments int32 [len(rows), encoder_length].

    Raises:
      ValueError: one line, for a row that is too long.
    """
    batch = {key: np.zeros((len(rows), decoder_length), np.int32) for key in ("tokens", "targets", "positions", "segments")}
    batch |= {f"encoder_{key}": np.zeros((len(rows), encoder_length), np.int32) for key in ("tokens", "positions", "segments")}
    batch["weights"] = np.zeros((len(rows), decoder_length), np.float32)
    for row, pairs in enumerate(rows):
        read, said = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
        if read > encoder_length or said > decoder_length:
            raise ValueError(f"row {row} has {read} and {said} tokens, and there is room for {encoder_length} in the encoder and {decoder_length} in the "
                             "decoder: shorten its pairs")
        a = b = 0
        for segment, (source, target) in enumerate(pairs, 1):
            place, answer = (row, slice(a, a + len(source))), (row, slice(b, b + len(target)))
            batch["encoder_tokens"][place], batch["encoder_positions"][place], batch["encoder_segments"][place] = source, np.arange(len(source)), segment
            batch["tokens"][answer], batch["targets"][answer] = [start, *target][:len(target)], target
            batch["positions"][answer], batch["segments"][answer], batch["weights"][answer] = np.arange(len(target)), segment, 1
            a, b = a + len(source), b + len(target)
    return batch


def span_corruption(tokens: Sequence[int], sentinels: Sequence[int], eos: int, seed: int, *, noise: float = 0.15,
                    mean_span: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """T5's task (Raffel et al. 2020): spans of the text are replaced by sentinels, and said after them. A pure function of its arguments.

    Args:
      tokens: ids of a text without eos, at least two.
      sentinels: ids of <extra_id_0>, <extra_id_1>, ...
      seed: decides where the spans lie.
      noise: share of the tokens that is replaced.
      mean_span: mean length of a span, in tokens.

    Returns:
      What the encoder reads, and what the decoder should say, int32: text and sentinels in turn, beginning with text, and the same beginning with
      the first sentinel; both end with eos.

    Raises:
      ValueError: one line: a text too short, or more spans than sentinels.
    """
    tokens, size = np.asarray(tokens, np.int32), len(tokens)
    if size < 2:
        raise ValueError(f"a text of {size} tokens has no span to leave out: give at least 2")
    hidden = min(max(round(size * noise), 1), size - 1)
    spans = min(max(round(hidden / mean_span), 1), hidden, size - hidden)
    if spans > len(sentinels):
        raise ValueError(f"a text of {size} tokens has {spans} spans, and there are {len(sentinels)} sentinels: cut it into shorter texts")
    draw = np.random.Generator(np.random.PCG64(seed))
    # Lengths of at least 1: cuts at different places, drawn by sorting raw 64-bit numbers, which numpy promises to keep.
    cuts = lambda total: np.sort(np.argsort(draw.bit_generator.random_raw(total - 1), kind="stable")[:spans - 1]) + 1
    lengths = lambda total: np.diff([0, *cuts(total), total])
    kept, gone = lengths(size - hidden), lengths(hidden)
    ends = np.cumsum(np.stack([kept, gone], 1).reshape(-1))
    parts = np.split(tokens, ends[:-1])
    mark = lambda i: np.array([sentinels[i]], np.int32)
    read = [piece for i in range(spans) for piece in (parts[2 * i], mark(i))]
    said = [piece for i in range(spans) for piece in (mark(i), parts[2 * i + 1])]
    end = np.array([eos], np.int32)
    return np.concatenate([*read, end]), np.concatenate([*said, end])
