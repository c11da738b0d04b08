"""Cross-entropy as sums, so that parts of a batch add up exactly."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per token: `-log p(target)` in nats, `log Z` and whether the target has the highest logit, all float32 `[...]`, of logits `[..., V]`.

    Targets must be in `[0, V)`: the data room checks that, since a gather would clamp in silence.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - picked, log_z, (picked >= logits.max(axis=-1)).astype(jnp.float32)


def token_losses(head: Callable[[jax.Array], jax.Array], hidden_BTD: jax.Array, targets_BT: jax.Array, chunk_rows: int = 0, ways: int = 1):
    """`cross_entropy` of `head(hidden)`, each `[B, T]`; with `chunk_rows`, not the logits of all tokens exist at one time.

    Args:
      head: hidden `[..., D]` -> logits `[..., V]`.
      chunk_rows: 0 for all at one time, else at most about so many tokens per chunk; the backward pass computes each chunk's logits again. A chunk
        takes every n-th token of all rows, so that devices that share the rows, or a row, share each chunk: no fewer than B tokens are one.
      ways: devices that share a row; each has T / ways neighbouring slots.
    """
    one = lambda hidden, targets: cross_entropy(head(hidden), targets)
    rows, length = targets_BT.shape
    least = -(-rows * length // chunk_rows) if chunk_rows else 1
    chunks = next((n for n in range(least, length // ways) if length // ways % n == 0), length // ways)
    if chunks <= 1:
        return one(hidden_BTD, targets_BT)
    cut = lambda x: jnp.moveaxis(x.reshape(rows, length // chunks, chunks, *x.shape[2:]), 2, 0)
    parts = jax.lax.map(lambda chunk: jax.checkpoint(one)(*chunk), (cut(hidden_BTD), cut(targets_BT)))
    return tuple(jnp.moveaxis(part, 0, 2).reshape(rows, length) for part in parts)
