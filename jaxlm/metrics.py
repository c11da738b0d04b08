"""From sums to the figures that are reported (how sure they are: evaluate/uncertainty.py). Numpy only: these are a few numbers on the host.

loss                mean negative log-likelihood of a token, in nats
perplexity          exp(loss) (Jelinek et al. 1977); depends on the tokenizer
bits per byte       total nats / ln 2 / bytes of the text; does not, so models with different tokenizers compare
accuracy            share of tokens that the model ranks first
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
