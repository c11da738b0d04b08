import random
import sys

import pytest

from jaxlm.data import extract

pytest.importorskip("resiliparse")
GERMAN = "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt. Größe, Übermut, Äpfel. " * 4
RUSSIAN = "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью. " * 6
KOREAN = "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며. " * 3
JAPANESE = "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。" * 6
PAGE = """<!doctype html><html><head><meta charset="{charset}"><title>T</title><style>p {{color: red}}</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About</a></li></ul></nav>
<script>var x = "tracking";</script>
<article><h1>A heading</h1>{paragraphs}</article>
<div class="comments"><p>First comment!</p></div><footer><p>Copyright notice, all rights reserved</p></footer></body></html>"""
PARAGRAPHS = ["The first paragraph says something of some length, so that an extractor takes it for content and not for a menu.",
              "The second one &amp; its entity go on for a while: it has commas, clauses, and a full stop at its end.",
              "A third paragraph closes the article with a sentence that is, again, long enough to be taken for prose."]


def page(paragraphs=PARAGRAPHS, charset="utf-8"):
    return PAGE.format(charset=charset, paragraphs="".join(f"<p>{p}</p>" for p in paragraphs))


@pytest.mark.parametrize("text, encoding, expected", [
    (GERMAN, "utf-8", "utf-8"), (GERMAN, "utf-8-sig", "utf-8"), (GERMAN, "utf-16", "utf-16-le"), (GERMAN, "utf-16-be", "utf-16-be"),
    (GERMAN, "utf-16-le", "utf-16-le"),
    (GERMAN, "utf-32", "utf-32-le"), (GERMAN, "cp1252", None), (RUSSIAN, "cp1251", None), (RUSSIAN, "koi8-r", None), (JAPANESE, "shift_jis", None),
    (JAPANESE, "euc_jp", None), (JAPANESE, "iso2022_jp", None), (KOREAN, "euc_kr", None), ("plain ASCII", "ascii", "utf-8"), ("", "ascii", "utf-8"),
    ("x", "ascii", "utf-8")])
def test_encodings_are_told_from_the_bytes_alone(text, encoding, expected):
    decoded, name = extract.decode(text.encode(encoding), html=False)
    assert decoded == text and (expected is None or name == expected)


@pytest.mark.parametrize("charset, encoding", [("windows-1251", "cp1251"), ("KOI8-R", "koi8-r"), ("ISO-8859-5", "iso8859-5"), ("utf-16", "utf-8")])
def test_pages_declare_their_encoding(charset, encoding):
    """A few words are too little for a detector; and a page that can be read as ASCII is not in UTF-16 whatever it says."""
    html = page(["Совесть"], charset)
    assert extract.decode(html.encode(encoding), html=True)[0] == html


def test_a_declaration_that_lies_loses():
    html = page([GERMAN], "shift_jis")
    assert extract.decode(html.encode(), html=True) == (html, "utf-8")  # valid UTF-8 with umlauts is no accident
    assert extract.decode(page([GERMAN], "us-ascii").encode("cp1252"), html=True)[0] == page([GERMAN], "us-ascii")  # read as browsers do
    for nonsense in ("rot13", "klingon", "zlib", "hex"):
        assert extract.decode(page([GERMAN], nonsense).encode("cp1252"), html=True)[0] == page([GERMAN], nonsense)


def test_damaged_utf8_is_utf8():
    assert extract.decode(GERMAN.encode()[:-300] + b"\xff" + RUSSIAN.encode()[:101], html=False)[0].count("\ufffd") == 2
    damaged = page([GERMAN], "iso-8859-1").encode() + b"\xff"
    assert extract.decode(damaged, html=True) == (page([GERMAN], "iso-8859-1") + "\ufffd", "utf-8")
    assert extract.decode("é".encode("cp1252"), html=False) == ("é", "cp1252")


def test_any_bytes_become_text():
    rng = random.Random(0)
    for size in [0, 1, 2, 3, 7, 100, 5000] * 5:
        for html in (False, True):
            given = rng.randbytes(size)
            text, _ = extract.decode(given, html)
            assert text.encode().decode() == text and len(text) <= size and bool(text) == bool(given), given  # no half characters, nothing made up


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_content_without_menus_scripts_and_comments(extractor):
    pytest.importorskip(extractor)
    text = extract.main_content(page(), extractor)
    lines = [line for line in text.split("\n") if line.strip()]
    for paragraph in PARAGRAPHS:
        assert paragraph.replace("&amp;", "&") in lines  # each paragraph a line of its own
    assert not any(word in text for word in ("tracking", "Home", "color", "comment!", "<p>", "all rights"))


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
@pytest.mark.parametrize("html", ["", " ", "<", "<html>", "<p>", "\0", "\ud800<p>half \udfff</p>", "<!-- " + "x" * 1000, "<div>" * 20_000,
    "<div>x" * 20_000 + "</div>" * 20_000, "<a " * 20_000,
                                  "<script>var x = 1;</script>", "<table><tr><td>" * 500, "&#0;&#xD800;&bogus;", "<p>" + "word " * 100_000])
def test_broken_pages_give_text_or_nothing(extractor, html):
    pytest.importorskip(extractor)
    extract.main_content(html, extractor).encode()


@pytest.mark.parametrize("package, call, words", [
    ("resiliparse", lambda: extract.main_content("<p>x</p>", "resiliparse"), "HTML pages need resiliparse"),
    ("resiliparse", lambda: extract.decode(b"\xe4\xf6\xfc", html=False), "not UTF-8"),
    ("trafilatura", lambda: extract.main_content("<p>x</p>", "trafilatura"), "needs trafilatura")])
def test_missing_packages_are_named_in_one_line(monkeypatch, package, call, words):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "pip install 'jaxlm[clean]'" in str(caught.value) and "\n" not in str(caught.value)
