"""Intervals and tests against what they promise, and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxlm import metrics
from jaxlm.evaluate import uncertainty


def test_resampled_sums_are_sums_of_drawn_documents():
    totals = np.array([[1, 10], [2, 20], [4, 40], [8, 80]])
    sums = uncertainty.resample(totals, 500)
    assert sums.shape == (500, 2) and np.array_equal(sums[:, 1], 10 * sums[:, 0]), "columns must come from the same draw"
    assert np.array_equal(sums, uncertainty.resample(totals, 500)) and not np.array_equal(sums, uncertainty.resample(totals, 500, seed=1))
    assert sums[:, 0].min() >= 4 and sums[:, 0].max() <= 32 and abs(sums[:, 0].mean() - 15) < 1
    assert (uncertainty.resample(np.ones((7, 1)), 50) == 7).all(), "as many are drawn as there are"


def test_large_corpora_are_drawn_in_pieces():
    sums = uncertainty.resample(np.ones((2**21 + 3, 1)), 5)
    assert sums.shape == (5, 1) and (sums == 2**21 + 3).all()


def test_the_interval_has_the_width_that_theory_gives():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = uncertainty.interval(metrics.ratio(*uncertainty.resample(np.stack([values, np.ones(400)], 1), 4000).T))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05) and low < values.mean() < high


def test_the_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        weight = generator.integers(5, 50, 60)  # tokens per document
        nll = weight * generator.normal(3, 0.5, 60)
        low, high = uncertainty.interval(metrics.ratio(*uncertainty.resample(np.stack([nll, weight], 1), 400, seed).T))
        hits += low <= 3 <= high
    assert 0.89 < hits / 300 < 0.99


def test_draws_without_weight_do_not_spoil_the_interval():
    assert uncertainty.interval(np.array([math.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert all(map(math.isnan, uncertainty.interval(np.array([math.nan]))))


def test_the_bootstrap_of_any_statistic_agrees_with_the_one_of_sums():
    values = np.random.default_rng(0).normal(5, 2, 200)
    any_low, any_high = uncertainty.bootstrap(values, np.mean, 1, resamples=4000)
    low, high = uncertainty.interval(uncertainty.resample(values[:, None], 4000, 2)[:, 0] / 200)
    assert any_low == pytest.approx(low, abs=0.02) and any_high == pytest.approx(high, abs=0.02)
    assert uncertainty.bootstrap(values, np.mean, 1, resamples=50) == uncertainty.bootstrap(values, np.mean, 1, resamples=50)
    pairs = np.stack([values, 2 * values], 1)
    assert uncertainty.bootstrap(pairs, lambda drawn: float(drawn[:, 1].sum() / drawn[:, 0].sum())) == (2, 2), "columns must stay together"
    assert all(map(math.isnan, uncertainty.bootstrap(np.zeros(0), np.mean)))


@pytest.mark.parametrize("successes, trials", [(0, 1), (0, 20), (7, 20), (20, 20), (1, 1), (431, 1000)])
def test_exact_intervals_are_those_of_scipy(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, "exact")
    assert uncertainty.exact(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_exact_intervals_at_the_edges():
    assert uncertainty.exact(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="21 successes of 20 trials"):
        uncertainty.exact(21, 20)


def test_equal_models_are_seldom_called_different():
    """Equally good models that err on different items: at most 5 % of verdicts are wrong, for right-or-wrong values, for real ones, and for a statistic."""
    generator, alarms = np.random.default_rng(0), np.zeros(3)
    for _ in range(400):
        ease = generator.uniform(0.2, 0.9, 60)
        a, b = (generator.random(60) < ease).astype(float), (generator.random(60) < ease).astype(float)
        alarms[0] += uncertainty.paired(a, b, resamples=99).verdict != "cannot tell"
        alarms[1] += uncertainty.paired(generator.standard_t(3, 40), generator.standard_t(3, 40), resamples=199).verdict != "cannot tell"
    for _ in range(100):
        a, b = generator.normal(0, 1, (2, 30, 2))
        alarms[2] += uncertainty.paired(a, b, lambda rows: rows.max(), resamples=59).verdict != "cannot tell"
    assert alarms[0] / 400 <= 0.05 and alarms[1] / 400 <= 0.075 and alarms[2] / 100 <= 0.12, alarms  # the last two: 5 % and chance (99.5 % bounds)
    same = uncertainty.paired(a[:, 0], a[:, 0])
    assert (same.verdict, same.p, same.difference, same.needed) == ("cannot tell", 1.0, 0.0, None)


def test_right_or_wrong_is_mcnemars_exact_test():
    a, b = np.array([1] * 9 + [0] * 2 + [1] * 30), np.array([0] * 9 + [1] * 2 + [1] * 30)
    found = uncertainty.paired(a, b)
    assert found.p == pytest.approx(stats.binomtest(9, 11).pvalue) and found.difference == pytest.approx(7 / 41) and found.verdict == "cannot tell"
    assert uncertainty.paired(np.tile(a, 2), np.tile(b, 2)).verdict == "better" and uncertainty.paired(np.tile(b, 2), np.tile(a, 2)).verdict == "worse"
    assert uncertainty.paired(np.tile(a, 2), np.tile(b, 2), higher_is_better=False).verdict == "worse"


def test_swapping_agrees_with_scipy_and_between_its_two_ways():
    generator = np.random.default_rng(2)
    a = generator.normal(0, 1, 30)
    b = a + generator.normal(0.3, 1, 30)
    expected = stats.permutation_test((a - b,), np.mean, permutation_type="samples", n_resamples=20000, rng=1).pvalue
    assert uncertainty.paired(a, b, resamples=20000).p == pytest.approx(expected, abs=0.01)
    assert uncertainty.paired(a, b, lambda values: float(values.mean())).p == pytest.approx(expected, abs=0.03)


def test_the_number_of_items_that_would_be_needed_is_enough():
    generator = np.random.default_rng(3)
    draw = lambda n: generator.normal(0.2, 1, n)
    needed = np.median([uncertainty.paired(draw(400), np.zeros(400), resamples=99).needed for _ in range(40)])
    assert needed == pytest.approx((1.95996 + 0.84162)**2 / 0.2**2, rel=0.25)
    found = np.mean([uncertainty.paired(draw(196), np.zeros(196), resamples=199).verdict == "better" for _ in range(150)])
    assert 0.7 < found < 0.9


def test_holm():
    assert uncertainty.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) and uncertainty.holm([]) == []
    one = uncertainty.Comparison("better", 0.1, 0, 0.2, 0.03, 10, 5)
    assert [c.verdict for c in uncertainty.decided([one, one._replace(p=0.001, difference=-0.1)], higher_is_better=[True, False])] == ["better", "better"]
    assert [c.verdict for c in uncertainty.decided([one, one], higher_is_better=[True, True])] == ["cannot tell"] * 2


def test_what_cannot_be_compared():
    for a, b, words in ((np.zeros(2), np.zeros(3), "same items"), (np.zeros(0), np.zeros(0), "same items"), (np.array([math.nan]), np.zeros(1), "NaN"),
                        (np.zeros((2, 2)), np.zeros((2, 2)), "statistic")):
        with pytest.raises(ValueError, match=words):
            uncertainty.paired(a, b)
