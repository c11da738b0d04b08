"""What a student is compared with: a teacher's distribution over the vocabulary, and its hidden states."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.ops.losses import cross_entropy


def divergence(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """`temperature^2 KL(teacher || student)` in nats of the softened distributions (Hinton et al. 2015), float32 `[...]`, of logits `[..., V]`; the square
    keeps its gradient of one size whatever the temperature."""
    log_p, log_q = (jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (teacher, student))
    return temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def token_losses(student: Callable, teacher: Callable, hidden_BTD: jax.Array, taught_BTE: jax.Array, targets_BT: jax.Array, temperature: float,
                 chunk_rows: int = 0, ways: int = 1) -> tuple[jax.Array, ...]:
    """`losses.cross_entropy` of the student's logits and `divergence`, each `[B, T]`; `chunk_rows` and `ways` as in `losses.token_losses`.

    Args:
      student, teacher: hidden states -> logits `[..., V]`.
    """
    def one(hidden, taught, targets):
        logits = student(hidden)
        return *cross_entropy(logits, targets), divergence(logits, teacher(taught), temperature)

    rows, length = targets_BT.shape
    least = -(-rows * length // chunk_rows) if chunk_rows else 1
    chunks = next((n for n in range(least, length // ways) if length // ways % n == 0), length // ways)
    if chunks <= 1 or not chunk_rows:
        return one(hidden_BTD, taught_BTE, targets_BT)
    cut = lambda x: jnp.moveaxis(x.reshape(rows, length // chunks, chunks, *x.shape[2:]), 2, 0)
    parts = jax.lax.map(lambda chunk: jax.checkpoint(one)(*chunk), tuple(map(cut, (hidden_BTD, taught_BTE, targets_BT))))
    return tuple(jnp.moveaxis(part, 0, 2).reshape(rows, length) for part in parts)


def angle(a: jax.Array, b: jax.Array) -> jax.Array:
    """`1 - cosine` of vectors `[..., D]`, float32 `[...]`."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return 1 - (a * b).sum(-1) / jnp.maximum(jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1), 1e-8)
