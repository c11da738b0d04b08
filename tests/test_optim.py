import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import optim, trees
from jaxlm.config import OptimConfig


def rates(total=100, **options):
    rate = optim.schedule(OptimConfig(lr=1.0, **options), total, tokens_per_step=10, tokens_per_epoch=500)
    return np.asarray(jax.jit(jax.vmap(rate))(np.arange(total, dtype=np.int32)))


def test_warmup_reaches_the_peak_and_never_starts_at_zero():
    for name in ("constant", "linear", "cosine", "cosine_restarts", "wsd", "step", "inverse_sqrt"):
        values = rates(schedule=name, warmup="10 steps")
        np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
        assert values[10] == pytest.approx(1.0, abs=0.05), name
        assert (values > 0).all()


@pytest.mark.parametrize("options, points", [
    (dict(schedule="constant"), {20: 1, 99: 1}),
    (dict(schedule="linear", end_lr_ratio=0.0), {10: 1, 55: 0.5, 99: 1 / 90}),
    (dict(schedule="cosine", end_lr_ratio=0.2), {55: 0.6, 99: 0.2}),
    (dict(schedule="cosine_restarts", end_lr_ratio=0.0, restarts=1), {10: 1, 32: 0.527, 54: 0.001, 55: 1, 99: 0.001}),
    (dict(schedule="wsd", decay="20%", end_lr_ratio=0.0), {50: 1, 80: 1, 90: 0.5, 99: 0.05}),
    (dict(schedule="step", step_every="30 steps", step_ratio=0.1), {39: 1, 41: 0.1, 71: 0.01, 99: 0.01}),
    (dict(schedule="inverse_sqrt"), {40: 0.5, 90: (10 / 90) ** 0.5}),
])
def test_shapes_of_schedules(options, points):
    values = rates(warmup="10 steps", **options)
    for step, expected in points.items():
        assert values[step] == pytest.approx(expected, abs=0.012), (options, step)


def test_durations_of_schedules():
    assert np.argmax(rates(schedule="constant", warmup="0.5 epochs") == 1.0) == 24
    assert rates(warmup="0")[0] == 1.0


@pytest.mark.parametrize("options, words", [
    (dict(warmup="101 steps"), "optim.warmup='101 steps' is 101 steps, longer than the run of 100"),
    (dict(schedule="wsd", warmup="50%", decay="60%"), "50 . 60 steps, longer than the run of 100"),
])
def test_too_long(options, words):
    with pytest.raises(ValueError, match=words):
        rates(**options)


AXES = {"embed/tokens": ("vocab", "embed"), "layers/attn/q": ("layers", "embed", "heads", "head_size"), "layers/attn/q_bias": ("layers", "heads", "head_size"),
        "layers/attn_norm/scale": ("layers", "embed"), "layers/mlp/down": ("layers", "feedforward", "embed")}
SHAPES = {"embed/tokens": (8, 4), "layers/attn/q": (2, 4, 2, 2), "layers/attn/q_bias": (2, 2, 2), "layers/attn_norm/scale": (2, 4), "layers/mlp/down": (2, 6, 4)}


def test_matrices_decay_and_nothing_else():
    assert optim.decays(OptimConfig(), AXES) == {"embed/tokens": True, "layers/attn/q": True, "layers/attn/q_bias": False,
                                                 "layers/attn_norm/scale": False, "layers/mlp/down": True}
    rules = ((".*/(q|down)", True), ("embed/.*|.*bias|.*scale", False))
    assert not optim.decays(OptimConfig(decay_rules=rules), AXES)["embed/tokens"]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_decay_reaches_exactly_the_chosen(name):
    params = trees.unflatten({path: jnp.ones(shape) for path, shape in SHAPES.items()})
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = optim.build(OptimConfig(name=name, weight_decay=0.5, clip=0.0), lambda step: 0.1, AXES)
    updates = jax.jit(lambda params: tx.update(zero, tx.init(params), params)[0])(params)
    moved = {path: bool((leaf != 0).any()) for path, leaf in trees.flatten(updates).items()}
    expected = optim.decays(OptimConfig(), AXES) | ({"embed/tokens": False} if name == "muon" else {})  # Muon's AdamW part does not decay
    assert moved == expected


def test_clip_bounds_the_step():
    params = trees.unflatten({path: jnp.zeros(shape) for path, shape in SHAPES.items()})
    huge = jax.tree.map(lambda x: 1e6 * jnp.ones_like(x), params)
    tx = optim.build(OptimConfig(name="sgd", clip=1.0, weight_decay=0.0, b1=0.0), lambda step: 1.0, AXES)
    updates = jax.jit(lambda params: tx.update(huge, tx.init(params), params)[0])(params)
    assert float(jnp.sqrt(sum(jnp.square(u).sum() for u in jax.tree.leaves(updates)))) == pytest.approx(1.0, rel=1e-5)


def test_muon_turns_matrices_into_orthogonal_ones():
    path = "layers/mlp/down"
    params = trees.unflatten({path: jnp.zeros((2, 6, 4))})
    gradient = trees.unflatten({path: jax.random.normal(jax.random.key(0), (2, 6, 4))})
    tx = optim.build(OptimConfig(name="muon", clip=0.0, weight_decay=0.0), lambda step: 1.0, {path: AXES[path]})
    update = trees.flatten(jax.jit(lambda params: tx.update(gradient, tx.init(params), params)[0])(params))[path]
    for layer in update:  # Newton-Schulz is approximate: singular values near one, times 0.2 sqrt(6)
        values = np.linalg.svd(layer, compute_uv=False) / (0.2 * 6 ** 0.5)
        assert values.max() / values.min() < 2 and 0.6 < values.mean() < 1.3
