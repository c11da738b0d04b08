"""The leaves of the network as Linen modules, used only as (init, apply) pairs. One Block serves every family through its config.

Shapes: B batch, T tokens, S keys, D width, N query heads, K key heads, H head size, F feed-forward, V vocabulary, L layers, E experts.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import TransformerConfig
from jaxlm.models.attend import attend
from jaxlm.ops import attention, moe, positions
from jaxlm.sharding import constrain, divides, per_device, platform, ways

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu,
}


class Memory(NamedTuple):
    """What an encoder made, for the decoder's layers to attend to."""
    hidden: jax.Array | None  # [B, S, D]; None: each layer's cache holds the keys and values
    segments: jax.Array  # int32 [B, S]


class Slots(NamedTuple):
    """What attention needs besides the activations, the same for all layers."""
    queries: attention.Tokens  # [B, T]
    keys: attention.Tokens  # [B, S]; S = T without a cache
    angles: tuple[jax.Array, jax.Array] | None  # rotary, of the queries
    local_angles: tuple[jax.Array, jax.Array] | None  # the same for layers with a window, where these differ
    store: Callable | None  # with a cache: writes a layer's new keys and values there and returns all (`cache.Store`)
    bias: jax.Array | None = None  # of the scores of self-attention, [B, N, T, S]
    memory: Memory | None = None  # of the encoder, where there is one


class Adapted(NamedTuple):
    """A matrix with a low-rank adapter, in place of the matrix. Linen compares the shape of the first leaf only, the matrix itself."""
    w: jax.Array  # [in..., out...]
    a: jax.Array  # [in..., r]
    b: jax.Array  # [r, out...]
    factor: jax.Array | None  # [out...], of the result (DoRA)


def adapt(layer: dict) -> dict:
    """One layer's weights with the branches `lora` joined to the matrices that they belong to; see `jaxlm/lora.py`."""
    if not isinstance(layer, dict):
        return layer
    adapters = layer.get("lora", {})
    return {name: _adapted(child, **adapters[name]) if name in adapters else adapt(child) for name, child in layer.items() if name != "lora"}


def _adapted(w: jax.Array, a: jax.Array, b: jax.Array, m: jax.Array | None = None) -> Adapted:
    if m is None:
        return Adapted(w, a, b, None)
    inputs = a.ndim - 1
    size, f32 = math.prod(a.shape[:-1]), jnp.float32
    whole = w.astype(f32) + (a.astype(f32).reshape(size, -1) @ b.astype(f32).reshape(b.shape[0], -1)).reshape(w.shape)
    length = jnp.sqrt(jnp.square(jax.lax.stop_gradient(whole)).sum(range(inputs)))
    return Adapted(w, a, b, (m.astype(f32) / length).astype(w.dtype))


def project(x: jax.Array, w: jax.Array | Adapted, inputs: int = 1) -> jax.Array:
    """Contracts the last `inputs` axes of `x` with the first of `w`, as one 2-D matrix product, and adds what an adapter does.

    On XLA:CPU a 2-D product is 1.4x a 3-D `dot_general` over a whole train step; elsewhere they are the same. Where devices share a row, rows and tokens
    cannot be one axis: the compiler would gather them. For the backward pass `x` and `w` are kept as they came, not the 2-D copies: several weights share `x`,
    and a layer's weights lie in the stack of all layers.
    """
    if isinstance(w, Adapted):
        y = project(x, w.w, inputs) + project(project(x, w.a, inputs), w.b)
        return y if w.factor is None else y * w.factor
    return jax.checkpoint(functools.partial(_product, inputs, ways("sequence") > 1), prevent_cse=False)(x, w)


def _product(inputs: int, divided: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    lead, outputs = x.shape[:x.ndim - inputs], w.shape[inputs:]
    size = math.prod(w.shape[:inputs])
    return (x.reshape(*(lead if divided else (-1,)), size) @ w.reshape(size, -1)).reshape(*lead, *outputs)


@jax.custom_vjp
def shift(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x + bias` over the last axes of `x`. On CPUs the bias's gradient is summed by a matrix product, which XLA does several times as fast as a sum."""
    return x + bias


def _shift_back(like: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    lead = g.shape[:g.ndim - like.ndim]
    add = lambda g: g.sum(range(len(lead)))
    return g, jax.lax.platform_dependent(g, cpu=lambda g: jnp.tensordot(jnp.ones(lead, g.dtype), g, len(lead)), default=add).astype(like.dtype)


shift.defvjp(lambda x, bias: (x + bias, bias), _shift_back)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; `key` None is evaluation."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def initialiser(cfg: TransformerConfig, inputs: int, outputs: int, into_residual: bool = False, t5: float | None = None) -> Callable:
    """An `(key, shape, dtype)` initialiser of a weight that maps `inputs` numbers to `outputs`, by the name in `cfg.init`.

    normal, truncated_normal: std `init_std`. xavier (Glorot & Bengio 2010): std sqrt(2 / (in + out)). kaiming (He et al. 2015): sqrt(2 / in).
    lecun: sqrt(1 / in); the last three are normal. Projections into the residual stream are divided by sqrt(2 L) where `init_depth_scaled` says so (GPT-2).
    t5 (Raffel et al. 2020, as Mesh TensorFlow and transformers draw it): sqrt(1 / in), normal, but for the weights that give their std as `t5`; never
    divided. An untied output projection is sqrt(1 / in) too, as in t5x; transformers draws it with 1, which begins with a loss in the hundreds.
    """
    std = {"normal": cfg.init_std, "truncated_normal": cfg.init_std, "xavier": math.sqrt(2 / (inputs + outputs)),
           "kaiming": math.sqrt(2 / inputs), "lecun": math.sqrt(1 / inputs), "t5": math.sqrt(1 / inputs) if t5 is None else t5}[cfg.init]
    if into_residual and cfg.init_depth_scaled and cfg.init != "t5":
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
        scale = self.param("scale", _scale_initialiser(cfg), (size,), jnp.float32)
        x = _normalise(cfg.norm == "layer", cfg.norm_eps, x_BTD.astype(jnp.float32)) * _multiplier(cfg, scale)
        if cfg.norm == "layer" and cfg.bias:
            x = x + self.param("bias", nn.initializers.zeros, (size,), jnp.float32).astype(jnp.float32)
        return x.astype(x_BTD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise(centred: bool, eps: float, x: jax.Array) -> jax.Array:
    """`x` over its root mean square along the last axis, less its mean before that if `centred`. For the backward pass it keeps its result and one number a
    row; autodiff would keep three arrays of the size of `x`."""
    return _normalise_forward(centred, eps, x)[0]


def _normalise_forward(centred: bool, eps: float, x: jax.Array):
    x = x - x.mean(-1, keepdims=True) if centred else x
    scale = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    y = x * scale
    return y, (y, scale)


def _normalise_backward(centred: bool, eps: float, kept, g: jax.Array):
    y, scale = kept
    x = g - y * (g * y).mean(-1, keepdims=True)
    return ((x - g.mean(-1, keepdims=True) if centred else x) * scale,)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def _scale_initialiser(cfg: TransformerConfig) -> Callable:
    return nn.initializers.zeros if cfg.norm_offset else nn.initializers.ones


def _multiplier(cfg: TransformerConfig, scale: jax.Array) -> jax.Array:
    """What a norm multiplies by. The scale itself stays as stored, so that a file read and written again is the same bit by bit."""
    return scale.astype(jnp.float32) + 1 if cfg.norm_offset else scale.astype(jnp.float32)


def _rms(cfg: TransformerConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS norm over the axes of `scale`: the head, or all heads."""
    y, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    return (y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + cfg.norm_eps) * _multiplier(cfg, scale)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention; with a cache it writes its keys and values there first."""
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD, slots: Slots, window: jax.Array | None, cache: dict | None, dropout_key: jax.Array | None = None):
        cfg = self.cfg
        d, n, k, h = x_BTD.shape[-1], cfg.heads, cfg.kv_heads, cfg.head_size
        q = project(x_BTD, self.param("q", initialiser(cfg, d, n * h, t5=(d * h) ** -0.5), (d, n, h), jnp.float32))
        key = project(x_BTD, self.param("k", initialiser(cfg, d, k * h), (d, k, h), jnp.float32))
        value = project(x_BTD, self.param("v", initialiser(cfg, d, k * h), (d, k, h), jnp.float32))
        if cfg.bias or cfg.qkv_bias:
            q = shift(q, self.param("q_bias", nn.initializers.zeros, (n, h), jnp.float32))
            key = shift(key, self.param("k_bias", nn.initializers.zeros, (k, h), jnp.float32))
            value = shift(value, self.param("v_bias", nn.initializers.zeros, (k, h), jnp.float32))
        if cfg.qk_norm != "none":
            whole = cfg.qk_norm == "full"
            q = _rms(cfg, q, self.param("q_norm", _scale_initialiser(cfg), (n, h) if whole else (h,), jnp.float32))
            key = _rms(cfg, key, self.param("k_norm", _scale_initialiser(cfg), (k, h) if whole else (h,), jnp.float32))
        if slots.angles is not None:
            angles = slots.angles
            if slots.local_angles is not None:
                angles = jax.tree.map(lambda far, near: jnp.where(window > 0, near, far), angles, slots.local_angles)
            q, key = positions.rotate(q, angles), positions.rotate(key, angles)
        q = constrain(q, "batch", "sequence", "heads", "head_size")
        key, value = (constrain(a, "batch", "sequence", "kv_heads", "head_size") for a in (key, value))
        # What remat=dots keeps of them: as attention takes them, so that they are not rotated again.
        q, key, value = (checkpoint_name(a, attention.SAVED) for a in (q, key, value))
        if cache is not None:
            cache, key, value = slots.store(cache, key, value)
        if self.is_initializing():  # only shapes count, of rows that a kernel for training may refuse
            out_BTNH = q
        else:
            out_BTNH = attend(cfg, q, key, value, slots.queries, slots.keys, window=window, cached=cache is not None, bias_BNTS=slots.bias,
                              **_dropping(cfg, dropout_key))
        out = project(out_BTNH, self.param("o", initialiser(cfg, n * h, d, into_residual=True), (n, h, d), jnp.float32), inputs=2)
        if cfg.bias:
            out = shift(out, self.param("o_bias", nn.initializers.zeros, (d,), jnp.float32))
        return out, cache


def _dropping(cfg: TransformerConfig, key: jax.Array | None) -> dict:
    """Options of a kernel that drops probabilities; none in evaluation."""
    return {} if key is None else {"dropout": cfg.attention_dropout, "key": key}


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to the encoder's tokens of the same segment, wherever those stand."""
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, slots: Slots, cache: dict | None, dropout_key: jax.Array | None = None):
        """The branch, and the keys and values where a cache wants them: `{"cross_k", "cross_v"}`, else empty."""
        cfg, memory = self.cfg, slots.memory
        d, n, k, h = x_BTD.shape[-1], cfg.heads, cfg.kv_heads, cfg.head_size
        q = project(x_BTD, self.param("q", initialiser(cfg, d, n * h, t5=(d * h) ** -0.5), (d, n, h), jnp.float32))
        made = {}
        if memory.hidden is None:
            key, value = cache["cross_k"].astype(q.dtype), cache["cross_v"].astype(q.dtype)
        else:
            key = project(memory.hidden, self.param("k", initialiser(cfg, d, k * h), (d, k, h), jnp.float32))
            value = project(memory.hidden, self.param("v", initialiser(cfg, d, k * h), (d, k, h), jnp.float32))
            key, value = (constrain(a, "batch", "sequence", "kv_heads", "head_size") for a in (key, value))
            made = {} if cache is None else {"cross_k": key, "cross_v": value}
        q = constrain(q, "batch", "sequence", "heads", "head_size")
        # Not causal and without a window, only segments count; positions of the two sides are not comparable.
        places = attention.Tokens(jnp.zeros_like(memory.segments), memory.segments)
        out_BTNH = attention.reference(q, key, value, slots.queries, places, causal=False, softcap=cfg.attention_softcap, scale=cfg.score_scale,
                                       **_dropping(cfg, dropout_key))
        return project(out_BTNH, self.param("o", initialiser(cfg, n * h, d, into_residual=True), (n, h, d), jnp.float32), inputs=2), made


class Mlp(nn.Module):
    """Feed-forward layer, plain or gated (Shazeer 2020)."""
    cfg: TransformerConfig
    size: int  # F

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg, d, f = self.cfg, x_BTD.shape[-1], self.size
        hidden = project(x_BTD, self.param("up", initialiser(cfg, d, f), (d, f), jnp.float32))
        if cfg.bias:
            hidden = shift(hidden, self.param("up_bias", nn.initializers.zeros, (f,), jnp.float32))
        if cfg.gated:
            gate = project(x_BTD, self.param("gate", initialiser(cfg, d, f), (d, f), jnp.float32))
            if cfg.bias:
                gate = shift(gate, self.param("gate_bias", nn.initializers.zeros, (f,), jnp.float32))
            parts = gate, hidden
        else:
            parts = hidden,
        # Recomputed in the backward pass: an activation costs less than keeping its parts and its result.
        down = self.param("down", initialiser(cfg, f, d, into_residual=True), (f, d), jnp.float32)
        out = jax.checkpoint(functools.partial(_down, cfg), prevent_cse=False)(parts, down)
        return shift(out, self.param("down_bias", nn.initializers.zeros, (d,), jnp.float32)) if cfg.bias else out


def _down(cfg: TransformerConfig, parts: tuple[jax.Array, ...], w_FD: jax.Array) -> jax.Array:
    """The second half of an MLP; `parts` are what the first made: the activation's input, and what the activation multiplies where it is a gate."""
    hidden = ACTIVATIONS[cfg.activation](parts[0])
    return project(constrain(hidden * parts[1] if len(parts) > 1 else hidden, "batch", "sequence", "feedforward"), w_FD)


class Moe(nn.Module):
    """Mixture of experts (Shazeer et al. 2017): each token passes the few gated MLPs that its router ranks first, none is dropped."""
    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The output, and the sums over the tokens that count (`counted_BT`, bool) of what `moe.statistics` makes of the router."""
        cfg, d, e, f = self.cfg, x_BTD.shape[-1], self.cfg.experts, self.cfg.expert_feedforward
        logits_BTE = project(x_BTD, self.param("router", initialiser(cfg, d, e), (d, e), jnp.float32)).astype(jnp.float32)
        weights_BTK, chosen_BTK = moe.route(logits_BTE, cfg.experts_per_token, renormalise=cfg.expert_renormalise)
        gate = self.param("gate", initialiser(cfg, d, f), (e, d, f), jnp.float32)
        up = self.param("up", initialiser(cfg, d, f), (e, d, f), jnp.float32)
        down = self.param("down", initialiser(cfg, f, d, into_residual=True), (e, f, d), jnp.float32)
        out = _experts(cfg, x_BTD, weights_BTK, chosen_BTK, gate, up, down)
        if cfg.shared_feedforward:
            shared = Mlp(cfg, cfg.shared_feedforward, name="shared")(x_BTD)
            if cfg.shared_gate:
                shared = shared * jax.nn.sigmoid(x_BTD @ self.param("shared_gate", initialiser(cfg, d, 1), (d,), jnp.float32))[..., None]
            out = out + shared
        return out, moe.statistics(logits_BTE, chosen_BTK, counted_BT)


def _experts(cfg: TransformerConfig, x_BTD, weights_BTK, chosen_BTK, gate, up, down) -> jax.Array:
    """The weighted sum of each token's experts. On a mesh each device sorts its own tokens: over `expert` they travel to their experts, over `tensor`
    each device has a part of every expert's inner size, whose results are added."""
    kernel = "blocks" if platform() == "cpu" else "ragged"

    def local(x, weights, chosen, gate, up, down, **over):
        act, flat = ACTIVATIONS[cfg.activation], lambda a: a.reshape(-1, a.shape[-1])
        mlp = lambda rows, multiply: multiply(act(multiply(rows, gate)) * multiply(rows, up), down)
        dispatch = functools.partial(moe.dispatch_over, **over) if over else moe.dispatch
        return dispatch(flat(x), flat(weights), flat(chosen), cfg.experts, mlp, kernel).reshape(x.shape)

    tokens, wide = ("batch", "sequence", None), ("expert", None, "feedforward")
    if not divides(x_BTD, *tokens):
        return local(x_BTD, weights_BTK, chosen_BTK, gate, up, down)
    over = {"axis": "expert", "parts": ways("expert"), "everywhere": jax.sharding.get_abstract_mesh().axis_names}
    device = lambda *arrays: jax.lax.psum(local(*arrays, **over), "tensor")
    return per_device(device, (tokens, tokens, tokens, wide, wide, ("expert", "feedforward", None)), tokens)(x_BTD, weights_BTK, chosen_BTK, gate, up, down)


class Block(nn.Module):
    """One transformer layer: attention, attention to an encoder where there is one, then MLP or experts, each a branch of the residual stream with its norm where `norm_position` puts it."""
    cfg: TransformerConfig
    sparse: bool = False  # a mixture of experts in place of the MLP

    @nn.compact
    def __call__(self, x_BTD, slots: Slots, window=None, cache: dict | None = None, key: jax.Array | None = None):
        """The new residual stream, the layer's cache, and the router's statistics (empty without experts)."""
        cfg = self.cfg
        crossed = slots.memory is not None
        keys = (None,) * 3 if key is None else jax.random.split(key, 3 if crossed else 2)
        given = cache
        inner = [None if k is None or not cfg.attention_dropout else jax.random.fold_in(k, 1) for k in keys]  # of the probabilities
        attn = lambda x: Attention(cfg, name="attn")(x, slots, window, given, inner[0])
        if self.sparse:
            mlp = lambda x: Moe(cfg, name="moe")(x, slots.queries.segments > 0)
        else:
            mlp = lambda x: (Mlp(cfg, cfg.feedforward, name="mlp")(x), {})
        mixed, cache = self._branch("attn", attn, x_BTD, keys[0])
        if cfg.parallel_residual:
            hidden, statistics = self._branch("mlp", mlp, x_BTD, keys[1])
            return constrain(x_BTD + mixed + hidden, "batch", "tokens", "residual"), cache, statistics
        x_BTD = self._join("attn", x_BTD, mixed)
        if crossed:
            mixed, made = self._branch("cross", lambda x: CrossAttention(cfg, name="cross")(x, slots, given, inner[2]), x_BTD, keys[2])
            x_BTD, cache = self._join("cross", x_BTD, mixed), None if cache is None else cache | made
        hidden, statistics = self._branch("mlp", mlp, x_BTD, keys[1])
        return self._join("mlp", x_BTD, hidden), cache, statistics

    def _branch(self, name: str, f: Callable, x_BTD: jax.Array, key: jax.Array | None):
        """What a branch adds to the residual stream, and what else `f` returns."""
        cfg, at = self.cfg, self.cfg.norm_position
        given = Norm(cfg, name=f"{name}_norm")(x_BTD) if at in ("pre", "sandwich") else x_BTD
        out, other = f(constrain(given, "batch", "sequence", "residual"))
        if at in ("branch", "sandwich"):
            out = Norm(cfg, name=f"{name}_norm" if at == "branch" else f"{name}_out_norm")(out)
        return dropout(out, cfg.dropout, key), other

    def _join(self, name: str, x_BTD: jax.Array, branch: jax.Array) -> jax.Array:
        x_BTD = constrain(x_BTD + branch, "batch", "tokens", "residual")
        return Norm(self.cfg, name=f"{name}_norm")(x_BTD) if self.cfg.norm_position == "post" else x_BTD
