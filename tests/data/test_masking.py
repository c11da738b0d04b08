"""Masked-token batches: shares, what is never hidden, whole words, and that a step decides its mask."""

import numpy as np
import pytest

from jaxlm.config import ObjectiveConfig
from jaxlm.data import tasks
from jaxlm.data import tokenizer as tokenizers

BYTES = tokenizers.from_bytes(b'{"kind": "bytes"}\n')
TEXT = b"the cat sees a tree and paints the sea. " * 1000


def batch(rows=40):
    tokens = np.frombuffer(TEXT, np.uint8).astype(np.int32).reshape(rows, -1).copy()
    segments = np.ones_like(tokens)
    tokens[:, 0], tokens[:, -10:], segments[:, -10:] = BYTES.bos, 0, 0
    return {"tokens": tokens, "segments": segments, "weights": (segments > 0).astype(np.float32), "positions": segments * 0}


def masked(given, *key, **values):
    how = tasks.masking(ObjectiveConfig(name="masked_token", **values), BYTES)
    return tasks.mask_batch(given, how, np.arange(given["tokens"].size, dtype=np.uint64).reshape(given["tokens"].shape), *key)


@pytest.mark.parametrize("whole_words", [False, True])
def test_shares(whole_words):
    given = batch()
    found = masked(given, 1, mask_whole_words=whole_words)
    chosen = found["weights"] > 0
    np.testing.assert_array_equal(found["targets"], given["tokens"])
    np.testing.assert_array_equal(found["tokens"][~chosen], given["tokens"][~chosen])
    assert chosen.mean() == pytest.approx(0.15, abs=0.015) and not chosen[:, 0].any() and not chosen[:, -10:].any()
    inside, original = found["tokens"][chosen], given["tokens"][chosen]
    assert (inside == BYTES.pad).mean() == pytest.approx(0.8, abs=0.02) and (inside == original).mean() == pytest.approx(0.1, abs=0.02)
    assert inside.max() == BYTES.pad and (inside != BYTES.pad).any()


def test_whole_words_are_told_together():
    given = batch()
    chosen = masked(given, 1, mask_whole_words=True)["weights"] > 0
    starts = (given["tokens"] == ord(" ")) | (given["tokens"] == BYTES.bos)
    inside = (given["segments"][:, 1:] > 0) & ~starts[:, 1:]
    inside[:, 0] = False  # the piece after bos is the rest of a word
    assert (chosen[:, 1:] == chosen[:, :-1])[inside].all()
    alone = masked(given, 1)["weights"] > 0
    assert not (alone[:, 1:] == alone[:, :-1])[inside].all()


def test_the_mask_follows_from_the_key():
    given = batch()
    same = [masked(given, key)["weights"] for key in (1, 1, 2)]
    assert (same[0] == same[1]).all() and (same[0] != same[2]).any()


def test_what_did_not_count_does_not_count():
    given = batch()
    given["weights"][:, :500] = 0
    found = masked(given, 1)
    assert not found["weights"][:, :500].any() and (found["tokens"][:, :500] != given["tokens"][:, :500]).any()


def test_mask_token():
    assert tasks.masking(ObjectiveConfig(), BYTES) is None
    files = {"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\nc\n"}
    words = tokenizers.from_files(files)
    how = tasks.masking(ObjectiveConfig(name="masked_token"), words)
    assert how.mask == 4 and how.plain.tolist() == [5, 6, 7] and how.begins_word[5:].tolist() == [True, False, True]
    assert not how.special[5:].any() and how.special[:5].all()
