"""The engine: what a request gets does not depend on who else is served, nothing leaks, and each way of ending is told."""

import dataclasses
import queue
import threading

import jax
import numpy as np
import pytest

from jaxlm.config import MeshConfig, TransformerConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.generate import Settings, generate
from jaxlm.models import decoder
from jaxlm.serve.engine import Ask, Busy, Engine, Limits
from jaxlm.sharding import make_mesh, params_shardings

BYTES = tokenizers.from_bytes(b'{"kind": "bytes"}\n')
CFG = TransformerConfig(vocab_size=320, context=512, layers=2, width=32, heads=4, kv_heads=2, windows=(0, 40))
LIMITS = Limits(rows=32, queue=60, page=16, chunk=64)
MODEL = decoder.build(CFG)


@pytest.fixture(scope="module")
def params():
    """Large random weights: with small ones every prompt has the same likeliest continuation."""
    return jax.jit(lambda key: jax.tree.map(lambda w: w * 8 if w.ndim > 1 else w, MODEL.init(key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def engine(params):
    engine = Engine(MODEL, params, CFG, BYTES, LIMITS)
    yield engine
    engine.close()
    assert engine.load()["pages_used"] == 0


def ask(prompt, max_tokens=12, **options):
    return Ask(prompt, max_tokens, **{"settings": Settings(temperature=0.0), **options})


def answers(engine, asks):
    """Ids, text, last piece and tokens of each."""
    queues = [queue.Queue() for _ in asks]
    rows, found = engine.submit(asks, [q.put for q in queues]), []
    for row, q in zip(rows, queues, strict=True):
        pieces = []
        while not (pieces and pieces[-1].finish):
            pieces.append(q.get(timeout=120))
        found.append((row.ids[len(row.ask.prompt):], "".join(p.text for p in pieces), pieces[-1], [t for p in pieces for t in p.tokens]))
    return found


def prompts(count, longest, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 128, random.integers(1, longest)).tolist() for _ in range(count)]


def test_greedy_is_what_generate_says(engine, params):
    given = [*prompts(4, 20), *prompts(2, 300, seed=1)]
    found = answers(engine, [ask(p) for p in given])
    want = generate(MODEL, params, given, max_tokens=12, context=512, settings=Settings(temperature=0.0), vocab_size=BYTES.vocab_size)
    assert [ids for ids, *_ in found] == want
    assert len({token for ids, *_ in found for token in ids}) > 10
    assert all(text == BYTES.decode(ids) and (last.finish, last.drawn_tokens) == ("length", 12) for ids, text, last, _ in found)


def test_alone_and_among_32_others(engine):
    draws = [Settings(temperature=1.0, top_k=(0, 20)[i % 2], top_p=(1.0, 0.9)[i % 2], seed=i) for i in range(8)]
    sampled = [ask(p, 24, settings=draw) for p, draw in zip(prompts(8, 200, seed=2), draws, strict=True)]
    others = [ask(p, 10 + i, settings=Settings(temperature=i % 2, seed=i), presence=0.5) for i, p in enumerate(prompts(32, 16, seed=3))]
    alone = [answers(engine, [one])[0][:2] for one in sampled]
    together = answers(engine, [*others[:16], *sampled, *others[16:]])[16:24]
    assert [found[:2] for found in together] == alone
    assert len({tuple(ids) for ids, _ in alone}) == 8
    again = dataclasses.replace(sampled[0], settings=dataclasses.replace(sampled[0].settings, seed=99))
    assert answers(engine, [again])[0][0] != alone[0][0]


def test_a_shared_beginning_is_computed_once_and_changes_nothing(engine):
    long = prompts(1, 2, seed=4)[0] + list(range(100, 220))
    first, second = answers(engine, [ask(long)])[0], answers(engine, [ask(long)])[0]
    assert first[0] == second[0] and first[2].cached_tokens == 0 and second[2].cached_tokens == 112  # 7 pages of 16: the last token is always fed
    other = answers(engine, [ask([*long[:60], *long[70:]])])[0]
    assert other[2].cached_tokens == 48
    turn = answers(engine, [ask([*long, *first[0], 65, 66])])[0]
    assert turn[2].cached_tokens == 128, "what was generated is known too"


def test_penalties_count_what_was_drawn(engine):
    [(plain, *_)] = answers(engine, [ask([65], 40)])
    assert len(set(plain)) < 40
    [(none_twice, *_)] = answers(engine, [ask([65], 40, presence=1e6)])
    assert len(set(none_twice)) == 40
    [(fewer, *_)] = answers(engine, [ask([65], 40, settings=Settings(temperature=0.0, repetition_penalty=1e6))])
    assert fewer != plain


def test_logprobs_are_the_models_own(engine, params):
    [(ids, _, last, tokens)] = answers(engine, [ask([1, 2, 3], 6, logprobs=True)])
    row = np.array([[1, 2, 3, *ids]], np.int32)
    hidden, _, _ = MODEL.apply(params, {"tokens": row, "positions": np.arange(9)[None], "segments": np.ones_like(row)})
    logits = np.asarray(MODEL.head(params, hidden))[0, 2:-1, :BYTES.vocab_size].astype(np.float64)
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [t.id for t in tokens] == ids
    for token, want in zip(tokens, shares, strict=True):
        np.testing.assert_allclose(token.logprob, want[token.id], atol=1e-4)
        assert len(token.top) == 20 and token.top[0][0] == want.argmax() and token.top[0][1] >= token.top[1][1]


def test_stop_texts_ids_cancels_and_timeouts(engine):
    [(ids, text, *_)] = answers(engine, [ask([9, 9], 30)])
    cut = answers(engine, [ask([9, 9], 30, stop=(text[3:5],))])[0]
    assert cut[1] == text[:text.find(text[3:5])] and cut[2].finish == "stop"
    by_id = answers(engine, [ask([9, 9], 30, stop_ids=frozenset({ids[2]}))])[0]
    assert by_id[0] == ids[:ids.index(ids[2])] and by_id[2].finish == "stop"
    q = queue.Queue()
    rows = engine.submit([ask([1], 500)], [q.put])
    q.get(timeout=60)
    engine.cancel(rows)
    while not (piece := q.get(timeout=60)).finish:
        pass
    assert piece.finish == "cancelled" and piece.drawn_tokens < 500
    assert answers(engine, [ask([1], 500, timeout=0.0)])[0][2].finish == "timeout"
    assert engine.load()["pages_used"] == 0


def test_what_cannot_be_served_is_refused(engine):
    for bad, message in ((ask([]), "no tokens"), (ask([1] * 512), "shorten it to 511"), (ask([1] * 500, 13), "ask for at most 12"),
                         (ask([1], 0), "max_tokens=0")):
        with pytest.raises(ValueError, match=message) as error:
            engine.submit([bad], [print])
        assert "\n" not in str(error.value)
    with pytest.raises(Busy, match="waiting"):
        engine.submit([ask([1])] * 200, [lambda piece: None] * 200)
    with pytest.raises(ValueError, match=r"holds \d+ tokens, fewer than the model's context of 512: give it .* GiB or more"):
        Engine(MODEL, None, CFG, BYTES, dataclasses.replace(LIMITS, cache_bytes=10_000))


def test_a_small_cache_makes_requests_wait_and_evicts(params):
    page_bytes = 2 * 2 * 16 * 2 * 8 * 4  # two sides, two layers, 16 tokens, two heads of 8, float32
    engine = Engine(MODEL, params, CFG, BYTES, dataclasses.replace(LIMITS, cache_bytes=34 * page_bytes))
    given = [ask(p, 100) for p in prompts(12, 64, seed=5)]
    found = answers(engine, given)
    assert [ids for ids, *_ in found] == [answers(engine, [one])[0][0] for one in given]
    engine.close()
    assert engine.load() == {"waiting": 0, "running": 0, "pages_used": 0, "pages": 33}


def test_closing_finishes_what_was_accepted_and_a_failure_ends_with_an_error(params, monkeypatch):
    engine, q = Engine(MODEL, params, CFG, BYTES, LIMITS), queue.Queue()
    engine.submit([ask([i], 10) for i in range(50)], [q.put] * 50)
    closing = threading.Thread(target=engine.close, args=(60,))
    closing.start()
    closing.join(90)
    assert not closing.is_alive()
    pieces = [q.get_nowait() for _ in range(q.qsize())]
    assert [p.finish for p in pieces if p.finish] == ["length"] * 50
    with pytest.raises(Busy, match="shutting down"):
        engine.submit([ask([1])], [q.put])

    engine, step = Engine(MODEL, params, CFG, BYTES, LIMITS), Engine._step
    monkeypatch.setattr(Engine, "_step", lambda *args: 1 / 0)
    assert answers(engine, [ask([1])])[0][2].finish == "error" and "ZeroDivisionError" in engine.stats.error
    monkeypatch.setattr(Engine, "_step", step)
    assert answers(engine, [ask([1])])[0][2].finish == "length"
    engine.close()


def test_a_mesh_and_int8(params, engine):
    given = [ask(p, 4) for p in prompts(8, 16, seed=6)]
    want = [ids for ids, *_ in answers(engine, given)]
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    spread = Engine(MODEL, jax.device_put(params, params_shardings(mesh, MODEL.axes, jax.eval_shape(MODEL.init, jax.random.key(0)))), CFG, BYTES, LIMITS)
    assert spread._storage[0]["k"].sharding.shard_shape(spread._storage[0]["k"].shape)[2] == 1
    assert [ids for ids, *_ in answers(spread, given)] == want
    assert spread._storage[0]["k"].sharding.shard_shape(spread._storage[0]["k"].shape)[2] == 1
    spread.close()
    small = Engine(MODEL, params, CFG, BYTES, dataclasses.replace(LIMITS, int8_cache=True, int8_weights=True))
    assert small._storage[0]["k"].dtype == small._params["layers"][1]["attn"]["q"]["int8"].dtype == np.int8
    [(ids, _, _, tokens)], [(exact, _, _, true)] = (answers(e, [dataclasses.replace(given[0], logprobs=True)]) for e in (small, engine))
    assert ids[0] == exact[0] and 0 < abs(tokens[0].logprob - true[0].logprob) < 0.5
    small.close()


def test_short_prompts_are_fed_together(engine, monkeypatch):
    step, fed = Engine._step, []
    monkeypatch.setattr(Engine, "_step", lambda self, rows, members, batch: (fed.append((rows.tokens.shape[1], len(members))), step(self, rows, members, batch))[1])
    answers(engine, [ask(p, 4) for p in prompts(4, 20, seed=8)])
    assert max(members for width, members in fed if width > 1) > 1, fed
