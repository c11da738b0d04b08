"""The schedule of a pipeline, by its own arithmetic, and dropout inside its stages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.config import MeshConfig, TransformerConfig
from jaxlm.models import decoder, pipeline

CFG = TransformerConfig(layers=12)


@pytest.mark.parametrize("stages, repeats, rows, wanted, microbatches, steps", [
    (4, 1, 16, 0, 16, 19), (4, 1, 64, 0, 16, 19), (4, 3, 8, 8, 8, 27), (2, 3, 6, 4, 3, 10), (4, 3, 2, 0, 2, 2 * 4 + 2 + 3), (3, 2, 1, 0, 1, 3 + 1 + 2)])
def test_plan(stages, repeats, rows, wanted, microbatches, steps):
    plan = pipeline.plan(dataclasses.replace(CFG, pipeline_repeats=repeats, pipeline_microbatches=wanted), stages, rows)
    assert (plan.microbatches, plan.steps, plan.layers) == (microbatches, steps, 12 // stages // repeats)
    # A slower way to the same: mark who works when.
    busy = {((r * plan.period + m) + s, s) for r in range(repeats) for m in range(microbatches) for s in range(stages)}
    assert len(busy) == repeats * microbatches * stages and max(t for t, _ in busy) == steps - 1
    assert plan.bubble == pytest.approx(1 - len(busy) / (steps * stages))


def test_more_groups_shrink_the_bubble():
    of = lambda repeats: pipeline.plan(dataclasses.replace(CFG, pipeline_repeats=repeats, pipeline_microbatches=4), 4, 4).bubble
    assert of(1) == pytest.approx(3 / 7) and of(3) == pytest.approx(3 / 15)


@functools.cache
def dropped(stages: int, repeats: int):
    """Runs layers that only add a constant, 4^l for layer l, to rows of zeros: the output's digits to base 4 are the masks of dropout.

    Returns:
      A function of a key: masks `[layers, rows, tokens, width]`, 2 where kept and 0 elsewhere, and what the backward pass says was kept, `[layers, width]`.
    """
    cfg = TransformerConfig(vocab_size=8, layers=4, width=64, heads=2, context=16, dropout=0.5, bias=True, remat="full", pipeline_repeats=repeats,
                            pipeline_microbatches=4).filled()
    mesh = sharding.make_mesh(MeshConfig(stage=stages, fsdp=1), jax.devices()[:stages])
    layers = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: decoder.init_layers(cfg, jax.random.key(0))))
    layers["mlp"]["down_bias"] = jnp.broadcast_to(4.0 ** jnp.arange(4)[:, None], (4, 64))
    inputs = {name: jnp.ones((8, 16), jnp.int32) for name in ("positions", "segments")}

    def total(layers, key):
        out = pipeline.run(cfg, layers, jnp.zeros((8, 16, 64)), decoder.make_slots(cfg, inputs), None, key, lambda layer: layer)[0]
        return out.sum(), out

    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(total, has_aux=True)).lower(layers, jax.random.key(0)).compile(compiler_options={"xla_backend_optimization_level": 0})

    def masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
        with jax.set_mesh(mesh):
            grads, out = run(layers, jax.random.key(seed))
        return np.stack([np.asarray(out, np.int64) // 4**layer % 4 for layer in range(4)]), np.asarray(grads["mlp"]["down_bias"])

    return masks


@pytest.mark.parametrize("stages, repeats", [(1, 1), (2, 2)])
def test_dropout_inside_stages(stages, repeats):
    """A layer drops as much as without stages, something else in every layer, row (so every microbatch) and step, the same for the same key, and the backward
    pass, which computes the masks anew, drops what the forward pass did."""
    masks, kept = dropped(stages, repeats)(0)
    assert set(np.unique(masks)) == {0, 2}  # kept or not, with the scale of 1 / (1 - rate), and each layer exactly once
    assert np.abs(masks.mean((1, 2, 3)) - 1).max() < 0.05
    each = masks.reshape(4 * 8, -1)  # of a layer and row
    same = (each[:, None] == each[None]).mean(-1)
    assert np.abs(same[~np.eye(len(same), dtype=bool)] - 0.5).max() < 0.1
    np.testing.assert_array_equal(kept, masks.sum((1, 2)))
    again, other = dropped(stages, repeats)(0)[0], dropped(stages, repeats)(1)[0]
    np.testing.assert_array_equal(again, masks)
    assert 0.45 < (other == masks).mean() < 0.55
