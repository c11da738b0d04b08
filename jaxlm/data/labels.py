"""Labels of texts: read from a source as JSON, brought to one form, numbered, and turned into the targets of a batch.

The form of a label is a text: of `classify` the class ("1", "true", "positive"), of `multi_label` its classes joined by "|" and sorted, of `regress` the
number, of `token_classify` the tags of the words joined by spaces.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SEVERAL = "|"  # between the classes of a text


class Examples(NamedTuple):
    """The labelled documents of one split, in its order."""
    texts: list[str]  # as cleaned; of a pair see `readers.PAIR`
    labels: list[str]  # in the form above
    fields: list[dict[str, str]]  # values of data.slice_keys
    words: list[np.ndarray]  # token_classify: place of the first token of each word in the document, int32 [words]; else empty


def parse(objective: str, given: str) -> str:
    """The form of a label that was read as JSON.

    Raises:
      ValueError: what is wrong with it, in a few words.
    """
    value = json.loads(given)
    if objective == "multi_label":
        names = value if isinstance(value, list) else str(value).split(SEVERAL) if value not in (None, "") else []
        return SEVERAL.join(sorted({_name(name) for name in names}))
    if objective == "token_classify":
        tags = value if isinstance(value, list) else str(value).split() if value is not None else []
        return " ".join(map(_name, tags))
    if objective == "regress":
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            raise ValueError(f"is {_short(value)}, not a number") from None
        if not math.isfinite(number):
            raise ValueError(f"is {_short(value)}, not a finite number")
        return repr(number)
    return _name(value)


def _name(value: Any) -> str:
    if isinstance(value, float) and value == value and value == int(value):
        value = int(value)
    if value is None or isinstance(value, (dict, list, float)) or str(value).strip().lower() in ("", "nan"):
        raise ValueError(f"is {_short(value)}, not a class")
    name = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if SEVERAL in name or "\n" in name:
        raise ValueError(f"is {_short(value)}: a class must not hold {SEVERAL!r} or a line end")
    return name


def _short(value: Any) -> str:
    return "empty" if value in (None, "") else str(value)[:40] if isinstance(value, float) else repr(value)[:40]


def classes(objective: str, label: str) -> list[str]:
    """The classes that a label names; of `regress` none."""
    if objective == "regress":
        return []
    return [name for name in label.split(" " if objective == "token_classify" else SEVERAL) if name] if objective != "classify" else [label]


def names(objective: str, labels: Sequence[str]) -> tuple[str, ...]:
    """All classes, numbers in their order, then texts in theirs; of BIO tags O is first."""
    found = {name for label in set(labels) for name in classes(objective, label)}
    number = lambda name: (name != "O", not name.lstrip("-").isdigit(), int(name) if name.lstrip("-").isdigit() else 0, name)
    return tuple(sorted(found, key=number))


def check(objective: str, known: Sequence[str], labels: Sequence[str], where: Sequence[str], trained: str) -> None:
    """Raises ValueError, one line, for a class that `trained` does not have; `where` names the documents."""
    known = set(known)
    for label, place in zip(labels, where):
        for name in classes(objective, label):
            if name not in known:
                raise ValueError(f"{place} has the label {name!r}, which {trained} does not have; it has {', '.join(map(repr, sorted(known)[:10]))}: "
                                 "give examples of it to train on, or take it out")


def targets(objective: str, known: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """float32 [documents, classes]: 1 for the class or classes of a document; of `regress` [documents, 1], the number."""
    if objective == "regress":
        return np.array([[float(label)] for label in labels], np.float32).reshape(-1, 1)
    numbers, out = {name: i for i, name in enumerate(known)}, np.zeros((len(labels), len(known)), np.float32)
    for row, label in enumerate(labels):
        out[row, [numbers[name] for name in classes(objective, label)]] = 1
    return out


def tags(known: Sequence[str], labels: Sequence[str]) -> list[np.ndarray]:
    """Of `token_classify` the number of each word's tag: int32 [words] of each document."""
    numbers = {name: i for i, name in enumerate(known)}
    return [np.array([numbers[name] for name in label.split()], np.int32) for label in labels]


def weights(names: Sequence[str], counts: np.ndarray, given: Mapping[str, float], balance: float) -> np.ndarray:
    """Factor of the loss of each class: float32 [classes].

    Args:
      counts: how often each class occurs in training, at least once.
      given: data.class_weights.
      balance: power of an even share over the class's own, as scikit-learn's "balanced" at 1.

    Raises:
      ValueError: a weight for a class that is not there.
    """
    for name in given:
        if name not in names:
            raise ValueError(f"objective.class_weights names the class {name!r}, which the data do not have; they have {', '.join(map(repr, names[:10]))}")
    even = counts.sum() / (len(names) * counts)
    return (even**balance * np.array([given.get(name, 1.0) for name in names])).astype(np.float32)


def strata(objective: str, labels: Sequence[str]) -> np.ndarray:
    """A number for each document; those of one number are divided between the splits in the same shares: a class or set of classes, or, of numbers, tenths."""
    if objective == "token_classify":
        return np.zeros(len(labels), np.int64)
    if objective == "regress":
        order = np.argsort(np.array([float(label) for label in labels]), kind="stable")
        return (np.argsort(order) * 10 // max(1, len(order))).astype(np.int64)
    return np.unique(np.array(labels, dtype=object).astype(str), return_inverse=True)[1].reshape(-1).astype(np.int64)


def stratified(hashes: np.ndarray, strata: np.ndarray, validation: float, test: float) -> np.ndarray:
    """Split of each document, 0 train, 1 validation, 2 test: uint8 [documents]. In each stratum those with the smallest hashes are held out.

    Documents of one hash (equal texts, also with other labels) stay together, with the stratum of the first of them.
    """
    unique, first, of = np.unique(hashes, return_index=True, return_inverse=True)
    mine, out = strata[first], np.zeros(len(unique), np.uint8)  # `unique` is sorted, so each stratum is in the order of its hashes
    for stratum in np.unique(mine):
        rows = np.flatnonzero(mine == stratum)
        tested, validated = round(len(rows) * test), round(len(rows) * validation)
        out[rows[:tested]] = 2
        out[rows[tested:tested + validated]] = 1
    return out[of.reshape(-1)]
