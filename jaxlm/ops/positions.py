"""Rotary position embedding (Su et al. 2021, RoFormer), in the half-split layout of GPT-NeoX and Llama, and its scalings for longer contexts; relative
positions in buckets (Raffel et al. 2020, T5)."""

import math

import jax
import jax.numpy as jnp


def frequencies(size: int, theta: float) -> jax.Array:
    """`theta^(-2i / size)`, float32 `[size / 2]`: radians per position of each pair of dimensions."""
    return theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def scale_llama3(freqs: jax.Array, *, factor: float, low: float, high: float, context: int) -> jax.Array:
    """Llama 3.1's scaling: wavelengths longer than `context / low` grow by `factor`, those shorter than `context / high` stay, between them it is
    blended."""
    turns = context * freqs / (2 * math.pi)  # of each pair within the original context
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * freqs + (1 - kept) * freqs / factor


def rotary_angles(positions_BT: jax.Array, freqs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each `[B, T, 1, len(freqs)]` float32, of positions times frequencies."""
    angles = positions_BT[..., None, None].astype(jnp.float32) * freqs
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair `(x[i], x[i + R/2])` of the first R dimensions of a head by its angle, where R is twice the number of angles; the result has
    the dtype of `x`. The angles have no gradient."""
    return _turn(x_BTNH, *angles)


@jax.custom_vjp
def _turn(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x_BTNH, cos, sin, tpu=_turn_by_product, default=_turn_by_halves)


def _turn_back(angles: tuple[jax.Array, jax.Array], g_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A rotation's transpose is the rotation back."""
    cos, sin = angles
    return _turn(g_BTNH, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


_turn.defvjp(lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)), _turn_back)


def _turn_by_halves(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = cos.shape[-1]
    a, b, rest = jnp.split(x_BTNH.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x_BTNH.dtype)


def _turn_by_product(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The halves changed by a product with a matrix of 0, 1 and -1, which is exact: TPUs take halves of their 128 lanes apart and join them slowly. In
    Llama-2-7B's compiled step on v5e the rotations took 50 ms by halves (docs/performance.md)."""
    half, size = cos.shape[-1], x_BTNH.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    swap = jnp.where((row == column + half) & (column < half), -1, (column == row + half) & (row < half))
    widen = lambda part, fill: jnp.concatenate([part, part, jnp.full((*part.shape[:-1], size - 2 * half), fill, part.dtype)], axis=-1)
    swapped = jnp.einsum("btnh,hk->btnk", x_BTNH, swap.astype(x_BTNH.dtype), preferred_element_type=jnp.float32,
                         precision=jax.lax.Precision.HIGHEST if x_BTNH.dtype == jnp.float32 else None)
    return (x_BTNH.astype(jnp.float32) * widen(cos, 1) + swapped * widen(sin, 0)).astype(x_BTNH.dtype)


def relative_buckets(queries_BT: jax.Array, keys_BS: jax.Array, *, buckets: int, distance: int, causal: bool) -> jax.Array:
    """The bucket of each distance between a query and a key, int32 `[B, T, S]` in `[0, buckets)`.

    Half of the buckets of a direction hold one distance each, the others grow by equal factors up to `distance`, from where on the last holds
    all. Causal: keys that come later are in the bucket of distance 0; else the second half of the buckets is theirs.
    """
    ahead_BTS = keys_BS[:, None, :] - queries_BT[:, :, None]
    count = buckets if causal else buckets // 2
    exact = count // 2
    # A table made on the host: logarithms at the borders of buckets must not depend on the device. The tiny excess keeps borders that are whole
    # numbers (16, 32, 64 of 128) on the upper side.
    steps = [exact + int(math.log(d / exact) / math.log(distance / exact) * (count - exact) + 1e-6) for d in range(exact, distance + 1)]
    table = jnp.array([*range(exact), *(min(step, count - 1) for step in steps)], jnp.int32)
    far = jnp.maximum(-ahead_BTS, 0) if causal else jnp.abs(ahead_BTS)
    found = table[jnp.minimum(far, distance)]
    return found if causal else found + jnp.where(ahead_BTS > 0, count, 0).astype(jnp.int32)
