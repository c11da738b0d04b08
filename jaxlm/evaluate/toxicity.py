"""Whether a text holds a word of a list. It knows no context: what people do to a group and what is said against it look the same to it."""

import pathlib
import re
from collections.abc import Callable, Sequence


def by_words(path: pathlib.Path) -> Callable[[Sequence[str]], list[float]]:
    """A judge: of each text 1 if any word or phrase of the file (one a line, # begins a comment, case does not count) stands in it whole, else 0.

    Raises:
      ValueError: one line: the file cannot be read, or holds no word.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the word list {path} cannot be read: {error}") from None
    words = [r"\s+".join(map(re.escape, line.split())) for line in lines if line]
    if not words:
        raise ValueError(f"the word list {path} holds no word: write one a line")
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(sorted(words, key=len, reverse=True)) + r")(?!\w)", re.IGNORECASE)
    return lambda texts: [float(pattern.search(text) is not None) for text in texts]
