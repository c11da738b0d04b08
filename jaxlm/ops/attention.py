"""Attention: one signature, a table of kernels.

Which key a query may see is data, not shape: a key counts when it lies in the same segment, not after the query (if causal), and inside the
layer's window. Packed rows, padding, caches and sliding windows are all cases of that.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """Where the tokens on one side of attention stand: both int32 `[B, T]`; segment 0 is padding or an empty cache slot."""
    positions: jax.Array
    segments: jax.Array


def mask(queries: Tokens, keys: Tokens, window: jax.Array | None, causal: bool = True) -> jax.Array:
    """Which key each query sees, bool `[B, T, S]`.

    Args:
      queries: `[B, T]` tokens.
      keys: `[B, S]` tokens.
      window: int32 scalar, how many positions back a query sees, itself included (0: all); None: all.
      causal: no later position is seen; else as far ahead as back.
    """
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = queries.segments[:, :, None] == keys.segments[:, None, :]
    seen, distance = (seen & (distance >= 0), distance) if causal else (seen, jnp.abs(distance))
    return seen if window is None else seen & ((distance < window) | (window == 0))


def reference(q_BTNH, k_BSKH, v_BSKH, queries: Tokens, keys: Tokens, *, window=None, causal: bool = True, softcap: float = 0.0,
              scale: float, bias_BNTS=None, dropout: float = 0.0, key: jax.Array | None = None) -> jax.Array:
    """Plain attention, softmax in float32. Query heads `N` share `K` key heads, `N / K` neighbours each (Ainslie et al. 2023). A bias is added
    to the scores. With a `key`, a share `dropout` of the probabilities is set to 0 and the others grow by as much, as in BERT."""
    b, t, n, h = q_BTNH.shape
    k = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * scale).reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias_BNTS is not None:
        scores = scores + bias_BNTS.reshape(-1, k, n // k, *scores.shape[-2:]).astype(jnp.float32)
    # A finite floor: a query that sees nothing (padding against an empty cache) gets the mean, not NaN; nothing reads it.
    scores = jnp.where(mask(queries, keys, window, causal)[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if key is not None and dropout:
        weights = jnp.where(jax.random.bernoulli(key, 1 - dropout, weights.shape), weights / (1 - dropout), 0)
    weights = weights.astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(b, t, n, h)


def blocked(q_BTNH, k_BSKH, v_BSKH, queries: Tokens, keys: Tokens, *, block: int = 128, **options) -> jax.Array:
    """`reference` by blocks of queries, each against the keys up to its own end: skips the half that causality hides.

    Right only for causal attention where slot order is time order within each segment (training rows; not a cache), which `choose` sees to.
    """
    t = q_BTNH.shape[1]
    starts = range(0, t, block)
    cut = lambda x, a, b: jax.tree.map(lambda leaf: leaf[:, a:b], x)
    return jnp.concatenate([
        reference(q_BTNH[:, a:a + block], k_BSKH[:, :a + block], v_BSKH[:, :a + block], cut(queries, a, a + block), cut(keys, 0, a + block),
                  **options) for a in starts], axis=1)


KERNELS: dict[str, Callable[..., jax.Array]] = {"reference": reference, "blocked": blocked}


def choose(kernel: str, *, cached: bool, causal: bool = True, biased: bool = False, dropped: bool = False) -> Callable[..., jax.Array]:
    """The kernel of that name; "auto" takes what was fastest on this backend (see tools/bench.py). What only the reference computes, it computes:
    caches, attention to both sides, biases of scores, dropout of probabilities."""
    if cached or not causal or biased or dropped:
        return reference
    if kernel == "auto":
        kernel = "blocked" if jax.default_backend() == "cpu" else "reference"
    return KERNELS[kernel]
