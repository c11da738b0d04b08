"""De-duplication over hashes alone: equal documents, repeated lines, near-duplicates.

Workers turn a text into a digest, hashes of its long lines and a MinHash signature (pure functions of the text, the same on every machine);
one process then decides by sorting these, so that neither the number of workers nor their order matters. Near-duplicates: Broder 1997 (On the
resemblance and containment of documents: MinHash of word shingles), candidates by banding as in Leskovec, Rajaraman, Ullman 2014 (Mining of
Massive Datasets, 3.4), each verified by the similarity that the two signatures say, clusters by union-find.

Memory of the deciding process: 16 bytes a document for digests, 8 for sizes, 5 for where it came from and whether it lives; while equal
documents are sought 16 more, for near-duplicates 8 (cluster) + 32 (one band at a time); a byte for each long line, and 48 bytes for each line of
one of as many passes as keep these below 2 GB. Signatures lie on the disk: 4 bytes times `dedup.permutations` a document, and 8 for each band.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

LINES_PER_PASS = 1 << 25
_LEADERS = 256  # rounds of comparison in one bucket of one band; what has found no match by then must find it in another band
_PAIRS = 1 << 16  # compared at a time: at 128 values 64 MB
_RECALL = 0.98  # the least probability that two documents at the threshold meet in some band
_WORDS = 1 << 13  # shingles that are hashed at a time
# Scripts that put no spaces between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese; Korean syllables): each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")


def digest(text: str) -> bytes:
    """The first 16 bytes of the sha256 of the text as UTF-8."""
    return hashlib.sha256(text.encode()).digest()[:16]


def long_lines(text: str, length: int) -> Iterator[tuple[int, str]]:
    """Number (from 0) and text, without white space at its ends, of each line that has at least `length` characters then."""
    for number, line in enumerate(text.split("\n")):
        if len(line) >= length and len(stripped := line.strip()) >= length:
            yield number, stripped


def line_hashes(text: str, length: int) -> list[int]:
    """64 bits of the sha256 of each long line. Among n lines two different ones share them with a probability of n^2 / 2^65."""
    return [int.from_bytes(hashlib.sha256(line.encode()).digest()[:8], "little") for _, line in long_lines(text, length)]


def without_lines(text: str, length: int, dead: np.ndarray) -> str:
    """The text without those of its long lines whose entry in `dead` (bool, one for each long line) is set."""
    gone = {number for (number, _), is_dead in zip(long_lines(text, length), dead) if is_dead}
    return "\n".join(line for number, line in enumerate(text.split("\n")) if number not in gone) if gone else text


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """Number of the first row that equals each row: int64 [rows], for keys uint64 [rows, columns]."""
    first = np.arange(len(keys))
    if len(keys):
        order = np.lexsort(keys.T[::-1])  # stable: equal rows stay in order
        starts = np.concatenate([[True], (keys[order[1:]] != keys[order[:-1]]).any(axis=1)])
        first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def repeated(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of `keys` (uint64 [n]) occurred before: bool [n]; then the keys that occur more than once, and how often."""
    values, first, counts = np.unique(keys, return_index=True, return_counts=True)
    before = np.ones(len(keys), bool)
    before[first] = False
    return before, values[counts > 1], counts[counts > 1]


class MinHash:
    """Signatures of texts: the smallest value of each of `permutations` hash functions over the text's shingles of `shingle` words.

    Two signatures agree in a share of places that estimates the Jaccard similarity s of the two sets of shingles, with a standard error of
    sqrt(s (1 - s) / permutations). Hash functions are multiply-shift on 64 bits (Dietzfelbinger et al. 1997).
    """

    def __init__(self, permutations: int, shingle: int):
        self.shingle = shingle
        stream = _mixed(np.arange(1, 2 * permutations + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        self._factor, self._offset = (stream[:permutations] | np.uint64(1))[:, None], stream[permutations:][:, None]
        self._weights = _mixed(np.arange(1001, 1001 + shingle, dtype=np.uint64)) | np.uint64(1)

    def shingles(self, text: str) -> np.ndarray:
        """Hashes of the shingles: uint64 [n], in order; a text of fewer words is one shingle. Case and punctuation do not count."""
        words = " ".join(_WORD.findall(text.lower())).encode().split() or [text.encode()]
        hashes = _mixed(np.array(list(map(zlib.crc32, words)), np.uint64))
        size = min(self.shingle, len(words))
        windows = np.lib.stride_tricks.sliding_window_view(hashes, size)
        return _mixed(windows @ self._weights[:size])

    def signature(self, text: str) -> np.ndarray:
        """uint32 [permutations]."""
        shingles, lowest = self.shingles(text), np.full(len(self._factor), np.iinfo(np.uint64).max)
        for start in range(0, len(shingles), _WORDS):
            lowest = np.minimum(lowest, (shingles[start:start + _WORDS] * self._factor + self._offset).min(axis=1))
        return (lowest >> np.uint64(32)).astype(np.uint32)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of `x`: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rows_of_a_band(near: float, permutations: int) -> int:
    """The most rows r, so the fewest false candidates, with which two documents of similarity `near` meet: 1 - (1 - near^r)^bands >= 0.98."""
    return max(r for r in range(1, permutations + 1) if r == 1 or 1 - (1 - near ** r) ** (permutations // r) >= _RECALL)


def band_keys(signatures: np.ndarray, rows: int) -> np.ndarray:
    """A 64-bit key of each band: uint64 [permutations // rows, documents], for signatures uint32 [documents, permutations]."""
    bands = signatures.shape[1] // rows
    values = signatures[:, :bands * rows].reshape(len(signatures), bands, rows).astype(np.uint64)
    key = np.zeros(values.shape[:2], np.uint64)
    for row in range(rows):
        key = _mixed(key ^ values[:, :, row]) + np.uint64(0x9E3779B97F4A7C15)
    return key.T


class Near(NamedTuple):
    """Clusters of near-duplicates, and how much work they were."""

    cluster: np.ndarray  # int64 [documents]: the first document of the cluster that it belongs to
    candidates: int  # pairs that were compared
    verified: int  # of these, as similar as the threshold or more


def near_duplicates(bands: Callable[[int], np.ndarray], count: int, signatures: np.ndarray, threshold: float) -> Near:
    """Clusters of documents that are linked by pairs whose signatures agree in at least `threshold` of their places.

    In a bucket of a band the first document is compared with all others, then the first of those that did not match it with the rest, and
    so on, all buckets at once; documents that are in one cluster already are not compared again.

    Args:
      bands: number of a band -> its keys, uint64 [documents].
      count: bands.
      signatures: uint32 [documents, permutations], may be memory-mapped.
      threshold: Jaccard similarity in (0, 1].
    """
    cluster, candidates, verified = np.arange(len(signatures)), 0, 0
    for band in range(count):
        keys = bands(band)
        members = np.argsort(keys, kind="stable")
        bucket = np.cumsum(np.concatenate([[0], keys[members[1:]] != keys[members[:-1]]])) if len(members) else members
        del keys
        for _ in range(_LEADERS):
            starts = np.flatnonzero(np.concatenate([[True], bucket[1:] != bucket[:-1]])) if len(bucket) else bucket
            sizes = np.diff(np.concatenate([starts, [len(bucket)]]))
            if not (sizes > 1).any():
                break
            leaders = np.repeat(members[starts], sizes)
            follows = np.repeat(sizes > 1, sizes)
            follows[starts] = False
            leaders, members, bucket = leaders[follows], members[follows], bucket[follows]
            known = cluster[leaders] == cluster[members]
            match = known.copy()
            match[~known] = similarity(signatures, leaders[~known], members[~known]) >= threshold
            candidates += int((~known).sum())
            verified += int((match & ~known).sum())
            join(cluster, leaders[match & ~known], members[match & ~known])
            members, bucket = members[~match], bucket[~match]
    return Near(cluster, candidates, verified)


def similarity(signatures: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of the documents `a` and `b` (int64 [pairs]): float64 [pairs]."""
    parts = [(signatures[a[i:i + _PAIRS]] == signatures[b[i:i + _PAIRS]]).mean(axis=1) for i in range(0, len(a), _PAIRS)]
    return np.concatenate(parts) if parts else np.zeros(0)


def join(cluster: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Union-find over arrays, in place: the clusters of `a` and `b` (int64 [pairs]) become one, named after its first document."""
    while len(a):
        low, high = np.minimum(cluster[a], cluster[b]), np.maximum(cluster[a], cluster[b])
        open_ = low != high
        a, b = a[open_], b[open_]
        np.minimum.at(cluster, high[open_], low[open_])
        while len(a) and (cluster != (shorter := cluster[cluster])).any():
            cluster[:] = shorter


def survivors(cluster: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of each cluster the longest document, of equally long ones the first: for each document the one that stands for it, int64."""
    order = np.lexsort((np.arange(len(cluster)), -sizes, cluster))
    starts = np.concatenate([[True], cluster[order[1:]] != cluster[order[:-1]]]) if len(order) else order.astype(bool)
    best = np.empty_like(cluster)
    best[order] = order[starts][np.cumsum(starts) - 1]
    return best
