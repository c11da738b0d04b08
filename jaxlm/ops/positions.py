"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-split layout of GPT-NeoX and Llama."""

import jax
import jax.numpy as jnp


def rotary_angles(positions_BT: jax.Array, head_size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each `[B, T, 1, head_size / 2]` float32, of positions times the wavelengths `theta^(-2i / head_size)`."""
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair `(x[i], x[i + H/2])` by its angle; the result has the dtype of `x`."""
    cos, sin = angles
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
