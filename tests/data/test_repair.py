import random
import sys
import unicodedata

import pytest

from jaxlm.data import repair

GOOD = ["schön", "naïve café — “quoted”", "Привет, мир", "日本語のテキスト", "emoji 👩‍👩‍👧 and ünï", "x² + y² ≤ 10 €", "NÃO É VERDADE", "plain"]


@pytest.mark.parametrize("good", ["schön und größer", "l’été déjà passé", "“quoted” — dash", "Привет, мир", "日本語", "10 € für Ähren"])
@pytest.mark.parametrize("wrong", ["cp1252", "latin-1"])
def test_mojibake_is_undone(good, wrong):
    pytest.importorskip("ftfy")
    try:
        bad = good.encode().decode(wrong)
    except UnicodeDecodeError:
        pytest.skip("cannot have happened: bytes that the code page does not have")
    assert repair.undo_mojibake(f"first line\n{bad}\nlast line") == (f"first line\n{good}\nlast line", 1)


def test_good_text_is_left_alone():
    pytest.importorskip("ftfy")
    text = "\n".join(GOOD)
    assert repair.undo_mojibake(text) == (text, 0)


def test_missing_ftfy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"clean.repair needs ftfy: pip install 'jaxlm\[clean\]'"):
        repair.undo_mojibake("x")


@pytest.mark.parametrize("before, after", [
    ("a\r\nb\rc\u2028d\x85e\x0cf", "a\nb\nc\nd\ne\nf"), ("a \t \nb", "a\nb"), ("\n\n  a\n\n", "  a"), ("a\n\n\nb", "a\n\n\nb"), ("a\n\n\n\nb", "a\n\n\nb"),
    ("a\n \n\n\t\n\nb", "a\n\n\nb"),
    ("a\u00a0b\u2003c\u3000d", "a b c d"), ("e\u0301", "é"), ("\u212b", "\u00c5"), ("a\0b\x1b[0mc\x7f", "ab[0mc"),
    ("soft\u00adhyphen zero\u200bwidth \ufeffmark", "softhyphen zerowidth mark"),
    ("e\u200b\u0301", "é"),  # composed only after what stood between is gone
    ("می\u200cخواهم 👩\u200d👩", "می\u200cخواهم 👩\u200d👩"), ("\ud83d\ude00 \ud800", "😀 \ufffd"), ("\uffff\ufdd0\U0001ffff\ue000", ""),
    ("def f():\n    if x:\n\t\treturn 1  # comment\n\n\ndef g(): pass", "def f():\n    if x:\n\t\treturn 1  # comment\n\n\ndef g(): pass"), ("", "")])
def test_one_form(before, after):
    assert repair.normalise(before)[0] == after


def test_properties_of_normalised_text():
    rng = random.Random(0)
    alphabet = ([chr(i) for i in range(0x250)] + [chr(rng.randrange(0x110000)) for _ in range(2000)] + list("\n\n\n\r \t\u0300\u0301\u0327\u1100\u1161\u11a8"))
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=rng.randrange(200)))
        clean, _ = repair.normalise(text)
        assert unicodedata.is_normalized("NFC", clean)
        assert not [c for c in clean if unicodedata.category(c) in ("Cc", "Cs", "Co", "Zl", "Zp") and c not in "\n\t"]
        assert not [c for c in clean if unicodedata.category(c) == "Zs" and c != " "]
        assert "\n\n\n\n" not in clean and all(line == line.rstrip(" \t") for line in clean.split("\n"))
        assert repair.normalise(clean) == (clean, 0)


def test_every_character_is_decided_on():
    clean, dropped = repair.normalise("".join(f"x{chr(i)}" for i in range(0x110000)))
    kinds = {unicodedata.category(c) for c in set(clean)}
    assert not kinds & {"Cs", "Co", "Zl", "Zp"} and {c for c in clean if unicodedata.category(c) == "Cc"} == {"\n", "\t"}
    assert dropped > 137_000  # private use is most of it
