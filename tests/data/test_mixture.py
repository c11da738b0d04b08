"""The order of sources: shares to within one row after any number of rows, known without looking back."""

from fractions import Fraction

import numpy as np
import pytest

from jaxlm.data import mixture


@pytest.mark.parametrize("shares", [[1], [3, 1], [1, 1, 1], [Fraction("0.7"), Fraction("0.2"), Fraction("0.1")], [5, 3, 2, 2, 1, 1, 1], [97, 2, 1],
                                    [1] * 13, [Fraction(1, 3), Fraction(1, 7), Fraction(11, 21)], [1000, 1, 1, 1, 1]])
def test_any_prefix_has_its_shares_to_within_one_row(shares):
    order = mixture.turns(shares)
    rows = 3 * len(order.source) + 5
    total, had = sum(shares), [0] * len(shares)
    for row in range(rows):
        assert mixture.rows_until(order, row).tolist() == had
        source, number = mixture.place(order, row)
        assert number == had[source]
        had[source] += 1
        for s, share in enumerate(shares):
            assert abs(had[s] - (row + 1) * Fraction(share) / total) < 1


def test_shares_without_a_short_table_are_rounded(monkeypatch):
    monkeypatch.setattr(mixture, "LONGEST", 4096)
    shares = [Fraction(str(x)) for x in np.random.default_rng(0).random(9)] + [Fraction(1, 10**9)]
    order = mixture.turns(shares)
    assert len(order.source) == sum(order.counts) and abs(len(order.source) - 4096) <= 1 and order.counts[-1] == 1
    for count, share in zip(order.counts, shares):
        assert abs(count / len(order.source) - share / sum(shares)) < 2 / 4096
    had = np.zeros(10)
    for row, s in enumerate(order.source):
        had[s] += 1
        assert np.abs(had - (row + 1) * order.counts / len(order.source)).max() < 1


def test_the_table_is_smallest():
    assert mixture.turns([20, 10, 10]).counts.tolist() == [2, 1, 1]
    assert mixture.turns([Fraction("0.5"), Fraction("1.5")]).source.tolist() in ([1, 0, 1, 1], [1, 1, 0, 1])
