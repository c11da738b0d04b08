"""Layers stacked on their first axis: initialised by `vmap`, run by `scan`, recomputed under `jax.checkpoint`.

Where layers with one MLP and layers with experts alternate, both kinds have stacks of their own for that part (`layers/mlp` has as many rows as
there are dense layers, `layers/moe` as there are sparse ones), and the scan goes over the shortest pattern that repeats.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import TransformerConfig
from jaxlm.models import axes
from jaxlm.models.layers import Block, Slots, adapt
from jaxlm.ops.attention import SAVED
from jaxlm.sharding import ways

View = Callable[[Any], Any]  # one layer's weights -> the weights to compute with (cast, dequantise, add LoRA)

KINDS = ("mlp", "moe")  # the part of a layer that its kind decides, indexed by `sparse`


def init(cfg: TransformerConfig, key: jax.Array, slots: Slots) -> dict:
    """Parameters of all layers, each leaf `[L, ...]` (`mlp` and `moe`: as many as there are such layers); `slots` gives shapes only."""
    shape = (*slots.queries.positions.shape, cfg.width)
    keys, of = jax.random.split(key, cfg.layers), kinds(cfg)
    stacks = []
    for sparse in sorted(set(of)):
        one = lambda k: Block(cfg, sparse).init(k, jnp.zeros(shape, jnp.float32), slots, jnp.zeros((), jnp.int32))["params"]
        stacks.append(jax.vmap(one)(keys if len(set(of)) == 1 else keys[jnp.array([i for i, kind in enumerate(of) if kind == sparse])]))
    if len(stacks) == 1:
        return stacks[0]
    place = jnp.argsort(jnp.argsort(jnp.array(of), stable=True))  # of each layer among the dense ones followed by the sparse ones
    own = {name: stack.pop(name) for name, stack in zip(KINDS, stacks)}
    return jax.tree.map(lambda dense, sparse: jnp.concatenate([dense, sparse])[place], *stacks) | own


def run(cfg: TransformerConfig, layers: dict, x_BTD: jax.Array, slots: Slots, cache: tuple | None, key: jax.Array | None, view: View):
    """All layers one after the other.

    Args:
      layers: leaves `[L, ...]`, see `init`; with a cache better a tuple of layers, see `unstack`. A list of stacks, of layers that are alike, is run one
        stack after the other: where the first ones have no gradient, nothing of them is kept for the backward pass.
      cache: a tuple with each layer's part of `models/cache.py`, or None.
      key: dropout key, or None for evaluation.
      view: applied to one layer's weights inside the loop, so only one layer is ever cast or dequantised.

    Returns:
      Hidden states `[B, T, D]`, the new cache, and the routers' statistics, each `[sparse layers, ...]` (empty without experts).
    """
    if cache is not None:
        return _one_by_one(cfg, unstack(cfg, {"layers": layers})["layers"], x_BTD, slots, cache, view)
    if not isinstance(layers, list):
        x_BTD, routed = scan(cfg, kinds(cfg), *rows(cfg, layers, key), x_BTD, slots, view)
        return x_BTD, None, routed
    start, routed = 0, []
    for part in layers:
        stop = start + _depth(part)
        own, per_layer = rows(cfg, part, key)
        per_layer |= {name: leaf[start:stop] for name, leaf in per_layer.items() if name != "params"}
        x_BTD, found = scan(cfg, kinds(cfg)[start:stop], own, per_layer, x_BTD, slots, view)
        start, routed = stop, routed + [found]
    return x_BTD, None, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routed)


def _depth(stack: dict) -> int:
    """Layers of a stack of layers that are alike."""
    return len(jax.tree.leaves(stack)[0])


def unstack(cfg: TransformerConfig, params: dict) -> dict:
    """`params` with a tuple of layers in place of stacks (of an encoder-decoder, in the decoder). XLA reads the rows of a stack through copies: outside a
    loop always, in one at each step on CPUs; 15 ms against 20 (loop) and 148 (none) for SmolLM2-135M's matrices."""
    if "decoder" in params:
        return params | {"decoder": unstack(cfg, params["decoder"])}
    stacks, of = params["layers"], kinds(cfg)
    if isinstance(stacks, tuple):
        return params
    if isinstance(stacks, list):
        return params | {"layers": tuple(jax.tree.map(lambda a, i=i: a[i], part) for part in stacks for i in range(_depth(part)))}
    common = {name: leaf for name, leaf in stacks.items() if name not in KINDS}
    at = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
    return params | {"layers": tuple(at(common, i) | {KINDS[sparse]: at(stacks[KINDS[sparse]], of[:i].count(sparse))} for i, sparse in enumerate(of))}


def _one_by_one(cfg: TransformerConfig, layers: tuple, x_BTD: jax.Array, slots: Slots, cache: tuple, view: View):
    sizes, caches, routed = [cfg.windows[i % len(cfg.windows)] for i in range(cfg.layers)], [], []
    for sparse, layer, size, part in zip(kinds(cfg), layers, sizes, cache, strict=True):
        window = jnp.int32(size) if any(sizes) else None
        x_BTD, part, statistics = Block(cfg, sparse).apply({"params": adapt(axes.whole(cfg, view(layer)))}, x_BTD, slots, window, part)
        caches.append(part)
        routed += [statistics] if statistics else []
    return x_BTD, tuple(caches), jax.tree.map(lambda *leaves: jnp.stack(leaves), *routed) if routed else {}


def rows(cfg: TransformerConfig, layers: dict, key: jax.Array | None) -> tuple[dict, dict]:
    """What belongs to each layer: the stacks of `KINDS`, each with rows for its own layers only, and the rest, leaves `[L, ...]`."""
    sizes = [cfg.windows[i % len(cfg.windows)] for i in range(cfg.layers)]
    per_layer: dict[str, Any] = {"params": {name: leaf for name, leaf in layers.items() if name not in KINDS}}
    if any(sizes):
        per_layer["window"] = jnp.array(sizes, jnp.int32)
    if key is not None:
        per_layer["key"] = jax.random.split(key, cfg.layers)
    return {name: layers[name] for name in KINDS if name in layers}, per_layer


def scan(cfg: TransformerConfig, kinds: tuple[bool, ...], own: dict, per_layer: dict, x_BTD: jax.Array, slots: Slots, view: View):
    """Layers of these kinds, with their `rows`: hidden states, and the routers' statistics."""
    def one(sparse, x, layer, own):
        params = adapt(axes.whole(cfg, view(layer["params"] | {KINDS[sparse]: own})))
        x, _, statistics = Block(cfg, sparse).apply({"params": params}, x, slots, layer.get("window"), None, layer.get("key"))
        return x, statistics

    bodies = {sparse: _rematerialised(cfg.remat, lambda x, layer, own, sparse=sparse: one(sparse, x, layer, own)) for sparse in (False, True)}
    start, routed = [0, 0, 0], []  # rows used so far of the dense, sparse and common stacks
    for pattern, repeats in _groups(kinds):
        counts = [pattern.count(False), pattern.count(True), len(pattern)]
        stacks = [own[name] if counts[kind] else {} for kind, name in enumerate(KINDS)] + [per_layer]
        # A pattern of one layer takes its rows as they lie: a slice made inside the loop would be kept for the backward pass, a copy of all weights.
        single = len(pattern) == 1
        rows = [jax.tree.map(lambda a: a[begin:begin + repeats * count].reshape(repeats, *() if single else (count,), *a.shape[1:]), stack)
                for stack, begin, count in zip(stacks, start, counts)]

        def group(x, rows, pattern=pattern, single=single):
            at = lambda tree, i: tree if single else jax.tree.map(lambda a: a[i], tree)
            results = []
            for i, sparse in enumerate(pattern):
                x, found = bodies[sparse](x, at(rows[2], i), at(rows[sparse], pattern[:i].count(sparse)))
                results += [found] if found else []
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results or [{}])

        x_BTD, found = jax.lax.scan(group, x_BTD, rows)
        routed += [jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)] if found else []
        start = [begin + repeats * count for begin, count in zip(start, counts)]
    return x_BTD, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routed) if routed else {}


def kinds(cfg: TransformerConfig) -> tuple[bool, ...]:
    """Of each layer, whether it has experts."""
    return tuple(i in cfg.sparse_layers for i in range(cfg.layers))


def _groups(kinds: tuple[bool, ...]) -> list[tuple[tuple[bool, ...], int]]:
    """`(pattern, repeats)` that make up the layers: one pattern where one repeats, else a pattern of one layer for each run of equal layers."""
    for size in range(1, len(kinds) // 2 + 1):
        if len(kinds) % size == 0 and kinds == kinds[:size] * (len(kinds) // size):
            return [(kinds[:size], len(kinds) // size)]
    return [((kind,), len(list(run))) for kind, run in itertools.groupby(kinds)]


def _rematerialised(remat: str, body: Callable) -> Callable:
    if remat == "full":
        return jax.checkpoint(body)
    if remat == "dots":
        policies = jax.checkpoint_policies
        return jax.checkpoint(body, policy=policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)))
    if ways("embed") > 1:  # all is kept but weights that FSDP has gathered, which the backward pass gathers again
        return jax.checkpoint(body, policy=lambda primitive, *_, **__: primitive.name not in _MOVES, prevent_cse=False)
    return body


_MOVES = ("sharding_constraint", "reshape", "transpose", "squeeze", "broadcast_in_dim")  # what stands between a weight and a matrix product, and computes nothing
