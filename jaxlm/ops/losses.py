"""Cross-entropy as sums, so that parts of a batch add up exactly."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(logits_RV: jax.Array, targets_R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per row: `-log p(target)` in nats, `log Z` and whether the target has the highest logit, all float32 `[R]`.

    Targets must be in `[0, V)`: the data room checks that, since a gather would clamp in silence.
    """
    logits = logits_RV.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets_R[:, None], axis=-1)[:, 0]
    return log_z - picked, log_z, (picked >= logits.max(axis=-1)).astype(jnp.float32)


def token_losses(head: Callable[[jax.Array], jax.Array], hidden_RD: jax.Array, targets_R: jax.Array, chunk_rows: int = 0):
    """`cross_entropy` of `head(hidden)`; with `chunk_rows`, no more than so many rows of logits exist at one time.

    Args:
      head: hidden `[R, D]` -> logits `[R, V]`.
      chunk_rows: 0 for all at one time, else rows per chunk; the backward pass computes each chunk's logits again.
    """
    one = lambda hidden, targets: cross_entropy(head(hidden), targets)
    rows = hidden_RD.shape[0]
    if not chunk_rows or chunk_rows >= rows:
        return one(hidden_RD, targets_R)
    padding = -rows % chunk_rows
    hidden = jnp.pad(hidden_RD, ((0, padding), (0, 0))).reshape(-1, chunk_rows, hidden_RD.shape[1])
    targets = jnp.pad(targets_R, (0, padding)).reshape(-1, chunk_rows)
    parts = jax.lax.map(lambda chunk: jax.checkpoint(one)(*chunk), (hidden, targets))
    return tuple(part.reshape(-1)[:rows] for part in parts)
