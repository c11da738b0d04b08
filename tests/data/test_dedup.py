import random

import numpy as np
import pytest

from jaxlm.config import DedupConfig
from jaxlm.data import dedup

WORDS = [f"word{i}" for i in range(3000)]


def near(texts, threshold, permutations=128, shingle=5):
    hashes = dedup.MinHash(permutations, shingle)
    signatures = np.stack([hashes.signature(text) for text in texts])
    keys = dedup.band_keys(signatures, dedup.rows_of_a_band(threshold, permutations))
    return dedup.near_duplicates(lambda band: keys[band], len(keys), signatures, threshold)


def jaccard(a, b, shingle=5):
    sets = [set(zip(*(text.lower().split()[i:] for i in range(shingle)))) for text in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text, rate, rng):
    return " ".join(rng.choice(WORDS) if rng.random() < rate else word for word in text.split())


def test_first_occurrences_are_those_of_a_dictionary():
    rng = np.random.default_rng(0)
    for rows, values in ((0, 1), (1, 1), (1000, 3), (1000, 100), (1000, 1)):
        keys = rng.integers(0, values, (rows, 2)).astype(np.uint64)
        seen = {}
        assert dedup.first_occurrences(keys).tolist() == [seen.setdefault(tuple(key), i) for i, key in enumerate(keys.tolist())]
    before, often, times = dedup.repeated(np.array([5, 3, 5, 5, 9, 3], np.uint64))
    assert before.tolist() == [False, False, True, True, False, True] and dict(zip(often.tolist(), times.tolist())) == {3: 2, 5: 3}


def test_union_find_against_a_walk_over_the_graph():
    rng = random.Random(0)
    for count, edges in ((1, 0), (10, 5), (100, 60), (300, 280), (300, 5000)):
        a, b = (np.array([rng.randrange(count) for _ in range(edges)], np.int64) for _ in range(2))
        cluster = np.arange(count)
        for part in np.array_split(np.arange(edges), 3):
            dedup.join(cluster, a[part], b[part])
        expected = list(range(count))
        for _ in range(count):
            for x, y in zip(a.tolist(), b.tolist()):
                expected[x] = expected[y] = min(expected[x], expected[y])
        assert cluster.tolist() == expected


def test_the_longest_of_a_cluster_survives_and_of_equally_long_ones_the_first():
    cluster = np.array([0, 1, 0, 1, 4, 0, 1])
    sizes = np.array([5, 7, 9, 7, 1, 9, 3])
    assert dedup.survivors(cluster, sizes).tolist() == [2, 1, 2, 1, 4, 2, 1]


def test_a_signature_estimates_the_jaccard_similarity():
    rng, hashes, errors = random.Random(1), dedup.MinHash(128, 5), []
    for rate in (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1) * 6:
        text = " ".join(rng.choices(WORDS, k=400))
        other = edited(text, rate, rng)
        truth = jaccard(text, other)
        errors.append((np.mean(hashes.signature(text) == hashes.signature(other)) - truth) / np.sqrt(max(truth * (1 - truth), 1e-3) / 128))
    assert max(map(abs, errors)) < 4 and abs(np.mean(errors)) < 0.5


def test_signatures_never_change():
    """They lie on disks and decide what lives: another value here would make other corpora of the same text."""
    signature = dedup.MinHash(8, 3).signature("The quick brown fox jumps over the lazy dog. 素早い狐 är snabb")
    assert signature.dtype == np.uint32 and signature.tolist() == [799238736, 1031709188, 569407016, 1228311943, 823347256, 6509053, 218999243, 971261774]
    assert dedup.line_hashes("  a line \nb", 6) == [int.from_bytes(dedup.digest("a line")[:8], "little")]


def test_what_counts_as_a_word():
    hashes = dedup.MinHash(64, 2)
    same = lambda a, b: set(hashes.shingles(a).tolist()) == set(hashes.shingles(b).tolist())
    assert same("The cat, the DOG!", "the cat  the\ndog") and not same("the cat the dog", "the cat and the dog")
    assert len(hashes.shingles("素早い狐が")) == 4  # no spaces: each character is a word
    for text in ("", "!", "one", "one two"):
        assert len(hashes.shingles(text)) == 1
    assert len(set(hashes.shingles("a b " * 50_000).tolist())) == 2


def test_long_texts_are_hashed_in_parts(monkeypatch):
    text, hashes = " ".join(random.Random(2).choices(WORDS, k=2000)), dedup.MinHash(32, 5)
    whole = hashes.signature(text)
    monkeypatch.setattr(dedup, "_WORDS", 7)
    assert (hashes.signature(text) == whole).all()


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_what_is_as_similar_as_the_threshold(threshold):
    rows = dedup.rows_of_a_band(threshold, 128)
    assert 1 - (1 - threshold ** rows) ** (128 // rows) >= 0.98
    assert rows == 128 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.98


def test_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(3)
    originals = [" ".join(rng.choices(WORDS, k=rng.randrange(100, 400))) for _ in range(150)]
    copies = [edited(text, 0.01, rng) for text in originals[:100]]
    found = near(originals + copies, 0.7)
    linked = [found.cluster[150 + i] == i for i in range(100)]
    truth = [jaccard(a, b) for a, b in zip(originals, copies)]
    assert all(is_linked for is_linked, similarity in zip(linked, truth) if similarity > 0.85) and np.mean(linked) > 0.9
    assert (found.cluster[:150] == np.arange(150)).all()
    assert found.candidates >= found.verified >= sum(linked)


def test_clusters_are_those_of_all_pairs():
    """Against every pair compared: candidates that no band brings together are the only loss, and equal texts are always found."""
    rng = random.Random(4)
    base = [" ".join(rng.choices(WORDS, k=120)) for _ in range(8)]
    texts = [edited(rng.choice(base), rng.choice([0, 0.01, 0.02]), rng) for _ in range(120)]
    hashes = dedup.MinHash(128, 5)
    signatures = np.stack([hashes.signature(text) for text in texts])
    expected = np.arange(len(texts))
    a, b = np.triu_indices(len(texts), 1)
    similar = dedup.similarity(signatures, a, b) >= 0.6
    dedup.join(expected, a[similar], b[similar])
    assert near(texts, 0.6).cluster.tolist() == expected.tolist() and len(set(expected.tolist())) >= 8
    shuffled = rng.sample(range(len(texts)), len(texts))
    again = near([texts[i] for i in shuffled], 0.6).cluster
    groups = lambda cluster, names: {frozenset(names[i] for i in np.flatnonzero(cluster == c)) for c in set(cluster.tolist())}
    assert groups(again, shuffled) == groups(expected, range(len(texts)))


def test_no_documents_and_one():
    for count in (0, 1):
        found = dedup.near_duplicates(lambda band: np.zeros(count, np.uint64), 3, np.zeros((count, 8), np.uint32), 0.5)
        assert found.cluster.tolist() == list(range(count)) and found.candidates == 0
    assert dedup.survivors(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_lines():
    text = "short\n a long line here  \nx\na long line here\nanother long line\n"
    assert [(number, line) for number, line in dedup.long_lines(text, 10)] == [(1, "a long line here"), (3, "a long line here"), (4, "another long line")]
    assert dedup.without_lines(text, 10, np.array([False, True, False])) == "short\n a long line here  \nx\nanother long line\n"
    assert dedup.without_lines(text, 10, np.array([False, False, False])) is text
    assert len(set(dedup.line_hashes(text, 10))) == 2


def test_impossible_values_are_refused():
    for values, words in (({"near": 1.5}, "dedup.near=1.5"), ({"near": -0.1}, "dedup.near"), ({"line_length": -1}, "dedup.line_length"),
                          ({"shingle": 0}, "dedup.shingle"), ({"permutations": 4}, "dedup.permutations")):
        with pytest.raises(ValueError, match=words):
            DedupConfig(**values)
