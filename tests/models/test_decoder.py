"""Properties of the decoder: causality and packing by gradient, equivalences, sizes, names."""

import dataclasses
import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import trees
from jaxlm.config import TransformerConfig
from jaxlm.models import decoder, kinds, layers, presets, stack
from jaxlm.ops import attention, positions

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BASE = TransformerConfig(vocab_size=64, context=64, layers=2, width=32, heads=4, kv_heads=2, init_std=0.2)
VARIANTS = {
    "llama": BASE,
    "gpt2": dataclasses.replace(BASE, kv_heads=0, norm="layer", positions="learned", activation="gelu_tanh", gated=False, bias=True),
    "knobs": dataclasses.replace(BASE, windows=(0, 5), qk_norm="head", attention_softcap=5.0, final_softcap=9.0, tied=False, activation="gelu", bias=True),
    "neox": dataclasses.replace(BASE, norm="layer", bias=True, parallel_residual=True, rotary_fraction=0.5, gated=False, activation="gelu"),
    "gemma": dataclasses.replace(BASE, layers=3, windows=(5, 5, 0), norm_position="sandwich", norm_offset=True, embedding_scale=5.0, query_scale=7.0,
                                 rope_theta=1000.0, rope_local_theta=20.0, rope_scaling="linear", rope_factor=2.0, qk_norm="head"),
    "olmo": dataclasses.replace(BASE, norm_position="branch", qk_norm="full", rope_scaling="llama3", rope_factor=4.0, rope_original_context=16),
    "post": dataclasses.replace(BASE, norm_position="post", norm="layer", bias=True, qkv_bias=True),
    "moe": dataclasses.replace(BASE, layers=4, experts=4, expert_feedforward=24, dense_layers=(0, 2), shared_feedforward=16, shared_gate=True,
                               expert_renormalise=False, qkv_bias=True),
    "bare": dataclasses.replace(BASE, positions="none", activation="relu", gated=False, head_size=6),
}


@functools.cache
def build(cfg):
    """The model, compiled, and parameters drawn here, also those that begin with 0 or 1: a leaf hangs on its name and shape alone."""
    model = decoder.build(cfg)
    draw = lambda path, leaf: np.random.default_rng(zlib.crc32(path.encode())).normal(float(path.endswith("scale")), 0.2, leaf.shape).astype(np.float32)
    shapes = trees.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    return model._replace(apply=jax.jit(model.apply)), trees.unflatten({path: jnp.asarray(draw(path, leaf)) for path, leaf in shapes.items()})


def inputs(tokens, segments=None):
    segments = jnp.ones_like(tokens) if segments is None else segments
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)
    index = jnp.arange(tokens.shape[1])
    begin = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return {"tokens": tokens, "positions": index - begin, "segments": segments}


def tokens(rows=2, length=24, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 64)


@functools.cache
def influences(cfg, length):
    """Compiled: each input position has an embedding table of its own, so its gradient is its influence."""
    model, params = build(cfg)

    @jax.jit
    def gradients(table, batch):
        hidden = lambda table: model.apply({**params, "embed": {**params["embed"], "tokens": table}}, batch)[0][0].astype(jnp.float32)
        seeds, pull = jax.random.normal(jax.random.key(3), (length, cfg.width)), jax.vjp(hidden, table)[1]
        grads = jax.vmap(lambda t: pull(jnp.zeros((length, cfg.width)).at[t].set(seeds[t]))[0])(jnp.arange(length))
        return jnp.abs(grads).reshape(length, length, -1).max(-1)

    return functools.partial(gradients, jnp.tile(params["embed"]["tokens"], (length, 1)))


def influence(cfg, segments=None, length=24):
    """[T, T] bool: whether the embedding at input s has any gradient into the hidden state at output t."""
    batch = inputs(tokens(1, length), segments)
    return np.asarray(influences(cfg, length)({**batch, "tokens": batch["tokens"] + 64 * jnp.arange(length)})) != 0


@pytest.mark.parametrize("name, kernel", [("llama", "reference"), ("knobs", "reference"), *((name, "blocked") for name in VARIANTS)])
def test_causality_is_exact(name, kernel):
    seen = influence(dataclasses.replace(VARIANTS[name], attention=kernel))
    if name == "knobs":  # one global layer below one that sees 5 back
        assert np.array_equal(seen, np.tril(np.ones_like(seen)))
    assert not np.triu(seen, 1).any() and np.tril(seen).sum() == 24 * 25 / 2


def test_window_is_exact():
    seen = influence(dataclasses.replace(BASE, windows=(4,), layers=2))
    distance = np.arange(24)[:, None] - np.arange(24)
    assert np.array_equal(seen, (distance >= 0) & (distance <= 2 * 3))


def test_an_encoder_sees_its_whole_segment():
    cfg = dataclasses.replace(VARIANTS["post"], causal=False, layers=1)
    segments = jnp.array([[1] * 10 + [2] * 14])
    same = np.asarray(segments[0])[:, None] == np.asarray(segments[0])
    assert np.array_equal(influence(cfg, segments), same)
    distance = np.abs(np.arange(24)[:, None] - np.arange(24))
    assert np.array_equal(influence(dataclasses.replace(cfg, windows=(4,))), distance < 4)


@pytest.mark.parametrize("change", [dict(parallel_residual=True), dict(norm_position="branch"), dict(norm_position="sandwich"), dict(norm_position="post"),
                                    dict(embedding_scale=2.0), dict(query_scale=3.0), dict(rotary_fraction=0.5), dict(rope_local_theta=5.0, windows=(50,)),
                                    dict(rope_scaling="linear", rope_factor=3.0),
                                    dict(rope_scaling="llama3", rope_factor=3.0, rope_original_context=12)], ids=str)
def test_each_knob_does_something(change):
    def apply(cfg):
        model, params = build(cfg)
        return model.apply(params, inputs(tokens()))[0]

    assert float(jnp.abs(apply(dataclasses.replace(BASE, **change)) - apply(BASE)).max()) > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_never_meet(name):
    segments = jnp.array([[1] * 7 + [2] * 9 + [3] * 3 + [0] * 5])
    seen = influence(dataclasses.replace(VARIANTS[name], attention="blocked"), segments)
    same = np.asarray(segments[0])[:, None] == np.asarray(segments[0])
    assert not (seen & ~same).any()


@pytest.mark.parametrize("name", VARIANTS)
def test_packing_and_padding_change_nothing(name):
    """Against rows of one document each, whose first tokens see nothing of what follows."""
    model, params = build(VARIANTS[name])
    rows = tokens()
    alone = model.apply(params, inputs(rows))[0]
    packed = jnp.stack([jnp.concatenate([rows[i, :9], rows[1 - i, :12], jnp.zeros(3, jnp.int32)]) for i in (0, 1)])
    found = model.apply(params, inputs(packed, jnp.array([[1] * 9 + [2] * 12 + [0] * 3] * 2)))[0]
    np.testing.assert_allclose(found[:, :9], alone[:, :9], atol=2e-5)
    np.testing.assert_allclose(found[:, 9:21], alone[::-1, :12], atol=2e-5)


@functools.cache
def gradient(cfg):
    model, params = decoder.build(cfg), build(cfg)[1]
    batch = inputs(tokens())
    return jax.jit(jax.value_and_grad(lambda p: jnp.square(model.head(p, model.apply(p, batch)[0])).mean()))(params)


HOW = {"remat": "dots", "attention": "blocked"}


@pytest.mark.parametrize("name, change", [("llama", {"remat": "full"}), ("moe", {"remat": "full"}), *((name, HOW) for name in VARIANTS)])
def test_how_it_is_computed_does_not_matter(name, change):
    cfg = dataclasses.replace(VARIANTS[name], attention="reference")
    one, other = gradient(cfg), gradient(dataclasses.replace(cfg, **change))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), one, other)


def through(cfg, rows, length):
    """Hidden states through all layers as training has them, a function of `(params, x)`, and the shapes of these."""
    place = attention.Tokens(jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), jnp.int32))
    angles = positions.rotary_angles(place.positions, positions.frequencies(cfg.head_size, 1e4)) if cfg.positions == "rotary" else None
    run = lambda params, x: stack.run(cfg, params, x, layers.Slots(place, place, angles, None, None), None, None, lambda layer: layer)[0]
    return run, jax.eval_shape(decoder.build(cfg).init, jax.random.key(0))["layers"], jax.ShapeDtypeStruct((rows, length, cfg.width), jnp.float32)


@pytest.mark.parametrize("name, arrays", [("gpt2", 12), ("llama", 15)])
def test_training_keeps_each_activation_once(name, arrays):
    """For the backward pass a layer keeps, in arrays of [B, T, D]: both norms' results before and after their scale, queries, keys and values (of 2 heads of 4
    in llama), attention's result, and the inputs of the activation (4 each)."""
    cfg = dataclasses.replace(VARIANTS[name], layers=3, feedforward=128, attention="blocked").filled()
    run, params, x = through(cfg, 2, 32)
    kept = jax.eval_shape(lambda params, x: jax.tree.leaves(jax.vjp(run, params, x)[1]), params, x)
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert sum(leaf.size for leaf in kept if leaf.shape not in weights) / (cfg.layers * x.size) < arrays + 0.5, [leaf.shape for leaf in kept]


def test_training_keeps_no_copies_of_weights():
    """They lie in their stacks already: of few tokens the program needs little beside its arguments and results."""
    cfg = dataclasses.replace(VARIANTS["gpt2"], layers=4, width=64, feedforward=256, attention="blocked").filled()
    run, params, x = through(cfg, 1, 8)
    program = jax.jit(jax.grad(lambda params, x: jnp.square(run(params, x)).sum())).lower(params, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.5 * 4 * trees.count(params)


def test_blocked_attention_with_uneven_blocks():
    key = jax.random.split(jax.random.key(0), 3)
    q, k, v = jax.random.normal(key[0], (2, 37, 4, 8)), jax.random.normal(key[1], (2, 37, 2, 8)), jax.random.normal(key[2], (2, 37, 2, 8))
    where = attention.Tokens(jnp.tile(jnp.arange(37), (2, 1)), jnp.ones((2, 37), jnp.int32))
    expected = jax.jit(lambda *qkv: attention.reference(*qkv, where, where, scale=0.3, window=jnp.int32(7)))(q, k, v)
    found = jax.jit(lambda *qkv: attention.blocked(*qkv, where, where, scale=0.3, window=jnp.int32(7), block=10))(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_equals_uncached(name):
    model, params = build(VARIANTS[name])
    batch = inputs(tokens())
    whole, _, _ = model.apply(params, batch)
    cache, parts = model.init_cache(2, 32), []
    for a, b in ((0, 9), (9, 10), (10, 19), *((t, t + 1) for t in range(19, 24))):
        hidden, cache, _ = model.apply(params, {k: v[:, a:b] for k, v in batch.items()}, cache=cache)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)


def test_ragged_prompts_continue_at_their_own_position():
    model, params = build(BASE)
    rows, lengths = tokens(), jnp.array([5, 8])
    whole, _, _ = model.apply(params, inputs(rows))
    padded = inputs(rows[:, :9], (jnp.arange(9) < lengths[:, None]).astype(jnp.int32))
    _, cache, _ = model.apply(params, padded, cache=model.init_cache(2, 32))
    for step in range(4):
        at = (lengths + step)[:, None]
        new = {"tokens": jnp.take_along_axis(rows, at, 1), "positions": at, "segments": jnp.ones((2, 1), jnp.int32)}
        hidden, cache, _ = model.apply(params, new, cache=cache)
        np.testing.assert_allclose(hidden[:, 0], jnp.take_along_axis(whole, at[..., None], 1)[:, 0], atol=2e-5)


def test_dropout_needs_a_key_and_keeps_the_mean():
    cfg = dataclasses.replace(BASE, dropout=0.5)
    model, params = build(cfg)
    batch = inputs(tokens())
    plain = model.apply(params, batch)[0]
    np.testing.assert_array_equal(plain, build(BASE)[0].apply(params, batch)[0])
    one, again, other = (model.apply(params, batch, key=jax.random.key(k))[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other) and not np.allclose(one, plain)


def test_bfloat16_computes_in_bfloat16_from_float32_parameters():
    model, params = build(dataclasses.replace(BASE, dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    hidden, _, _ = model.apply(params, inputs(tokens()))
    assert hidden.dtype == jnp.bfloat16 and model.head(params, hidden).dtype == jnp.float32
    exact, _, _ = build(BASE)[0].apply(params, inputs(tokens()))
    assert float(jnp.abs(hidden - exact).max() / jnp.abs(exact).max()) < 0.03


# Parameters as the papers, model cards and released safetensors give them; of Gemma 3 without the vision encoder.
PUBLISHED = {
    "gpt2_124m": 124_439_808, "gpt2_medium": 354_823_168, "gpt2_large": 774_030_080, "gpt2_xl": 1_557_611_200, "llama_150m": 149_840_640,
    "llama_1b": 1_100_048_384, "llama_7b": 6_738_415_616, "llama_8b": 8_030_261_248,
    "llama1_7b": 6_738_415_616, "llama1_13b": 13_015_864_320, "llama1_30b": 32_528_943_616, "llama1_65b": 65_285_660_672,
    "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192, "llama3_70b": 70_553_706_496, "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496, "llama3.1_405b": 405_853_388_800, "llama3.2_1b": 1_235_814_400, "llama3.2_3b": 3_212_749_824,
    "neox_20b": 20_554_567_680, "pythia_70m": 70_426_624, "pythia_160m": 162_322_944, "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632, "pythia_1.4b": 1_414_647_808, "pythia_2.8b": 2_775_208_960, "pythia_6.9b": 6_857_302_016,
    "pythia_12b": 11_846_072_320, "mistral_7b": 7_241_732_096, "mixtral_8x7b": 46_702_792_704, "qwen2_0.5b": 494_032_768,
    "qwen2_1.5b": 1_543_714_304, "qwen2_7b": 7_615_616_512, "qwen2_72b": 72_706_203_648, "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304, "qwen2.5_7b": 7_615_616_512, "qwen2.5_72b": 72_706_203_648, "minilm_l6": 22_713_216, "minilm_l12": 33_360_000,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_14b": 14_770_033_664, "qwen2.5_32b": 32_763_876_352, "qwen3_0.6b": 596_049_920, "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360, "qwen3_14b": 14_768_307_200, "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624, "qwen3_235b_a22b": 235_093_634_560, "olmo2_1b": 1_484_916_736, "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400, "olmo2_32b": 32_234_279_936, "gemma_2b": 2_506_172_416, "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984, "gemma2_27b": 27_227_128_320, "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952, "gemma3_4b": 3_880_263_168, "gemma3_12b": 11_766_034_176, "gemma3_27b": 27_009_346_304,
    "bert_base": 109_514_298, "bert_large": 335_174_458, "roberta_base": 124_697_433, "roberta_large": 355_412_057, "distilbert": 66_985_530,
    "t5_small": 60_506_624, "t5_base": 222_903_552, "t5_large": 737_668_096, "t5_3b": 2_851_598_336, "t5_11b": 11_307_321_344,
    "t5_v1_1_small": 76_961_152, "t5_v1_1_base": 247_577_856, "t5_v1_1_large": 783_150_080, "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_published_sizes(name):
    shapes = jax.eval_shape(kinds.build(presets.PRESETS[name]).init, jax.random.key(0))
    assert trees.count(shapes) == PUBLISHED[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_paths_are_public(name):
    model = decoder.build(VARIANTS[name])
    shapes = trees.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    golden = json.loads((GOLDEN / "parameter_paths.json").read_text())
    assert {path: list(leaf.shape) for path, leaf in shapes.items()} == golden[name], (
        "names or shapes of parameters changed: checkpoints people hold would no longer load; if that is really meant, refresh with "
        "tools/refresh_golden.py parameter_paths and write a migration")
    trees.match(model.axes, shapes, "axes")  # strict: nothing unnamed, no idle rule


@pytest.mark.parametrize("init, expected", [("normal", 0.02), ("truncated_normal", 0.02), ("xavier", (2 / (64 + 256)) ** 0.5), ("kaiming", (2 / 64) ** 0.5),
                                            ("lecun", (1 / 64) ** 0.5)])
def test_inits(init, expected):
    cfg = TransformerConfig(vocab_size=64, layers=8, width=64, heads=4, init=init)
    up, down = jax.jit(lambda key: [decoder.build(cfg).init(key)["layers"]["mlp"][name] for name in ("up", "down")])(jax.random.key(0))
    assert np.std(up) == pytest.approx(expected, rel=0.02)
    back = {"normal": 0.02, "truncated_normal": 0.02, "xavier": expected, "kaiming": (2 / 256) ** 0.5, "lecun": (1 / 256) ** 0.5}[init]
    assert np.std(down) == pytest.approx(back / 4, rel=0.02)
    if init == "truncated_normal":
        assert np.abs(up).max() <= 2 * 0.02 / 0.8796 + 1e-6


def test_vocabulary_too_small_is_refused():
    with pytest.raises(ValueError, match="smaller than the tokenizer's 300"):
        decoder.vocabulary(BASE, 300)
    assert decoder.vocabulary(dataclasses.replace(BASE, vocab_size=0), 300).vocab_size == 320
