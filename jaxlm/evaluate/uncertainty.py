"""How sure a figure is, and whether two models differ: bootstrap and exact intervals, a paired test, and a correction for many tests.

Items (documents, questions, pairs) are what is drawn again: tokens and choices of one item depend on each other.

bootstrap    the middle 95 % of a statistic over items drawn with replacement (Efron & Tibshirani 1993, ch. 13)
exact        an interval of a share that covers the truth at least 95 times in 100 for any number of items (Clopper & Pearson 1934)
paired       the models answer the same items; if they were the same, an item's two answers could be swapped. The test swaps them at random and counts how
             often the difference is as large as the one seen (Fisher 1935; Noreen 1989, "approximate randomization"). It is exact: of two models that are
             equal it calls at most 5 in 100 different. Where answers are right or wrong it is McNemar's exact test and needs no drawing.
holm         keeps the chance of even one false alarm among many tests at 5 % (Holm 1979)
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

LEVEL = 0.95  # of every interval; 1 - LEVEL is the rate of false alarms that a test may have
POWER = 0.8  # "how many items would be needed" to see a difference so often

Statistic = Callable[[np.ndarray], float]


def bootstrap(values: np.ndarray, statistic: Statistic, seed: int = 0, *, resamples: int = 1000, level: float = LEVEL) -> tuple[float, float]:
    """The bootstrap interval of any statistic, `statistic(values)`.

    Args:
      values: `[N, ...]`, one entry per item; a statistic of several columns takes them side by side.
      statistic: from items `[N, ...]`, drawn with replacement, to a number. For the mean or anything else that is made of sums, `resample` is faster.
      seed: the same seed gives the same interval.

    Returns:
      (low, high); NaN, NaN where there is no item. Draws of which the statistic is NaN (no positive was drawn, for instance) are left out.
    """
    values, generator = np.asarray(values), np.random.default_rng(seed)
    if not len(values):
        return math.nan, math.nan
    return interval(np.array([statistic(values[generator.integers(len(values), size=len(values))]) for _ in range(resamples)], np.float64), level)


def resample(totals_NK: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """Column sums of `resamples` draws of N items with replacement, float64 `[resamples, K]`.

    Columns of one row come from the same draw, so any function of the sums may be formed, a ratio for instance.

    Args:
      totals_NK: one row per item.
      seed: the same seed gives the same draws.
    """
    totals_NK = np.asarray(totals_NK, np.float64)
    items, generator = len(totals_NK), np.random.default_rng(seed)
    rows = max(1, 2**22 // max(1, items))  # draws of one pass: 32 MiB of indices
    parts = []
    for start in range(0, resamples, rows):
        some = min(rows, resamples - start)
        drawn = generator.integers(items, size=(some, items)) + items * np.arange(some)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=some * items).reshape(some, items) @ totals_NK)
    return np.concatenate(parts)


def interval(values_R: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of resampled values; NaN ones (nothing was weighed in the draw) are left out."""
    values = np.asarray(values_R)[~np.isnan(values_R)]
    if not values.size:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def exact(successes: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """The Clopper-Pearson interval of a share, `successes` of `trials`; (0, 1) of no trials.

    Raises:
      ValueError: successes outside [0, trials].
    """
    from scipy.special import betaincinv

    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials: give a number from 0 to {trials}")
    tail = (1 - level) / 2
    low = betaincinv(successes, trials - successes + 1, tail) if successes else 0.0
    high = betaincinv(successes + 1, trials - successes, 1 - tail) if successes < trials else 1.0
    return float(low), float(high)


class Comparison(NamedTuple):
    """Two models on the same items."""
    verdict: Literal["better", "worse", "cannot tell"]  # A against B
    difference: float  # the statistic of A less that of B
    low: float  # bootstrap interval of the difference
    high: float
    p: float  # the chance of so large a difference, either way, if the two were equal
    items: int
    needed: int | None  # items with which a true difference as large as the one seen would be found in 80 of 100 evaluations; None: none was seen


def paired(a: np.ndarray, b: np.ndarray, statistic: Statistic | None = None, *, higher_is_better: bool = True, seed: int = 0, resamples: int = 2000,
           level: float = LEVEL) -> Comparison:
    """Whether A is better than B, worse, or one cannot tell.

    Args:
      a: `[N, ...]` what A made of each item.
      b: `[N, ...]` what B made of the same items, in the same order.
      statistic: from such an array to a number; None: the mean of `[N]`.
      seed: of the swaps and draws.
      resamples: how many random swaps stand behind `p`, which cannot be smaller than 1 / (resamples + 1) and stays exact whatever their number, and draws
        behind the interval.

    Raises:
      ValueError: one line: no items, different shapes, or a value that is not a number.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not len(a):
        raise ValueError(f"a paired test needs both models' values of the same items: {a.shape} and {b.shape} were given")
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("a paired test needs a number for each item: some are NaN")
    if statistic is None and a.ndim > 1:
        raise ValueError(f"items have several values, shape {a.shape}: say which statistic of them is compared")
    difference, p, draws = _of_means(a - b, seed, resamples) if statistic is None else _of_statistics(a, b, statistic, seed, resamples)
    low, high = interval(draws, level)
    needed = _needed(difference, float(np.nanstd(draws)), len(a), level)
    return Comparison(_verdict(difference, p, higher_is_better, level), difference, low, high, p, len(a), needed)


def _of_means(differences_N: np.ndarray, seed: int, resamples: int) -> tuple[float, float, np.ndarray]:
    """Mean difference, p, and draws of the mean difference."""
    from scipy.stats import binomtest

    items = len(differences_N)
    unequal = differences_N[differences_N != 0]
    if not len(unequal):
        p = 1.0
    elif np.ptp(np.abs(unequal)) == 0:  # right or wrong: each unequal item goes one way or the other
        p = float(binomtest(int((unequal > 0).sum()), len(unequal)).pvalue)
    else:
        generator, seen = np.random.default_rng(seed), abs(unequal.sum())
        rows, as_large = max(1, 2**22 // len(unequal)), 0
        for start in range(0, resamples, rows):
            signs = generator.integers(0, 2, (min(rows, resamples - start), len(unequal)), dtype=np.int8) * 2 - 1
            as_large += int((np.abs(signs @ unequal) >= seen * (1 - 1e-9)).sum())
        p = (as_large + 1) / (resamples + 1)
    return float(differences_N.mean()), p, resample(differences_N[:, None], resamples, seed)[:, 0] / items


def _of_statistics(a: np.ndarray, b: np.ndarray, statistic: Statistic, seed: int, resamples: int) -> tuple[float, float, np.ndarray]:
    generator, difference, as_large = np.random.default_rng(seed), float(statistic(a) - statistic(b)), 0
    for _ in range(resamples):
        swap = generator.integers(0, 2, len(a), dtype=bool).reshape(-1, *[1] * (a.ndim - 1))
        as_large += abs(statistic(np.where(swap, b, a)) - statistic(np.where(swap, a, b))) >= abs(difference) * (1 - 1e-9)
    drawn = (generator.integers(len(a), size=len(a)) for _ in range(resamples))
    return difference, (int(as_large) + 1) / (resamples + 1), np.array([statistic(a[items]) - statistic(b[items]) for items in drawn])


def _verdict(difference: float, p: float, higher_is_better: bool, level: float) -> Literal["better", "worse", "cannot tell"]:
    if p > 1 - level + 1e-12:
        return "cannot tell"
    return "better" if (difference > 0) == higher_is_better else "worse"


def _needed(difference: float, error: float, items: int, level: float) -> int | None:
    """Of a two-sided test: the standard error shrinks with the root of the items until the difference is z(1 - alpha / 2) + z(power) of them."""
    from scipy.special import ndtri

    if not difference or not math.isfinite(difference) or not error:
        return None
    return max(1, math.ceil(items * ((ndtri((1 + level) / 2) + ndtri(POWER)) * error / difference)**2))


def holm(p: Sequence[float]) -> list[float]:
    """p values of tests that were made together, corrected: calling those up to 0.05 different gives a false alarm in at most 5 of 100 such families."""
    order, corrected, largest = np.argsort(np.asarray(p, np.float64), kind="stable"), [0.0] * len(p), 0.0
    for rank, index in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def decided(comparisons: Sequence[Comparison], *, higher_is_better: Sequence[bool], level: float = LEVEL) -> list[Comparison]:
    """Comparisons that were made together, with `p` and verdict corrected by `holm`."""
    return [one._replace(p=p, verdict=_verdict(one.difference, p, higher, level))
            for one, p, higher in zip(comparisons, holm([one.p for one in comparisons]), higher_is_better)]
