"""Sampling against a plain numpy reference, and by the distribution of what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import sampling
from jaxlm.ops.sampling import penalise, sample

V = 12


def allowed(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities after all filters, written the slow way."""
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    probabilities = np.exp((logits - logits.max()) / temperature)
    probabilities /= probabilities.sum()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = [i for i in order if probabilities[i] >= min_p * probabilities.max()]
    kept = kept[:top_k] if top_k else kept
    total, reached, nucleus = sum(probabilities[i] for i in kept), 0.0, []
    for i in kept:
        if reached < top_p or top_p == 1:
            nucleus.append(i)
        reached += probabilities[i] / total
    out = np.zeros(len(logits))
    out[nucleus] = probabilities[nucleus]
    return out / out.sum()


CASES = [dict(), dict(temperature=0.5), dict(temperature=2.0), dict(top_k=1), dict(top_k=4), dict(top_k=99), dict(top_p=0.6), dict(top_p=1e-6), dict(min_p=0.2),
         dict(min_p=1.0), dict(temperature=0.0, top_k=3), dict(temperature=1.5, top_k=6, top_p=0.8, min_p=0.1), dict(temperature=1e-9)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_distribution_is_the_references(case):
    logits, draws = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32), 20_000
    want = allowed(logits.astype(np.float64), **case)
    got = sample(jnp.tile(logits, (draws, 1)), jax.random.split(jax.random.key(1), draws), **{"temperature": 1.0, **case})
    counts = np.bincount(np.asarray(got), minlength=V)
    assert not counts[want == 0].any(), "a token was drawn that a filter excludes"
    spread = np.sqrt(want * (1 - want) / draws)
    assert (np.abs(counts / draws - want) <= 5 * spread + 1e-12).all()


def test_settings_may_differ_from_row_to_row():
    logits = np.random.default_rng(1).normal(0, 1.5, (len(CASES), V)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), len(CASES))
    cases = [{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **case} for case in CASES]
    together = sample(logits, keys, **{name: np.array([case[name] for case in cases]) for name in cases[0]})
    # A row alone takes the branch without sorting where its own settings allow it; beside others it does not.
    alone = [sample(logits[i:i + 1], keys[i:i + 1], **case)[0] for i, case in enumerate(cases)]
    assert np.array_equal(together, alone)


def test_large_vocabularies_are_cut_at_the_same_token():
    logits = np.random.default_rng(4).normal(0, 3, 20_000).astype(np.float32)
    logits[::7] = logits[3]  # many ties, some of which must go
    kept = lambda scaled: np.flatnonzero(np.isfinite(scaled[0])).tolist()
    scaled = jnp.array(logits - logits.max())[None]
    for k in (1, 40, 9000, 10_000, 19_999):
        assert kept(sampling._likeliest(scaled, jnp.array([[k]]))) == np.flatnonzero(allowed(logits, top_k=k)).tolist()
    for p in (0.1, 0.5, 0.9, 0.999):
        got, want = kept(sampling._nucleus(scaled, jnp.array([[p]]))), np.flatnonzero(allowed(logits.astype(np.float64), top_p=p)).tolist()
        assert len(set(got) ^ set(want)) <= 1 + 2e-4 * len(want)  # sums in float32 against float64


def test_ties_keep_no_more_than_needed_and_impossible_tokens_are_never_drawn():
    logits = np.zeros((5000, 8), np.float32)
    logits[:, 0] = -np.inf
    drawn = np.asarray(sample(logits, jax.random.split(jax.random.key(3), 5000), temperature=1.0, top_k=3))
    assert set(drawn.tolist()) == {1, 2, 3}
    drawn = np.asarray(sample(logits, jax.random.split(jax.random.key(3), 5000), temperature=1.0, top_p=0.45))
    assert set(drawn.tolist()) == {1, 2, 3, 4}  # of seven equal ones, three do not reach 0.45
    drawn = np.asarray(sample(logits, jax.random.split(jax.random.key(3), 5000), temperature=5.0))
    assert set(drawn.tolist()) == set(range(1, 8))


def test_works_jitted_and_in_bfloat16_with_traced_settings():
    logits = jnp.arange(V, dtype=jnp.bfloat16)[None]
    draw = jax.jit(lambda t, k, p: sample(logits, jax.random.split(jax.random.key(0), 1), temperature=t, top_k=k, top_p=p))
    assert draw(0.0, 0, 1.0)[0] == V - 1 and draw(1.0, 1, 0.5)[0] == V - 1 and draw(1.0, 1, 0.5).dtype == jnp.int32


def test_penalty_moves_seen_tokens_down_on_both_sides_of_zero():
    logits = np.array([[2.0, -2.0, 2.0, -2.0, -np.inf, 0.0]], np.float32)
    seen = np.array([[True, True, False, False, True, True]])
    want = [[1.0, -4.0, 2.0, -2.0, -np.inf, 0.0]]
    assert np.array_equal(penalise(logits, seen, 2.0), want)
    assert np.array_equal(penalise(logits, seen.astype(np.int32) * 7, np.array([2.0])), want)
    assert np.array_equal(penalise(logits, seen, 1.0), logits)
