"""Counterfactual swaps: a text as if it were about one group, and as if about another, and how much a classifier's answer changes between the two.

Both versions are made from the text, so that it does not matter which group it is about: each word of the list becomes the first word of its pair in one
version and the second in the other. What differs between the answers is then due to these words alone (Garg et al. 2019, "counterfactual fairness in text
classification"; Dixon et al. 2018).
"""

import difflib
import pathlib
import re
import tomllib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.evaluate import answers

LISTS = pathlib.Path(__file__).with_name("swaps.toml")
# English: after "her", a word of these (or no word) does not begin what belongs to her.
_NO_NOUN = frozenset("a an the and or but to at in on by for of from with as if that than then when while because so after before again about into over up "
                     "down out off away back is was were are be been will would can could has had have did does i you he she it we they who what".split())


class Swap(NamedTuple):
    """Words that are exchanged to ask whether an answer depends on a group."""
    name: str
    groups: tuple[str, str]
    pairs: tuple[tuple[str, str], ...]


class Versions(NamedTuple):
    """The texts that a swap changes."""
    items: np.ndarray  # int64, their numbers
    first: list[str]  # each as if about the first group
    second: list[str]


def find(names: Sequence[str]) -> list[Swap]:
    """The lists of these names: of ours (`swaps.toml`), "FILE.toml" for all of a file, or "FILE.toml:NAME".

    Raises:
      ValueError: one line: no such list or file, or a list that is none.
    """
    found = []
    for given in names:
        path, dot, name = given.partition(".toml")
        place = pathlib.Path(path + dot).expanduser() if dot else LISTS
        name = name.removeprefix(":") if dot else given
        tables = _load(place)
        if name and name not in tables:
            near = difflib.get_close_matches(name, tables, n=1)
            raise ValueError(f"audit.swaps: there is no list {name!r} in {place}" + (f"; did you mean {near[0]!r}?" if near else "") +
                             f" It has {', '.join(tables)}")
        found += [_swap(place, one, tables[one]) for one in ([name] if name else tables)]
    return found


def _load(place: pathlib.Path) -> dict[str, Any]:
    try:
        return tomllib.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"audit.swaps: {place} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"audit.swaps: {place} is not TOML: {error}") from None


def _swap(place: pathlib.Path, name: str, table: Any) -> Swap:
    texts = lambda value: isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) and one.strip() for one in value)
    ok = isinstance(table, dict) and set(table) == {"groups", "pairs"} and texts(table["groups"]) and isinstance(table["pairs"], list) and table["pairs"]
    if not ok or not all(texts(pair) for pair in table["pairs"]):
        raise ValueError(f"audit.swaps: list {name} in {place} must have groups = [\"one\", \"other\"] and pairs = [[\"word\", \"its partner\"], ...]")
    return Swap(name, tuple(table["groups"]), tuple(tuple(pair) for pair in table["pairs"]))


def versions(swap: Swap, texts: Sequence[str]) -> Versions:
    """Both versions of each text that holds a word of the list; the case of a word stays: "He", "HE" and "he" become "She", "SHE" and "she"."""
    partner = [{pair[1 - side].lower(): pair[side] for pair in reversed(swap.pairs)} for side in (0, 1)]
    words = sorted({re.escape(word) for pair in swap.pairs for word in pair}, key=len, reverse=True)
    pattern = re.compile(rf"\b({'|'.join(words)})\b(?=([ \t]+\w+)?)", re.IGNORECASE)

    def as_if(side: int, text: str) -> str:
        def one(match: re.Match) -> str:
            word, after = match[1].lower(), (match[2] or "").strip().lower()
            if word == "her" and partner[side].get("her") == "his" and (not after or after in _NO_NOUN):
                return _cased(match[1], "him")
            return _cased(match[1], partner[side].get(word, match[1]))
        return pattern.sub(one, text)

    both = [(as_if(0, text), as_if(1, text)) for text in texts]
    chosen = [i for i, (a, b) in enumerate(both) if a != b]
    return Versions(np.array(chosen, np.int64), [both[i][0] for i in chosen], [both[i][1] for i in chosen])


def _cased(like: str, word: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[0].upper() + word[1:] if like[0].isupper() else word


def result(first: np.ndarray, second: np.ndarray, names: Sequence[str], *, multi_label: bool, bootstrap: int
           ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of the two versions' answers, and the columns behind them.

    Args:
      first, second: `[texts, classes]` probabilities, or `[texts, 1]` numbers (then `names` is empty).
      names: of the classes.
      multi_label: several classes of a text may be right.

    Returns:
      Metric -> figures: `flips` and `change` (of several labels their mean; of numbers their mean absolute difference, and no flips), and "shift/CLASS": of two
      classes that exclude each other that of the second alone, since the other's is its opposite; of numbers "shift". And metric -> `[texts, 2]`.
    """
    one = np.ones(len(first))
    gap = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    columns = {"change": np.abs(gap).sum(axis=1) / (len(names) if multi_label else 2 if names else 1)}
    if names:
        said = (lambda probs: probs > 0.5) if multi_label else (lambda probs: probs.argmax(axis=1)[:, None])
        columns = {"flips": (said(first) != said(second)).any(axis=1).astype(np.float64)} | columns
    shown = range(len(names))[1:] if len(names) == 2 and not multi_label else range(len(names))
    columns |= {f"shift/{names[i]}": gap[:, i] for i in shown} if names else {"shift": gap[:, 0]}
    pairs = {name: np.stack([values, one], axis=1) for name, values in columns.items()}
    return {name: answers.figures(values, name.partition("/")[0], bootstrap) for name, values in pairs.items()}, pairs
