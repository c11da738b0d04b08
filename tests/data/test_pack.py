import hashlib
import random

import numpy as np
import pytest

from jaxlm.data import pack, tasks

T = 32
KEYS = ("tokens", "targets", "weights", "positions", "segments", "documents")
SIZES = {
    "mixed": [random.Random(0).choice((1, 2, 3, 10, 31, 32, 33, 34, 65, 150)) for _ in range(300)],
    "short": [2] * 100 + [1] * 50 + [3] * 7,
    "one long": [1, 5 * T + 3],
    "exact rows": [T + 1] * 6,
    "smallest": [2],
}


@pytest.fixture(params=SIZES)
def documents(request):
    """Documents whose every token is a number of its own."""
    rng, start, found = random.Random(1), 0, []
    for size in SIZES[request.param]:
        found.append(np.arange(start, start + size))
        start += size
    rng.shuffle(found)
    return found


def lengths_of(documents):
    return np.array([len(document) for document in documents], np.int32)


def reader(documents):
    return lambda document, start, stop: documents[document][start:stop]


def check_segments(batch, documents):
    """Every segment is a part of one document: consecutive tokens, each followed by its target, positions from 0; the rest is padding."""
    for tokens, targets, weights, positions, segments, of in zip(*(batch[key] for key in KEYS)):
        used = segments > 0
        assert not any(array[~used].any() for array in (tokens, targets, weights, positions)) and (of[~used] == -1).all()
        assert used[:used.sum()].all() and (np.diff(segments[used]) >= 0).all()
        assert set(segments[used]) == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert (positions[here] == np.arange(here.sum())).all()
            document = documents[of[here][0]]
            first = tokens[here][0] - document[0]
            assert (of[here] == of[here][0]).all()
            assert (tokens[here] == document[first:first + here.sum()]).all()
            assert (targets[here] == document[first + 1:first + here.sum() + 1]).all()


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_has_every_target_once_and_pads_only_its_end(documents, epoch):
    lengths = lengths_of(documents)
    plan, size = pack.epoch_plan(lengths, T, 3, epoch), pack.epoch_size(lengths, T)
    assert len(plan.rows) == size.rows
    batch = tasks.next_token_batch([pack.row(plan, i) for i in range(size.rows)], reader(documents), T)
    check_segments(batch, documents)
    targets = batch["targets"][batch["weights"] > 0]
    assert sorted(targets) == sorted(token for document in documents for token in document[1:])
    assert size.targets == len(targets) and size.padding == size.rows * T - size.targets < T
    assert ((batch["weights"] == 0).sum(axis=1) > 0).sum() <= 1
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        key: (np.float32 if key == "weights" else np.int32, (size.rows, T)) for key in KEYS}


def test_epochs_and_seeds_differ_and_rows_of_a_long_document_are_spread():
    lengths = np.full(400, 40, np.int32)
    lengths[17] = 100 * T
    orders = [pack.epoch_plan(lengths, T, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a].documents != orders[b].documents).any() and (orders[a].rows != orders[b].rows).any()
    again = pack.epoch_plan(lengths, T, 0, 0)
    assert (again.documents == orders[0].documents).all() and (again.rows == orders[0].rows).all()
    places = [i for i in range(len(again.rows)) if pack.row(again, i)[0].document == 17]
    assert len(places) >= 99 and max(np.diff(places)) > 8 and places[-1] - places[0] > 0.9 * len(again.rows)


def test_the_shuffle_is_a_permutation_and_stays_what_it_is():
    for count in (0, 1, 2, 1000):
        assert sorted(pack.shuffled(count, "x", 1)) == list(range(count))
    first = pack.shuffled(100_000, "documents", 0, 0)
    assert abs(np.corrcoef(first, np.arange(100_000))[0, 1]) < 0.02
    # If this changes, every run that is resumed sees other batches than it would have: change it never, or with the format of the manifest.
    assert hashlib.sha256(first.astype("<i8").tobytes()).hexdigest()[:16] == "9ba2ca1c21ae41b4"


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9, 0.999])
def test_an_evaluation_counts_every_target_once(documents, overlap):
    plan = pack.evaluation_plan(lengths_of(documents), T, overlap)
    batch = tasks.next_token_batch([pack.row(plan, i) for i in range(len(plan.row_ends))], reader(documents), T)
    check_segments(batch, documents)
    counted = batch["weights"] == 1
    assert ((batch["weights"] == 0) | counted).all()
    assert sorted(batch["targets"][counted]) == sorted(token for document in documents for token in document[1:])
    of = {token: number for number, document in enumerate(documents) for token in document}
    assert [of[target] for target in batch["targets"][counted]] == batch["documents"][counted].tolist()
    # a target beyond the first window has at least the overlap as context
    beyond = counted & (batch["targets"] - np.array([documents[d][0] for d in batch["documents"].ravel()]).reshape(counted.shape) > T)
    assert not beyond.any() or batch["positions"][beyond].min() >= T - max(1, round((1 - overlap) * T))


def test_an_evaluation_of_some_documents_only():
    documents = [np.arange(10 * i, 10 * i + size) for i, size in enumerate((5, 1, 9, 10, 3))]
    plan = pack.evaluation_plan(lengths_of(documents), 4, 0.5, np.array([1, 2, 4]))
    batch = tasks.next_token_batch([pack.row(plan, i) for i in range(len(plan.row_ends))], reader(documents), 4)
    assert sorted(batch["targets"][batch["weights"] > 0]) == [*range(21, 29), 41, 42]


def test_short_documents_share_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 200, 3000).astype(np.int32)
    plan = pack.evaluation_plan(lengths, 256, 0.5)
    assert len(plan.row_ends) * 256 < 1.02 * (lengths - 1).sum()
