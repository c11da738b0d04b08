"""From sums to the figures that are reported, and how sure they are. Numpy only: these are a few numbers on the host.

loss                mean negative log-likelihood of a token, in nats
perplexity          exp(loss) (Jelinek et al. 1977); depends on the tokenizer
bits per byte       total nats / ln 2 / bytes of the text; does not, so models with different tokenizers compare
accuracy            share of tokens that the model ranks first
interval            percentile bootstrap over documents (Efron & Tibshirani 1993, ch. 13): tokens of one document depend on each other,
                    so documents are what is drawn again
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """`{name: (sum, weight)}` -> `{name: mean}`; NaN where nothing was weighed."""
    return {name: ratio(float(total), float(weight)) for name, (total, weight) in sums.items()}


def ratio(total, weight):
    """`total / weight`, numbers or arrays, NaN where the weight is 0."""
    total, weight = np.asarray(total, np.float64), np.asarray(weight, np.float64)
    out = np.divide(total, weight, out=np.full(np.broadcast_shapes(total.shape, weight.shape), math.nan), where=weight != 0)
    return out if out.ndim else float(out)


def perplexity(loss):
    """`exp(loss)`, of numbers or arrays; inf where that is out of range."""
    with np.errstate(over="ignore"):
        out = np.exp(np.asarray(loss, np.float64))
    return out if out.ndim else float(out)


def bits_per_byte(nats, size):
    """`nats / ln 2 / size` of a text of `size` bytes, numbers or arrays."""
    return ratio(nats, np.asarray(size, np.float64) * math.log(2))


def resample(totals_DK: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """Column sums of `resamples` draws of D documents with replacement, float64 `[resamples, K]`.

    Columns of one row come from the same draw, so any function of the sums may be formed, a ratio for instance.

    Args:
      totals_DK: one row per document.
      seed: the same seed gives the same draws.
    """
    totals_DK = np.asarray(totals_DK, np.float64)
    documents, generator = len(totals_DK), np.random.default_rng(seed)
    rows = max(1, 2**22 // max(1, documents))  # draws of one pass: 32 MiB of indices
    parts = []
    for start in range(0, resamples, rows):
        some = min(rows, resamples - start)
        drawn = generator.integers(documents, size=(some, documents)) + documents * np.arange(some)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=some * documents).reshape(some, documents) @ totals_DK)
    return np.concatenate(parts)


def interval(values_R: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of resampled values; NaN ones (nothing was weighed in the draw) are left out."""
    values = np.asarray(values_R)[~np.isnan(values_R)]
    if not values.size:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
