"""The optimiser's moments in half or about a quarter of the memory: bfloat16, or 8 bits in blocks, around any optax transformation.

Between steps a moment is stored; for the step it is float32 again, so the optimiser's arithmetic does not change. 8 bits in blocks with a scale each:
Dettmers et al. 2022 (arXiv:2110.02861). A root before rounding, so that small entries keep their relative precision, and blocks of 32: FlashOptim, Gonzalez
Ortiz et al. 2026 (arXiv:2602.23349); there softsign and square root, here a square root for what has a sign and a fourth root for squares, which reach
4e-9 of a block's largest. Rounding is stochastic (Gupta et al. 2015, arXiv:1502.02551): a slow average, which moves by less than a code in one step,
would stand still if it were rounded to the nearest.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm import trees

BLOCK = 32
_UNSIGNED = {"nu", "v"}  # optax's names of second moments, which are never negative


class Blocks(NamedTuple):
    """A moment in 8 bits: `value = scale * (codes / most)^power`, blocks of neighbours along one axis (see `_axis`)."""
    codes: jax.Array  # int8 or uint8, the parameter's shape
    scale: jax.Array  # bfloat16, the largest of each block


class Compressed(NamedTuple):
    """State of an optimiser whose moments are stored small."""

    count: jax.Array  # int32: steps done, the seed of the rounding
    inner: Any  # the transformation's own state


def compressed(tx: optax.GradientTransformation, dtype: str, axes: Mapping[str, tuple[str, ...]]) -> optax.GradientTransformation:
    """`tx` with the moments of matrices stored in `dtype`, "bfloat16" or "int8".

    Args:
      axes: path -> logical axes of each parameter. Norms, biases and factored moments stay as they are: they are small.
    """
    def stored(path: tuple, leaf: Any) -> bool:
        names = axes.get(trees.path_name(path), ())
        return len([a for a in names if a not in ("layers", "head_size")]) > 1 and leaf.ndim == len(names) and leaf.dtype == jnp.float32

    def pack(state: Any, count: jax.Array) -> Any:
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        packed = []
        for number, (path, leaf) in enumerate(leaves):
            if stored(path, leaf):
                noise = _noise(leaf.shape, count.astype(jnp.uint32) * jnp.uint32(len(leaves)) + jnp.uint32(number))
                unsigned = any(getattr(entry, "name", None) in _UNSIGNED for entry in path)
                leaf = _half(leaf, noise) if dtype == "bfloat16" else _blocks(leaf, noise, unsigned, _axis(axes[trees.path_name(path)]))
            packed.append(leaf)
        return Compressed(count, jax.tree.unflatten(structure, packed))

    def unpack(state: Any) -> Any:
        restore = lambda x: _value(x) if isinstance(x, Blocks) else x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
        return jax.tree.map(restore, state.inner, is_leaf=lambda x: isinstance(x, Blocks))

    def update(grads: Any, state: Compressed, params: Any = None):
        updates, inner = tx.update(grads, unpack(state), params)
        return updates, pack(inner, state.count + 1)

    return optax.GradientTransformation(lambda params: pack(tx.init(params), jnp.zeros((), jnp.int32)), update)


def _axis(names: tuple[str, ...]) -> int:
    """The axis along which blocks lie: never the last, which a TPU lays out in 128 lanes, nor one that counts layers, experts or heads."""
    return next(i for i, name in enumerate(names) if name not in ("layers", "expert", "heads", "kv_heads"))


def _noise(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Random uint32 by position and seed, the same on every mesh: MurmurHash3's last mixing (Appleby 2011), a few integer operations per element."""
    strides = [math.prod(shape[i + 1:]) % 2**32 for i in range(len(shape))]
    bits = sum(jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(stride) for i, stride in enumerate(strides))
    bits = bits ^ (seed * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def _half(x: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 -> bfloat16, up or down with the probability that keeps the mean."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise & 0xFFFF)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _blocks(x: jax.Array, noise: jax.Array, unsigned: bool, axis: int) -> Blocks:
    """float32 -> 8 bits. A square that is not 0 never becomes 0: the optimiser divides by its root."""
    size = math.gcd(x.shape[axis], BLOCK)
    largest = jnp.abs(x).reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1:]).max(axis + 1)
    scale = (largest * (1 + 2**-7)).astype(jnp.bfloat16)  # not below the largest, whichever way it is rounded
    share = jnp.abs(x) / jnp.maximum(jnp.repeat(scale.astype(jnp.float32), size, axis), jnp.finfo(jnp.float32).tiny)
    power, most = (4, 255) if unsigned else (2, 127)
    low = jnp.minimum(jnp.floor(share ** (1 / power) * most), most - 1)
    below, above = ((code / most) ** power for code in (low, low + 1))
    codes = low + (noise.astype(jnp.float32) * 2**-32 < (share - below) / (above - below))  # the mean of the value is kept, not of its root
    if unsigned:
        return Blocks(jnp.maximum(codes, (x > 0).astype(jnp.float32)).astype(jnp.uint8), scale)
    return Blocks((jnp.sign(x) * codes).astype(jnp.int8), scale)


def _value(blocks: Blocks) -> jax.Array:
    codes, scale = blocks
    axis = next((i for i, (n, m) in enumerate(zip(codes.shape, scale.shape)) if n != m), 0)
    scale = jnp.repeat(scale.astype(jnp.float32), codes.shape[axis] // scale.shape[axis], axis)
    if codes.dtype == jnp.uint8:
        return scale * (codes.astype(jnp.float32) / 255) ** 4
    share = codes.astype(jnp.float32) / 127
    return scale * share * jnp.abs(share)
