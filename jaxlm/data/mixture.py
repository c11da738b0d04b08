"""Which source a row comes from: an exact order of named sources, known ahead.

Sources take turns in a fixed table that repeats: after any number of rows each has had its share of them to within one row. The table follows from whole
numbers alone, so row i of the mixture is known to be row j of source s without looking at the rows before. Within a row no two sources meet; each source
runs through epochs of its own.
"""

import difflib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

LONGEST = 1 << 20  # rows of a table; shares that need more are rounded to this


class Mixture(NamedTuple):
    """What is asked for; see data.weights, data.temperature and data.epochs. Of nothing: no mixture."""
    weights: tuple[tuple[str, float], ...] = ()
    temperature: float = 0.0
    epochs: tuple[tuple[str, float], ...] = ()


def known(key: str, named: Sequence[tuple[str, object]], sources: Sequence[str]) -> None:
    """Raises ValueError, one line, for a name that no source has."""
    for name, _ in named:
        if name not in sources:
            guess = difflib.get_close_matches(name, sources, n=1)
            raise ValueError(f"{key} names the source {name!r}, which data.source does not have: {f'did you mean {guess[0]!r}? ' if guess else ''}"
                             f"sources: {', '.join(map(repr, sources[:10]))}")


def used(mixture: Mixture, sources: Sequence[str]) -> list[str]:
    """The sources of a mixture, in the order of the corpus: those with a weight, else all."""
    for key in ("weights", "epochs"):
        known(f"data.{key}", getattr(mixture, key), sources)
    return [name for name in sources if not mixture.weights or name in dict(mixture.weights)]


def shares(mixture: Mixture, names: Sequence[str], rows: Sequence[int], tokens: Sequence[int]) -> list[Fraction]:
    """How many rows of each source belong together, as multiples of anything.

    Args:
      names: of the sources that are used.
      rows: of one epoch of each.
      tokens: likewise.
    """
    if mixture.weights:
        return [Fraction(str(dict(mixture.weights)[name])) for name in names]
    if mixture.epochs:
        return [Fraction(str(dict(mixture.epochs).get(name, 1))) * count for name, count in zip(names, rows)]
    # Rounded to 0.01 %, so that it is the same on machines whose powers differ in the last digit.
    heaviest = max(tokens)
    scaled = [(count / heaviest) ** (1 / mixture.temperature) for count in tokens]
    return [Fraction(max(round(10_000 * share / sum(scaled)), 1)) for share in scaled]


class Turns(NamedTuple):
    """The repeating order of sources."""
    source: np.ndarray  # int16 [rows of the table]: whose turn it is
    before: np.ndarray  # int32, likewise: how many turns it has had in the table before
    counts: np.ndarray  # int64 [sources]: turns of each in one table


def turns(shares: Sequence[Fraction | int]) -> Turns:
    """The order of sources whose shares are given, none of them 0, as multiples of anything.

    The order is that of the earliest deadline: the j-th turn of a source with share p lies after floor(j / p) rows and before row ceil((j + 1) / p), which
    always works out (Liu & Layland 1973; Tijdeman 1980, the chairman assignment problem) and keeps every source within one row of its share.
    """
    counts = _whole(shares)
    total = sum(counts)
    # Of the next turn of each source: (first row, deadline, source). Whole numbers: floor(j T / c), and ceil((j + 1) T / c).
    waiting = [(0, -(-total // count), source) for source, count in enumerate(counts)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    done, source, before = [0] * len(counts), np.zeros(total, np.int16), np.zeros(total, np.int32)
    for row in range(total):
        while waiting and waiting[0][0] <= row:
            _, deadline, s = heapq.heappop(waiting)
            heapq.heappush(ready, (deadline, s))
        deadline, s = heapq.heappop(ready)
        assert row < deadline
        source[row], before[row] = s, done[s]
        done[s] += 1
        if done[s] < counts[s]:
            heapq.heappush(waiting, (done[s] * total // counts[s], -(-(done[s] + 1) * total // counts[s]), s))
    return Turns(source, before, np.array(counts, np.int64))


def place(order: Turns, row: int) -> tuple[int, int]:
    """Of a row of the mixture its source, and its number among the rows of that source."""
    cycle, slot = divmod(row, len(order.source))
    s = int(order.source[slot])
    return s, cycle * int(order.counts[s]) + int(order.before[slot])


def rows_of(order: Turns, source: int, numbers: np.ndarray) -> np.ndarray:
    """The inverse of `place`: the rows of the mixture that are these rows of a source, int64 [numbers]."""
    cycle, turn = np.divmod(numbers, order.counts[source])
    return cycle * len(order.source) + np.flatnonzero(order.source == source)[turn]


def rows_until(order: Turns, row: int) -> np.ndarray:
    """How many of the rows [0, row) each source has: int64 [sources]."""
    cycle, slot = divmod(row, len(order.source))
    return cycle * order.counts + np.bincount(order.source[:slot], minlength=len(order.counts))


def _whole(shares: Sequence[Fraction | int]) -> list[int]:
    """The smallest whole numbers in these proportions, or, where their sum would be above `LONGEST`, the nearest that have this sum."""
    fractions = [Fraction(share) for share in shares]
    assert fractions and min(fractions) > 0
    total = sum(fractions)
    fractions = [share / total for share in fractions]
    denominator = math.lcm(*(share.denominator for share in fractions))
    if denominator <= LONGEST:
        return [int(share * denominator) for share in fractions]
    exact = [share * LONGEST for share in fractions]
    counts = [max(int(share), 1) for share in exact]
    order = sorted(range(len(exact)), key=lambda s: (counts[s] - exact[s], s))  # largest remainder first
    for s in order[:max(LONGEST - sum(counts), 0)]:
        counts[s] += 1
    return counts
