"""Mixtures as the loader delivers them: the shares, the epochs and the shuffles of each source."""

import dataclasses

import numpy as np
import pytest

from jaxlm.config import DataConfig, ObjectiveConfig, TokenizerConfig
from jaxlm.data import loader, mixture, prepare, rows, stream
from jaxlm.data.mixture import Mixture
from tests.data import made

BATCH, LENGTH = 4, 24
LENGTHS = np.random.default_rng(0).integers(2, 60, 90)
NAMES = ("web", "books", "code")
SPANS = rows.Task(LENGTH, ObjectiveConfig(name="span_corruption"), eos=1, sentinels=np.arange(2, 16, dtype=np.int32), target_length=16)
TASKS = {"stream": rows.Task(LENGTH), "best_fit": rows.Task(LENGTH, packing="best_fit"), "spans": SPANS}
MIXTURES = {"weights": Mixture(weights=(("web", 0.5), ("code", 0.125), ("books", 0.375))), "temperature": Mixture(temperature=3.0),
            "epochs": Mixture(epochs=(("code", 2.5), ("books", 3)))}


def name_of(number):
    return NAMES[0 if number % 9 < 6 else 1 if number % 9 < 8 else 2]


SOURCE_OF = np.array([NAMES.index(name_of(number)) for number in range(len(LENGTHS))])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return {framed: made.corpus(folder / str(framed), LENGTHS + 2 * framed, framed=framed, source=name_of, sources=NAMES) for framed in (False, True)}


def delivered(corpus, task, start, stop, **options):
    """int64 [rows, documents]: tokens of each document in every row."""
    found = loader.batches(corpus, "train", task, batch_size=BATCH, seed=3, start_step=start, stop_step=stop, **options)
    return np.concatenate([made.documents(batch, len(LENGTHS)) for _, batch in found])


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("by", MIXTURES)
def test_shares_epochs_and_shuffles(mixed, kind, by):
    corpus, task = mixed[kind == "spans"], TASKS[kind]._replace(mixture=MIXTURES[by])
    whole = stream.build(corpus, "train", task)
    assert [part.name for part in whole.parts] == list(NAMES)
    found = delivered(corpus, task, 0, 2 * whole.size.rows // BATCH + 7)
    of = np.stack([found[:, SOURCE_OF == s].sum(1) > 0 for s in range(3)], axis=1)
    assert (of.sum(1) == 1).all()  # no row holds two sources
    sizes = [part.size for part in whole.parts]
    shares = {"weights": [0.5, 0.375, 0.125], "epochs": [s.rows * times for s, times in zip(sizes, (1, 3, 2.5))],
              "temperature": [s.targets ** (1 / 3) for s in sizes]}[by]
    expected = np.arange(1, len(found) + 1)[:, None] * np.array(shares) / sum(shares)
    assert np.abs(of.cumsum(0) - expected).max() < 1 + 1e-4 * len(found)
    once = LENGTHS if kind == "spans" else LENGTHS - 1
    for s, size in enumerate(sizes):
        own = found[of[:, s]]
        epochs = [own[i:i + size.rows] for i in range(0, len(own) - size.rows + 1, size.rows)]
        assert epochs and all((epoch.sum(0) == np.where(SOURCE_OF == s, once, 0)).all() for epoch in epochs)
        assert all((a != b).any() for a, b in zip(epochs, epochs[1:]))
    if by == "epochs":
        assert whole.size.rows == round(sum(shares))
    # The position is one integer.
    np.testing.assert_array_equal(delivered(corpus, task, 5, 9, threads=2), found[5 * BATCH:9 * BATCH])
    np.testing.assert_array_equal(delivered(corpus, task, 5, 9, rows=(1, 3)), found[5 * BATCH:9 * BATCH].reshape(4, BATCH, -1)[:, 1:3].reshape(8, -1))


def test_what_a_source_gives_does_not_depend_on_the_others(mixed):
    alone, among = (rows.Task(LENGTH, mixture=Mixture(weights=weights)) for weights in ((("books", 1),), (("web", 0.6), ("books", 0.4))))
    one, two = (delivered(mixed[False], task, 0, 40) for task in (alone, among))
    two = two[two[:, SOURCE_OF == 1].sum(1) > 0]
    np.testing.assert_array_equal(one[:len(two)], two)
    assert len(two) == pytest.approx(0.4 * 160, abs=1)


def test_without_a_mixture_sources_make_no_difference(mixed, tmp_path):
    plain = made.corpus(tmp_path / "plain", LENGTHS)
    np.testing.assert_array_equal(delivered(mixed[False], rows.Task(LENGTH), 0, 30), delivered(plain, rows.Task(LENGTH), 0, 30))


def test_passes_are_those_that_are_delivered(mixed):
    task = rows.Task(LENGTH, mixture=MIXTURES["epochs"])
    whole = stream.build(mixed[False], "train", task)
    [web, books, code] = stream.passes(whole, whole.size.rows)
    assert [part[0] for part in (web, books, code)] == list(NAMES)
    for part, size, times in zip((web, books, code), (part.size for part in whole.parts), (1, 3, 2.5)):
        assert part[1] == pytest.approx(times * size.rows, abs=1) and part[3] == part[1] / size.rows and part[2] == pytest.approx(times * (LENGTHS - 1)[
            SOURCE_OF == NAMES.index(part[0])].sum(), abs=2 * LENGTH)
    assert loader.epoch_size(mixed[False], "train", task, 10**6) == whole.size  # rows repeat anyway: no batch is too large


@pytest.mark.parametrize("asked, words", [
    (Mixture(weights=(("wbe", 1),)), "data.weights names the source 'wbe', which data.source does not have: did you mean 'web'[?] "
     "sources: 'web', 'books', 'code'"),
    (Mixture(epochs=(("tiny", 1),)), "data.epochs names the source 'tiny', which data.source does not have"),
    (Mixture(temperature=2.0), r"the source 'tiny' in .* has 3 training tokens, less than a row of data.sequence_length=24"),
    (Mixture(weights=(("none", 1),)), r"the source 'none' in .* has 0 training tokens"),
])
def test_mixtures_that_cannot_be(tmp_path, mixed, asked, words):
    names = (*NAMES, "tiny", "none") if "training tokens" in words else NAMES
    corpus = made.corpus(tmp_path / "c", [30] * 9 + [4], source=lambda number: "tiny" if number == 9 and len(names) > 3 else NAMES[number % 3], sources=names)
    with pytest.raises(ValueError, match=words) as caught:
        stream.build(corpus, "train", rows.Task(LENGTH, mixture=asked))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys, words", [
    ({"weights": (("a", 0.0),)}, "data.weights: 'a' has 0, which must be positive; to leave a source out, do not name it"),
    ({"weights": (("a", -1.0),)}, "data.weights: 'a' has -1, which must be positive"),
    ({"epochs": (("a", float("nan")),)}, "data.epochs: 'a' has nan, which must be positive"),
    ({"weights": (("a", 1.0), ("a", 2.0))}, "data.weights names a source twice"),
    ({"temperature": -1.0}, "data.temperature=-1.0 must be positive"),
    ({"temperature": 2.0, "epochs": (("a", 1.0),)}, "data.temperature and data.epochs are given: a mixture follows from one of them"),
])
def test_keys_that_cannot_be(keys, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**keys)


def test_a_wrong_name_is_seen_before_the_work_begins(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    data = DataConfig(source=(f"web={source}",), weights=(("wep", 1.0),))
    with pytest.raises(ValueError, match="did you mean 'web'"):
        prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lambda line: None)
    assert not (tmp_path / "data").exists()
    other = dataclasses.replace(data, weights=(("web", 1.0),), validation=0, test=0)
    assert prepare.prepare(other, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lambda line: None).sources == ["web"]
    assert mixture.used(Mixture(weights=(("web", 1.0),)), ["a", "web"]) == ["web"]
