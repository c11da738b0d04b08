"""Adapters and compact frozen weights: the base exactly at first, merged as unmerged, errors as stated; preferences and distillation against formulas."""

import types
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import lora, objectives, trees
from jaxlm.config import LoraConfig, ObjectiveConfig, TransformerConfig
from jaxlm.models import decoder
from jaxlm.ops import quantise
from jaxlm.verify import compiled

CFG = TransformerConfig(layers=2, width=32, heads=2, kv_heads=1, head_size=16, feedforward=64, context=16, vocab_size=64, init_std=0.2, qkv_bias=True)
MODEL = decoder.build(CFG)
SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0))
AXES = trees.match(MODEL.axes, trees.flatten(SHAPES), "axes")
BATCH = {"tokens": jnp.arange(16)[None] % 64, "positions": jnp.arange(16)[None], "segments": jnp.ones((1, 16), jnp.int32)}


def logits(model, params):
    return MODEL.head(params, model.apply(params, BATCH)[0])


@pytest.mark.parametrize("cfg, dtype", [(LoraConfig(rank=4), "float32"), (LoraConfig(rank=4, dora=True, rslora=True, targets=("layers/attn/[qo]",)), "float32"),
                                        (LoraConfig(rank=2), "nf4")])
def test_adapters(cfg, dtype):
    form = lora.form(MODEL, cfg, dtype, AXES, dict.fromkeys(AXES, False), "float32")

    def compute(key, moves):
        """With adapters that have moved so far: the base, the same with adapters off, with them, and with them merged."""
        base = MODEL.init(key)
        first = form.dress(base, key)
        flat = trees.flatten(first)
        moved = trees.unflatten({path: leaf + moves * jax.random.normal(jax.random.fold_in(key, i), leaf.shape) if lora.is_adapter(path) else leaf
                                 for i, (path, leaf) in enumerate(flat.items())})
        plain = lora.plain(lora.without(first), lora.compact(dtype, AXES, lambda path: True)[1])
        return {"base": logits(MODEL, plain), "off": logits(form.model, lora.without(moved)), "moved": logits(form.model, moved),
                "merged": logits(MODEL, form.plain(moved))}, plain, base

    run = compiled(jax.jit(compute), jax.random.key(1), 0.0)
    (at_first, plain, base), (found, _, _) = run(jax.random.key(1), 0.0), run(jax.random.key(1), 0.1)
    found["first"] = at_first["moved"]
    # DoRA divides a length by itself; what dequantises is fused with what follows. Else nothing may differ.
    exact = {"rtol": 0, "atol": 0} if dtype == "float32" else {"atol": 1e-5}
    np.testing.assert_allclose(found["first"], found["base"], **({"atol": 2e-5} if cfg.dora else exact))
    np.testing.assert_allclose(found["off"], found["base"], **exact)
    np.testing.assert_allclose(found["moved"], found["merged"], atol=2e-4)
    assert np.abs(found["moved"] - found["base"]).max() > 0.1
    matrices = {path for path in AXES if path.rpartition("/")[2] in ("q", "k", "v", "o", "up", "gate", "down")}
    for path, leaf in trees.flatten(base).items():
        error = np.abs(np.asarray(leaf) - trees.flatten(plain)[path]).max()
        if path not in lora.compact(dtype, AXES, lambda path: True)[0]:
            assert error == 0, path
        else:
            assert 0 < error <= np.abs(leaf).max() * (quantise.ERROR[dtype] if path in matrices else 2**-8), path


@pytest.mark.parametrize("kind, bits", [("int8", 8.5), ("nf4", 4.5)])
def test_quantised_within_the_stated_error(kind, bits):
    random = np.random.default_rng(0)
    w = (random.normal(size=(3, 128, 64)) * np.exp(random.normal(size=(3, 128, 1)))).astype(np.float32)
    w[0, 0] = 0

    def there_and_back(w, axis):
        stored = quantise.quantise(w, axis, kind)
        back = quantise.dequantise(stored, axis)
        return stored, back, quantise.quantise(back, axis, kind)[kind]

    for axis in (1, 2):
        stored, back, again = jax.jit(there_and_back, static_argnums=1)(w, axis)
        blocks, found = (np.moveaxis(np.asarray(a), axis, -1).reshape(3, -1, 64) for a in (w, back))
        assert (np.abs(found - blocks) <= np.abs(blocks).max(-1, keepdims=True) * quantise.ERROR[kind] * (1 + 1e-5)).all()
        assert sum(leaf.nbytes for leaf in stored.values()) * 8 == w.size * bits and np.array_equal(again, stored[kind])


def test_the_levels_of_nf4():
    """By their definition: equally spaced quantiles of the normal distribution, eight above 0 and seven below, and 0 itself, up to 1."""
    normal, most = NormalDist(), 0.9677083
    above, below = ([normal.inv_cdf(p) for p in np.linspace(most, 0.5, n)[:-1]] for n in (9, 8))
    np.testing.assert_allclose(quantise._NF4, np.sort([*above, 0, *np.negative(below)]) / max(above), atol=2e-7)


def test_targets_that_match_nothing():
    with pytest.raises(ValueError, match="lora.targets: 'layers/attn/query' matches none"):
        lora.targets(LoraConfig(rank=2, targets=("layers/attn/query",)), AXES)
    assert lora.targets(LoraConfig(rank=2, targets=("layers/attn/[qv]",)), AXES) == ["layers/attn/q", "layers/attn/v"]


def test_fingerprints_tell_bases_apart():
    a = {"x": jnp.arange(12.0).reshape(3, 4), "y": jnp.ones(3)}
    swapped = {"x": a["x"][::-1], "y": a["y"]}
    assert lora.fingerprint(a) == lora.fingerprint(jax.tree.map(jnp.array, a)) != lora.fingerprint(swapped)
    assert lora.fingerprint({"x": a["x"].at[2, 3].add(1e-6), "y": a["y"]}) != lora.fingerprint(a)


# A model whose hidden states are a row of a table: what objectives do to log-probabilities stands alone.
def table(name):
    return types.SimpleNamespace(apply=lambda params, batch, key=None: (params[name][batch["tokens"]], None, {}), projection=lambda params: lambda hidden: hidden)


def pairs_batch():
    random = np.random.default_rng(0)
    segments = np.array([[1] * 5 + [2] * 6 + [3] * 4 + [4] * 5, [1] * 9 + [2] * 8 + [0] * 3])
    weights = (segments > 0) & (random.random(segments.shape) < 0.6)
    return {"tokens": random.integers(0, 7, segments.shape), "targets": random.integers(0, 7, segments.shape), "segments": segments,
            "positions": np.zeros_like(segments), "weights": weights.astype(np.float32)}


PREFERENCES = [ObjectiveConfig(name="preference", **options) for options in (
    {}, {"preference_smoothing": 0.2, "preference_beta": 0.5}, {"preference_loss": "ipo"}, {"preference_per_token": True})]


@pytest.fixture(scope="module")
def preferences():
    """Two tables of logits, a batch, and of each of `PREFERENCES` what the objective makes of them: loss and pairs, and the gradient. One program."""
    random = np.random.default_rng(1)
    policy, reference, batch = random.normal(size=(7, 7)), random.normal(size=(7, 7)), pairs_batch()

    def loss(table_, cfg):
        params = {"policy": table_, objectives.COMPANION: {"reference": jnp.asarray(reference, jnp.float32)}}
        sums = objectives.preference(cfg, table("policy"), params, jax.tree.map(jnp.asarray, batch), None, companion=table("reference"))["loss"]
        return sums[0], sums

    both = lambda cfg: lambda table_: jax.value_and_grad(lambda t: loss(t, cfg), has_aux=True)(table_)
    every = jax.jit(lambda table_: [both(cfg)(table_) for cfg in PREFERENCES])(jnp.asarray(policy, jnp.float32))
    return policy, reference, batch, [(sums, gradient) for (_, sums), gradient in every]


@pytest.mark.parametrize("number", range(len(PREFERENCES)))
def test_preference_is_the_formula(preferences, number):
    """TRL's formulas (trl/trainer/dpo_trainer.py) in float64, and their gradient by the logits."""
    cfg, (policy, reference, batch, computed) = PREFERENCES[number], preferences

    def of(logits):
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return log_p[batch["tokens"], batch["targets"]]

    def expected(logits):
        total, count = 0.0, 0
        for row in range(2):
            for k in range(2):
                sides = [(batch["segments"][row] == 2 * k + 1 + side) * batch["weights"][row] for side in (0, 1)]
                if not sides[0].any():
                    continue
                sums = [((of(logits) - of(reference))[row] * side).sum() / (side.sum() if cfg.preference_per_token else 1) for side in sides]
                r = sums[0] - sums[1]
                sigmoid = lambda x: np.log(1 / (1 + np.exp(-x)))
                e, beta = cfg.preference_smoothing, cfg.preference_beta
                total += (r - 1 / (2 * beta))**2 if cfg.preference_loss == "ipo" else -sigmoid(beta * r) * (1 - e) - sigmoid(-beta * r) * e
                count += 1
        return total, count

    (value, pairs), gradient = computed[number]
    assert expected(policy)[1] == float(pairs) == 3
    np.testing.assert_allclose(float(value), expected(policy)[0], rtol=1e-5)
    numeric = np.zeros((7, 7))
    for i in np.ndindex(7, 7):
        step = np.zeros((7, 7))
        step[i] = 1e-6
        numeric[i] = (expected(policy + step)[0] - expected(policy - step)[0]) / 2e-6
    np.testing.assert_allclose(np.asarray(gradient), numeric, atol=1e-5 * max(1, np.abs(numeric).max()))


def test_distillation_is_the_formula():
    cfg = ObjectiveConfig(teacher="x", teacher_kl=0.7, teacher_hard=0.3, teacher_cosine=0.2, teacher_temperature=3.0, chunk_rows=10)
    random = np.random.default_rng(2)
    student, teacher, batch = random.normal(size=(7, 7)), random.normal(size=(7, 7)), pairs_batch()
    soft = lambda logits: np.exp(logits / 3) / np.exp(logits / 3).sum(-1, keepdims=True)
    kl = 9 * (soft(teacher) * np.log(soft(teacher) / soft(student))).sum(-1)
    hard = np.log(np.exp(student).sum(-1, keepdims=True)) - student
    cosine = 1 - (student * teacher).sum(-1) / np.linalg.norm(student, axis=-1) / np.linalg.norm(teacher, axis=-1)
    per_token = 0.7 * kl[batch["tokens"]] + 0.3 * hard[batch["tokens"], batch["targets"]] + 0.2 * cosine[batch["tokens"]]
    params = {"s": jnp.asarray(student, jnp.float32), objectives.COMPANION: {"t": jnp.asarray(teacher, jnp.float32)}}
    sums = jax.jit(lambda p, b: objectives.distilled(objectives.next_token, cfg, table("s"), p, b, None, companion=table("t")))(params, batch)
    np.testing.assert_allclose(float(sums["loss"][0]), (per_token * batch["weights"]).sum(), rtol=1e-5)
    assert float(sums["loss"][1]) == batch["weights"].sum()
