"""Training a mixture of experts: the losses that balance it, what is reported, microbatches, meshes, optimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import objectives, trees
from jaxlm.config import TransformerConfig
from jaxlm.train import report
from tests.train.test_step import SGD, batch, build, train

MOE = dict(model__layers=3, model__experts=4, model__expert_feedforward=32, model__dense_layers=(0,))


def test_reported_balance_is_switchs():
    """Against the formula written out over the router's own decisions."""
    parts = build(**MOE)
    with jax.set_mesh(parts.mesh):
        params = parts.init().params
        rows = {k: jnp.asarray(v) for k, v in batch(0).items()}
        sums_of = lambda params: objectives.next_token(parts.config.objective, parts.model, params, rows, None)
        routing, sums = jax.jit(lambda params: (parts.model.apply(params, rows)[2], sums_of(params)))(params)
    assert routing["chosen"].shape == (2, 4)  # sparse layers, experts
    tokens = int((rows["segments"] > 0).sum())
    np.testing.assert_array_equal(routing["tokens"], [tokens, tokens])
    np.testing.assert_array_equal(routing["chosen"].sum(1), [2 * tokens] * 2)
    np.testing.assert_allclose(routing["shares"].sum(1), tokens, rtol=1e-5)
    expected = np.mean([4 * sum(c / tokens * s / tokens for c, s in zip(*pair)) for pair in zip(np.array(routing["chosen"]), np.array(routing["shares"]))])
    mean = {name: float(total) / float(weight) for name, (total, weight) in sums.items()}
    assert mean["moe_balance"] == pytest.approx(expected, rel=1e-5) and 2 <= mean["moe_balance"] < 4
    assert 0 <= mean["expert_min"] < 1 < mean["expert_max"] <= 2
    cfg = parts.config.objective
    assert mean["loss"] == pytest.approx(mean["cross_entropy"] + cfg.moe_balance * mean["moe_balance"] + cfg.moe_z * mean["moe_z"], rel=1e-5)


def test_the_balance_loss_balances():
    unbalanced = lambda metrics: float(metrics["sums"]["expert_max"][0] / metrics["sums"]["expert_max"][1])
    losses, _, without = train(build(**MOE, objective__moe_balance=0.0), 20)
    assert losses[-1] < losses[0] - 1 and without["skipped"] == 0
    assert unbalanced(train(build(**MOE, objective__moe_balance=1.0), 20)[2]) < unbalanced(without)


@pytest.mark.parametrize("mesh, options", [((2, 2, 2), {"model__remat": "full"}), ((1, 1, 1), {"train__microbatches": 2})], ids=str)
def test_where_and_how_it_is_computed_does_not_matter(mesh, options):
    # The balance of two halves is not that of the whole, by its definition.
    settings = MOE | SGD | ({"objective__moe_balance": 0.0} if options.get("train__microbatches") else {})
    one, other = train(build(**settings), 3), train(build(mesh, **settings, **options), 3)
    np.testing.assert_allclose(one[0], other[0], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one[1].params, other[1].params)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_other_optimisers_take_experts(name):
    losses, _, metrics = train(build(**MOE, optim__name=name), 10)
    assert losses[-1] < losses[0] and metrics["skipped"] == 0


def test_flops_count_the_experts_that_a_token_passes():
    dense = TransformerConfig(vocab_size=64, layers=2, width=32, heads=4, feedforward=64)
    sparse = TransformerConfig(vocab_size=64, layers=2, width=32, heads=4, experts=8, experts_per_token=1, expert_feedforward=64)
    from jaxlm.models import decoder
    count = lambda cfg: trees.count(jax.eval_shape(decoder.build(cfg).init, jax.random.key(0)))
    router = 2 * 32 * 8
    assert report.flops_per_token(sparse, count(sparse), 16) == report.flops_per_token(dense, count(dense), 16) + 6 * router


