"""Logical axes of every parameter: what sharding, optimisers and reports know of a weight."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import trees
from jaxlm.config import TransformerConfig
from jaxlm.models.layers import project
from jaxlm.sharding import constrain, ways

Axes = tuple[tuple[str, tuple[str, ...]], ...]


def whole(cfg: TransformerConfig, layer: dict[str, Any]) -> dict[str, Any]:
    """One layer's weights, whole in the axis that FSDP splits: said where a layer computes, so that one layer is gathered at a time, in the compute
    dtype, and weights rather than activations are moved."""
    rules = [(path.rpartition("layers/")[2], axes[1:]) for path, axes in (encdec_axes if cfg.encoder_layers else decoder_axes)(cfg) if "layers/" in path]
    axes = lambda path: next((axes for rule, axes in rules if re.fullmatch(rule, path)), None)
    return trees.map_paths(lambda path, w: gathered(w, *axes(path)) if axes(path) else w, layer)


def gathered(w: Any, *axes: str) -> Any:
    """A weight with its logical axes, whole in `embed`; its gradient is split again where it arises, before the layers' gradients are stacked."""
    whole = lambda w: constrain(w, *(None if axis == "embed" else axis for axis in axes))
    gather = jax.custom_vjp(whole)
    gather.defvjp(lambda w: (whole(w), None), lambda _, gradient: (constrain(gradient, *axes),))
    return gather(constrain(w, *axes))


def lent(w: jax.Array, dtype: jnp.dtype, *axes: str | None) -> Callable[[jax.Array], jax.Array]:
    """`hidden @ gathered(w.astype(dtype), *axes)` for hidden `[..., D]`, with one gather and one sum over devices for all loop bodies in which it is called.

    In the body of a loop the weight would be gathered, and its gradient, which is of all devices' tokens, be summed over them, at each turn. Here the weight
    is gathered where `lent` is called, and has as many copies as there are devices that share the tokens, each on its own: what each adds to the gradient of
    its copy, in the dtype of `w`, stays there until the loop is over; then the copies' gradients are added up and split, in `dtype`, as those of layers are.
    """
    rows, parts = ways("batch"), ways("sequence")
    place = ("batch", "sequence", *(None if axis == "embed" else axis for axis in axes))
    copies = constrain(jnp.broadcast_to(jax.lax.stop_gradient(gathered(w.astype(dtype), *axes)), (rows, parts, *w.shape)), *place)
    added = lambda gradient: _summed(constrain(gradient, *place).astype(dtype), *axes).astype(w.dtype)
    kept = jax.custom_vjp(lambda w: jnp.zeros(copies.shape, w.dtype))  # of which only the gradient counts
    kept.defvjp(lambda w: (jnp.zeros(copies.shape, w.dtype), None), lambda _, gradient: (added(gradient),))
    lend = jax.custom_vjp(lambda kept, copies: copies)
    lend.defvjp(lambda kept, copies: (copies, None), lambda _, gradient: (constrain(gradient, *place).astype(w.dtype), None))
    sums = kept(w)

    def multiply(hidden: jax.Array) -> jax.Array:
        if rows * parts == 1:
            return project(hidden, lend(sums, copies)[0, 0])
        if hidden.ndim != 3 or hidden.shape[0] % rows or hidden.shape[1] % parts:  # a few tokens of generation
            return project(hidden, gathered(w.astype(dtype), *axes))
        batch, length, width = hidden.shape
        apart = hidden.reshape(rows, batch // rows, parts, length // parts, width)
        return jnp.einsum("brstd,bsdv->brstv", apart, lend(sums, copies)).reshape(batch, length, -1)

    return multiply


def _summed(copies: jax.Array, *axes: str | None) -> jax.Array:
    """The sum over the first two axes, in the dtype of `copies` (`jnp.sum` would send float32), split as the weight is."""
    return constrain(jax.lax.reduce(copies, jnp.zeros((), copies.dtype), jax.lax.add, (0, 1)), *axes)


def encoder_axes(cfg: TransformerConfig) -> Axes:
    """Strict rules, path regex -> logical axes, for the encoder that `cfg` describes."""
    norm_bias, tokens = cfg.bias and cfg.norm == "layer", cfg.output == "tokens"
    table = [
        (cfg.token_types > 0, "embed/types", ("types", "embed")),
        (True, "embed_norm/scale", ("embed",)),
        (norm_bias, "embed_norm/bias", ("embed",)),
        (tokens, "head/dense", ("embed", "feedforward")),
        (tokens and cfg.bias, "head/dense_bias", ("feedforward",)),
        (tokens, "head/norm/scale", ("embed",)),
        (tokens and norm_bias, "head/norm/bias", ("embed",)),
        (tokens and cfg.bias, "head/bias", ("vocab",)),
        (cfg.output in ("pooled", "sequence_labels"), "pooler/kernel", ("embed", "feedforward")),
        (cfg.output in ("pooled", "sequence_labels"), "pooler/bias", ("feedforward",)),
        (cfg.labels > 0, "classifier/kernel", ("embed", "labels")),
        (cfg.labels > 0, "classifier/bias", ("labels",)),
    ]
    body = tuple(rule for rule in decoder_axes(cfg) if tokens or rule[0] != "head/kernel")
    return body + tuple((path, axes) for present, path, axes in table if present)


def decoder_axes(cfg: TransformerConfig) -> Axes:
    """Strict rules, path regex -> logical axes, for the decoder that `cfg` describes."""
    learned = cfg.positions == "learned"
    norm_bias = cfg.bias and cfg.norm == "layer"
    qkv_bias = cfg.bias or cfg.qkv_bias
    norms = "layers/(attn|mlp)(_out)?_norm" if cfg.norm_position == "sandwich" else "layers/(attn|mlp)_norm"
    dense = len(cfg.sparse_layers) < cfg.layers
    shared = cfg.shared_feedforward > 0
    matrix = "(up|gate)" if cfg.gated else "up"
    table = [
        (True, "embed/tokens", ("vocab", "embed")),
        (learned, "embed/positions", ("positions", "embed")),
        (True, f"{norms}/scale", ("layers", "embed")),
        (norm_bias, f"{norms}/bias", ("layers", "embed")),
        (True, "layers/attn/q", ("layers", "embed", "heads", "head_size")),
        (True, "layers/attn/[kv]", ("layers", "embed", "kv_heads", "head_size")),
        (True, "layers/attn/o", ("layers", "heads", "head_size", "embed")),
        (qkv_bias, "layers/attn/q_bias", ("layers", "heads", "head_size")),
        (qkv_bias, "layers/attn/[kv]_bias", ("layers", "kv_heads", "head_size")),
        (cfg.bias, "layers/attn/o_bias", ("layers", "embed")),
        (cfg.qk_norm == "head", "layers/attn/[qk]_norm", ("layers", "head_size")),
        (cfg.qk_norm == "full", "layers/attn/q_norm", ("layers", "heads", "head_size")),
        (cfg.qk_norm == "full", "layers/attn/k_norm", ("layers", "kv_heads", "head_size")),
        (dense, f"layers/mlp/{matrix}", ("layers", "embed", "feedforward")),
        (dense, "layers/mlp/down", ("layers", "feedforward", "embed")),
        (dense and cfg.bias, f"layers/mlp/{matrix}_bias", ("layers", "feedforward")),
        (dense and cfg.bias, "layers/mlp/down_bias", ("layers", "embed")),
        (cfg.experts > 0, "layers/moe/router", ("layers", "embed", "routes")),
        (cfg.experts > 0, "layers/moe/(up|gate)", ("layers", "expert", "embed", "feedforward")),
        (cfg.experts > 0, "layers/moe/down", ("layers", "expert", "feedforward", "embed")),
        (shared, "layers/moe/shared/(up|gate)", ("layers", "embed", "feedforward")),
        (shared, "layers/moe/shared/down", ("layers", "feedforward", "embed")),
        (cfg.shared_gate, "layers/moe/shared_gate", ("layers", "embed")),
        (cfg.norm_position != "post", "final_norm/scale", ("embed",)),
        (cfg.norm_position != "post" and norm_bias, "final_norm/bias", ("embed",)),
        (not cfg.tied and not cfg.labels, "head/kernel", ("embed", "vocab")),
        (cfg.kind == "decoder" and cfg.labels > 0, "classifier/kernel", ("embed", "labels")),
    ]
    return tuple((path, axes) for present, path, axes in table if present)


def encdec_axes(cfg: TransformerConfig) -> Axes:
    """The same for an encoder-decoder: what a decoder has in its layers and after them, on both sides, and what joins them."""
    both = [(path if path.startswith(("embed/", "head/")) else f"(encoder|decoder)/{path}", axes) for path, axes in decoder_axes(cfg)]
    return (*both, ("(encoder|decoder)/relative_bias", ("positions", "heads")), ("decoder/layers/cross_norm/scale", ("layers", "embed")),
            ("decoder/layers/cross/q", ("layers", "embed", "heads", "head_size")), ("decoder/layers/cross/[kv]", ("layers", "embed", "kv_heads", "head_size")),
            ("decoder/layers/cross/o", ("layers", "heads", "head_size", "embed")))
