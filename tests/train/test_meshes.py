"""Every axis of the mesh, alone and with others, computes what one device does: loss and each leaf of the gradient; checkpoints fit all meshes."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from jaxlm import sharding, trees
from jaxlm.aot import hlo
from jaxlm.train import checkpoint
from jaxlm.train.lock import Lock
from tests.train.test_step import batch, build

KNOBS = dict(model__windows=(0, 7), model__attention_softcap=5.0, model__qk_norm="head", model__norm_position="sandwich", objective__z_loss=1e-3)
MOE = dict(model__experts=4, model__expert_feedforward=32, model__shared_feedforward=32, model__shared_gate=True)
BF16 = dict(model__dtype="bfloat16")


def difference(mesh: dict, kind: str = "", **options) -> tuple[float, float]:
    """Relative error of the loss, and the largest of a leaf of the gradient, to the leaf's largest entry. The options are the mesh's alone."""
    model = {"": {}, "knobs": KNOBS, "moe": MOE, "bf16": BF16, "deep": {"model__layers": 4}}[kind]
    loss, grads = gradient(build((1, 1, 1), **{f"mesh__{axis}": n for axis, n in mesh.items()}, **model, **options))
    loss_1, grads_1 = on_one_device(kind)
    largest = lambda a: np.abs(a).max()
    return abs(loss - loss_1) / loss_1, max(largest(grads[path] - leaf) / largest(leaf) for path, leaf in grads_1.items())


@functools.cache
def on_one_device(kind: str):
    return gradient(build(**{"": {}, "knobs": KNOBS, "moe": MOE, "bf16": BF16, "deep": {"model__layers": 4}}[kind]))


def gradient(parts):
    with jax.set_mesh(parts.mesh):
        grads, sums = parts.gradient(parts.init().params, sharding.to_device(parts.mesh, batch(0), parts.config.data.batch_size))
    total, weight = sums["loss"]
    return float(total) / float(weight), {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(grads).items()}


def case(mesh, *options, slow=True, **more):
    return pytest.param(mesh, *options, more, id="+".join(f"{axis}{n}" for axis, n in mesh.items()) + "".join(f"-{o}" for o in (*options, *more.values()) if o),
                        marks=[pytest.mark.slow] * slow)


ULYSSES, TWICE = {"model__sequence_attention": "all_to_all"}, {"model__pipeline_repeats": 2}


@pytest.mark.parametrize("mesh, kind, options", [
    case({"sequence": 4}, "knobs", slow=False), case({"sequence": 2, "fsdp": 2}, "", slow=False, **ULYSSES),
    case({"fsdp": 2, "tensor": 2, "stage": 2}, "deep", slow=False, **TWICE), case({"fsdp": 2, "expert": 4}, "moe", slow=False),
    *(case({axis: n}, "") for axis in ("slice", "data", "fsdp", "sequence") for n in (2, 4)), case({"tensor": 2}, ""), case({"stage": 2}, ""),
    case({"stage": 4}, "deep"), case({"stage": 2}, "deep", **TWICE), case({"stage": 2}, "knobs", model__remat="full", train__microbatches=2),
    case({"stage": 2}, "deep", **TWICE, model__pipeline_microbatches=1), case({"expert": 2}, "moe"), case({"expert": 4}, "moe"),
    case({"tensor": 2, "expert": 2}, "moe"), case({"stage": 2, "expert": 2, "sequence": 2}, "moe"), case({"stage": 2, "fsdp": 2}, "moe"),
    case({"sequence": 2, "tensor": 2, "fsdp": 2}, "knobs"), case({"sequence": 2, "tensor": 2}, "knobs", **ULYSSES),
    case({"sequence": 4, "fsdp": 2}, "", objective__chunk_rows=48), case({"slice": 2, "fsdp": 4}, "knobs"),
    case({"fsdp": 4, "tensor": 2}, "knobs", model__remat="dots"), case({"stage": 2, "sequence": 2, "fsdp": 2}, "knobs")])
def test_a_mesh_computes_what_one_device_does(mesh, kind, options):
    loss, grads = difference(mesh, kind, **options)
    assert loss < 1e-5 and grads < 1e-5, (loss, grads)


@pytest.mark.parametrize("mesh, options", [
    case({"fsdp": 2, "sequence": 2, "stage": 2}, slow=False), case({"tensor": 2, "fsdp": 4}), case({"sequence": 4}, **ULYSSES)])
def test_in_bfloat16_to_two_percent(mesh, options):
    loss, grads = difference(mesh, "bf16", **options)
    assert loss < 2e-2 and grads < 2e-2, (loss, grads)


def test_a_checkpoint_of_one_mesh_fits_five_others(tmp_path):
    """Bit by bit, moments too, whatever the order in which stages and sequences lie."""
    state_of = lambda parts: {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(parts)}
    first = build((1, 2, 2), mesh__stage=2)
    with jax.set_mesh(first.mesh):
        state = first.init()
        state = state._replace(opt=jax.tree.map(lambda x: x + 1, state.opt))
        with Lock(tmp_path) as lock, checkpoint.Checkpoints(lock, keep_last=1, keep_best=0, keep_every=0) as checkpoints:
            checkpoints.save(3, state, {"data.json": json.dumps({}).encode()})
            checkpoints.wait()
    for mesh in ({"fsdp": 8}, {"slice": 2, "sequence": 4}, {"tensor": 2, "data": 4}, {"stage": 2, "sequence": 2, "fsdp": 2}, {}):
        parts = build((1, 1, 1), **{f"mesh__{axis}": n for axis, n in mesh.items()})
        found = checkpoint.restore(tmp_path, 3, parts.target)
        assert found.params["layers"]["attn"]["q"].sharding == parts.target.params["layers"]["attn"]["q"].sharding
        for path, leaf in state_of(state).items():
            np.testing.assert_array_equal(state_of(found)[path], leaf, err_msg=f"{mesh} {path}")


@pytest.mark.parametrize("changes, words", [
    ({"mesh__expert": 2}, "mesh.expert=2 splits the experts of a mixture, and model.experts=0: give these devices to mesh.fsdp"),
    ({"mesh__stage": 4}, r"model.layers=2 cannot be split over mesh.stage=4 x model.pipeline_repeats=1: .* stages that work are \[1, 2\]"),
    ({"mesh__stage": 2, "model__pipeline_repeats": 2}, r"layers=2 cannot be split over mesh.stage=2 x model.pipeline_repeats=2: .*stages that work are \[1\]"),
    ({"mesh__stage": 2, "model__pipeline_microbatches": 3}, "model.pipeline_microbatches=3 must divide the 8 rows of a device: try 2"),
    ({"mesh__stage": 2, **MOE, "model__dense_layers": (0,), "model__layers": 4}, r"groups of 2 layers .* differ in which have experts"),
    ({"mesh__expert": 8, **MOE}, r"expert=4 cannot be split over mesh.expert=8; sizes that work: \[1, 2, 4\]"),
    ({"mesh__sequence": 4, "data__sequence_length": 30, "model__context": 30}, "rows of 30 tokens cannot be split over mesh.sequence=4"),
    ({"mesh__sequence": 8, "model__sequence_attention": "all_to_all"},
     r"splits the 4 query and 2 key heads of a device over mesh.sequence=8: sizes that work are \[1, 2, 4\]"),
    ({"mesh__sequence": 2, "model__attention": "blocked"}, "model.attention=blocked needs whole rows, and mesh.sequence=2 splits them"),
    ({"model__attention": "cudnn"}, "model.attention=cudnn runs on NVIDIA GPUs; here auto, reference, blocked, xla work"),
    ({"model__attention": "xla", "model__attention_softcap": 2.0}, "model.attention=xla has no soft-cap; here auto, reference, blocked work"),
])
def test_bad_input(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


def test_the_output_projection_is_gathered_once_for_all_chunks_of_the_loss():
    """Under FSDP; gathered in the body of the loop over the chunks it would travel once for each, in both directions."""
    parts = build((1, 8, 1), model__vocab_size=192, model__tied=False, objective__chunk_rows=64)
    with jax.set_mesh(parts.mesh):
        program = hlo.parse(parts.gradient.lower(parts.target.params, parts.batch).compile().as_text())
    found = [(c.times, c.loop) for c in hlo.collectives(program, parts.mesh.shape) if c.kind == "all-gather" and 192 * 64 in {math.prod(a.shape) for a in c.arrays}]
    assert found == [(1, "")] * 2, found  # the embedding, and the projection
