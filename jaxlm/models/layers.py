"""The leaves of the network as Linen modules, used only as (init, apply) pairs. One Block serves every family through its config.

Shapes: B batch, T tokens, S keys, D width, N query heads, K key heads, H head size, F feed-forward, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import TransformerConfig
from jaxlm.ops import attention, positions
from jaxlm.sharding import constrain

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu,
}


class Slots(NamedTuple):
    """What attention needs besides the activations, the same for all layers."""
    queries: attention.Tokens  # [B, T]
    keys: attention.Tokens  # [B, S]; S = T without a cache
    angles: tuple[jax.Array, jax.Array] | None  # rotary, of the queries
    start: jax.Array | None  # first cache slot to write, int32 scalar; None without a cache


def project(x: jax.Array, w: jax.Array, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` axes of `x` with the first of `w`, as one 2-D matrix product.

    On XLA:CPU a 2-D product is 1.4x a 3-D `dot_general` over a whole train step; elsewhere they are the same.
    """
    lead, outputs = x.shape[:x.ndim - inputs], w.shape[inputs:]
    size = math.prod(w.shape[:inputs])
    return (x.reshape(-1, size) @ w.reshape(size, -1)).reshape(*lead, *outputs)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; `key` None is evaluation."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def initialiser(cfg: TransformerConfig, inputs: int, outputs: int, into_residual: bool = False) -> Callable:
    """An `(key, shape, dtype)` initialiser of a weight that maps `inputs` numbers to `outputs`, by the name in `cfg.init`.

    normal, truncated_normal: std `init_std`. xavier (Glorot & Bengio 2010): std sqrt(2 / (in + out)). kaiming (He et al. 2015): sqrt(2 / in).
    lecun: sqrt(1 / in); the last three are normal. Projections into the residual stream are divided by sqrt(2 L) where `init_depth_scaled` says so (GPT-2).
    """
    std = {"normal": cfg.init_std, "truncated_normal": cfg.init_std, "xavier": math.sqrt(2 / (inputs + outputs)),
           "kaiming": math.sqrt(2 / inputs), "lecun": math.sqrt(1 / inputs)}[cfg.init]
    if into_residual and cfg.init_depth_scaled:
        std /= math.sqrt(2 * cfg.layers)
    if cfg.init == "truncated_normal":  # cut at two deviations; the constant restores the std
        return lambda key, shape, dtype: std / 0.87962566103423978 * jax.random.truncated_normal(key, -2, 2, shape, dtype)
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm (Ba et al. 2016) over the last axis, in float32."""
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg, size = self.cfg, x_BTD.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (size,), jnp.float32)
        x = x_BTD.astype(jnp.float32)
        if cfg.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + cfg.norm_eps) * scale.astype(jnp.float32)
        if cfg.norm == "layer" and cfg.bias:
            x = x + self.param("bias", nn.initializers.zeros, (size,), jnp.float32).astype(jnp.float32)
        return x.astype(x_BTD.dtype)


def _rms(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention; with a cache it writes its keys and values there first."""
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD, slots: Slots, window: jax.Array | None, cache: dict | None):
        cfg = self.cfg
        d, n, k, h = x_BTD.shape[-1], cfg.heads, cfg.kv_heads, cfg.head_size
        q = project(x_BTD, self.param("q", initialiser(cfg, d, n * h), (d, n, h), jnp.float32))
        key = project(x_BTD, self.param("k", initialiser(cfg, d, k * h), (d, k, h), jnp.float32))
        value = project(x_BTD, self.param("v", initialiser(cfg, d, k * h), (d, k, h), jnp.float32))
        if cfg.bias:
            q = q + self.param("q_bias", nn.initializers.zeros, (n, h), jnp.float32)
            key = key + self.param("k_bias", nn.initializers.zeros, (k, h), jnp.float32)
            value = value + self.param("v_bias", nn.initializers.zeros, (k, h), jnp.float32)
        if cfg.qk_norm:
            q = _rms(q, self.param("q_norm", nn.initializers.ones, (h,), jnp.float32), cfg.norm_eps)
            key = _rms(key, self.param("k_norm", nn.initializers.ones, (h,), jnp.float32), cfg.norm_eps)
        if slots.angles is not None:
            q, key = positions.rotate(q, slots.angles), positions.rotate(key, slots.angles)
        q = constrain(q, "batch", "sequence", "heads", "head_size")
        key, value = (constrain(a, "batch", "sequence", "kv_heads", "head_size") for a in (key, value))
        if cache is not None:
            cache = {name: jax.lax.dynamic_update_slice_in_dim(cache[name], new.astype(cache[name].dtype), slots.start, axis=1)
                     for name, new in (("k", key), ("v", value))}
            key, value = cache["k"].astype(q.dtype), cache["v"].astype(q.dtype)
        kernel = attention.choose(cfg.attention, cached=cache is not None)
        out_BTNH = kernel(q, key, value, slots.queries, slots.keys, window=window, softcap=cfg.attention_softcap, scale=h ** -0.5)
        out = project(out_BTNH, self.param("o", initialiser(cfg, n * h, d, into_residual=True), (n, h, d), jnp.float32), inputs=2)
        if cfg.bias:
            out = out + self.param("o_bias", nn.initializers.zeros, (d,), jnp.float32)
        return out, cache


class Mlp(nn.Module):
    """Feed-forward layer, plain or gated (Shazeer 2020)."""
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg, d, f = self.cfg, x_BTD.shape[-1], self.cfg.feedforward
        hidden = project(x_BTD, self.param("up", initialiser(cfg, d, f), (d, f), jnp.float32))
        if cfg.bias:
            hidden = hidden + self.param("up_bias", nn.initializers.zeros, (f,), jnp.float32)
        if cfg.gated:
            gate = project(x_BTD, self.param("gate", initialiser(cfg, d, f), (d, f), jnp.float32))
            if cfg.bias:
                gate = gate + self.param("gate_bias", nn.initializers.zeros, (f,), jnp.float32)
            hidden = ACTIVATIONS[cfg.activation](gate) * hidden
        else:
            hidden = ACTIVATIONS[cfg.activation](hidden)
        hidden = constrain(hidden, "batch", "sequence", "feedforward")
        out = project(hidden, self.param("down", initialiser(cfg, f, d, into_residual=True), (f, d), jnp.float32))
        if cfg.bias:
            out = out + self.param("down_bias", nn.initializers.zeros, (d,), jnp.float32)
        return out


class Block(nn.Module):
    """Pre-norm transformer layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD, slots: Slots, window=None, cache: dict | None = None, key: jax.Array | None = None):
        cfg = self.cfg
        keys = (None, None) if key is None else jax.random.split(key)
        mixed, cache = Attention(cfg, name="attn")(Norm(cfg, name="attn_norm")(x_BTD), slots, window, cache)
        x_BTD = constrain(x_BTD + dropout(mixed, cfg.dropout, keys[0]), "batch", "sequence", "residual")
        hidden = Mlp(cfg, name="mlp")(Norm(cfg, name="mlp_norm")(x_BTD))
        x_BTD = constrain(x_BTD + dropout(hidden, cfg.dropout, keys[1]), "batch", "sequence", "residual")
        return x_BTD, cache
