"""Which tokens go into which row: plans made ahead with numpy, so that a batch is known by its number alone.

A document of n tokens has n - 1 targets (each token but the first), each with the token before it as input. A row holds `sequence_length`
targets, made of pieces of one or more documents.

Training: an epoch lays its documents end to end in an order shuffled by (seed, epoch) and cuts the line into rows, which are then shuffled
by (seed, epoch) too, so that a long document does not fill a batch. A piece that continues a document starts afresh: attention does not
reach back into the row before. Every target of the split is in exactly one row of each epoch; only the epoch's last row may end in padding.

Evaluation: every target counts exactly once. A document longer than a row is read in overlapping windows, so that its later targets see
what came before them; the targets seen again do not count. Pieces share rows where they fit.
"""

import hashlib
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Inputs are a document's tokens [start, stop), targets its tokens [start + 1, stop + 1), of which the first `seen` do not count."""

    document: int
    start: int
    stop: int
    seen: int = 0


class EpochSize(NamedTuple):
    rows: int
    targets: int  # tokens to predict, in all rows together
    padding: int  # positions without a target, all in one row


class EpochPlan(NamedTuple):
    sequence_length: int
    documents: np.ndarray  # int64 [documents with a target], shuffled
    ends: np.ndarray  # int64, likewise: targets up to the end of each
    rows: np.ndarray  # int64 [rows]: the shuffled place of each row on the line


class EvaluationPlan(NamedTuple):
    sequence_length: int
    pieces: np.ndarray  # int64 [pieces, 4]: the fields of `Piece`, row after row
    row_ends: np.ndarray  # int64 [rows]


def epoch_size(lengths: np.ndarray, sequence_length: int) -> EpochSize:
    """Size of an epoch over documents of `lengths` tokens [documents]."""
    targets = int(np.maximum(lengths.astype(np.int64) - 1, 0).sum())
    rows = -(-targets // sequence_length)
    return EpochSize(rows, targets, rows * sequence_length - targets)


def epoch_plan(lengths: np.ndarray, sequence_length: int, seed: int, epoch: int) -> EpochPlan:
    """The rows of one epoch over documents of `lengths` tokens [documents]; a pure function of its arguments, on every machine."""
    documents = shuffled(len(lengths), "documents", seed, epoch)
    targets = lengths[documents].astype(np.int64) - 1
    documents, targets = documents[targets > 0], targets[targets > 0]
    rows = epoch_size(lengths, sequence_length).rows
    return EpochPlan(sequence_length, documents, np.cumsum(targets), shuffled(rows, "rows", seed, epoch))


def epoch_row(plan: EpochPlan, index: int) -> list[Piece]:
    """The pieces of row `index` in [0, rows)."""
    position = int(plan.rows[index]) * plan.sequence_length
    end = min(position + plan.sequence_length, int(plan.ends[-1]))
    k = int(np.searchsorted(plan.ends, position, side="right"))
    pieces = []
    while position < end:
        begin = int(plan.ends[k - 1]) if k else 0
        stop = min(int(plan.ends[k]), end)
        pieces.append(Piece(int(plan.documents[k]), position - begin, stop - begin))
        position, k = stop, k + 1
    return pieces


def evaluation_plan(lengths: np.ndarray, sequence_length: int, overlap: float, documents: np.ndarray | None = None) -> EvaluationPlan:
    """The rows that evaluate documents of `lengths` tokens [documents], or those numbered `documents` only.

    Args:
      overlap: share of a window, in [0, 1), that it has in common with the one before.
    """
    documents = np.arange(len(lengths)) if documents is None else documents
    targets = lengths[documents].astype(np.int64) - 1
    documents, targets = documents[targets > 0], targets[targets > 0]
    stride = max(1, round((1 - overlap) * sequence_length))
    windows = 1 + -(-np.maximum(targets - sequence_length, 0) // stride)
    of = np.repeat(np.arange(len(documents)), windows)
    number = np.arange(len(of)) - np.repeat(np.cumsum(windows) - windows, windows)
    start = number * stride
    stop = np.minimum(start + sequence_length, targets[of])
    seen = np.where(number > 0, sequence_length - stride, 0)
    row, order = _fit(stop - start, sequence_length)
    pieces = np.stack([documents[of], start, stop, seen], axis=1)[order]
    return EvaluationPlan(sequence_length, pieces, np.cumsum(np.bincount(row)))


def evaluation_row(plan: EvaluationPlan, index: int) -> list[Piece]:
    """The pieces of row `index` in [0, rows)."""
    begin = int(plan.row_ends[index - 1]) if index else 0
    return [Piece(*map(int, piece)) for piece in plan.pieces[begin:plan.row_ends[index]]]


def _fit(sizes: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts pieces of `sizes` into rows of `room`, the longest first, each where it leaves the least space (best fit, decreasing).

    Returns:
      The row of each piece, and the pieces ordered by row.
    """
    row = np.zeros(len(sizes), np.int64)
    rows_with = [[] for _ in range(room + 1)]  # rows by the space left in them
    spaces, rows = 0, 0  # bit s is set where rows_with[s] is not empty: the least space that fits is the lowest bit from `size` up
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            chosen = rows_with[space].pop()
            if not rows_with[space]:
                spaces &= ~(1 << space)
        else:
            space, chosen, rows = room, rows, rows + 1
        row[piece] = chosen
        if space > size:
            rows_with[space - size].append(chosen)
            spaces |= 1 << (space - size)
    return row, np.argsort(row, kind="stable")


def shuffled(count: int, *key: object) -> np.ndarray:
    """0 .. count - 1 in an order that follows from `key` alone: int64 [count].

    The numbers are sorted by a hash of each (SplitMix64, one-to-one, so there are no ties), because numpy does not promise that its own
    permutations stay the same in its next version.
    """
    return np.argsort(hashed(np.arange(count, dtype=np.uint64), *key))


def hashed(numbers: np.ndarray, *key: object) -> np.ndarray:
    """SplitMix64 of uint64 `numbers`, of the same shape; another function for each `key`."""
    salt = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    x = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
