"""The encoder: the decoder's embedding and stack with attention to both sides, token types, an embedding norm, and the heads of `heads.py`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import TransformerConfig
from jaxlm.models import decoder, heads, pipeline, stack
from jaxlm.models.axes import encoder_axes
from jaxlm.models.layers import Norm, dropout, initialiser
from jaxlm.sharding import constrain


def build(cfg: TransformerConfig) -> decoder.Model:
    """The model of an encoder's config whose `vocab_size` is known.

    `head` gives what `cfg.output` names, float32: logits `[..., V]` of any hidden states `[..., D]` (tokens), the states as they are (hidden), a vector
    `[B, D]` (pooled) or class logits `[B, labels]` (sequence_labels) of sequences `[B, T, D]`, or class logits `[..., labels]` (token_labels).
    """
    assert cfg.vocab_size > 0 and cfg.kind == "encoder"
    cfg = cfg.filled()
    return decoder.Model(functools.partial(_init, cfg), functools.partial(_apply, cfg), functools.partial(_projection, cfg), _no_cache, _no_cache,
                         encoder_axes(cfg))


def _init(cfg: TransformerConfig, key: jax.Array) -> dict:
    k_tokens, k_positions, k_types, k_layers, k_norm, k_head, k_labels = jax.random.split(key, 7)
    params: dict[str, Any] = {"embed": decoder.init_embed(cfg, k_tokens, k_positions), "layers": decoder.init_layers(cfg, k_layers)}
    norm = lambda: Norm(cfg).init(k_norm, jnp.zeros((1, cfg.width)))["params"]
    params["embed_norm"] = norm()
    if cfg.token_types:
        params["embed"]["types"] = initialiser(cfg, cfg.token_types, cfg.width)(k_types, (cfg.token_types, cfg.width), jnp.float32)
    if cfg.norm_position != "post":
        params["final_norm"] = norm()
    if cfg.output == "tokens":
        params["head"] = heads.init_masked(cfg, k_head)
    if cfg.output in ("pooled", "sequence_labels"):
        params["pooler"] = heads.init_linear(cfg, k_head, cfg.width)
    if cfg.labels:
        params["classifier"] = heads.init_linear(cfg, k_labels, cfg.labels)
    return params


def _apply(cfg: TransformerConfig, params: dict, inputs: dict, *, cache: None = None, key: jax.Array | None = None,
           view: stack.View | None = None) -> tuple[jax.Array, None, dict]:
    """Hidden states `[B, T, D]` in the compute dtype; see `decoder`. `inputs` may hold `types`, int32 `[B, T]`; without them all are of type 0."""
    assert cache is None, "an encoder has no cache"
    dtype = jnp.dtype(cfg.dtype)
    view = view or (lambda layer: jax.tree.map(lambda w: w.astype(dtype), layer))
    k_embed, k_layers = (None, None) if key is None or not cfg.drops else jax.random.split(key)
    x = decoder.embed(cfg, params, inputs, dtype)
    if cfg.token_types:
        types = params["embed"]["types"].astype(dtype)
        x = x + (types[inputs["types"]] if "types" in inputs else types[0])
    x = dropout(Norm(cfg).apply({"params": params["embed_norm"]}, x), cfg.dropout, k_embed)
    x = constrain(x, "batch", "tokens", "residual")
    x, _, routing = pipeline.run(cfg, params["layers"], x, decoder.make_slots(cfg, inputs), None, k_layers, view)
    if cfg.norm_position != "post":
        x = Norm(cfg).apply({"params": params["final_norm"]}, x)
    return x, None, routing


def _projection(cfg: TransformerConfig, params: dict) -> Callable[[jax.Array], jax.Array]:
    """See `build`."""
    return heads.masked(cfg, params["head"], params["embed"]["tokens"]) if cfg.output == "tokens" else functools.partial(_outputs, cfg, params)


def _outputs(cfg: TransformerConfig, params: dict, hidden: jax.Array) -> jax.Array:
    if cfg.output == "hidden":
        return hidden.astype(jnp.float32)
    if cfg.output == "token_labels":
        return heads.linear(params["classifier"], hidden)
    pooled = heads.pool(cfg, params["pooler"], hidden)
    return pooled if cfg.output == "pooled" else heads.linear(params["classifier"], pooled)


def _no_cache(*_) -> dict:
    raise ValueError("an encoder fills in masked tokens and does not continue text: generate needs a model of model.kind=decoder")
