"""Dropout of attention probabilities: exactly off without a key, right on average with one, and only the reference kernel has it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import TransformerConfig
from jaxlm.models import kinds
from jaxlm.ops import attention


def arguments(t=6):
    draw = np.random.default_rng(0)
    q, k = (jnp.array(draw.normal(size=(2, t, 2, 4)), jnp.float32) for _ in range(2))
    tokens = attention.Tokens(jnp.arange(t)[None].repeat(2, 0), jnp.ones((2, t), jnp.int32))
    return q, k, jnp.ones((2, t, 2, 4)), tokens, tokens


def test_probabilities_are_dropped_and_the_others_grow():
    """Values of 1 give the sum of what is left of the probabilities: 1 without dropout, 1 on average with it."""
    plain = attention.reference(*arguments(), scale=0.5)
    np.testing.assert_allclose(plain, 1, rtol=1e-6)
    np.testing.assert_array_equal(attention.reference(*arguments(), scale=0.5, dropout=0.5), plain)
    np.testing.assert_array_equal(attention.reference(*arguments(), scale=0.5, dropout=0.0, key=jax.random.key(1)), plain)
    many = jax.vmap(lambda key: attention.reference(*arguments(), scale=0.5, dropout=0.25, key=key))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(many.mean(0), 1, atol=0.06)
    first = np.asarray(many[:, :, 0])  # the first token sees itself alone: kept, and then 1 / (1 - 0.25), or dropped
    np.testing.assert_allclose(np.unique(np.round(first, 4)), [0, 1.3333])
    assert abs((first == 0).mean() - 0.25) < 0.02


def test_only_the_reference_kernel_drops():
    assert attention.choose("blocked", cached=False) is attention.blocked
    assert attention.choose("blocked", cached=False, dropped=True) is attention.reference


MODELS = {
    "decoder": TransformerConfig(vocab_size=64, width=16, heads=2, layers=2, context=16),
    "encoder": TransformerConfig(kind="encoder", causal=False, vocab_size=64, width=16, heads=2, layers=2, context=16),
    "encoder-decoder": TransformerConfig(vocab_size=64, width=16, heads=2, layers=2, context=16, encoder_layers=1, positions="relative"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_drops_in_training_only(name):
    cfg = MODELS[name]
    plain, dropping = kinds.build(cfg), kinds.build(dataclasses.replace(cfg, attention_dropout=0.5))
    params = jax.tree.map(lambda leaf: leaf * 10, plain.init(jax.random.key(0)))
    tokens = jnp.arange(12)[None]
    batch = {"tokens": tokens, "positions": tokens, "segments": jnp.ones_like(tokens)}
    if cfg.encoder_layers:
        batch |= {f"encoder_{key}": value for key, value in batch.items()}
    run = lambda model, key: np.asarray(model.apply(params, batch, key=key)[0])
    np.testing.assert_array_equal(run(dropping, None), run(plain, None))
    one, two = run(dropping, jax.random.key(1)), run(dropping, jax.random.key(2))
    assert np.abs(one - two).max() > 1e-3 and np.abs(one - run(plain, jax.random.key(1))).max() > 1e-3
    np.testing.assert_array_equal(one, run(dropping, jax.random.key(1)))
