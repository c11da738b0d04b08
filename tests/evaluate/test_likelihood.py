"""Each document's likelihood equals that of a plain forward pass over it alone, however documents are batched and spread."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import MeshConfig
from jaxlm.data import rows
from jaxlm.data.shards import Corpus, Split
from jaxlm.evaluate import likelihood
from jaxlm.sharding import make_mesh, params_shardings

ONE = MeshConfig(data=1, fsdp=1, tensor=1)


def score(model, params, corpus, sizes=ONE, split="validation", **options):
    mesh = make_mesh(sizes, jax.devices()[:1] if sizes == ONE else None)
    places = params_shardings(mesh, model.axes, jax.eval_shape(model.init, jax.random.key(0)))
    options = {"batch_size": 8, "overlap": 0.5, **options}
    return likelihood.score_documents(likelihood.scorer(model, mesh), jax.device_put(params, places), mesh, corpus, split, rows.Task(64), **options)


@pytest.fixture(scope="module")
def scores(model, params, corpus):
    return score(model, params, corpus)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, segments):
    hidden, _, _ = model.apply(params, {"tokens": tokens, "positions": jnp.arange(tokens.shape[1])[None], "segments": segments})
    return model.head(params, hidden)[0]


def plain(model, params, ids, window, stride):
    """nll and rank of each target of one document in float64: the first window whole, then of each next one what is new."""
    nll, right, start, done = [], [], 0, 0
    while done < len(ids) - 1:
        piece = ids[start:min(start + window, len(ids) - 1)]
        tokens = np.zeros((1, window), np.int32)
        tokens[0, :len(piece)] = piece
        logits = np.asarray(forward(model, params, tokens, (np.arange(window) < len(piece))[None].astype(np.int32)), np.float64)
        for position in range(done - start, len(piece)):
            row, target = logits[position], ids[start + position + 1]
            nll.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
            right.append(row[target] == row.max())
        done, start = start + len(piece), start + stride
    return np.array(nll), np.array(right)


@pytest.mark.parametrize("overlap, stride", [(0.5, 32), (0.0, 64), (0.75, 16)])
def test_each_document_is_scored_as_if_it_were_alone(model, params, corpus, overlap, stride):
    scores = score(model, params, corpus, overlap=overlap)
    lengths = corpus.splits["validation"].tokens
    assert lengths.max() > 128 and lengths.min() < 64, "both kinds of documents are needed"
    assert scores.document.tolist() == list(range(len(lengths)))
    for i in range(len(lengths)):
        nll, right = plain(model, params, corpus.read("validation", i).tolist(), 64, stride)
        assert scores.tokens[i] == len(nll) == lengths[i] - 1
        assert scores.nll[i] == pytest.approx(nll.sum(), rel=1e-5) and scores.right[i] == right.sum()
    assert scores.bytes.sum() == corpus.splits["validation"].text_bytes.sum()


@pytest.mark.parametrize("sizes, batch_size", [(ONE, 5), (MeshConfig(fsdp=2, data=2, tensor=2), 3), (MeshConfig(fsdp=2, stage=2, sequence=2), 8)],
                         ids=str)
def test_batches_and_devices_do_not_matter(model, params, corpus, scores, sizes, batch_size):
    got = score(model, params, corpus, sizes, batch_size=batch_size)
    np.testing.assert_allclose(got.nll, scores.nll, rtol=1e-5, atol=1e-4)
    assert all(np.array_equal(getattr(got, name), getattr(scores, name)) for name in ("document", "right", "tokens", "bytes"))


def test_a_limit_takes_documents_from_all_over_the_split_and_progress_reaches_the_end(model, params, corpus, scores):
    seen = []
    got = score(model, params, corpus, limit_documents=4, progress=lambda done, total: seen.append(done))
    assert len(got.document) == 4 and got.document[0] == 0 and got.document[-1] >= len(scores.document) // 2
    np.testing.assert_allclose(got.nll, scores.nll[got.document], rtol=1e-5)
    assert seen[-1] == got.tokens.sum()
    assert len(score(model, params, corpus, limit_documents=10**6).document) == len(scores.document)


def test_an_empty_split_is_one_line(model, params, corpus):
    none = np.zeros(0, np.int64)
    empty = Corpus(corpus.folder, corpus.manifest, {**corpus.splits, "test": Split(*(none,) * 4, np.zeros(1, np.int64), none, none, ())})
    with pytest.raises(ValueError, match="the test split in .* has no documents"):
        score(model, params, empty, split="test")


def test_summary_by_hand():
    scores = likelihood.Scores(np.arange(2), np.array([6 * math.log(2), 2 * math.log(2)]), np.array([1.0, 1.0]), np.array([3, 1]), np.array([2, 6]))
    got = likelihood.summary(scores, 200)
    assert got["loss"] == pytest.approx(2 * math.log(2)) and got["perplexity"] == pytest.approx(4) and got["bits_per_byte"] == pytest.approx(1)
    assert got["accuracy"] == 0.5 and (got["tokens"], got["documents"], got["bytes"]) == (4, 2, 8)
    # Resamples hold the first document twice, both, or the second twice.
    assert got["bits_per_byte_low"] == pytest.approx(1 / 3) and got["bits_per_byte_high"] == pytest.approx(3)
    assert got["perplexity_low"] == pytest.approx(4) and got["perplexity_high"] == pytest.approx(4)
    assert got["accuracy_low"] == pytest.approx(1 / 3) and got["accuracy_high"] == 1
    assert all(isinstance(value, (int, float)) for value in got.values())
    table = likelihood.table(got)
    assert "95 % interval" in table and "0.3333 to 3.0000" in table and "2 documents, 4 tokens, 8 bytes" in table


def test_a_single_document_has_no_interval():
    got = likelihood.summary(likelihood.Scores(*(np.ones(1) for _ in range(5))), 10)
    assert not [name for name in got if name.endswith(("_low", "_high"))]
    assert "no interval from a single document" in likelihood.table(got)
