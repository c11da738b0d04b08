"""Self-attention on the mesh: which kernel, and whether devices that share a row pass keys round or exchange tokens for heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.config import TransformerConfig
from jaxlm.ops import attention, ring
from jaxlm.ops.attention import Tokens

_ROWS = ("batch", "sequence")


def attend(cfg: TransformerConfig, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries: Tokens, keys: Tokens, *, window: jax.Array | None,
           cached: bool, bias_BNTS: jax.Array | None, **dropping: Any) -> jax.Array:
    """`[B, T, N, H]`: what `attention.reference` computes, by the kernel and over the devices that `cfg` and the mesh say.

    With a cache (generation), a bias (T5) or dropout of probabilities (`dropout` and `key` of `attention.reference`) there is only `reference`: where
    devices share a row the compiler gathers the keys.
    """
    options = {"causal": cfg.causal, "softcap": cfg.attention_softcap, "scale": cfg.score_scale}
    if cached or bias_BNTS is not None or dropping:
        biased = {} if bias_BNTS is None else {"bias_BNTS": bias_BNTS}
        return attention.reference(q_BTNH, k_BSKH, v_BSKH, queries, keys, window=window, **options, **biased, **dropping)
    name, parts = attention.choose(cfg, q_BTNH.shape[1], sharding.platform()), sharding.ways("sequence")
    evenly = sharding.divides(q_BTNH, *_ROWS, "heads", None)
    if parts > 1 and (cfg.attention == "reference" or not evenly):
        return attention.reference(q_BTNH, k_BSKH, v_BSKH, queries, keys, window=window, **options)
    kernel = functools.partial(attention.splash, windows=tuple(sorted(set(cfg.windows)))) if name == "splash" else attention.KERNELS[name]
    if parts > 1 and cfg.sequence_attention == "ring":
        kernel = functools.partial(ring.ring, axis="sequence", parts=parts)
    elif parts > 1:
        kernel = functools.partial(ring.exchange, axis="sequence", parts=parts, order=sharding.zigzag(parts, q_BTNH.shape[1]), kernel=kernel)
    elif name != "splash" or not evenly:  # a Pallas kernel is what the compiler cannot split itself
        return kernel(q_BTNH, k_BSKH, v_BSKH, queries, keys, window=window, **options)
    device = lambda q, k, v, queries, keys, window: kernel(q, k, v, queries, keys, window=window, **options)
    heads, kv_heads = (*_ROWS, "heads", None), (*_ROWS, "kv_heads", None)
    return sharding.per_device(device, (heads, kv_heads, kv_heads, _ROWS, _ROWS, ()), heads)(
        q_BTNH, k_BSKH, v_BSKH, queries, keys, jnp.int32(0) if window is None else window)


def check(cfg: TransformerConfig, mesh: Any, length: int, platform: str) -> str:
    """How attention will be computed in training with rows of `length` tokens on a "cpu", "gpu" or "tpu", in words for the run's introduction.

    Raises:
      ValueError: one line: a forced kernel that cannot do what the model needs, heads that do not divide.
    """
    name, parts = attention.choose(cfg, length, platform), mesh.shape["sequence"]
    if cfg.positions == "relative" or cfg.attention_dropout:
        return "reference"
    if parts == 1:
        return name
    if cfg.sequence_attention == "ring":
        if cfg.attention not in ("auto", "reference"):
            raise ValueError(f"model.attention={cfg.attention} needs whole rows, and mesh.sequence={parts} splits them: set "
                             "model.sequence_attention=all_to_all, or model.attention=auto for the ring")
        return name if cfg.attention == "reference" else f"ring of {parts}"
    heads, kv_heads = (n // mesh.shape["tensor"] for n in (cfg.heads, cfg.kv_heads))
    if heads % parts or (kv_heads % parts and parts % kv_heads):
        works = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise ValueError(f"model.sequence_attention=all_to_all splits the {heads} query and {kv_heads} key heads of a device over mesh.sequence={parts}: "
                         f"sizes that work are {works}; or set model.sequence_attention=ring")
    return f"{name}, tokens exchanged for heads among {parts}"
