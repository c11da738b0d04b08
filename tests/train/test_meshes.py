"""Every axis of the mesh, alone and with others, computes what one device does: loss and each leaf of the gradient; a run goes on on any other mesh."""

import functools
import json
import math
import re

import jax
import numpy as np
import pytest

from jaxlm import sharding, trees
from jaxlm.aot import hlo
from jaxlm.train import checkpoint
from jaxlm.train.lock import Lock
from jaxlm.verify import compiled
from tests.train.test_step import batch, build

KNOBS = dict(model__windows=(0, 7), model__attention_softcap=5.0, model__qk_norm="head", model__norm_position="sandwich", objective__z_loss=1e-3)
MOE = dict(model__experts=4, model__expert_feedforward=32, model__shared_feedforward=32, model__shared_gate=True)
KINDS = {"": {}, "knobs": KNOBS, "moe": MOE, "bf16": {"model__dtype": "bfloat16"}, "moe bf16": MOE | {"model__dtype": "bfloat16", "model__experts_per_token": 4}}
# "moe bf16" takes all experts: which ones are chosen hangs, for some tokens, on less than a rounding of bfloat16, and one such token is a tenth of a gradient.
SIZES = dict(model__layers=4, model__heads=8, model__kv_heads=4)  # what 4 stages and 4 parts of the key heads need

LONG = dict(model__context=2048, data__sequence_length=2048, data__batch_size=1, model__remat="full", objective__chunk_rows=256)


def on_mesh(mesh: dict, kind: str = "", **options):
    return build((1, 1, 1), **{f"mesh__{axis}": n for axis, n in mesh.items()}, **SIZES, **KINDS[kind], **options)


@functools.cache
def parameters(kind: str):
    """Drawn once for all meshes, on the host."""
    return jax.tree.map(np.asarray, jax.jit(on_mesh({}, kind).model.init)(jax.random.key(0)))


def placed(parts, kind: str):
    return jax.tree.map(lambda leaf, target: jax.device_put(leaf, target.sharding), parameters(kind), parts.target.params)


def gradient(parts, kind: str):
    with jax.set_mesh(parts.mesh):
        given = placed(parts, kind), sharding.to_device(parts.mesh, batch(0), parts.config.data.batch_size)
        grads, sums = compiled(parts.gradient, *given)(*given)
    total, weight = sums["loss"]
    return float(total) / float(weight), {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(grads).items()}


@functools.cache
def on_one_device(kind: str):
    return gradient(on_mesh({}, kind), kind)


def difference(mesh: dict, kind: str = "", **options) -> tuple[float, float]:
    """Relative error of the loss, and the largest of a leaf of the gradient, to the leaf's largest entry. The options are the mesh's alone."""
    loss, grads = gradient(on_mesh(mesh, kind, **options), kind)
    loss_1, grads_1 = on_one_device(kind)
    largest = lambda a: np.abs(a).max()
    return abs(loss - loss_1) / loss_1, max(largest(grads[path] - leaf) / largest(leaf) for path, leaf in grads_1.items())


def case(mesh, *options, slow=True, **more):
    return pytest.param(mesh, *options, more, id="+".join(f"{axis}{n}" for axis, n in mesh.items()) + "".join(f"-{o}" for o in (*options, *more.values()) if o),
                        marks=[pytest.mark.slow] * slow)


ULYSSES, TWICE, ONCE = {"model__sequence_attention": "all_to_all"}, {"model__pipeline_repeats": 2}, {"model__pipeline_microbatches": 1}
CHUNKS = {"objective__chunk_rows": 48}


@pytest.mark.parametrize("mesh, kind, options", [
    case({"sequence": 4}, "knobs", slow=False, **CHUNKS), case({"fsdp": 2, "tensor": 2, "stage": 2}, "knobs", slow=False, **TWICE, **CHUNKS),
    *(case({axis: 4}, "") for axis in ("slice", "data", "stage", "tensor")), case({"slice": 2, "fsdp": 4}, "knobs"),
    case({"stage": 2}, "knobs", model__remat="full", train__microbatches=2), case({"stage": 2}, "", **TWICE, **ONCE),
    case({"fsdp": 2, "tensor": 2, "expert": 2}, "moe"), case({"stage": 2, "expert": 2, "sequence": 2}, "moe"),
    *(case({"sequence": 2, "tensor": 2, "fsdp": 2}, "knobs", **options) for options in ({}, ULYSSES)),
    case({"fsdp": 2, "tensor": 4}, "knobs", model__remat="dots")])
def test_a_mesh_computes_what_one_device_does(mesh, kind, options):
    loss, grads = difference(mesh, kind, **options)
    assert loss < 1e-5 and grads < 1e-5, (loss, grads)


@pytest.mark.parametrize("mesh, kind, options", [
    case({"fsdp": 2, "sequence": 2, "stage": 2}, "bf16", slow=False), case({"tensor": 2, "fsdp": 4}, "bf16"),
    case({"sequence": 4, "data": 2}, "bf16", **ULYSSES), case({"expert": 4, "fsdp": 2}, "moe bf16")])
def test_in_bfloat16_to_two_percent(mesh, kind, options):
    loss, grads = difference(mesh, kind, **options)
    assert loss < 2e-2 and grads < 2e-2, (loss, grads)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_ring_never_holds_all_scores_or_masks(remat):
    """In the traced gradient: tiles of 512 x 512 for each head, not 8192 / 8 x 8192 of them, however the scan over layers moves what all layers share."""
    parts = build((1, 1, 1), mesh__sequence=8, **LONG | dict(model__context=8192, data__sequence_length=8192, model__remat=remat))
    with jax.set_mesh(parts.mesh):
        traced = str(parts.gradient.trace(parts.target.params, parts.batch).jaxpr)
    largest = max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"(?:bool|f32|i32)\[([\d,]+)\]", traced))
    assert largest <= 2 * 8192 * 256, largest  # feed-forward activations of all tokens, two layers; the masks alone were 8192 x 8192


@pytest.mark.slow
def test_a_row_longer_than_one_device_holds():
    """Of a single row of 2048 tokens each of eight devices needs less than an eighth of what one needs alone, as compiled, and all compute the same."""
    found = []
    for parts in (build((1, 1, 1), **LONG), build((1, 1, 1), mesh__sequence=8, **LONG)):
        with jax.set_mesh(parts.mesh):
            params = jax.tree.map(lambda leaf, target: jax.device_put(leaf, target.sharding), found[0][0] if found else parts.init().params, parts.target.params)
            given = params, sharding.to_device(parts.mesh, batch(0, rows=1, length=2048), 1)
            program = compiled(parts.gradient, *given)
            grads, sums = program(*given)
        found.append((jax.tree.map(np.asarray, params), float(sums["loss"][0]) / float(sums["loss"][1]), np.asarray(grads["layers"]["attn"]["k"]),
                      program.memory_analysis().temp_size_in_bytes))
    (_, loss_1, grad_1, memory_1), (_, loss, grad, memory) = found
    assert memory < memory_1 / 8, (memory, memory_1)
    assert abs(loss - loss_1) < 1e-5 * loss_1 and np.abs(grad - grad_1).max() < 1e-5 * np.abs(grad_1).max()


@pytest.mark.slow
def test_a_run_goes_on_the_same_on_five_other_meshes(tmp_path):
    """The checkpoint is read bit by bit, moments too, whatever the order in which stages and sequences lie; on two of them two more steps have the losses of
    the run that was not cut: the first says that parameters, the second that moments and counters are the run's."""
    leaves = lambda state: {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}

    def train(parts, state, steps):
        losses = []
        with jax.set_mesh(parts.mesh):
            step = compiled(parts.step, state, sharding.to_device(parts.mesh, batch(0), 8))
            for number in steps:
                state, metrics = step(state, sharding.to_device(parts.mesh, batch(number), 8))
                losses.append(float(metrics["sums"]["loss"][0]) / float(metrics["sums"]["loss"][1]))
                if number == 1:
                    saved.update(leaves(state))
                    checkpoints.save(2, state, {"data.json": json.dumps({}).encode()})
                    checkpoints.wait()
        return losses

    saved = {}
    with Lock(tmp_path) as lock, checkpoint.Checkpoints(lock, keep_last=1, keep_best=0, keep_every=0) as checkpoints:
        first = on_mesh({"fsdp": 2, "tensor": 2, "stage": 2})
        with jax.set_mesh(first.mesh):
            state = first.begin(placed(first, ""))
        expected = train(first, state, range(4))
        assert expected[3] < expected[0] - 0.01
        for mesh in ({"fsdp": 8}, {"slice": 2, "sequence": 4}, {"tensor": 4, "data": 2}, {"stage": 2, "sequence": 2, "fsdp": 2}, {}):
            parts = on_mesh(mesh)
            found = checkpoint.restore(tmp_path, 2, parts.target)
            assert found.params["layers"]["attn"]["q"].sharding == parts.target.params["layers"]["attn"]["q"].sharding
            there = leaves(found)
            for path, leaf in saved.items():
                np.testing.assert_array_equal(there[path], leaf, err_msg=f"{mesh} {path}")
            if "stage" in mesh or not mesh:
                np.testing.assert_allclose(train(parts, found, (2, 3)), expected[2:], rtol=1e-5, err_msg=str(mesh))


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


def test_the_output_projection_moves_once_for_all_chunks_of_the_loss():
    """Under FSDP; gathered, or its gradient summed, in the body of the loop over the chunks it would travel once for each."""
    parts = build((1, 8, 1), model__vocab_size=192, model__tied=False, objective__chunk_rows=64)
    with jax.set_mesh(parts.mesh):
        program = hlo.parse(parts.gradient.lower(parts.target.params, parts.batch).compile().as_text())
    found = [c for c in hlo.collectives(program, parts.mesh.shape) if 192 * 64 in {math.prod(a.shape) for a in c.arrays}]
    gathers, sums = ([(c.times, c.loop) for c in found if (c.kind == "all-gather") == gather] for gather in (True, False))
    assert gathers == [(1, "")] * 2, found  # the embedding, and the projection
    assert sums and set(sums) == {(1, "")}, found
