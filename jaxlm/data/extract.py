"""From the bytes of a page or file to its text: which encoding, and which part of an HTML page is its content."""

import codecs
import re
from typing import Literal

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF16_LE, "utf-16-le"),
         (codecs.BOM_UTF16_BE, "utf-16-be"))  # the longer one first where two begin alike
_DECLARED = re.compile(rb"""charset\s{0,9}=\s{0,9}["']?([A-Za-z0-9_.:-]{2,40})""", re.IGNORECASE)
_XML_DECLARED = re.compile(rb"""<\?xml[^>]{0,200}encoding\s{0,9}=\s{0,9}["']([A-Za-z0-9_.:-]{2,40})""")
_HEAD = 4096  # bytes in which a page declares its encoding (the HTML standard asks for the first 1024)
_SAMPLE = 1 << 16  # bytes that the detector sees
# Browsers read these labels as the larger Windows code page (encoding.spec.whatwg.org), and so were the pages written.
_AS_BROWSERS_DO = {"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "tis-620": "cp874", "gb2312": "gb18030", "gbk": "gb18030"}

_DEEPEST = 2000  # elements within elements; resiliparse's search for the main content takes time in the square of the depth
# Elements that have no end tag, or often none, do not nest.
_TAG = re.compile(r"<(/?)(?!(?:br|img|input|hr|meta|link|area|base|col|embed|source|track|wbr|param|p|li|td|tr|th|dd|dt|option)\b)[a-z]", re.IGNORECASE)


def decode(data: bytes, html: bool) -> tuple[str, str]:
    """The text of `data` and the name of the encoding it was in, as Python's codecs spell it.

    In this order: a byte order mark; UTF-16 without a mark, by its zero bytes; UTF-8 where (nearly) all bytes are valid UTF-8; what an HTML page declares; the
    guess of uchardet (in resiliparse). Bytes that mean nothing in that encoding become U+FFFD.

    Raises:
      ValueError: the detector is needed and not installed.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark):].decode(encoding, "replace"), encoding
    zeros = _utf16(data[:_SAMPLE])
    if zeros:
        return data.decode(zeros, "replace"), zeros
    if b"\x1b$" not in data[:_SAMPLE]:  # ISO-2022 is 7-bit: it would pass for UTF-8
        try:
            return data.decode(), "utf-8"
        except UnicodeDecodeError:
            text = data.decode(errors="replace")
            broken = text.count("\ufffd")
            if len(text) - len(text.encode("ascii", "ignore")) > 10 * broken:  # UTF-8 that was damaged, or cut in a character
                return text, "utf-8"
    declared = _declared(data[:_HEAD]) if html else ""
    if declared:
        try:
            return data.decode(declared), declared
        except UnicodeDecodeError:
            pass
    guess = _known(_detect(data)) or declared or "cp1252"
    return data.decode(guess, "replace"), guess


def _utf16(sample: bytes) -> str:
    """Text in UTF-16 has a zero in every other byte where its characters are Latin."""
    half = len(sample) // 2
    if not half or b"\0" not in sample:
        return ""
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if odd > 0.3 * half and even < 0.02 * half:
        return "utf-16-le"
    return "utf-16-be" if even > 0.3 * half and odd < 0.02 * half else ""


def _declared(head: bytes) -> str:
    match = _DECLARED.search(head) or _XML_DECLARED.search(head)
    encoding = _known(match[1].decode()) if match else ""
    return "" if encoding.startswith(("utf-16", "utf-32")) else encoding  # a declaration that can be read as ASCII is not in UTF-16


def _known(name: str) -> str:
    try:
        info = codecs.lookup(name)
    except (LookupError, ValueError):
        return ""
    if not info._is_text_encoding:  # "rot13", "zlib" and the like are codecs too
        return ""
    return _AS_BROWSERS_DO.get(info.name, info.name)


def _detect(data: bytes) -> str:
    try:
        from resiliparse.parse.encoding import detect_encoding
    except ImportError:
        raise ValueError("text that is not UTF-8 needs a detector of encodings, resiliparse: pip install 'jaxlm[clean]'") from None
    return detect_encoding(data, max_len=_SAMPLE, html5_compatible=False) or ""  # the HTML5 names lose Korean (CP949)


def main_content(page: str, extractor: Literal["resiliparse", "trafilatura"]) -> str:
    """The main content of an HTML page as text, one paragraph a line or more, without menus, comments and scripts; "" where there is none.

    Args:
      page: HTML, however broken.
      extractor: "resiliparse" (Bevendorff et al. 2018; a C++ rule base) or "trafilatura" (Barbaresi 2021); docs/data.md has their F1 and speed.

    Raises:
      ValueError: the extractor is not installed.
    """
    page = page.replace("\0", "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # parsers take no half characters
    return (_resiliparse if extractor == "resiliparse" else _trafilatura)(page)


def _resiliparse(page: str) -> str:
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise ValueError("HTML pages need resiliparse: pip install 'jaxlm[clean]'") from None
    try:
        return extract_plain_text(page, main_content=not _too_deep(page), preserve_formatting=True, alt_texts=False, links=False, comments=False)
    except RuntimeError:  # the parser gave up
        return ""


def _too_deep(page: str) -> bool:
    """Whether a page's elements nest so deeply that it can only be broken or hostile; all of its text is then taken for its content."""
    if page.count("<") < _DEEPEST:
        return False
    depth = 0
    for match in _TAG.finditer(page):
        depth = max(depth - 1, 0) if match[1] else depth + 1
        if depth > _DEEPEST:
            return True
    return False


def _trafilatura(page: str) -> str:
    try:
        import trafilatura
    except ImportError:
        raise ValueError("clean.extract=trafilatura needs trafilatura: pip install 'jaxlm[clean]'") from None
    return trafilatura.extract(page, include_comments=False) or ""
