"""Rules of quality: each measures one figure of a document and compares it with its threshold in FilterConfig, which names the papers."""

import collections
import dataclasses
import functools
import re
import unicodedata
from collections.abc import Callable, Iterable

import numpy as np

from jaxlm.config import FilterConfig

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Rae et al. 2021, appendix A1.1
_SENTENCE_MARKS = (".", "!", "?", "。", "！", "？", "।", "؟", "۔")
_CLOSERS = ("\"", "'", "”", "’", "»", "」", "』", ")")  # may follow the mark
_ELLIPSES = ("...", "…")
_BULLETS = ("•", "‣", "◦", "▪", "●", "○", "■", "□", "–", "-", "*", "·")
_SHORT_LINE = 30  # characters; Penedo et al. 2024
# Each looks at no more than two characters ahead, so that a long run of marks costs linear time.
_SENTENCE_END = re.compile(r"[.!?](?=[\"'”’»)]?(?:\s|$))|[。！？।؟۔]")
_PARAGRAPHS = re.compile(r"\n[ \t\r]*(?=\n)")
_LETTER = re.compile(r"[^\W\d_]")
_JAVASCRIPT = re.compile("javascript", re.IGNORECASE)
_LOREM_IPSUM = re.compile("lorem ipsum", re.IGNORECASE)
_TOKEN = re.compile(r"\w+")


class Features:
    """What the rules measure in a text; each part is made once, when the first rule asks for it."""

    def __init__(self, text: str, word_list: frozenset[tuple[str, ...]] = frozenset()):
        self.text, self.word_list = text, word_list

    @functools.cached_property
    def words(self) -> list[str]:
        """What stands between white space."""
        return self.text.split()

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Each different word and its number."""
        return {word: i for i, word in enumerate(dict.fromkeys(self.words))}

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """int64 [words]: number of each word."""
        return np.fromiter(map(self.vocabulary.__getitem__, self.words), np.int64, len(self.words))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [words]: characters of each word."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """int64 [words + 1]: characters of the words before each place."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @functools.cached_property
    def lines(self) -> list[str]:
        """Lines that hold something, without white space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        """What stands between empty lines, likewise."""
        return [paragraph for paragraph in map(str.strip, _PARAGRAPHS.split(self.text)) if paragraph]

    @functools.cached_property
    def characters(self) -> collections.Counter:
        """How often each Unicode category occurs ("Nd", "Lu", ...; white space is "Z")."""
        totals = collections.Counter()
        for character, count in collections.Counter(self.text).items():
            totals["Z" if character.isspace() else unicodedata.category(character)] += count
        return totals

    @functools.cached_property
    def repeats(self) -> dict[int, tuple[float, float]]:
        """Of n-grams of 2 to 10 words: shares of the words' characters that lie in the commonest one, and in any that came before."""
        return _repeats(self.ids, self.ends)


def _repeats(ids: np.ndarray, ends: np.ndarray) -> dict[int, tuple[float, float]]:
    """An n-gram occurs twice only where both of its (n-1)-grams do, so there is ever less to sort; the comparison is exact."""
    count, total = len(ids), max(int(ends[-1]), 1)
    shares = dict.fromkeys(range(2, 11), (0.0, 0.0))
    places, group, groups = np.flatnonzero(np.bincount(ids)[ids] > 1), ids, count  # places of repeated words; number of the (n-1)-gram at each place
    for n in range(2, 11):
        places = places[:-1][np.diff(places) == 1]
        codes = group[places] * groups + group[places + 1]
        order = np.argsort(codes, kind="stable")
        new = np.diff(codes[order], prepend=-1) != 0
        starts = np.flatnonzero(new)
        sizes = np.diff(starts, append=len(order))
        if not len(sizes) or sizes.max() == 1:
            break
        numbers = np.cumsum(new) - 1
        earlier = places[order[~new]]  # the sort is stable: the first of each group is its first place
        often = places[order[starts[sizes == sizes.max()]]]
        top = int(sizes.max() * (ends[often + n] - ends[often]).max())
        shares[n] = (min(top / total, 1.0), _covered(earlier, n, ends) / total)
        repeated = sizes[numbers] > 1
        group, groups = np.zeros(count, np.int64), len(sizes)
        group[places[order]] = numbers
        places = np.sort(places[order[repeated]])
    return shares


def _covered(places: np.ndarray, n: int, ends: np.ndarray) -> int:
    """Characters of the words that lie in an n-gram that begins at one of the places; each counts once."""
    steps = np.bincount(places, minlength=len(ends)) - np.bincount(places + n, minlength=len(ends))
    return int(np.diff(ends)[np.cumsum(steps)[:-1] > 0].sum())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _duplicates(items: list[str]) -> float:
    return _share(len(items) - len(set(items)), len(items))


def _duplicate_characters(items: list[str]) -> float:
    total = sum(map(len, items))
    return _share(total - sum(map(len, set(items))), total)


def _lines(f: Features, condition: Callable[[str], bool]) -> float:
    return _share(sum(map(condition, f.lines)), len(f.lines))


def _symbols_per_word(f: Features) -> float:
    return _share(f.text.count("#") + sum(map(f.text.count, _ELLIPSES)), len(f.words))


def _alphabetic_words(f: Features) -> float:
    has_letter = np.fromiter((bool(_LETTER.search(word)) for word in f.vocabulary), bool, len(f.vocabulary))
    return _share(float(has_letter[f.ids].sum()), len(f.words))


def _stop_words(f: Features) -> float:
    return float(sum(any(form in f.vocabulary for form in (word, word.capitalize(), word.upper())) for word in STOP_WORDS))


def closed(line: str) -> bool:
    """Whether a line ends in a sentence mark, a closing quotation mark after it allowed, and not in an ellipsis."""
    return line.endswith((*_SENTENCE_MARKS, *_CLOSERS[:-1])) and not line.endswith(_ELLIPSES) or line.endswith(".)")


def _listed_words(f: Features) -> float:
    tokens = _TOKEN.findall(f.text.lower())
    return float(sum(sum(gram in f.word_list for gram in zip(*(tokens[i:] for i in range(n))))
                     for n in {len(entry) for entry in f.word_list}))


def _symbols(f: Features) -> float:
    return _share(sum(count for kind, count in f.characters.items() if kind[0] in "PS"), len(f.text))


def _uppercase(f: Features) -> float:
    return _share(f.characters["Lu"], sum(count for kind, count in f.characters.items() if kind[0] == "L"))


# What each key of FilterConfig measures; "min_..." and "max_..." say which side of the threshold is bad, the others remove from the threshold on.
RULES: dict[str, Callable[[Features], float]] = {
    "min_characters": lambda f: len(f.text),
    "max_characters": lambda f: len(f.text),
    "min_words": lambda f: len(f.words),
    "max_words": lambda f: len(f.words),
    "min_mean_word_length": lambda f: _share(f.ends[-1], len(f.words)),
    "max_mean_word_length": lambda f: _share(f.ends[-1], len(f.words)),
    "max_symbols_per_word": _symbols_per_word,
    "max_bullet_lines": lambda f: _lines(f, lambda line: line.startswith(_BULLETS)),
    "max_ellipsis_lines": lambda f: _lines(f, lambda line: line.endswith(_ELLIPSES)),
    "min_alphabetic_words": _alphabetic_words,
    "min_stop_words": _stop_words,
    "max_duplicate_lines": lambda f: _duplicates(f.lines),
    "max_duplicate_line_characters": lambda f: _duplicate_characters(f.lines),
    "max_duplicate_paragraphs": lambda f: _duplicates(f.paragraphs),
    "max_duplicate_paragraph_characters": lambda f: _duplicate_characters(f.paragraphs),
    "max_top_2gram": lambda f: f.repeats[2][0],
    "max_top_3gram": lambda f: f.repeats[3][0],
    "max_top_4gram": lambda f: f.repeats[4][0],
    "max_duplicate_5grams": lambda f: f.repeats[5][1],
    "max_duplicate_6grams": lambda f: f.repeats[6][1],
    "max_duplicate_7grams": lambda f: f.repeats[7][1],
    "max_duplicate_8grams": lambda f: f.repeats[8][1],
    "max_duplicate_9grams": lambda f: f.repeats[9][1],
    "max_duplicate_10grams": lambda f: f.repeats[10][1],
    "min_sentences": lambda f: sum(1 for _ in _SENTENCE_END.finditer(f.text)),
    "lorem_ipsum": lambda f: len(_LOREM_IPSUM.findall(f.text)),
    "curly_brackets": lambda f: f.text.count("{"),
    "listed_words": _listed_words,
    "min_closed_lines": lambda f: _lines(f, closed),
    "max_short_lines": lambda f: _lines(f, lambda line: len(line) <= _SHORT_LINE),
    "max_newlines_per_word": lambda f: _share(f.text.count("\n"), len(f.words)),
    "max_digits": lambda f: _share(f.characters["Nd"], len(f.text)),
    "max_symbols": _symbols,
    "max_uppercase": _uppercase,
}


def judge(cfg: FilterConfig, word_list: Iterable[str] = ()) -> Callable[[str], tuple[str, float] | None]:
    """A function from a text to the first rule that it breaks, as ("filter.min_words", 12.0), or None. Rules are tried in the order of FilterConfig.

    Args:
      cfg: the thresholds; 0 is off.
      word_list: words and phrases for `listed_words`, compared without regard to case and punctuation.
    """
    entries = frozenset(tuple(_TOKEN.findall(entry.lower())) for entry in word_list)
    rules = [(name, threshold, RULES[name]) for name, threshold in dataclasses.asdict(cfg).items() if threshold and not name.startswith("drop_")]

    def broken(text: str) -> tuple[str, float] | None:
        features = Features(text, entries)
        for name, threshold, measure in rules:
            value = float(measure(features))
            if value < threshold if name.startswith("min_") else value > threshold if name.startswith("max_") else value >= threshold:
                return f"filter.{name}", value
        return None

    return broken


def line_filter(cfg: FilterConfig) -> Callable[[str], tuple[str, dict[str, int]]]:
    """A function from a text to what its lines leave, and how many lines each "filter.drop_..." rule removed. Of empty lines one stays."""
    rules: dict[str, Callable[[str], bool]] = {}
    if cfg.drop_open_lines:
        rules["filter.drop_open_lines"] = lambda line: not closed(line)
    if cfg.drop_short_lines:
        rules["filter.drop_short_lines"] = lambda line: len(line.split()) < cfg.drop_short_lines
    if cfg.drop_javascript_lines:
        rules["filter.drop_javascript_lines"] = lambda line: bool(_JAVASCRIPT.search(line))

    def drop(text: str) -> tuple[str, dict[str, int]]:
        counts = dict.fromkeys(rules, 0)
        if not rules:
            return text, counts
        kept: list[str] = []
        for line in text.split("\n"):
            bare = line.strip()
            name = next((name for name, bad in rules.items() if bad(bare)), None) if bare else None
            if name:
                counts[name] += 1
            else:
                kept.append(line)
        if not any(counts.values()):
            return text, counts
        kept = [line for line, before in zip(kept, ["", *kept]) if line.strip() or before.strip()]
        return "\n".join(kept).strip("\n"), counts

    return drop


def read_word_list(path: str) -> tuple[str, ...]:
    """The entries of a word list, one a line.

    Raises:
      ValueError: it cannot be read, or holds no word.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = tuple(entry for entry in map(str.strip, file) if _TOKEN.search(entry))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"clean.word_list={path!r} cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or 'not UTF-8'}): "
                         "write one word or phrase a line") from None
    if not entries:
        raise ValueError(f"clean.word_list={path!r} holds no word: write one word or phrase a line")
    return entries
