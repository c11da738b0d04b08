"""The encoder-decoder (T5, Raffel et al. 2020): two stacks of the one Block over one embedding, relative positions, cross-attention.

It keeps the contract of `decoder.Model`. What is more: `apply` also takes `encoder_tokens`, `encoder_positions` and `encoder_segments`, int32
`[B, S]`, and a decoder token attends to the encoder's tokens with its own segment number, so that pairs can be packed. With a cache, the first
call has these three and leaves each layer's keys and values of the encoder's output in the cache; later calls have not, and use them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxlm.config import TransformerConfig
from jaxlm.models import cache as caches
from jaxlm.models import decoder, pipeline, stack
from jaxlm.models.axes import encdec_axes, gathered
from jaxlm.models.layers import Memory, Norm, Slots, dropout, initialiser
from jaxlm.ops import attention, positions
from jaxlm.sharding import constrain

ENCODER_INPUTS = ("encoder_tokens", "encoder_positions", "encoder_segments")


def build(cfg: TransformerConfig) -> decoder.Model:
    """The model of a config with `encoder_layers`, whose `vocab_size` is known."""
    assert cfg.vocab_size > 0 and cfg.encoder_layers > 0
    cfg = cfg.filled()
    # What begins, what ends and the cache of the decoder are those of a model without an encoder.
    plain = decoder.build(cfg)
    return decoder.Model(functools.partial(_init, cfg), functools.partial(_apply, cfg), plain.projection, plain.init_cache, plain.unstack, encdec_axes(cfg),
                         cfg.decoder_start)


def _encoder(cfg: TransformerConfig) -> TransformerConfig:
    """The encoder's layers, as a model that has no encoder itself."""
    return dataclasses.replace(cfg, layers=cfg.encoder_layers, causal=False, encoder_layers=0, positions="none")


def _init(cfg: TransformerConfig, key: jax.Array) -> dict:
    k_tokens, k_encoder, k_decoder, k_head = jax.random.split(key, 4)
    params = {"embed": {"tokens": initialiser(cfg, cfg.vocab_size, cfg.width, t5=1.0)(k_tokens, (cfg.vocab_size, cfg.width), jnp.float32)}}
    one = jnp.zeros((1, 1), jnp.int32)
    memory = Memory(jnp.zeros((1, 1, cfg.width), jnp.float32), one)
    for name, part, k, given in (("encoder", _encoder(cfg), k_encoder, None), ("decoder", cfg, k_decoder, memory)):
        k_layers, k_bias, k_norm = jax.random.split(k, 3)
        tokens = attention.Tokens(one, one)
        params[name] = {"layers": stack.init(part, k_layers, Slots(tokens, tokens, None, None, None, memory=given)),
                        "relative_bias": initialiser(cfg, cfg.relative_buckets, cfg.heads, t5=cfg.width ** -0.5)(k_bias, (cfg.relative_buckets, cfg.heads), jnp.float32),
                        "final_norm": Norm(cfg).init(k_norm, jnp.zeros((1, 1, cfg.width)))["params"]}
    if not cfg.tied:
        params["head"] = {"kernel": initialiser(cfg, cfg.width, cfg.vocab_size)(k_head, (cfg.width, cfg.vocab_size), jnp.float32)}
    return params


def _apply(cfg: TransformerConfig, params: dict, inputs: dict, *, cache: dict | None = None, key: jax.Array | None = None,
           view: stack.View | None = None) -> tuple[jax.Array, dict | None, dict]:
    """Hidden states of the decoder `[B, T, D]` in the compute dtype, the cache after the tokens, and an empty dict; see `decoder.Model`.

    Args:
      inputs: `tokens`, `positions`, `segments` of the decoder, int32 `[B, T]`, and those of the encoder (`ENCODER_INPUTS`), int32 `[B, S]`, which
        are left out once the cache holds what was made of them.
    """
    dtype = jnp.dtype(cfg.dtype)
    view = view or (lambda layer: jax.tree.map(lambda w: w.astype(dtype), layer))
    k_encoder, k_decoder = (None, None) if key is None or not cfg.drops else jax.random.split(key)
    run = functools.partial(_stack, embedding=gathered(params["embed"]["tokens"].astype(dtype), "vocab", "embed"), view=view)
    if "encoder_tokens" in inputs:
        read = dict(zip(("tokens", "positions", "segments"), (inputs[name] for name in ENCODER_INPUTS)))
        memory = Memory(run(_encoder(cfg), params["encoder"], read, None, None, k_encoder)[0], inputs["encoder_segments"])
    else:
        memory = Memory(None, cache["encoder_segments"])
    x, new = run(cfg, params["decoder"], inputs, memory, cache, k_decoder)
    return x, None if cache is None else new | {"encoder_segments": memory.segments}, {}


def _stack(cfg: TransformerConfig, params: dict, inputs: dict, memory: Memory | None, cache: dict | None, key: jax.Array | None, *,
           embedding: jax.Array, view: stack.View):
    """One side: embedding, layers, norm. The hidden states, and the cache after them."""
    queries = attention.Tokens(inputs["positions"], inputs["segments"])
    keys, store, after = (queries, None, None) if cache is None else caches.attach(cache, inputs)
    buckets = positions.relative_buckets(queries.positions, keys.positions, buckets=cfg.relative_buckets, distance=cfg.relative_distance, causal=cfg.causal)
    bias_BNTS = jnp.moveaxis(params["relative_bias"].astype(jnp.float32)[buckets], -1, 1)
    slots = Slots(queries, keys, None, None, store, bias_BNTS, memory)
    k_embed, k_layers, k_final = (None, None, None) if key is None else jax.random.split(key, 3)
    x = embedding[inputs["tokens"]]
    if cfg.embedding_scale != 1:
        x = x * jnp.asarray(cfg.embedding_scale, x.dtype)
    x = constrain(dropout(x, cfg.dropout, k_embed), "batch", "tokens", "residual")
    x, kv, _ = pipeline.run(cfg, params["layers"], x, slots, None if cache is None else cache["layers"], k_layers, view)
    x = dropout(Norm(cfg).apply({"params": params["final_norm"]}, x), cfg.dropout, k_final)
    return x, None if cache is None else after(kv)
