"""What adapters and compact frozen weights cost and leave alone, on one device and on meshes; packed chats train as unpacked ones do."""


import jax
import numpy as np
import pytest

from jaxlm import lora, objectives, sharding, trees
from jaxlm.config import ObjectiveConfig, TransformerConfig
from jaxlm.models import decoder
from tests.train.test_step import batch, build, gathered, train

QLORA = {"lora__rank": 2, "optim__frozen_dtype": "int8", "model__heads": 4, "model__kv_heads": 2, "optim__lr": 1e-2, "optim__name": "sgd"}


@pytest.fixture(scope="module")
def single():
    parts = build(**QLORA)
    with jax.set_mesh(parts.mesh):
        before = gathered(parts.init())
    return parts, before, *train(parts, 3, init=lambda parts: parts.init())


def test_frozen_leaves_stay_bit_by_bit_and_cost_no_state(single):
    parts, before, losses, state, _ = single
    for path, leaf in gathered(state).items():
        assert np.array_equal(leaf, before[path]) == (not lora.is_adapter(path)), path
    assert {path for path, _ in trees.flatten(state.params).items() if path.endswith("/int8")} == {
        f"layers/{name}/int8" for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/gate", "mlp/down")}
    names = {trees.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt)} - {"", "count"}
    assert names and all(map(lora.is_adapter, names))
    full = build(optim__name="sgd")
    assert trees.nbytes(parts.target.params) < trees.nbytes(full.target.params) / 2 and trees.nbytes(parts.target.opt) < trees.nbytes(full.target.opt) / 10
    kept = trees.split(parts.target.params, parts.kept)[0]
    assert all(map(lora.is_adapter, trees.flatten(kept))) and losses[-1] < losses[0]


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2, "stage": 2}, pytest.param({"sequence": 2}, marks=pytest.mark.slow)])
def test_meshes_agree(single, mesh):
    others = {f"mesh__{axis}": size for axis, size in mesh.items() if axis not in ("fsdp", "tensor")}
    parts = build((1, mesh.get("fsdp", 1), mesh.get("tensor", 1)), **QLORA, **others)
    with jax.set_mesh(parts.mesh):
        params = jax.tree.map(lambda leaf, target: jax.device_put(leaf, target.sharding), trees.unflatten(single[1]), parts.target.params)
        state, losses = parts.begin(params), []
        for step in range(3):
            state, metrics = parts.step(state, sharding.to_device(parts.mesh, batch(step), 8))
            losses.append(float(metrics["sums"]["loss"][0]) / float(metrics["sums"]["loss"][1]))
    np.testing.assert_allclose(losses, single[2], rtol=2e-5)


def test_packed_chats_have_the_gradients_of_unpacked_ones():
    cfg = TransformerConfig(layers=1, width=32, heads=2, context=24, vocab_size=64, init_std=0.2)
    model, random = decoder.build(cfg), np.random.default_rng(0)
    chats = [(random.integers(0, 64, n + 1), random.random(n) < 0.5) for n in (7, 9, 5)]

    def rows(groups):
        dtypes = dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32) | {"weights": np.float32}
        out = {key: np.zeros((len(groups), 24), dtype) for key, dtype in dtypes.items()}
        for row, group in enumerate(groups):
            column = 0
            for segment, (ids, said) in enumerate(group, 1):
                at = slice(column, column + len(said))
                for key, value in (("tokens", ids[:-1]), ("targets", ids[1:]), ("positions", np.arange(len(said))), ("segments", segment), ("weights", said)):
                    out[key][row, at] = value
                column = at.stop
        return out

    params = jax.jit(model.init)(jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda p, b: objectives.OBJECTIVES["sft"](ObjectiveConfig(name="sft"), model, p, b, None)["loss"][0]))
    packed, alone = gradient(params, rows([chats, []])), None
    for first in range(0, 3, 2):
        part = gradient(params, rows([chats[first:first + 1], chats[first + 1:first + 2]]))
        alone = part if alone is None else jax.tree.map(np.add, alone, part)
    for path, leaf in trees.flatten(packed).items():
        np.testing.assert_allclose(leaf, trees.flatten(alone)[path], atol=1e-5 * float(np.abs(leaf).max()), err_msg=path)
    crossed = rows([chats, []])
    crossed["segments"] = (crossed["segments"] > 0).astype(np.int32)  # one segment: the chats see each other
    assert max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(gradient(params, crossed)))) > 1e-3
