"""Log-likelihoods of continuations: token ids in, sums per request out, whatever the devices, the batch size and the processes.

Requests are sorted by length, longest first, and each batch holds about as many tokens as any other, so little of it is padding and few shapes are compiled.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxlm import sharding
from jaxlm.data import tasks
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.evaluate.likelihood import Scorer, one_behind


class Request(NamedTuple):
    """Tokens of which a model is to say how likely they are."""
    tokens: np.ndarray  # int32, what is read and then what is scored
    targets: int  # how many of the last tokens are scored
    place: int = -1  # of an encoder: of `tokens`, which are all read, the one that is scored alone
    mask: int = 0  # and what it is read as


class Score(NamedTuple):
    """What the model says of a request."""
    logprob: float  # nats, of all targets
    greedy: bool  # whether the model ranks each of them first


def pairs(tokenizer: Tokenizer, contexts: Sequence[str], continuations: Sequence[str], context: int) -> tuple[list[Request], int]:
    """Requests for continuations of contexts. White space between them belongs to the continuation; both are encoded together, so that the tokens are those
    of the whole text. What is longer than the model loses its beginning.

    Args:
      contexts: "" for none: the continuation then follows the begin-of-sequence token alone.
      context: the longest sequence that the model may see.

    Returns:
      The requests, and how many of them were cut.

    Raises:
      ValueError: one line: a continuation alone is longer than the model.
    """
    moved = [before[len(before.rstrip()):] + after for before, after in zip(contexts, continuations)]
    bare = [before.rstrip() for before in contexts]
    distinct = list(dict.fromkeys(bare))
    sizes = dict(zip(distinct, (len(ids) for ids in tokenizer.encode_batch(distinct))))
    wholes = tokenizer.encode_batch([before + after for before, after in zip(bare, moved)])
    found, cut = [], 0
    for number, (before, after, whole) in enumerate(zip(bare, moved, wholes)):
        begin = [tokenizer.bos] if tokenizer.adds_bos or not sizes[before] else []
        targets = len(whole) - sizes[before]
        if targets <= 0:  # the tokenizer joined it with the end of the context
            whole = np.concatenate([tokenizer.encode_batch([before])[0], last := tokenizer.encode_batch([after])[0]])
            targets = len(last)
        if targets > context:
            raise ValueError(f"continuation {number}, {after[:40]!r}..., has {targets} tokens, and the model's context holds {context}: leave that item "
                             "out, or use another model")
        tokens = np.concatenate([np.array(begin, np.int32), whole.astype(np.int32)])
        cut += len(tokens) > context + 1
        found.append(Request(tokens[-(context + 1):], targets))
    return found, cut


def hidden(tokenizer: Tokenizer, texts: tuple[str, str], context: int) -> list[list[Request]]:
    """Requests to an encoder for two texts: their scores add up to the pseudo-log-likelihood of what the two have in common, in each of them. Every shared
    token is hidden once and scored, given all others (Nangia et al. 2020). What the texts do not share is never scored, so a name that is rarer does not
    count against its group.

    Raises:
      ValueError: one line: a text is longer than the model, the two share no token, or the tokenizer has no token that hides.
    """
    mask, both = tasks.mask_token(tokenizer), [ids.astype(np.int32) for ids in tokenizer.encode_batch(texts)]
    if (longest := max(map(len, both)) + 2) > context:
        raise ValueError(f"the text {texts[0][:40]!r}... has {longest} tokens, and the model's context holds {context}: leave that item out, or use another "
                         "model")
    blocks = difflib.SequenceMatcher(None, *(ids.tolist() for ids in both), autojunk=False).get_matching_blocks()
    if not blocks[0].size:
        raise ValueError(f"the texts {texts[0][:40]!r} and {texts[1][:40]!r} have no token in common, which is what an encoder is asked for")
    framed = [np.concatenate([[tokenizer.bos], ids, [tokenizer.eos]]).astype(np.int32) for ids in both]
    return [[Request(ids, 1, 1 + block[side] + i, mask) for block in blocks for i in range(block.size)] for side, ids in enumerate(framed)]


def windows(tokenizer: Tokenizer, text: str, context: int) -> list[Request]:
    """Requests that together score each token of a text once, after the begin-of-sequence token: the first sees `context` tokens, each other one those that it
    scores and, the last above all, as many before them as the model holds (as lm-evaluation-harness does)."""
    tokens = np.concatenate([np.array([tokenizer.bos], np.int32), tokenizer.encode_batch([text])[0].astype(np.int32)])
    ends = [*range(context, len(tokens) - 1, context), len(tokens) - 1] if len(tokens) > 1 else []
    return [Request(tokens[max(0, end - context):end + 1], end - (ends[i - 1] if i else 0)) for i, end in enumerate(ends)]


def likelihoods(score: Scorer, params: Any, mesh: Mesh, requests: Sequence[Request], *, context: int, batch_tokens: int) -> Iterator[dict[int, Score]]:
    """The scores of the requests, by their numbers, batch by batch. In several processes all call this together, and all get everything.

    Args:
      score: `likelihood.scorer`.
      batch_tokens: tokens of a batch, about; it does not change the scores.
    """
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    ways, parts = sharding.ways("batch", mesh), 2 * mesh.shape["sequence"]
    batches = []
    while order:
        longest = _bucket(len(requests[order[0]].tokens) - (requests[order[0]].place < 0))
        width = -(-longest // parts) * parts if mesh.shape["sequence"] > 1 else longest
        rows = -(-min(max(1, batch_tokens // width), len(requests)) // ways) * ways
        batches.append((order[:rows], rows, width))
        order = order[rows:]

    def run(batch: tuple[list[int], int, int]):
        numbers, rows, width = batch
        begin, end = sharding.local_rows(mesh, rows)
        return score(params, sharding.to_device(mesh, _fill(requests, numbers[begin:end], end - begin, width), rows))

    for (numbers, _, _), parts_of in zip(batches, one_behind(run, iter(batches), mesh)):
        nll, right, weights, of = map(np.asarray, parts_of)
        counts = weights > 0
        place = {number: i for i, number in enumerate(numbers)}
        where = np.array([place[number] for number in of[counts].tolist()])
        total = np.bincount(where, nll[counts].astype(np.float64), len(numbers))
        first = np.bincount(where, right[counts], len(numbers))
        scored = np.bincount(where, minlength=len(numbers))
        assert np.array_equal(scored, [requests[number].targets for number in numbers]), "a target was left out or counted twice"
        yield {number: Score(float(-total[i]), bool(first[i] == scored[i])) for i, number in enumerate(numbers)}


def _bucket(length: int) -> int:
    """16, 24, 32, 48, 64, 96 ...: little padding, few shapes."""
    power = 1 << max(4, math.ceil(math.log2(max(length, 1))))
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


def _fill(requests: Sequence[Request], numbers: Sequence[int], rows: int, width: int) -> dict[str, np.ndarray]:
    """A batch with the keys of `data/tasks.py`, a request a row; "documents" are the requests' numbers."""
    batch = {key: np.zeros((rows, width), np.int32) for key in ("tokens", "targets", "positions", "segments")}
    batch |= {"weights": np.zeros((rows, width), np.float32), "documents": np.full((rows, width), -1, np.int32)}
    for row, number in enumerate(numbers):
        tokens, targets, place, mask = requests[number]
        size = len(tokens) - (place < 0)
        if place < 0:
            batch["tokens"][row, :size], batch["targets"][row, :size] = tokens[:-1], tokens[1:]
            batch["weights"][row, size - targets:size] = 1
        else:
            batch["tokens"][row, :size], batch["targets"][row, :size] = tokens, tokens
            batch["tokens"][row, place], batch["weights"][row, place] = mask, 1
        batch["positions"][row, :size], batch["segments"][row, :size] = np.arange(size), 1
        batch["documents"][row, :size] = number
    return batch
