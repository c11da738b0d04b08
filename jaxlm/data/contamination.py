"""Whether a document holds text of an evaluation set: overlap of word n-grams, as GPT-3 (Brown et al. 2020, appendix C) measured it."""

import collections
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jaxlm.config import CleanConfig, DataConfig
from jaxlm.data import corpora, extract

_WORD = re.compile(r"\w+")
_SHORTEST = 5  # words; what is shorter ("He said no.") stands anywhere by chance and is not looked for
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing


def finder(clean: CleanConfig) -> Callable[[str], tuple[str, float, dict[str, int]]]:
    """A function from a text to (name of the set that it is contaminated with or "", share of the item's n-grams, {"decontaminate.NAME:ITEM": 1, ...}).

    Words are runs of letters and digits, in lower case. An item of fewer than `decontaminate_words` words is compared whole, one of fewer than 5 not at all.
    Items are numbered from 0 through all files of a name. Where several sets are hit, the set with the largest share removes the document.

    Raises:
      ValueError: one line: a file or field that cannot be read, or no item of 5 words.
    """
    vocabulary: dict[str, int] = {}
    items: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for name, place in clean.decontaminate:
        path, _, field = place.rpartition(":")
        for document in corpora.documents(DataConfig(source=(path,), text_key=field)):
            text = document.text if isinstance(document.text, str) else extract.decode(document.text, document.html)[0]
            words = _WORD.findall(text.lower())
            items[name].append(np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words], np.uint64))
    index, owners, sizes, names = _index(items, clean.decontaminate_words)
    lengths = sorted(index)

    def find(text: str) -> tuple[str, float, dict[str, int]]:
        ids = np.array([vocabulary.get(word, 0) for word in _WORD.findall(text.lower())], np.uint64)
        hits = collections.Counter()
        for length in lengths:
            hashes, (known, starts) = np.unique(_hashes(ids, length)), index[length]
            for found in np.flatnonzero(np.isin(known, hashes, assume_unique=True)):
                hits.update(owners[length][starts[found]:starts[found + 1]].tolist())
        shares = {item: count / sizes[item] for item, count in hits.items() if count / sizes[item] >= clean.decontaminate_overlap}
        if not shares:
            return "", 0.0, {}
        worst = max(shares, key=lambda item: (shares[item], -item))
        return names[worst].partition(":")[0], shares[worst], {f"decontaminate.{names[item]}": 1 for item in sorted(shares)}

    return find


def shares(items: Sequence[str], documents: Iterable[str], words: int = 13) -> list[float | None]:
    """Of each item the share of its different word n-grams that stand in any of the documents; None for an item of fewer than 5 words.

    Args:
      words: length of the n-grams (GPT-3: 13); items that are shorter are compared whole.
    """
    vocabulary: dict[str, int] = {}
    texts = [np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in _WORD.findall(item.lower())], np.uint64) for item in items]
    if all(len(ids) < _SHORTEST for ids in texts):
        return [None] * len(items)
    index, owners, sizes, names = _index({"items": texts}, words)
    seen = {length: np.zeros(len(known), bool) for length, (known, _) in index.items()}
    for text in documents:
        ids = np.array([vocabulary.get(word, 0) for word in _WORD.findall(text.lower())], np.uint64)
        for length, (known, _) in index.items():
            if len(hashes := np.unique(_hashes(ids, length))):
                seen[length] |= np.isin(known, hashes, assume_unique=True)
    found = np.zeros(len(sizes))
    for length, (_, starts) in index.items():
        np.add.at(found, owners[length], np.repeat(seen[length], np.diff(starts)))
    by_item = {int(name.rpartition(":")[2]): count / size for name, count, size in zip(names, found.tolist(), sizes)}
    return [by_item.get(i) for i in range(len(items))]


def items_found(counts: Mapping[str, int]) -> dict[str, int]:
    """From the counts of all documents, added up, to the number of different items of each evaluation set that were found."""
    return dict(collections.Counter(key.removeprefix("decontaminate.").partition(":")[0] for key in counts if key.startswith("decontaminate.") and ":" in key))


def _index(items: Mapping[str, list[np.ndarray]], n: int):
    """For each length of n-gram: its different hashes, sorted, with where its items' numbers begin; these numbers; items' n-grams; names."""
    grams, sizes, names = collections.defaultdict(list), [], []
    for name, texts in items.items():
        before = len(sizes)
        for i, ids in enumerate(texts):
            if len(ids) < _SHORTEST:
                continue
            hashes = np.unique(_hashes(ids, min(n, len(ids))))
            grams[min(n, len(ids))].append((hashes, np.full(len(hashes), len(sizes))))
            sizes.append(len(hashes))
            names.append(f"{name}:{i}")
        if len(sizes) == before:
            raise ValueError(f"clean.decontaminate: {name} has no text of at least {_SHORTEST} words: name the field that holds the question or passage")
    index, owners = {}, {}
    for length, pairs in grams.items():
        hashes, numbers = (np.concatenate(part) for part in zip(*pairs))
        order = np.lexsort((numbers, hashes))
        known, starts = np.unique(hashes[order], return_index=True)
        index[length], owners[length] = (known, np.append(starts, len(order))), numbers[order]
    return index, owners, sizes, names


def _hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """uint64 hashes of the n-grams of word numbers without an unknown word (0); 64 bits, so that none of a million n-grams meets one of 10^12 by chance."""
    count = len(ids) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    unknown = np.concatenate([[0], np.cumsum(ids == 0)])
    starts = np.flatnonzero(unknown[n:] == unknown[:-n])
    hashes = np.zeros(len(starts), np.uint64)
    for i in range(n):
        hashes = (hashes ^ ids[starts + i]) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes
