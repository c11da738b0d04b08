"""What a classifier gets wrong and why: slices, suspected label errors, near-duplicates, words that move answers. Numpy on texts; the model is a function."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data import dedup
from jaxlm.evaluate import baselines, uncertainty

_NEGATION = re.compile(r"\b(?:no|not|never|none|nothing|nobody|neither|nor|cannot|without|hardly|barely)\b|n['\u2019]t\b", re.IGNORECASE)
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_VALUES = 12  # of one column: the most frequent
_LEAST = 5  # texts of a slice


class Slice(NamedTuple):
    """Texts that have a value in a column, and how right the model is about them."""
    column: str
    value: str
    texts: int
    mean: float  # share of right answers; of numbers the mean absolute error
    low: float
    high: float


def slices(columns: Mapping[str, Sequence[str]], quality: np.ndarray) -> list[Slice]:
    """The figure of each value of each column, with its 95 % interval: exact for right and wrong answers, else bootstrap.

    Args:
      columns: name -> value of each text. A column of one value is left out; of many the most frequent are shown, with at least 5 texts.
      quality: float64 [N], 1 for right and 0 for wrong, or any number.
    """
    found, binary = [], set(np.unique(quality)) <= {0.0, 1.0}
    for column, values in columns.items():
        frequent = Counter(values).most_common(_VALUES)
        if column == "length":
            frequent.sort(key=lambda item: int(item[0].split()[0]))
        for value, count in frequent if len(frequent) > 1 else ():
            if count < min(_LEAST, len(values) // len(frequent)):  # of few texts all slices are small
                continue
            mine = quality[np.array([one == value for one in values])]
            low, high = uncertainty.exact(int(mine.sum()), count) if binary else uncertainty.bootstrap(mine, lambda some: float(some.mean()))
            found.append(Slice(column, value, count, float(mine.mean()), low, high))
    return found


def columns(texts: Sequence[str], sources: Sequence[str], fields: Sequence[Mapping[str, str]], languages: Sequence[str]) -> dict[str, list[str]]:
    """The columns of `slices`: length in words (quarters), source, language, negation (English words), and the fields that were kept."""
    words = np.array([len(text.split()) for text in texts])
    edges = [0, *sorted({int(edge) for edge in np.quantile(words, [0.25, 0.5, 0.75])})] if len(words) else [0]
    name = lambda n: next((f"{low + 1} to {high} words" for low, high in zip(edges, edges[1:]) if n <= high), f"{edges[-1] + 1} words or more")
    found = {"length": [name(n) for n in words], "source": list(sources)}
    if languages:
        found["language"] = list(languages)
    found["negation"] = ["with negation" if _NEGATION.search(text) else "without negation" for text in texts]
    for key in fields[0] if fields else ():
        found[key] = [field[key] for field in fields]
    return found


class Suspect(NamedTuple):
    """A text whose label looks wrong."""
    place: int  # in the arrays given
    given: int  # class
    likely: int
    margin: float  # probability of the likely class less that of the given one


def label_errors(probs: np.ndarray, given: np.ndarray) -> list[Suspect]:
    """Texts whose label is probably wrong, the surest first, by confident learning (Northcutt, Jiang & Chuang 2021): those that look like another class at
    least as much as the texts with that label do on average.

    Args:
      probs: [N, C] of a model that was not trained on these labels.
      given: int [N].
    """
    classes = probs.shape[1]
    usual = np.array([probs[given == c, c].mean() if (given == c).any() else np.inf for c in range(classes)])
    confident = np.where(probs >= usual, probs, -1.0)
    likely = confident.argmax(axis=1)
    suspected = np.flatnonzero((confident.max(axis=1) >= 0) & (likely != given) & (probs.argmax(axis=1) != given))
    found = [Suspect(int(i), int(given[i]), int(likely[i]), float(probs[i, likely[i]] - probs[i, given[i]])) for i in suspected]
    return sorted(found, key=lambda suspect: (-suspect.margin, suspect.place))


def cross_validated(features: np.ndarray, truth: np.ndarray, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Logits [N, C] of logistic regressions for texts that each was not trained on. Each fold has the same share of every class.

    Args:
      features: [N, F], dense or sparse.
      truth: [N, C], one 1 in each row.
    """
    order, given, fold = np.random.default_rng(seed).permutation(len(truth)), truth.argmax(axis=1), np.zeros(len(truth), np.int64)
    for c in range(truth.shape[1]):
        mine = order[given[order] == c]
        fold[mine] = np.arange(len(mine)) % folds
    out = np.zeros(truth.shape, np.float64)
    for number in range(folds):
        test = fold == number
        if test.any() and not test.all():
            out[test] = baselines.fit("classify", features[~test], truth[~test], strength=1.0)(features[test])
    return out


class Near(NamedTuple):
    """An evaluated text that is almost one of the training texts."""
    place: int  # of the evaluated text
    train: int  # of the training text
    similarity: float


def near_duplicates(train: Sequence[str], texts: Sequence[str], threshold: float = 0.6, shingle: int = 2) -> list[Near]:
    """For each text with near-duplicates in training the most similar one, the most similar first: Jaccard similarity of pairs of words (dedup.py), without
    regard to case and punctuation. Pairs of words, since texts with labels are often a sentence."""
    hashes = dedup.MinHash(128, shingle)
    every = [*train, *texts]
    signatures = np.array([hashes.signature(text) for text in every], np.uint32).reshape(-1, 128)
    keys = dedup.band_keys(signatures, dedup.rows_of_a_band(threshold, 128))
    cluster = dedup.near_duplicates(lambda band: keys[band], len(keys), signatures, threshold).cluster
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(len(train)):
        members[int(cluster[i])].append(i)
    found = []
    for place in range(len(texts)):
        if near := members.get(int(cluster[len(train) + place])):
            alike = dedup.similarity(signatures, np.full(len(near), len(train) + place), np.array(near))
            found.append(Near(place, near[int(alike.argmax())], float(alike.max())))
    return sorted(found, key=lambda one: (-one.similarity, one.place))


class Moving(NamedTuple):
    """A word that moves answers."""
    word: str
    texts: int
    effect: float  # mean change of the class's probability (of a number: of the number) by the word's presence


def moving_words(texts: Sequence[str], answer: Callable[[Sequence[str]], np.ndarray], classes: int, least: int = 3, most_words: int = 40) -> list[list[Moving]]:
    """Of each class the words that move its probability most, up first: each word of each text is left out once (occlusion: Zeiler & Fergus 2014; Li,
    Monroe & Jurafsky 2016), and the changes are averaged over the texts with it.

    Args:
      answer: texts -> [N, classes].
      least: texts with the word.
      most_words: of a text that are left out, its first ones.
    """
    spans = [list(_WORD.finditer(text))[:most_words] for text in texts]
    without = [text[:match.start()] + text[match.end():] or " " for text, found in zip(texts, spans) for match in found]
    whole, parts = answer(texts), answer(without) if without else np.zeros((0, classes))
    effects: dict[str, list[np.ndarray]] = defaultdict(list)
    at = 0
    for row, found in enumerate(spans):
        mine: dict[str, list[np.ndarray]] = defaultdict(list)
        for match in found:
            mine[match[0].lower()].append(whole[row] - parts[at])
            at += 1
        for word, changes in mine.items():
            effects[word].append(np.mean(changes, axis=0))
    means = {word: (len(changes), np.mean(changes, axis=0)) for word, changes in effects.items() if len(changes) >= least}
    of_class = lambda c: (Moving(word, count, float(mean[c])) for word, (count, mean) in means.items())
    return [sorted(of_class(c), key=lambda one: (-one.effect, one.word)) for c in range(classes)]
