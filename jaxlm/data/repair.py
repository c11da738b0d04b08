"""Characters: mojibake undone, and Unicode, line ends and spaces in one form."""

import re
import unicodedata

_CHUNK = 100_000  # characters that ftfy sees at a time; it is meant for lines, and some documents are one line
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# Control characters but tab and line feed; zero-width space, word joiner and byte order mark; soft hyphen; explicit directions; private use; non-characters.
# The zero-width joiners stay: Persian, the Indic scripts and emoji need them. So do the plain direction marks.
_UNWANTED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\ue000-\uf8ff\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff"
                       "\U000f0000-\U0010ffff]|[" + "".join(f"{chr(plane + 0xfffe)}{chr(plane + 0xffff)}" for plane in range(0x10000, 0xf0000, 0x10000)) + "]")
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_BLANK_LINES = re.compile("\n{4,}")


def undo_mojibake(text: str) -> tuple[str, int]:
    """The text with wrongly decoded characters put right ("schÃ¶n" -> "schön"), and the number of lines that changed. Source: ftfy (Speer 2019).

    Raises:
      ValueError: ftfy is not installed.
    """
    try:
        import ftfy
        from ftfy.badness import is_bad
    except ImportError:
        raise ValueError("clean.repair needs ftfy: pip install 'jaxlm[clean]'") from None
    if text.isascii():
        return text, 0
    lines, changed = text.split("\n"), 0
    for i, line in enumerate(lines):
        if line.isascii():
            continue
        pieces = [line[start:start + _CHUNK] for start in range(0, len(line), _CHUNK)]
        fixed = "".join(ftfy.fix_encoding(piece) if is_bad(piece) else piece for piece in pieces)
        changed += fixed != line
        lines[i] = fixed
    return ("\n".join(lines), changed) if changed else (text, 0)


def normalise(text: str) -> tuple[str, int]:
    """One form of every character, line end and space, and the number of characters that were dropped as unwanted.

    Line ends become "\\n", all spaces but the tab become " ", space at the end of a line goes, and so do empty lines at both ends of the text and all but two
    of a run of them (code has two between functions). Space inside a line and before it stays: there it is indentation, a table or a verse. Then Unicode NFC.
    """
    text = _LINE_ENDS.sub("\n", text)
    if _SURROGATES.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    text, dropped = _UNWANTED.subn("", text)
    text = unicodedata.normalize("NFC", _SPACES.sub(" ", text))
    text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])  # a pattern for this would be quadratic in the length of a run of spaces
    return _BLANK_LINES.sub("\n\n\n", text).strip("\n"), dropped
