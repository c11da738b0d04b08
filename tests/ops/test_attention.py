"""The table of kernels: each equals the reference where it runs here; which one a model gets, and what a forced one refuses; dropout of
attention probabilities: exactly off without a key, right on average with one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import TransformerConfig
from jaxlm.models import kinds
from jaxlm.ops import attention

CFG = TransformerConfig(heads=2, head_size=128)


def compare(kernel, *, length, size, kv_heads=1, options=None, kernel_options=None, packed=True):
    """Values and gradients against the reference, on the tokens of two documents and padding, or of one document."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, pull = (jax.random.normal(key, (1, length, heads, size)) for key, heads in zip(keys, (2, kv_heads, kv_heads, 2)))
    place = np.arange(length)[None]
    segments = np.where(place >= length - 9, 0, np.where(place >= 40, 2, 1)) if packed else np.ones_like(place)
    tokens = attention.Tokens(jnp.array(np.where(segments == 2, place - 40, place), jnp.int32), jnp.array(segments, jnp.int32))
    options = {"scale": size**-0.5} | (options or {})
    inside = (tokens.segments > 0)[..., None, None]

    def both(f, **more):
        run = lambda q, k, v: (f(q, k, v, tokens, tokens, **options, **more) * inside)
        return jax.jit(lambda q, k, v: (run(q, k, v), jax.grad(lambda *a: (run(*a) * pull).sum(), argnums=(0, 1, 2))(q, k, v)))(q, k, v)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), both(kernel, **(kernel_options or {})), both(attention.reference))


@pytest.mark.parametrize("options", [{}, {"window": jnp.int32(7)}, {"causal": False}], ids=str)
def test_xla_equals_reference(options):
    """Also stands for cudnn, which differs in the implementation alone: rows that are packed, with a mask, and rows of one document, without."""
    compare(attention.KERNELS["xla"], length=64, size=8, options=options)
    compare(attention.KERNELS["xla"], length=64, size=8, options=options, packed=False)


@pytest.mark.parametrize("capability, fuses", [("9.0", True), ("8.0", True), ("12.0", True), ("7.5", False), ("gfx90a", False)])
def test_cudnn_is_for_new_gpus(capability, fuses, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [type("Gpu", (), {"compute_capability": capability})()])
    assert attention.choose(dataclasses.replace(CFG, dtype="bfloat16"), 512, "gpu") == ("cudnn" if fuses else "reference")


@pytest.mark.parametrize("options", [{}, {"window": jnp.int32(7), "softcap": 3.0}], ids=str)
def test_blocked_equals_reference(options):
    compare(attention.blocked, length=64, size=8, options=options, kernel_options={"block": 20})


@pytest.mark.parametrize("options, windows", [
    ({}, (0,)), ({"window": jnp.int32(50), "softcap": 3.0}, (50,)), ({"window": jnp.int32(0)}, (0, 30)), ({"window": jnp.int32(30)}, (0, 30))], ids=str)
def test_splash_equals_reference(options, windows):
    """Interpreted, since there is no TPU here."""
    compare(attention.splash, length=128, size=128, options=options, kernel_options={"interpret": True, "windows": windows})


def test_splash_fills_small_heads_and_goes_over_several_blocks():
    """Heads of 64, as in GPT-2 and small Llamas; 640 tokens in blocks of 128, of which causality hides some."""
    compare(attention.splash, length=640, size=64, kernel_options={"interpret": True})


@pytest.mark.parametrize("change, backend, length, expected", [
    ({}, "cpu", 512, "blocked"), ({"causal": False, "kind": "encoder"}, "cpu", 512, "reference"), ({}, "tpu", 512, "splash"), ({}, "tpu", 500, "reference"),
    ({"head_size": 64}, "tpu", 512, "splash"), ({}, "gpu", 512, "reference"), ({"dtype": "bfloat16"}, "gpu", 512, "cudnn"),
    ({"dtype": "bfloat16", "attention_softcap": 3.0}, "gpu", 512, "reference"), ({"attention": "cudnn", "dtype": "bfloat16"}, "gpu", 512, "cudnn"),
    ({"attention": "reference"}, "tpu", 512, "reference")])
def test_what_a_model_gets(change, backend, length, expected):
    assert attention.choose(dataclasses.replace(CFG, **change), length, backend) == expected


@pytest.mark.parametrize("change, backend, words", [
    ({"attention": "splash"}, "cpu", "model.attention=splash runs on TPUs; here auto, reference, blocked, xla work"),
    ({"attention": "cudnn"}, "gpu", "computes in bfloat16: set model.dtype=bfloat16"),
    ({"attention": "cudnn", "dtype": "bfloat16", "head_size": 256}, "gpu", "a multiple of 8 and at most 128, not 256"),
    ({"attention": "cudnn", "dtype": "bfloat16", "attention_softcap": 3.0}, "gpu", "has no soft-cap"),
    ({"attention": "blocked", "causal": False, "kind": "encoder"}, "cpu", "is for causal models; here auto, reference, xla work"),
    ({"attention": "blocked", "positions": "relative", "encoder_layers": 2}, "cpu",
     "adds no bias to the scores, which relative positions are; here auto, reference work")])
def test_a_forced_kernel_refuses_what_it_cannot(change, backend, words):
    with pytest.raises(ValueError, match=words) as caught:
        attention.choose(dataclasses.replace(CFG, **change), 512, backend)
    assert "\n" not in str(caught.value)


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
    many = jax.jit(jax.vmap(lambda key: attention.reference(*arguments(), scale=0.5, dropout=0.25, key=key)))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(many.mean(0), 1, atol=0.06)
    first = np.asarray(many[:, :, 0])  # the first token sees itself alone: kept, and then 1 / (1 - 0.25), or dropped
    np.testing.assert_allclose(np.unique(np.round(first, 4)), [0, 1.3333])
    assert abs((first == 0).mean() - 0.25) < 0.02


MODELS = {
    "decoder": TransformerConfig(vocab_size=64, width=16, heads=2, layers=2, context=16),
    "encoder": TransformerConfig(kind="encoder", causal=False, vocab_size=64, width=16, heads=2, layers=2, context=16),
    "encoder-decoder": TransformerConfig(vocab_size=64, width=16, heads=2, layers=2, context=16, encoder_layers=1, positions="relative"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_drops_in_training_only(name):
    cfg = MODELS[name]
    plain, dropping = kinds.build(cfg), kinds.build(dataclasses.replace(cfg, attention_dropout=0.5))
    params = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf * 10, plain.init(key)))(jax.random.key(0))
    tokens = jnp.arange(12)[None]
    batch = {"tokens": tokens, "positions": tokens, "segments": jnp.ones_like(tokens)}
    if cfg.encoder_layers:
        batch |= {f"encoder_{key}": value for key, value in batch.items()}
    compiled = {model: jax.jit(lambda key, model=model: model.apply(params, batch, key=key)[0]) for model in (plain, dropping)}
    run = lambda model, key: np.asarray(compiled[model](key))
    np.testing.assert_array_equal(run(dropping, None), run(plain, None))
    one, two = run(dropping, jax.random.key(1)), run(dropping, jax.random.key(2))
    assert np.abs(one - two).max() > 1e-3 and np.abs(one - run(plain, jax.random.key(1))).max() > 1e-3
    np.testing.assert_array_equal(one, run(dropping, jax.random.key(1)))
