"""Layers over the mesh axis `stage`: parts of the batch pass from stage to stage (Huang et al. 2019, GPipe), several times where a stage has several groups
of layers (Narayanan et al. 2021: interleaved, or circular, stages).

With S stages, R groups each and M microbatches, group g lies on stage g mod S. Microbatch m enters group g of its round r on stage 0 at step r max(M, S) + m
and leaves the last stage S - 1 steps later, so that all takes (R - 1) max(M, S) + M + S - 1 steps of which M R do work; the rest is the bubble. Each step
sends one microbatch's activations to the next stage. The backward pass is the same in reverse, made by jax.

All stages run one program (`shard_map` over `stage` alone), so all groups must have the same kinds of layers; windows and dropout keys are data. Inside a
stage the other axes of the mesh work as they do without stages.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.config import TransformerConfig
from jaxlm.models import stack
from jaxlm.models.layers import Slots
from jaxlm.sharding import constrain, ways


class Plan(NamedTuple):
    """How a batch passes the stages."""
    stages: int
    repeats: int  # groups of layers of each stage
    layers: int  # of a group
    microbatches: int

    @property
    def period(self) -> int:
        """Steps between a microbatch's rounds."""
        return max(self.microbatches, self.stages)

    @property
    def steps(self) -> int:
        """Steps from the first microbatch in to the last one out."""
        return (self.repeats - 1) * self.period + self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """Share of the steps in which a stage has nothing to do."""
        return 1 - self.microbatches * self.repeats / self.steps


def plan(cfg: TransformerConfig, stages: int, rows: int) -> Plan:
    """How `rows` of a device pass: the number of microbatches is the largest divisor of `rows` up to `cfg.pipeline_microbatches` (0: 4 x stages).

    Raises:
      ValueError: one line, for layers that do not make equal groups.
    """
    repeats, wanted = cfg.pipeline_repeats, cfg.pipeline_microbatches or 4 * stages
    if cfg.layers % (stages * repeats):
        works = [n for n in range(1, cfg.layers + 1) if cfg.layers % (n * repeats) == 0] or [1]
        raise ValueError(f"model.layers={cfg.layers} cannot be split over mesh.stage={stages} x model.pipeline_repeats={repeats}: with these repeats stages "
                         f"that work are {works}")
    size = cfg.layers // (stages * repeats)
    kinds = stack.kinds(cfg)
    if len({kinds[i:i + size] for i in range(0, cfg.layers, size)}) > 1:
        raise ValueError(f"model.dense_layers={cfg.dense_layers}: groups of {size} layers (mesh.stage={stages} x model.pipeline_repeats={repeats}) differ in "
                         "which have experts, and all stages run one program: choose dense layers that repeat in each group, or mesh.stage=1")
    return Plan(stages, repeats, size, max(n for n in range(1, min(rows, wanted) + 1) if rows % n == 0))


def run(cfg: TransformerConfig, layers: dict, x_BTD: jax.Array, slots: Slots, cache: tuple | None, key: jax.Array | None, view: stack.View):
    """`stack.run` over the stages of the surrounding mesh. Generation (with a cache) runs the plain stack there: right, but each layer's weights are
    fetched from their stage for each token; for much of it use a mesh without stages, which reads the same checkpoints."""
    stages = ways("layers")
    if stages == 1 or cache is not None:
        return stack.run(cfg, layers, x_BTD, slots, cache, key, view)
    if isinstance(layers, list):
        layers = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
    how = plan(cfg, stages, x_BTD.shape[0] // ways("batch"))
    own, per_layer = stack.rows(cfg, layers, key)
    params = {**own, "params": per_layer.pop("params")}
    if key is not None:
        per_layer["key"] = jax.random.key_data(per_layer["key"])
    data = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(how.repeats, stages, how.layers, *a.shape[1:]), 0, 1), per_layer)
    cut = lambda a: jnp.moveaxis(a.reshape(-1, how.microbatches, *a.shape[1:]), 1, 0)
    # Rows m, m + M, ... are microbatch m: each device cuts its own rows and none moves.
    x_MBTD = constrain(cut(x_BTD), None, "batch", "tokens", "residual")
    # One copy for each stage, which takes no room, so that the compiler makes the sum of their gradients: what shard_map would make of arrays that are
    # whole on all stages crashes XLA:CPU in bfloat16.
    copies = lambda a: jnp.broadcast_to(a, (stages, *a.shape))
    out, routed = jax.shard_map(functools.partial(_stage, cfg, how, view), in_specs=PartitionSpec("stage"), out_specs=PartitionSpec("stage"),
                                axis_names={"stage"}, check_vma=False)(
        jnp.arange(stages), params, data, copies(x_MBTD), jax.tree.map(lambda a: copies(cut(a)), slots))
    x_BTD = jnp.moveaxis(constrain(out[0], None, "batch", "tokens", "residual"), 0, 1).reshape(x_BTD.shape)
    in_order = lambda a: jnp.swapaxes(a.reshape(stages, how.repeats, *a.shape[1:]), 0, 1).reshape(-1, *a.shape[2:])
    return constrain(x_BTD, "batch", "tokens", "residual"), None, jax.tree.map(in_order, routed)


def _stage(cfg: TransformerConfig, how: Plan, view: stack.View, *mine):
    """What one stage does with its own row of each argument of the `shard_map` in `run`, parameters apart.

    Returns:
      On stage 0 the results `[1, M, B, T, D]` (elsewhere what does not matter), and the routers' statistics of this stage's layers `[R layers, ...]`.
    """
    params, m, period = _own_groups(how, mine[1]), how.microbatches, how.period
    me, data, x_MBTD, slots = jax.tree.map(lambda a: a[0], (mine[0], *mine[2:]))
    kinds = stack.kinds(cfg)[:how.layers]
    waiting = jnp.pad(x_MBTD, ((0, period - m), *((0, 0),) * 3))
    forward = [(i, (i + 1) % how.stages) for i in range(how.stages)]

    def step(carry, t):
        waiting, arrived = carry
        number, repeat = (t - me) % period, jnp.clip((t - me) // period, 0, how.repeats - 1)
        at = lambda tree, i: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)
        group, per_layer = at(params, repeat), at(data, repeat)
        if "key" in per_layer:
            per_layer["key"] = jax.vmap(lambda k: jax.random.fold_in(jax.random.wrap_key_data(k), number))(per_layer["key"])
        x = jnp.where(me == 0, at(waiting, t % period), arrived)
        own = {name: group[name] for name in stack.KINDS if name in group}
        x, routed = stack.scan(cfg, kinds, own, per_layer | {"params": group["params"]}, x, at(slots, jnp.minimum(number, m - 1)), view)
        counts = (t >= me) & ((t - me) // period < how.repeats) & (number < m)
        arrived = jax.lax.ppermute(x, "stage", forward)
        # What the last stage has finished waits on stage 0 for its next round, or for the end, in the place where it waited before.
        place = (t - how.stages + 1) % period
        waiting = jnp.where(t >= how.stages - 1, jax.lax.dynamic_update_index_in_dim(waiting, arrived, place, 0), waiting)
        return (waiting, arrived), (jax.nn.one_hot(repeat, how.repeats) * counts, routed)

    (waiting, _), (counts_tR, routed) = jax.lax.scan(step, (waiting, jnp.zeros_like(x_MBTD[0])), jnp.arange(how.steps))
    summed = jax.tree.map(lambda a: jnp.einsum("tr,t...->r...", counts_tR, a, precision=jax.lax.Precision.HIGHEST), routed)
    return waiting[None, :m], summed


def _own_groups(how: Plan, params: dict) -> dict:
    """Leaves `[R, layers, ...]` of this stage's groups r S + s, of leaves `[R layers, ...]` as parameters lie: groups s R, ... s R + R - 1.

    So that a checkpoint does not depend on stages and repeats, the parameters are stored in the order of the layers; with several repeats each weight moves
    to its stage once per pass over the batch, and its gradient back.
    """
    groups = jax.tree.map(lambda a: a.reshape(how.repeats, -1, *a.shape[1:]), params)
    if how.repeats == 1:
        return groups

    def arrange(a: jax.Array) -> jax.Array:
        rows = []
        for row in range(how.repeats):
            moves = {q: [(s, (s * how.repeats + q) % how.stages) for s in range(how.stages) if (s * how.repeats + q) // how.stages == row]
                     for q in range(how.repeats)}
            rows.append(sum(jax.lax.ppermute(a[q], "stage", pairs) for q, pairs in moves.items() if pairs))
        return jnp.stack(rows)

    return jax.tree.map(arrange, groups)
