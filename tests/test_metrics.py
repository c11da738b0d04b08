"""Figures against their definitions, and intervals against what they promise."""

import math

import numpy as np
import pytest

from jaxlm import metrics


def test_figures_by_hand():
    assert metrics.means({"loss": (6.0, 4.0), "none": (0.0, 0.0)})["loss"] == 1.5
    assert math.isnan(metrics.means({"none": (0.0, 0.0)})["none"])
    assert metrics.perplexity(math.log(50)) == pytest.approx(50) and metrics.perplexity(1000.0) == math.inf
    assert metrics.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)  # a uniform guess among 256 tokens of 4 bytes each
    values = metrics.ratio([1.0, 2.0], [2.0, 0.0])
    assert values[0] == 0.5 and math.isnan(values[1])
    assert metrics.bits_per_byte(np.ones(2), np.array([1, 2])).tolist() == pytest.approx([1 / math.log(2), 0.5 / math.log(2)])


def test_resampled_sums_are_sums_of_drawn_documents():
    totals = np.array([[1, 10], [2, 20], [4, 40], [8, 80]])
    sums = metrics.resample(totals, 500)
    assert sums.shape == (500, 2) and np.array_equal(sums[:, 1], 10 * sums[:, 0]), "columns must come from the same draw"
    assert np.array_equal(sums, metrics.resample(totals, 500)) and not np.array_equal(sums, metrics.resample(totals, 500, seed=1))
    assert sums[:, 0].min() >= 4 and sums[:, 0].max() <= 32 and abs(sums[:, 0].mean() - 15) < 1
    assert (metrics.resample(np.ones((7, 1)), 50) == 7).all(), "as many are drawn as there are"


def test_large_corpora_are_drawn_in_pieces():
    sums = metrics.resample(np.ones((2**21 + 3, 1)), 5)
    assert sums.shape == (5, 1) and (sums == 2**21 + 3).all()


def test_the_interval_has_the_width_that_theory_gives():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = metrics.interval(metrics.ratio(*metrics.resample(np.stack([values, np.ones(400)], 1), 4000).T))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05) and low < values.mean() < high


def test_the_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        weight = generator.integers(5, 50, 60)  # tokens per document
        nll = weight * generator.normal(3, 0.5, 60)
        low, high = metrics.interval(metrics.ratio(*metrics.resample(np.stack([nll, weight], 1), 400, seed).T))
        hits += low <= 3 <= high
    assert 0.89 < hits / 300 < 0.99


def test_draws_without_weight_do_not_spoil_the_interval():
    assert metrics.interval(np.array([math.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert all(map(math.isnan, metrics.interval(np.array([math.nan]))))
