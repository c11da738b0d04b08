"""Batches of encoder-decoders: pairs in segments, and the spans that are left out."""

import numpy as np
import pytest

from jaxlm.data import tasks

SENTINELS = range(1099, 999, -1)


def restored(read, said):
    """The text from both sides: what follows each sentinel on the second is put in its place on the first."""
    answers = {}
    for token in said[:-1].tolist():
        if token >= 1000:
            answers[token] = current = []
        else:
            current.append(token)
    return [token for item in read[:-1].tolist() for token in (answers[item] if item >= 1000 else [item])]


@pytest.mark.parametrize("size", [2, 3, 7, 20, 100, 511])
def test_nothing_is_lost(size):
    text = np.arange(2, 2 + size)
    for seed in range(20):
        read, said = tasks.span_corruption(text, SENTINELS, 1, seed)
        assert read[-1] == said[-1] == 1 and restored(read, said) == text.tolist()
        marks = [token for token in read.tolist() if token >= 1000]
        assert marks == list(SENTINELS[:len(marks)]) and said[0] == 1099 and read[0] < 1000
        assert len(said) - 1 - len(marks) == max(round(0.15 * size), 1)
        assert len(marks) == max(round(round(0.15 * size) / 3), 1)


def test_seed_decides():
    text = np.arange(2, 202)
    same, other = (tasks.span_corruption(text, SENTINELS, 1, seed)[0] for seed in (5, 6))
    np.testing.assert_array_equal(same, tasks.span_corruption(text, SENTINELS, 1, 5)[0])
    assert same.tolist() != other.tolist()


def test_impossible_spans():
    with pytest.raises(ValueError, match="no span to leave out"):
        tasks.span_corruption([3], SENTINELS, 1, 0)
    with pytest.raises(ValueError, match="5 spans, and there are 2 sentinels"):
        tasks.span_corruption(range(2, 102), [1099, 1098], 1, 0)


def test_pairs_in_rows():
    batch = tasks.seq2seq_batch([[([5, 6, 1], [7, 1]), ([8, 1], [9, 4, 1])], []], 6, 6, start=0)
    assert batch["encoder_tokens"].tolist() == [[5, 6, 1, 8, 1, 0], [0] * 6] and batch["encoder_segments"][0].tolist() == [1, 1, 1, 2, 2, 0]
    assert batch["encoder_positions"][0].tolist() == [0, 1, 2, 0, 1, 0]
    assert batch["tokens"][0].tolist() == [0, 7, 0, 9, 4, 0] and batch["targets"][0].tolist() == [7, 1, 9, 4, 1, 0]
    assert batch["segments"][0].tolist() == [1, 1, 2, 2, 2, 0] and batch["weights"].sum() == 5
    with pytest.raises(ValueError, match="row 0 has 7 and 1 tokens, and there is room for 6"):
        tasks.seq2seq_batch([[([3] * 7, [1])]], 6, 6, start=0)
