"""One step: exact however it is cut and wherever it lies; skipping, freezing, averaging; golden losses."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from jaxlm import config, sharding, trees
from jaxlm.models import kinds
from jaxlm.train import setup

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "losses.json"
TINY = {"model": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "context": 32, "vocab_size": 128, "init_std": 0.05},
        "data": {"sequence_length": 32, "batch_size": 8}, "train": {"steps": 20}, "optim": {"lr": 3e-3, "warmup": 2}}


# Plain SGD where parameters are compared: Adam turns a rounding error of a tiny gradient into a step of full size.
SGD = {"optim__name": "sgd", "optim__lr": 0.3}


def build(mesh=(1, 1, 1), **changes):
    tree = {part: dict(values) for part, values in TINY.items()}
    for key, value in changes.items():
        part, name = key.split("__")
        tree.setdefault(part, {})[name] = value
    tree["mesh"] = dict(zip(("data", "fsdp", "tensor"), mesh)) | tree.get("mesh", {})
    count = math.prod(tree["mesh"].values())
    cfg = config.build(tree)
    return setup.build(cfg, sharding.make_mesh(cfg.mesh, jax.devices()[:count]), 128)


def batch(step, ragged=True, rows=8, length=32):
    """Rows of two documents and some padding, from a small language that can be learned: the next token is 3 x + 1 or 3 x + 2."""
    random = np.random.default_rng(step)
    ids = np.zeros((rows, length + 1), np.int64)
    ids[:, 0] = random.integers(0, 128, rows)
    for t in range(length):
        ids[:, t + 1] = (3 * ids[:, t] + 1 + random.integers(0, 2, rows)) % 128
    cut = random.integers(4, length - 8, rows)[:, None]
    end = random.integers(length - 8, length + 1, rows)[:, None] if ragged else length
    place = np.arange(length)
    segments = np.where(place >= end, 0, np.where(place >= cut, 2, 1)).astype(np.int32)
    return {"tokens": ids[:, :-1].astype(np.int32), "targets": ids[:, 1:].astype(np.int32), "weights": (segments > 0).astype(np.float32),
            "positions": np.where(segments == 2, place - cut, place).astype(np.int32), "segments": segments}


@functools.cache
def parameters(cfg, seed):
    """What a model begins with, on the host: to draw it is a third of what is compiled for a step, and the same for all optimisers and meshes."""
    return jax.tree.map(np.asarray, jax.jit(kinds.build(cfg).init)(jax.random.split(jax.random.key(seed))[0]))


def start(parts):
    """The state that `parts.init` makes."""
    forms = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    if forms(parts.target.params) != forms(parts.plain):  # adapters, frozen matrices in other forms
        return parts.init()
    first = parameters(dataclasses.replace(parts.config.model, dropout=0.0, remat="none", attention="auto"), parts.config.train.seed)
    return parts.begin(jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), first, parts.target.params))


def train(parts, steps, make=batch, init=start):
    losses, metrics = [], None
    with jax.set_mesh(parts.mesh):
        state = init(parts)
        for step in range(steps):
            state, metrics = parts.step(state, sharding.to_device(parts.mesh, make(step), parts.config.data.batch_size))
            total, weight = metrics["sums"]["loss"]
            losses.append(float(total) / float(weight))
    return losses, state, metrics


def golden_losses():
    return {name: train(build(optim__name=name, **extra), 20)[0] for name, extra in OPTIMISERS.items()}


@functools.cache
def baseline():
    """What others are compared with: losses and parameters of three steps on one device."""
    losses, state, _ = train(build(**SGD), 3)
    return losses, gathered(state)


@functools.cache
def averaging():
    """Parts of a run that keeps an average, compiled once for what is asked of single steps."""
    return build(optim__ema=0.5, optim__weight_decay=0.0)


OPTIMISERS = {"adamw": {}, "adafactor": {}, "lion": {"optim__lr": 5e-4}, "muon": {}, "sgd": {"optim__lr": 0.5}}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_golden_losses(name):
    losses, _, _ = train(build(optim__name=name, **OPTIMISERS[name]), 20)
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text())[name], rtol=2e-4, err_msg=(
        f"20 steps of {name} gave other losses than before: the model, the optimiser or its defaults compute something else now. If that is meant and "
        "understood, refresh with tools/refresh_golden.py losses and say why in the commit"))


def gathered(state):
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(state.params).items()}


def compare(parts, losses, expected, init=start):
    """Three steps of `parts` against a baseline."""
    found, state, _ = train(parts, 3, init=init)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for path, leaf in gathered(state).items():
        np.testing.assert_allclose(leaf, expected[path], atol=2e-5, err_msg=path)


def test_a_mesh_draws_and_computes_the_same():
    compare(build((2, 2, 2), **SGD), *baseline(), init=lambda parts: parts.init())


def test_microbatches_on_a_mesh_that_splits_parameters_and_moments():
    found, state, _ = train(build((1, 4, 2), train__microbatches=2), 3)
    np.testing.assert_allclose(found, json.loads(GOLDEN.read_text())["adamw"][:3], rtol=1e-5)
    q = state.params["layers"]["attn"]["q"]
    assert q.addressable_shards[0].data.size * 8 == q.size
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt) if trees.path_name(path) == "layers/attn/q"]
    assert len(moments) == 2 and all(m.sharding == q.sharding for m in moments)


def test_microbatches_are_exact_on_ragged_weights():
    """Of one row each, whose weights differ most."""
    compare(build(train__microbatches=8, **SGD), *baseline())


def test_chunked_loss_is_the_same_and_z_loss_adds_its_square():
    losses, state, metrics = train(build(objective__z_loss=0.1, objective__chunk_rows=48, **SGD), 1)
    plain, sums = train(build(objective__z_loss=0.1, **SGD), 1), metrics["sums"]
    np.testing.assert_allclose(losses, plain[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, plain[1].params)
    assert float(sums["cross_entropy"][0] / sums["cross_entropy"][1]) == pytest.approx(baseline()[0][0], rel=1e-6)
    assert float(sums["loss"][0]) == pytest.approx(float(sums["cross_entropy"][0] + sums["z_loss"][0]), rel=1e-6)
    assert float(sums["z_loss"][0]) > 0


def test_padding_alone_changes_nothing_but_decay():
    empty = lambda step: {key: np.zeros_like(value) for key, value in batch(step).items()}
    parts = averaging()
    with jax.set_mesh(parts.mesh):
        before = gathered(start(parts))
        state, metrics = parts.step(start(parts), sharding.to_device(parts.mesh, empty(0), 8))
    assert float(metrics["grad_norm"]) == 0 and float(metrics["skipped"]) == 0
    for path, leaf in gathered(state).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_what_is_not_finite_is_skipped():
    def poisoned(step):
        clean = batch(step)
        return clean | {"weights": np.full_like(clean["weights"], np.nan)} if step == 1 else clean

    parts = averaging()
    with jax.set_mesh(parts.mesh):
        state, _ = parts.step(start(parts), sharding.to_device(parts.mesh, poisoned(0), 8))
        before = jax.tree.map(np.asarray, state)
        state, metrics = parts.step(state, sharding.to_device(parts.mesh, poisoned(1), 8))
        assert float(metrics["skipped"]) == 1 and int(state.step) == 2
        jax.tree.map(np.testing.assert_array_equal, before.params, jax.tree.map(np.asarray, state.params))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.tree.map(np.asarray, state.opt)))
        state, metrics = parts.step(state, sharding.to_device(parts.mesh, poisoned(2), 8))
        assert float(metrics["skipped"]) == 0 and math.isfinite(float(metrics["grad_norm"]))


def test_frozen_parameters_stay_and_have_no_moments():
    rules = (("layers/attn/.*", True), ("layers/(mlp|attn_norm|mlp_norm)/.*|embed/.*|final_norm/.*", False))
    parts = build(optim__trainable=rules)
    with jax.set_mesh(parts.mesh):
        before = gathered(start(parts))
    _, state, _ = train(parts, 2)
    for path, leaf in gathered(state).items():
        assert np.array_equal(leaf, before[path]) == (not path.startswith("layers/attn/")), path
    names = {trees.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt)}
    assert "layers/attn/q" in names and "layers/mlp/up" not in names


def test_ema_follows_the_parameters():
    parts = averaging()
    with jax.set_mesh(parts.mesh):
        first = jax.tree.map(np.asarray, start(parts).params)
        state, _ = parts.step(start(parts), sharding.to_device(parts.mesh, batch(0), 8))
    jax.tree.map(lambda a, p, e: np.testing.assert_allclose(e, (a + p) / 2, atol=1e-6), first, jax.tree.map(np.asarray, state.params), state.ema)


def test_dropout_is_a_function_of_seed_and_step():
    a, b, c = (train(build(model__dropout=0.2, train__seed=seed), 2)[0] for seed in (0, 0, 1))
    assert a == b and a != c


def test_first_parameters_compile_quickly_into_the_same_numbers(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    quickly, key = setup._compiled_quickly("cpu"), jax.random.key(0)
    draw = jax.jit(lambda key: 0.02 * jax.random.normal(key, (64, 48))).lower(key)
    np.testing.assert_array_equal(draw.compile(compiler_options=quickly)(key), draw.compile(compiler_options={"xla_backend_optimization_level": 3})(key))
    assert setup._compiled_quickly("tpu") is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # the user's wins
    assert setup._compiled_quickly("cpu") is None


@pytest.mark.parametrize("changes, words", [
    ({"data__batch_size": 6, "mesh": (4, 1, 1)}, "must be a multiple of train.microbatches=1 times mesh.data = 4: try 8"),
    ({"mesh": (1, 1, 8)}, r"kv_heads=2 cannot be split over mesh.tensor=8; sizes that work: \[1, 2\]"),
    ({"model__vocab_size": 64}, "smaller than the tokenizer's 128"),
    ({"optim__warmup": 30}, "longer than the run of 20"),
    ({"optim__schedule": "wsd", "optim__decay": 19}, "longer than the run of 20"),
    ({"train__steps": "1 epoch"}, "epochs are not known here"),
    ({"train__steps": 0}, "is no step at all"),
    ({"optim__trainable": (("layers/.*", True),)}, "no rule matches"),
    ({"optim__decay_rules": ((".*", True), ("head/.*", False))}, "matches no path"),
    ({"optim__decay_rules": ((".*", True), ("embed/.*", False))}, "all match"),
])
def test_bad_input(changes, words):
    mesh = changes.pop("mesh", (1, 1, 1))
    with pytest.raises(ValueError, match=words) as caught:
        build(mesh, **changes)
    assert "\n" not in str(caught.value)
    changes["mesh"] = mesh


@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 1, 1), (2, -1, 3)])
def test_mesh_that_does_not_fit(sizes):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        sharding.make_mesh(config.MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes))))
