"""Generation equals the plain forward pass, row by row, whatever else is in the batch."""

import dataclasses
import functools
import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from jaxlm import generate as generation
from jaxlm.config import MeshConfig, TransformerConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.generate import Settings, bucket, complete, generate, release
from jaxlm.models import decoder
from jaxlm.ops import sampling
from jaxlm.sharding import make_mesh, params_shardings

BASE = TransformerConfig(vocab_size=97, context=64, layers=1, width=32, heads=4, kv_heads=2)
VARIANTS = {
    "rotary_gqa": BASE,
    "learned_layernorm": dataclasses.replace(BASE, kv_heads=4, positions="learned", norm="layer", bias=True, gated=False, activation="gelu", tied=False),
    "windows": dataclasses.replace(BASE, layers=2, windows=(5, 0), kv_heads=1, qk_norm="head"),
    "softcaps": dataclasses.replace(BASE, attention_softcap=5.0, final_softcap=3.0, head_size=16),
}
PROMPTS = [[1, 5, 9], [2], list(range(3, 40)), [7] * 16, [11, 13]]
GREEDY = Settings(temperature=0.0)


one_model = functools.cache(decoder.build)  # and one compilation for each shape


def build(cfg, scale=8.0):
    """Large random weights: with small ones every prompt has the same likeliest continuation."""
    model = one_model(cfg)
    return model, jax.jit(lambda key: jax.tree.map(lambda w: w * scale if w.ndim > 1 else w, model.init(key)))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def uncached(model, params, tokens):
    """Logits [64, V] after each token of one row `[64]`, padded with -1, without a cache."""
    inside = (tokens >= 0)[None]
    inputs = {"tokens": jnp.maximum(tokens, 0)[None], "positions": jnp.arange(64, dtype=jnp.int32)[None], "segments": inside.astype(jnp.int32)}
    return model.head(params, model.apply(params, inputs)[0][0])


def logits_after(model, params, ids):
    return np.asarray(uncached(model, params, jnp.array([*ids, *[-1] * (64 - len(ids))], jnp.int32)))[:len(ids)]


def check_greedy(model, params, prompt, continuation, vocab=None):
    """Each token is the likeliest after all that came before it, hence the continuation is what step by step decoding gives."""
    want = logits_after(model, params, [*prompt, *continuation])[:, :vocab].argmax(-1)
    assert continuation == want[len(prompt) - 1:-1].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_decoding_is_the_uncached_forward_pass(name):
    model, params = build(VARIANTS[name])
    got = generate(model, params, PROMPTS, max_tokens=12, context=64, settings=GREEDY)
    for prompt, row in zip(PROMPTS, got, strict=True):
        assert len(row) == 12
        check_greedy(model, params, prompt, row)
    assert len({token for row in got for token in row}) > 10, "the test is empty when every row repeats itself"


def test_padding_of_the_vocabulary_is_never_drawn():
    model, params = build(BASE)
    got = generate(model, params, PROMPTS, max_tokens=8, context=64, settings=GREEDY, vocab_size=40)
    for prompt, row in zip(PROMPTS, got, strict=True):
        check_greedy(model, params, prompt, row, vocab=40)
    hot = generate(model, params, PROMPTS, max_tokens=8, context=64, settings=Settings(temperature=50.0, top_p=1.0), vocab_size=40)
    assert max(map(max, hot)) < 40


def test_a_row_does_not_depend_on_its_neighbours():
    model, params = build(BASE, scale=2.0)
    settings = Settings(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=5)
    run = lambda prompts: generate(model, params, prompts, max_tokens=10, context=64, settings=settings)
    a, b, long = [3, 4], [5, 6, 7], list(range(50))
    both = run([a, b])
    assert both[0] == run([a])[0] == run([a, long])[0] and both[1] == run([long, b])[1] == run([b, b])[1]
    assert run([b, b])[0] != run([b, b])[1], "rows of one prompt must draw differently"
    assert both != generate(model, params, [a, b], max_tokens=10, context=64, settings=dataclasses.replace(settings, seed=6))
    assert both == run([a, b])


def test_the_repetition_penalty_counts_the_prompt_and_what_was_drawn():
    model, params = build(BASE)
    prompt, ids = [1, 5, 9, 9], [1, 5, 9, 9]
    for _ in range(10):
        seen = np.zeros((1, 97), bool)
        seen[0, ids] = True
        ids.append(int(sampling.penalise(logits_after(model, params, ids)[-1:], seen, 1.5).argmax()))
    got = generate(model, params, [prompt, [2]], max_tokens=10, context=64, settings=Settings(temperature=0.0, repetition_penalty=1.5))
    assert got[0] == ids[4:] != generate(model, params, [prompt], max_tokens=10, context=64, settings=GREEDY)[0]


def test_rows_stop_at_their_own_stop_id_callback_or_limit():
    model, params = build(BASE)
    free = generate(model, params, PROMPTS, max_tokens=12, context=64, settings=GREEDY)
    stop = free[0][4]
    calls = []
    got = generate(model, params, PROMPTS, max_tokens=12, context=64, settings=GREEDY, stop_ids={stop},
                   on_token=lambda row, token: calls.append((row, token)) or (row == 2 and sum(r == 2 for r, _ in calls) == 3))
    assert sorted(row for row, token in calls if token is None) == list(range(len(PROMPTS))), "each row ends once"
    want = [list(itertools.takewhile(lambda t: t != stop, row)) for row in free]
    want[2] = want[2][:3]
    assert got == want and len(got[0]) <= 4
    assert [[t for r, t in calls if r == row] for row in range(len(PROMPTS))] == [[*row, None] for row in got]


def test_one_compilation_serves_a_bucket_of_lengths_and_all_settings():
    model, params = build(BASE)
    _prefill, _step = generation._prefill, generation._step
    generate(model, params, [[1] * 3], max_tokens=10, context=64, settings=GREEDY)
    sizes = _prefill._cache_size(), _step._cache_size()
    generate(model, params, [[1] * 9], max_tokens=16, context=64, settings=Settings(top_k=3, top_p=0.5, seed=4, repetition_penalty=1.1))
    assert (_prefill._cache_size(), _step._cache_size()) == sizes
    assert [bucket(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]


def test_the_cache_is_updated_in_place(monkeypatch):
    step, given = generation._step, []
    monkeypatch.setattr(generation, "_step", lambda *args: given.append(args[3].cache["layers"][1]["k"]) or step(*args))
    model, params = build(VARIANTS["windows"])
    generate(model, params, PROMPTS, max_tokens=5, context=64)
    assert len(given) == 4 and all(k.is_deleted() for k in given)


def test_sharded_parameters_and_batches_that_do_not_divide(monkeypatch):
    step, shares = generation._step, set()
    monkeypatch.setattr(generation, "_step", lambda *args: shares.add((k := args[3].cache["layers"][0]["k"]).sharding.shard_shape(k.shape)) or step(*args))
    cfg = dataclasses.replace(BASE, vocab_size=96)
    model, params = build(cfg)
    sampled = Settings(top_k=10, top_p=0.9, seed=1)
    want = generate(model, params, PROMPTS[:3], max_tokens=8, context=64, settings=sampled)
    shares.clear()
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    spread = jax.device_put(params, params_shardings(mesh, model.axes, jax.eval_shape(model.init, jax.random.key(0))))
    assert generate(model, spread, PROMPTS[:3], max_tokens=8, context=64, settings=sampled) == want
    with jax.set_mesh(mesh):  # as inside the training loop
        assert generate(model, spread, PROMPTS[:3], max_tokens=8, context=64, settings=sampled) == want
    assert shares == {(2, 1, 128, 8)}, "each device keeps its rows and heads of the cache only"


@pytest.mark.parametrize("prompt, max_tokens, message", [
    (64, 5, "prompt 1 has 64 tokens and the model's context holds 64: shorten it to 63 or fewer"),
    (60, 5, "with max_tokens=5 that makes 65, and the model's context holds 64: ask for at most 4 tokens"),
    (0, 5, "prompt 1 has no tokens"),
    (5, 0, "max_tokens=0 must be at least 1"),
])
def test_prompts_that_leave_no_room_are_refused_in_one_line(prompt, max_tokens, message):
    model, params = build(BASE)
    with pytest.raises(ValueError, match=message) as error:
        generate(model, params, [[1], [1] * prompt], max_tokens=max_tokens, context=64)
    assert "\n" not in str(error.value)


def test_the_last_slot_of_the_context_can_be_used():
    for name in ("rotary_gqa", "learned_layernorm"):
        model, params = build(VARIANTS[name])
        prompts = [list(range(60)), *[[1]] * 4]
        for prompt, row in zip(prompts, generate(model, params, prompts, max_tokens=4, context=64, settings=GREEDY), strict=True):
            check_greedy(model, params, prompt, row)


@pytest.mark.parametrize("wrong", [dict(temperature=-1), dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_k=-1), dict(top_p=0), dict(top_p=1.5),
                                   dict(min_p=-0.1), dict(min_p=2), dict(repetition_penalty=0), dict(seed=-1), dict(seed=2**32)])
def test_impossible_settings_are_refused_in_one_line(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}=[^\n]*must be[^\n]*$"):
        Settings(**wrong)


# --- text ---

BYTES = tokenizers.from_bytes(b'{"kind": "bytes"}\n')


@functools.cache
def puppet():
    """A model that says the ids in `params` whatever it is asked: its logits point at the one for the position. The prompt must be empty (bos alone)."""
    model, _ = build(TransformerConfig(vocab_size=320, context=256, layers=1, width=8, heads=1))
    apply = lambda params, inputs, *, cache=None: (inputs["positions"][..., None], {**cache, "length": cache["length"] + inputs["tokens"].shape[1]}, {})
    says = lambda params: lambda hidden: jax.nn.one_hot(params["says"][hidden[..., 0]], 320) * 100.0
    return model._replace(apply=apply, unstack=lambda params: params, projection=says)


def say(text, stop=(), max_tokens=24):
    ids = [*(text.encode() if isinstance(text, str) else text)]
    params = {"says": np.array(ids + [BYTES.eos] * (64 - len(ids)), np.int32)}
    chunks = []
    [out] = complete(puppet(), params, BYTES, [""], max_tokens=max_tokens, context=256, settings=GREEDY, stop=stop,
                     on_text=lambda row, text: chunks.append(text))
    assert chunks.pop() is None and "".join(chunks) == out
    return out, chunks


def test_text_streams_whole_characters_only():
    out, chunks = say("a\u00e9\u20ac\U0001f600z")
    assert out == "a\u00e9\u20ac\U0001f600z" and chunks == list(out)
    assert say("ab\u20ac", max_tokens=4)[0] == "ab\ufffd"  # cut inside a character
    assert say(b"a\xffb")[0] == "a\ufffdb"


def test_stop_texts_are_cut_and_held_back():
    assert say("one\n\ntwo", ["\n\n"]) == ("one", ["o", "n", "e"])
    out, chunks = say("a\nb\n", ["\n\n"])
    assert (out, chunks) == ("a\nb\n", ["a", "\nb", "\n"])  # held, then released: by what follows, and by the end
    assert say("aab", ["ab"])[0] == "a"
    assert say("The END.", ["END", "nd"])[0] == "The "
    assert say("x\u20acy", ["\u20ac"])[0] == "x"
    assert say("abc", ["abc", "b"])[0] == "a"  # what is complete first counts
    with pytest.raises(ValueError, match="stop text is empty"):
        say("abc", [""])


def test_release_does_not_depend_on_how_text_arrives():
    random = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(random.choice(list("abc"), 12))
        stop = ["".join(random.choice(list("abc"), random.integers(1, 5))) for _ in range(random.integers(1, 4))]
        results = set()
        for _ in range(4):
            out, held, found, rest = "", "", False, text
            while rest and not found:
                size = int(random.integers(1, 6))
                ready, held, found = release(held + rest[:size], stop)
                out, rest = out + ready, rest[size:]
                assert not any(s in out for s in stop)
            results.add(out if found else out + held)
        assert len(results) == 1
        ends = [text.find(s) + len(s) for s in stop if s in text]
        assert results == {text} if not ends else len(results.pop()) < min(ends)


def test_a_tokenizer_that_puts_a_space_before_texts_keeps_the_one_of_the_continuation():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["the dog", "a dog", "the cat"] * 20), model_writer=file, vocab_size=20, model_type="bpe",
                                             minloglevel=2)
    tokenizer = tokenizers.from_bytes(file.getvalue())
    [dog] = tokenizer.encode("dog")
    params = {"says": np.full(64, dog, np.int32)}
    options = dict(max_tokens=2, context=64, settings=GREEDY)
    assert complete(puppet(), params, tokenizer, ["the", ""], **options) == [" dog dog", "dog dog"]


def test_complete_begins_with_bos_and_follows_the_prompt():
    model, params = build(TransformerConfig(vocab_size=320, context=64, layers=1, width=32, heads=4))
    ids = [[BYTES.bos, *b"hello"], [BYTES.bos]]
    want = generate(model, params, ids, max_tokens=10, context=64, settings=GREEDY, stop_ids={BYTES.eos}, vocab_size=BYTES.vocab_size)
    got = complete(model, params, BYTES, ["hello", ""], max_tokens=10, context=64, settings=GREEDY)
    assert got == [BYTES.decode(row) for row in want] and got[0] != got[1]
