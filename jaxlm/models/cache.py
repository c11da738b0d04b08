"""Where the keys and values of a decoder lie between calls: a row of slots for each sequence (`empty`), or pages that sequences share (`empty_pages`).

A cache holds one dict for each layer, so that a donated cache is updated in place: stacked over layers it would be copied at each step. `attach` says, for
either kind, what attention needs to know; the layers know neither.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlm.config import TransformerConfig
from jaxlm.ops.attention import Tokens
from jaxlm.sharding import constrain

# A layer's cache, new keys and values [B, T, K, H] -> the cache with them, and all keys and values [B, S, K, H].
Store = Callable[[dict, jax.Array, jax.Array], tuple[dict, jax.Array, jax.Array]]


def empty(cfg: TransformerConfig, batch: int, length: int) -> dict:
    """Slots for `length` tokens of each sequence: keys and values `[B, K, S, H]` of each layer in the compute dtype, which is how a step's products read
    them; positions and segments int32 `[B, S]`, and the next free slot, the same for all."""
    side = lambda: jnp.zeros((batch, cfg.kv_heads, length, cfg.head_size), cfg.dtype)
    return {"layers": tuple({"k": side(), "v": side()} for _ in range(cfg.layers)), "positions": jnp.zeros((batch, length), jnp.int32),
            "segments": jnp.zeros((batch, length), jnp.int32), "length": jnp.zeros((), jnp.int32)}


def empty_pages(cfg: TransformerConfig, pages: int, size: int, int8: bool = False) -> tuple[dict, ...]:
    """Pages of `size` tokens, `[P, size, K, H]` for each layer's keys and values, in the compute dtype or as int8 with a float32 scale `[P, size, K]`.

    With them a cache is `{"layers": pages, "table": int32 [B, N]}`: the pages of each row in the order of its tokens. Page 0 belongs to nobody: padding is
    written there.
    """
    shape = (pages, size, cfg.kv_heads, cfg.head_size)
    kinds = {"k": (shape, "int8"), "v": (shape, "int8"), "k_scale": (shape[:-1], "float32"), "v_scale": (shape[:-1], "float32")} if int8 else {
        "k": (shape, cfg.dtype), "v": (shape, cfg.dtype)}
    return tuple({name: jnp.zeros(*kind) for name, kind in kinds.items()} for _ in range(cfg.layers))


def attach(cache: dict, inputs: dict) -> tuple[Tokens, Store, Callable[[tuple], dict]]:
    """The tokens whose keys a call sees, how a layer stores and reads them, and the cache after the call, given its layers."""
    if "table" in cache:
        rows, pages = cache["table"].shape
        places = jnp.broadcast_to(jnp.arange(pages * cache["layers"][0]["k"].shape[1], dtype=jnp.int32), (rows, pages * cache["layers"][0]["k"].shape[1]))
        # What an earlier owner left in a page stands at positions that this row has not reached: causality hides it.
        keys = Tokens(places, jnp.ones_like(places))
        return keys, functools.partial(_in_pages, cache["table"], inputs), lambda layers: {**cache, "layers": layers}
    start = cache["length"]
    keys = Tokens(*(jax.lax.dynamic_update_slice_in_dim(cache[name], inputs[name], start, axis=1) for name in ("positions", "segments")))
    after = lambda layers: {**cache, "layers": layers, "positions": keys.positions, "segments": keys.segments, "length": start + inputs["tokens"].shape[1]}
    return keys, functools.partial(_in_slots, start), after


def _in_slots(start: jax.Array, layer: dict, key: jax.Array, value: jax.Array) -> tuple[dict, jax.Array, jax.Array]:
    turned = lambda a: jnp.swapaxes(a, 1, 2)
    new = {name: jax.lax.dynamic_update_slice_in_dim(layer[name], turned(side).astype(layer[name].dtype), start, axis=2)
           for name, side in (("k", key), ("v", value))}
    return layer | new, turned(new["k"]).astype(key.dtype), turned(new["v"]).astype(value.dtype)


def _in_pages(table: jax.Array, inputs: dict, layer: dict, key: jax.Array, value: jax.Array) -> tuple[dict, jax.Array, jax.Array]:
    size = layer["k"].shape[1]
    page = jnp.take_along_axis(table, inputs["positions"] // size, axis=1)
    page, slot = jnp.where(inputs["segments"] > 0, page, 0), inputs["positions"] % size
    read = []
    for name, side in (("k", key), ("v", value)):
        new = {name: side.astype(layer[name].dtype)}
        if f"{name}_scale" in layer:
            scale = jnp.maximum(jnp.abs(side.astype(jnp.float32)).max(-1), 1e-12) / 127
            new = {name: jnp.round(side.astype(jnp.float32) / scale[..., None]).astype(jnp.int8), f"{name}_scale": scale}
        layer = layer | {part: layer[part].at[page, slot].set(a) for part, a in new.items()}
        found = {part: layer[part][table].reshape(table.shape[0], -1, *layer[part].shape[2:]) for part in new}
        whole = found[name].astype(side.dtype) if len(new) == 1 else (found[name] * found[f"{name}_scale"][..., None]).astype(side.dtype)
        read.append(constrain(whole, "batch", "sequence", "kv_heads", "head_size"))
    return layer, *read


def placed(cache: dict) -> dict:
    """The slots' cache in fixed places on a mesh, so that each step's lies where the next one's does."""
    axes = {"k": ("batch", "kv_heads", "sequence", "head_size"), "positions": ("batch", "sequence"), "length": ()}
    axes |= {"v": axes["k"], "segments": axes["positions"], "encoder_segments": axes["positions"]}
    axes |= dict.fromkeys(("cross_k", "cross_v"), ("batch", "sequence", "kv_heads", "head_size"))
    place = lambda tree: {name: constrain(leaf, *axes[name]) for name, leaf in tree.items() if name != "layers"}
    return place(cache) | {"layers": tuple(place(layer) for layer in cache["layers"])}


def placed_pages(layers: tuple[dict, ...]) -> tuple[dict, ...]:
    """The same of pages: heads are split over devices, pages are not."""
    return tuple({name: constrain(leaf, None, None, "kv_heads", *[None] * (leaf.ndim - 3)) for name, leaf in layer.items()} for layer in layers)
