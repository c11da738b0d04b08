"""Blockwise 8-bit and 4-bit weights: each block of a row keeps its largest absolute value, and each weight a code relative to it.

int8: 255 even levels; a weight is off by at most 1/254 of the largest in its block. nf4 (Dettmers et al. 2023, QLoRA, appendix E): 16 levels at quantiles of
the normal distribution, two codes in a byte; a weight is off by at most 0.152 of the largest; normal weights by 0.092 standard deviations, root mean square.
"""

import jax
import jax.numpy as jnp

BLOCK = 64  # weights that share a scale, as in QLoRA
# Half the widest gap between neighbouring levels, relative to the largest weight of a block.
ERROR = {"int8": 0.5 / 127, "nf4": (1.0 - 0.6961928009986877) / 2}

_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def block_size(size: int, kind: str) -> int:
    """Weights of a block on an axis of `size`: the largest divisor up to `BLOCK`, even for nf4; 0 if there is none."""
    return max((n for n in range(1, min(size, BLOCK) + 1) if size % n == 0 and (kind == "int8" or n % 2 == 0)), default=0)


def quantise(w: jax.Array, axis: int, kind: str) -> dict[str, jax.Array]:
    """`w` with `axis` moved to the end and cut into blocks: `{kind: codes [..., blocks, n], "scale": float32 [..., blocks]}`; int8 codes, or uint8 with two
    nf4 codes each (n is half a block)."""
    n = block_size(w.shape[axis], kind)
    w = jnp.moveaxis(w.astype(jnp.float32), axis, -1)
    blocks = w.reshape(*w.shape[:-1], -1, n)
    scale = jnp.abs(blocks).max(-1)
    unit = blocks / jnp.where(scale > 0, scale, 1)[..., None]
    if kind == "int8":
        return {kind: jnp.round(unit * 127).astype(jnp.int8), "scale": scale}
    codes = sum((unit > (low + high) / 2).astype(jnp.uint8) for low, high in zip(_NF4, _NF4[1:]))  # the nearest level
    return {kind: codes[..., ::2] | (codes[..., 1::2] << 4), "scale": scale}


def dequantise(stored: dict[str, jax.Array], axis: int) -> jax.Array:
    """The weights of `quantise` with their axis back in its place, float32."""
    if "int8" in stored:
        unit = stored["int8"].astype(jnp.float32) / 127
    else:
        packed = stored["nf4"]
        codes = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
        unit = jnp.array(_NF4, jnp.float32)[codes]
    w = unit * stored["scale"][..., None]
    return jnp.moveaxis(w.reshape(*w.shape[:-2], -1), -1, axis)
