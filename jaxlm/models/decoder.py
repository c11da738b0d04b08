"""The decoder-only language model: embedding, stack, norm, output projection, as pure functions over a nested dict."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import mup
from jaxlm.config import TransformerConfig
from jaxlm.models import cache as caches
from jaxlm.models import pipeline, stack
from jaxlm.models.axes import decoder_axes, gathered, lent
from jaxlm.models.layers import Norm, Slots, dropout, initialiser, project
from jaxlm.ops import attention, positions
from jaxlm.sharding import constrain


class Model(NamedTuple):
    """A language model: pure functions and a table.

    `apply` ends before the output projection, so that a loss may take the tokens in pieces and generation may ask for the last token only.
    `projection` does first what depends on the parameters alone, so that a loop over such pieces does it once.
    """
    init: Callable  # key -> params, nested dict of float32
    apply: Callable  # params, {tokens, positions, segments} each int32 [B, T], *, cache=None, key=None, view=... -> hidden [B, T, D], cache, routing
    projection: Callable  # params -> hidden [..., D] -> logits [..., V] float32
    init_cache: Callable  # batch, length -> cache
    unstack: Callable  # params -> params whose layers are a tuple, which `apply` with a cache reads without copying them; a copy of the layers
    axes: tuple[tuple[str, tuple[str, ...]], ...]  # path regex -> logical axes, strict
    start: int | None = None  # models with an encoder (encdec.py): id with which the decoder begins; None: the decoder continues what it is given

    def head(self, params: dict, hidden: jax.Array) -> jax.Array:
        """Logits `[..., V]` float32 of hidden states `[..., D]`, or what else the model ends in."""
        return self.projection(params)(hidden)


def vocabulary(cfg: TransformerConfig, tokenizer_size: int) -> TransformerConfig:
    """`cfg` with the vocabulary filled in from the tokenizer.

    Raises:
      ValueError: a `vocab_size` smaller than the tokenizer's, whose last ids the model could not tell apart.
    """
    if cfg.vocab_size == 0:
        cfg = dataclasses.replace(cfg, vocab_size=-(-tokenizer_size // 64) * 64)
    if cfg.vocab_size < tokenizer_size:
        raise ValueError(f"model.vocab_size={cfg.vocab_size} is smaller than the tokenizer's {tokenizer_size} pieces: set it to 0 or to at least {tokenizer_size}")
    return cfg


def build(cfg: TransformerConfig) -> Model:
    """The model of a config whose `vocab_size` is known (see `vocabulary`)."""
    assert cfg.vocab_size > 0
    cfg = cfg.filled()
    return Model(mup.scaled(cfg, decoder_axes(cfg), functools.partial(_init, cfg)), functools.partial(_apply, cfg), functools.partial(_projection, cfg),
                 functools.partial(caches.empty, cfg), functools.partial(stack.unstack, cfg), decoder_axes(cfg))


def _init(cfg: TransformerConfig, key: jax.Array) -> dict:
    k_tokens, k_positions, k_layers, k_head = jax.random.split(key, 4)
    params = {"embed": init_embed(cfg, k_tokens, k_positions), "layers": init_layers(cfg, k_layers)}
    if cfg.norm_position != "post":
        params["final_norm"] = Norm(cfg).init(k_head, jnp.zeros((1, 1, cfg.width)))["params"]
    if cfg.labels:
        params["classifier"] = {"kernel": initialiser(cfg, cfg.width, cfg.labels)(k_head, (cfg.width, cfg.labels), jnp.float32)}
    elif not cfg.tied:
        params["head"] = {"kernel": initialiser(cfg, cfg.width, cfg.vocab_size)(k_head, (cfg.width, cfg.vocab_size), jnp.float32)}
    return params


def init_embed(cfg: TransformerConfig, k_tokens: jax.Array, k_positions: jax.Array) -> dict:
    """Tables of tokens and, where they are learned, of positions."""
    table = lambda key, rows: initialiser(cfg, rows, cfg.width, t5=1.0)(key, (rows, cfg.width), jnp.float32)
    embed = {"tokens": table(k_tokens, cfg.vocab_size)}
    return embed | {"positions": table(k_positions, cfg.context + cfg.position_offset)} if cfg.positions == "learned" else embed


def init_layers(cfg: TransformerConfig, key: jax.Array) -> dict:
    """Parameters of all layers, stacked."""
    one = jnp.zeros((1, 1), jnp.int32)
    return stack.init(cfg, key, make_slots(cfg, {"positions": one, "segments": one}))


def embed(cfg: TransformerConfig, params: dict, inputs: dict, dtype: jnp.dtype) -> jax.Array:
    """`[B, T, D]`: tokens, and learned positions where there are."""
    x = gathered(params["embed"]["tokens"].astype(dtype), "vocab", "embed")[inputs["tokens"]]
    if cfg.embedding_scale != 1:
        x = x * jnp.asarray(cfg.embedding_scale, dtype)
    if cfg.positions == "learned":
        x = x + gathered(params["embed"]["positions"].astype(dtype), "positions", "embed")[inputs["positions"] + cfg.position_offset]
    return x


def make_slots(cfg: TransformerConfig, inputs: dict, keys: attention.Tokens | None = None, store: caches.Store | None = None) -> Slots:
    """What the layers need of the inputs and, with a cache, of what `caches.attach` says."""
    queries = attention.Tokens(inputs["positions"], inputs["segments"])
    angles, local = (None if freqs is None else positions.rotary_angles(inputs["positions"], freqs) for freqs in _frequencies(cfg))
    return Slots(queries, queries if keys is None else keys, angles, local, store)


def _frequencies(cfg: TransformerConfig) -> tuple[jax.Array | None, jax.Array | None]:
    """Rotary frequencies of the layers, and of those with a window where these have their own; None for none."""
    if cfg.positions != "rotary":
        return None, None
    size = int(cfg.head_size * cfg.rotary_fraction)
    freqs = positions.frequencies(size, cfg.rope_theta)
    if cfg.rope_scaling == "linear":
        freqs = freqs / cfg.rope_factor
    elif cfg.rope_scaling == "llama3":
        freqs = positions.scale_llama3(freqs, factor=cfg.rope_factor, low=cfg.rope_low_frequency, high=cfg.rope_high_frequency,
                                       context=cfg.rope_original_context)
    return freqs, positions.frequencies(size, cfg.rope_local_theta) if cfg.rope_local_theta and any(cfg.windows) else None


def _apply(cfg: TransformerConfig, params: dict, inputs: dict, *, cache: dict | None = None, key: jax.Array | None = None,
           view: stack.View | None = None) -> tuple[jax.Array, dict | None, dict]:
    """Hidden states `[B, T, D]` in the compute dtype, before the output projection, the cache after the tokens, and what the routers did.

    Args:
      inputs: `tokens`, `positions`, `segments`, int32 `[B, T]`; segment 0 is padding.
      cache: from `init_cache` or an earlier call, or made of pages; see `models/cache.py`. The caller keeps count of the room.
      key: dropout key; None for evaluation.
      view: what one layer computes with, given its weights; the default casts to the compute dtype.

    Returns:
      The third is empty without experts, else `moe.statistics` of each sparse layer, over the tokens that are not padding.
    """
    dtype = jnp.dtype(cfg.dtype)
    view = view or (lambda layer: jax.tree.map(lambda w: w.astype(dtype), layer))
    keys, store, after = (None,) * 3 if cache is None else caches.attach(cache, inputs)
    slots = make_slots(cfg, inputs, keys, store)
    k_embed, k_layers = (None, None) if key is None or not cfg.drops else jax.random.split(key)
    x = embed(cfg, params, inputs, dtype)
    if cfg.embedding_noise and key is not None:  # NEFTune (Jain et al. 2023)
        most = jnp.asarray(cfg.embedding_noise / math.sqrt(x.shape[1] * cfg.width), dtype)
        x = x + most * jax.random.uniform(jax.random.fold_in(k_embed, 1), x.shape, dtype, -1, 1)
    x = constrain(dropout(x, cfg.dropout, k_embed), "batch", "tokens", "residual")
    x, kv, routing = pipeline.run(cfg, params["layers"], x, slots, None if cache is None else cache["layers"], k_layers, view)
    if cfg.norm_position != "post":
        x = Norm(cfg).apply({"params": params["final_norm"]}, x)
    return x, None if cache is None else after(kv), routing


def _projection(cfg: TransformerConfig, params: dict) -> Callable[[jax.Array], jax.Array]:
    """Hidden states `[..., D]` -> logits `[..., V]` float32; with labels `[..., labels]`, of sequence_labels from the first slot (the caller puts the state of
    a text's last token there)."""
    if cfg.labels:
        classifier = params["classifier"]["kernel"]
        first = (lambda hidden: hidden[..., 0, :]) if cfg.output == "sequence_labels" else lambda hidden: hidden
        return lambda hidden: project(first(hidden), classifier.astype(hidden.dtype)).astype(jnp.float32)
    multiply = lent(params["embed"]["tokens"].T if cfg.tied else params["head"]["kernel"], jnp.dtype(cfg.dtype), "embed", "vocab")

    def head(hidden: jax.Array) -> jax.Array:
        hidden = hidden if cfg.hidden_scale == 1 else hidden * jnp.asarray(cfg.hidden_scale, hidden.dtype)
        logits = multiply(hidden).astype(jnp.float32)
        return cfg.final_softcap * jnp.tanh(logits / cfg.final_softcap) if cfg.final_softcap else logits

    return head
