"""Which tokens go into which row: plans made ahead with numpy, so that a batch is known by its number alone.

A document of n tokens has n - 1 targets (each token but the first), each with the token before it as input. A row holds `sequence_length`
targets, made of pieces of one or more documents.

Training: an epoch lays its documents end to end in an order shuffled by (seed, epoch) and cuts the line into rows, which are then shuffled
by (seed, epoch) too, so that a long document does not fill a batch. A piece that continues a document starts afresh: attention does not
reach back into the row before. Every target of the split is in exactly one row of each epoch; only the epoch's last row may end in padding.

Whole documents instead (`fitted_plan`): documents, or windows of those longer than a row, are put into rows by best fit, each whole and in
exactly one row of an epoch. So are the pairs of an encoder-decoder, which need room on two sides. Which of equal size sits where changes with
(seed, epoch), the number of rows does not.

Evaluation: every target counts exactly once. A document longer than a row is read in overlapping windows, so that its later targets see
what came before them; the targets seen again do not count. Pieces share rows where they fit.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


_POOL = 32  # batches among whose texts those of similar length are put together


class Piece(NamedTuple):
    """Inputs are a document's tokens [start, stop), targets its tokens [start + 1, stop + 1), of which the first `seen` do not count."""

    document: int
    start: int
    stop: int
    seen: int = 0


class EpochSize(NamedTuple):
    """What one epoch comes to."""

    rows: int
    targets: int  # tokens to predict, in all rows together
    padding: int  # positions without a token, of both sides of an encoder-decoder; all in one row where rows are cut from a stream
    positions: int  # in all rows together


class EpochPlan(NamedTuple):
    """The order of an epoch whose rows are cut from one line of tokens."""

    sequence_length: int
    documents: np.ndarray  # int64 [documents with a target], shuffled
    ends: np.ndarray  # int64, likewise: targets up to the end of each
    rows: np.ndarray  # int64 [rows]: the shuffled place of each row on the line


class FittedPlan(NamedTuple):
    """The order of an epoch whose rows hold whole pieces, best fit first."""

    pieces: np.ndarray  # int64 [pieces, 4]: the fields of `Piece`, row after row
    row_ends: np.ndarray  # int64 [rows]: pieces up to the end of each
    rows: np.ndarray  # int64 [rows]: which of them comes when


Plan = EpochPlan | FittedPlan


def epoch_size(lengths: np.ndarray, sequence_length: int) -> EpochSize:
    """Size of an epoch over documents of `lengths` tokens [documents]."""
    targets = int(np.maximum(lengths.astype(np.int64) - 1, 0).sum())
    rows = -(-targets // sequence_length)
    return EpochSize(rows, targets, rows * sequence_length - targets, rows * sequence_length)


def epoch_plan(lengths: np.ndarray, sequence_length: int, *key: object) -> EpochPlan:
    """The rows of one epoch over documents of `lengths` tokens [documents], shuffled by `key`: (seed, epoch), and the source's name in a mixture. A pure
    function of its arguments, on every machine."""
    documents = shuffled(len(lengths), "documents", *key)
    targets = lengths[documents].astype(np.int64) - 1
    documents, targets = documents[targets > 0], targets[targets > 0]
    rows = epoch_size(lengths, sequence_length).rows
    return EpochPlan(sequence_length, documents, np.cumsum(targets), shuffled(rows, "rows", *key))


def row(plan: Plan, index: int) -> list[Piece]:
    """The pieces of row `index` in [0, rows)."""
    if isinstance(plan, FittedPlan):
        place = int(plan.rows[index])
        begin = int(plan.row_ends[place - 1]) if place else 0
        return [Piece(*piece) for piece in plan.pieces[begin:plan.row_ends[place]].tolist()]
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


def evaluation_plan(lengths: np.ndarray, sequence_length: int, overlap: float, documents: np.ndarray | None = None) -> FittedPlan:
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
    return fitted_plan(np.stack([documents[of], start, stop, seen], axis=1), (stop - start)[:, None], (sequence_length,))


def windows(sizes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts things of `sizes` [things] into consecutive windows of at most `most`: of each window the thing, its start and its stop, int64 [windows]."""
    sizes = sizes.astype(np.int64)
    counts = -(-sizes // most)
    of = np.repeat(np.arange(len(sizes)), counts)
    start = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * most
    return of, start, np.minimum(start + most, sizes[of])


def fitted_plan(pieces: np.ndarray, sizes: np.ndarray, room: Sequence[int], *key: object) -> FittedPlan:
    """Rows of whole pieces.

    Args:
      pieces: int64 [pieces, 4], the fields of `Piece`.
      sizes: int64 [pieces, sides], the places that each takes; no more than there are.
      room: the places of a row, on each side.
      key: shuffles pieces of equal size, and the rows; none leaves them in order.
    """
    if key:
        order = shuffled(len(pieces), "pieces", *key)
        pieces, sizes = pieces[order], sizes[order]
    place = best_fit(sizes, room)
    row_ends = np.cumsum(np.bincount(place))
    rows = shuffled(len(row_ends), "rows", *key) if key else np.arange(len(row_ends))
    return FittedPlan(pieces[np.argsort(place, kind="stable")], row_ends, rows)


def grouped_plan(pieces: np.ndarray, sizes: np.ndarray, batch_size: int, *key: object) -> FittedPlan:
    """Rows of one piece each, shuffled by `key`, such that the rows of a batch are of similar size: of each `_POOL` batches of shuffled pieces those of similar
    size are put together. The last batch of the epoch ends in rows of nothing."""
    order = shuffled(len(pieces), "pieces", *key)
    pool = _POOL * batch_size
    order = np.concatenate([order[:0], *(some[np.argsort(sizes[some, 0], kind="stable")] for some in np.split(order, range(pool, len(order), pool)))])
    whole = len(order) // batch_size  # batches without padding: these are shuffled
    batches = np.append(shuffled(whole, "batches", *key), [whole] * (len(order) % batch_size > 0)).astype(np.int64)
    rows = (batches[:, None] * batch_size + np.arange(batch_size)).reshape(-1)
    return FittedPlan(pieces[order], np.minimum(np.arange(1, len(rows) + 1), len(order)), rows)


def best_fit(sizes: np.ndarray, room: Sequence[int]) -> np.ndarray:
    """Puts things of `sizes` [things, 1 or 2 sides] into rows with `room` on each side: the largest first, each into the row where it leaves the
    least space on the first side (best fit, decreasing; Johnson 1973). Whole numbers only, so every machine finds the same.

    Things of equal size are placed together and rows with equal space are kept together, so the time follows the number of different sizes
    where that is smaller than the number of things.

    Returns:
      The row of each thing, int64 [things].
    """
    if not len(sizes):
        return np.zeros(0, np.int64)
    sizes = np.asarray(sizes, np.int64)
    first, second = sizes[:, 0], sizes[:, 1] if sizes.shape[1] > 1 else np.zeros(len(sizes), np.int64)
    a_room, b_room = int(room[0]), int(room[1]) if len(room) > 1 else 0
    assert first.min() > 0 and second.min() >= 0 and first.max() <= a_room and second.max() <= b_room
    # One number for each size, which sorts by the larger of the shares it takes of a row's sides.
    share = np.maximum(first * max(b_room, 1), second * a_room)
    kinds, of, counts = np.unique((share * (a_room + 1) + first) * (b_room + 1) + second, return_inverse=True, return_counts=True)
    spaces = _Spaces(a_room, b_room)
    placed, rows = [], 0
    for kind, count in zip(kinds[::-1].tolist(), counts[::-1].tolist()):
        b = kind % (b_room + 1)
        a = kind // (b_room + 1) % (a_room + 1)
        while count:
            found = spaces.take(a, b, count)
            if found is None:
                each = min(a_room // a, b_room // b) if b else a_room // a
                begin, rows = rows, rows + -(-count // each)
                found = a_room, b_room, np.arange(begin, rows)
            count = spaces.fill(*found, a, b, count, placed)
    out = np.empty(len(sizes), np.int64)
    out[np.argsort(-of.reshape(-1), kind="stable")] = np.concatenate(placed)
    return out


class _Spaces:
    """Rows by the space that is left in them."""

    def __init__(self, a_room: int, b_room: int):
        self._rows: dict[tuple[int, int], list[np.ndarray]] = {}
        self._b = [0] * (a_room + 1)  # bit b of entry a: there are rows with spaces a and b
        self._a = 0  # bit a: entry a has a bit

    def take(self, a: int, b: int, count: int) -> tuple[int, int, np.ndarray] | None:
        """Rows, no more than `count` of them need, with the least space of at least `a` on the first side that also have `b` on the second."""
        fitting = self._a >> a
        space = a
        while fitting:
            step = (fitting & -fitting).bit_length() - 1
            space, fitting = space + step, fitting >> step
            seconds = self._b[space] >> b
            if seconds:
                other = b + (seconds & -seconds).bit_length() - 1
                rows = self._rows[space, other].pop()
                need = -(-count // (min(space // a, other // b) if b else space // a))
                if need < len(rows):
                    self._rows[space, other].append(rows[need:])
                    rows = rows[:need]
                elif not self._rows[space, other]:
                    self._b[space] &= ~(1 << other)
                    self._a &= ~((not self._b[space]) << space)
                return space, other, rows
            fitting, space = fitting >> 1, space + 1
        return None

    def fill(self, space: int, other: int, rows: np.ndarray, a: int, b: int, count: int, placed: list[np.ndarray]) -> int:
        """Puts up to `count` things of size (a, b) into rows with spaces (space, other); what is left of `count`."""
        each = min(space // a, other // b) if b else space // a
        whole, last = divmod(min(count, len(rows) * each), each)
        placed.append(np.repeat(rows[:whole], each))
        self._put(space - each * a, other - each * b, rows[:whole])
        if last:
            placed.append(np.repeat(rows[whole:whole + 1], last))
            self._put(space - last * a, other - last * b, rows[whole:whole + 1])
        return count - whole * each - last

    def _put(self, space: int, other: int, rows: np.ndarray) -> None:
        if space and len(rows):
            self._rows.setdefault((space, other), []).append(rows)
            self._b[space] |= 1 << other
            self._a |= 1 << space


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
