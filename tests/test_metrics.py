"""Figures against their definitions."""

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
