"""Layers stacked on their first axis: initialised by `vmap`, run by `scan`, recomputed under `jax.checkpoint`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import TransformerConfig
from jaxlm.models.layers import Block, Slots

View = Callable[[Any], Any]  # one layer's weights -> the weights to compute with (cast, dequantise, add LoRA)


def init(cfg: TransformerConfig, key: jax.Array, slots: Slots) -> dict:
    """Parameters of all layers, each leaf `[L, ...]`; `slots` gives shapes only."""
    shape = (*slots.queries.positions.shape, cfg.width)
    one = lambda k: Block(cfg).init(k, jnp.zeros(shape, jnp.float32), slots)["params"]
    return jax.vmap(one)(jax.random.split(key, cfg.layers))


def run(cfg: TransformerConfig, layers: dict, x_BTD: jax.Array, slots: Slots, cache: dict | None, key: jax.Array | None, view: View):
    """All layers one after the other.

    Args:
      layers: leaves `[L, ...]`.
      cache: `{"k", "v"}` of `[L, B, S, K, H]`, or None.
      key: dropout key, or None for evaluation.
      view: applied to one layer's weights inside the loop, so only one layer is ever cast or dequantised.

    Returns:
      Hidden states `[B, T, D]` and the new cache.
    """
    sizes = [cfg.windows[i % len(cfg.windows)] for i in range(cfg.layers)]
    per_layer = {"params": layers}
    if any(sizes):
        per_layer["window"] = jnp.array(sizes, jnp.int32)
    if cache is not None:
        per_layer["cache"] = cache
    if key is not None:
        per_layer["key"] = jax.random.split(key, cfg.layers)

    def body(x, layer):
        return Block(cfg).apply({"params": view(layer["params"])}, x, slots, layer.get("window"), layer.get("cache"), layer.get("key"))

    if cfg.remat == "full":
        body = jax.checkpoint(body)
    elif cfg.remat == "dots":
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return jax.lax.scan(body, x_BTD, per_layer)
