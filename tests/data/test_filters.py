import collections
import dataclasses
import random

import pytest

from jaxlm.config import FilterConfig
from jaxlm.data import filters

PROSE = ("The committee met on the first day of the month, and it agreed that the report should be sent to all members.\n\n"
         "Several people asked to have more time with the figures; the chair gave them a week, which seemed fair to most.\n\n"
         "\"We will be back,\" said one of them. Nothing else of note happened before lunch.")

# rule -> (threshold, a text that just passes, a text that just does not, the value of that text)
AROUND = {
    "min_characters": (10, "x" * 10, "x" * 9, 9),
    "max_characters": (10, "x" * 10, "x" * 11, 11),
    "min_words": (3, "a b c", "a b", 2),
    "max_words": (3, "a b c", "a b c d", 4),
    "min_mean_word_length": (3.0, "aa bbbb", "aa bbb", 2.5),
    "max_mean_word_length": (3.0, "aa bbbb", "aaa bbbb", 3.5),
    "max_symbols_per_word": (0.5, "a # b ...", "# # … c d", 3 / 5),
    "max_bullet_lines": (0.5, "* a\nb", "* a\n- b\nc", 2 / 3),
    "max_ellipsis_lines": (0.5, "a...\nb", "a...\nb…\nc", 2 / 3),
    "min_alphabetic_words": (0.5, "a 1", "a 1 2", 1 / 3),
    "min_stop_words": (2, "The cat AND", "the the the", 1),
    "max_duplicate_lines": (0.25, "a\nb\nc\na", "a\nb\na", 1 / 3),
    "max_duplicate_line_characters": (0.25, "aa\nbb\ncc\naa", "aa\nb\naa", 2 / 5),
    "max_duplicate_paragraphs": (0.25, "a\n\nb\n\nc\nd\n\na", "a\n \nb\n\na", 1 / 3),
    "max_duplicate_paragraph_characters": (0.25, "aa\n\nbb\n\ncc\n\naa", "aa\n\nb\n\naa", 2 / 5),
    "max_top_2gram": (0.5, "a b c d a b e f", "a b c a b d", 4 / 6),
    "max_top_3gram": (0.5, "a b c 1 2 3 a b c 4 5 6", "a b c x a b c", 6 / 7),
    "max_top_4gram": (0.5, "a b c d 1 2 3 4 a b c d 5 6 7 8", "a b c d x a b c d", 8 / 9),
    **{f"max_duplicate_{n}grams": (0.4, " ".join("abcdefghij"[:n] + "ABCDEFGHIJ"[:n] + "abcdefghij"[:n]), " ".join("abcdefghij"[:n] + "x" + "abcdefghij"[:n]),
        n / (2 * n + 1))
       for n in range(5, 11)},
    "min_sentences": (2, "One. Two!", "Only one at example.com", 0),
    "lorem_ipsum": (1, "lorem", "Lorem ipsum dolor", 1),
    "curly_brackets": (2, "{ a }", "{ { a } }", 2),
    "listed_words": (2, "a badword here", "Badword, and a very-bad thing", 2),
    "min_closed_lines": (0.5, "a.\nb", "a.\nb\nc", 1 / 3),
    "max_short_lines": (0.5, "a\n" + "b" * 31, "a\nc\n" + "b" * 31, 2 / 3),
    "max_newlines_per_word": (0.5, "a\nb", "a\n\nb c", 2 / 3),
    "max_digits": (0.5, "1a", "12a", 2 / 3),
    "max_symbols": (0.5, "a+", "a+(", 2 / 3),
    "max_uppercase": (0.5, "aB1", "aBC", 2 / 3),
}


def rules():
    return [f.name for f in dataclasses.fields(FilterConfig) if not f.name.startswith("drop_")]


def test_every_key_is_a_rule_and_is_tested():
    assert set(rules()) == set(filters.RULES) == set(AROUND)


@pytest.mark.parametrize("rule", AROUND)
def test_a_rule_fires_on_one_side_of_its_threshold(rule):
    threshold, passes, fails, value = AROUND[rule]
    judge = filters.judge(FilterConfig(**{rule: threshold}), ("BADWORD", "very bad"))
    assert judge(passes) is None
    name, measured = judge(fails)
    assert name == f"filter.{rule}" and measured == pytest.approx(value)
    assert filters.judge(FilterConfig())(fails) is None


def test_rules_go_in_the_order_of_the_keys():
    judge = filters.judge(FilterConfig(max_digits=0.1, min_words=5))
    assert judge("1 2 3") == ("filter.min_words", 3.0)
    assert judge("1 2 3 4 5")[0] == "filter.max_digits"


GOPHER = FilterConfig(
    min_words=50, max_words=100_000, min_mean_word_length=3, max_mean_word_length=10, max_symbols_per_word=0.1, max_bullet_lines=0.9, max_ellipsis_lines=0.3,
    min_alphabetic_words=0.8, min_stop_words=2, max_duplicate_lines=0.3, max_duplicate_line_characters=0.2, max_duplicate_paragraphs=0.3,
    max_duplicate_paragraph_characters=0.2, max_top_2gram=0.20, max_top_3gram=0.18, max_top_4gram=0.16, max_duplicate_5grams=0.15, max_duplicate_6grams=0.14,
    max_duplicate_7grams=0.13, max_duplicate_8grams=0.12, max_duplicate_9grams=0.11, max_duplicate_10grams=0.10)


def test_prose_passes_all_of_gopher():
    assert filters.judge(GOPHER)(PROSE) is None
    assert filters.judge(GOPHER)((PROSE + "\n\n") * 2)[0].startswith("filter.max_duplicate")


@pytest.mark.parametrize("text", ["", " ", "\n\n", "a", "a b", "1"])
def test_short_texts_have_figures(text):
    everything = FilterConfig(**{rule: 1e9 if rule.startswith("max_") or not rule.startswith("min_") else 1e-12 for rule in rules() if rule != "listed_words"})
    filters.judge(everything)(text)
    features = filters.Features(text)
    for measure in filters.RULES.values():
        assert 0 <= measure(features) < 1e9


def repeats_by_hand(words):
    total, shares = max(sum(map(len, words)), 1), {}
    for n in range(2, 11):
        grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
        counts = collections.Counter(grams)
        most = max(counts.values(), default=0)
        top = max((most * sum(map(len, gram)) for gram, count in counts.items() if count == most), default=0) if most > 1 else 0
        seen, covered = set(), [False] * len(words)
        for i, gram in enumerate(grams):
            if gram in seen:
                covered[i:i + n] = [True] * n
            seen.add(gram)
        shares[n] = (min(top / total, 1.0), sum(len(word) for word, inside in zip(words, covered) if inside) / total)
    return shares


def test_repeated_ngrams_against_a_plain_count():
    rng = random.Random(0)
    for _ in range(150):
        words = [rng.choice("abcdefgh"[:rng.randint(1, 8)]) * rng.randint(1, 3) for _ in range(rng.randint(0, 60))]
        words += words[rng.randint(0, 5):] if rng.random() < 0.5 else []
        found, expected = filters.Features(" ".join(words)).repeats, repeats_by_hand(words)
        for n in expected:
            assert found[n] == pytest.approx(expected[n], abs=1e-12), (n, words)


@pytest.mark.parametrize("cfg, before, after, counts", [
    (FilterConfig(drop_open_lines=True), "A menu\nA sentence.\n\nHome | About\n\n\"Quoted.\"\nmore...\nIs it?", "A sentence.\n\n\"Quoted.\"\nIs it?",
    {"drop_open_lines": 3}),
    (FilterConfig(drop_short_lines=3), "one two\none two three\n\nx", "one two three", {"drop_short_lines": 2}),
    (FilterConfig(drop_javascript_lines=True), "Enable JavaScript!\nText.", "Text.", {"drop_javascript_lines": 1}),
    (FilterConfig(drop_open_lines=True, drop_short_lines=3), "x\nOne two three.\nTwo.", "One two three.", {"drop_open_lines": 1, "drop_short_lines": 1}),
    (FilterConfig(), "x\n\n\n\ny ", "x\n\n\n\ny ", {}),
    (FilterConfig(drop_open_lines=True), "Fine.\n\n\n\n  Also fine.", "Fine.\n\n\n\n  Also fine.", {})])
def test_lines_are_dropped(cfg, before, after, counts):
    drop = filters.line_filter(cfg)
    text, found = drop(before)
    assert text == after and {name: n for name, n in found.items() if n} == {f"filter.{name}": n for name, n in counts.items()}
    assert drop(text)[0] == text and not any(drop(text)[1].values())


def test_word_lists(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeffalpha\n\n  two words \n--\n", encoding="utf-8")
    assert filters.read_word_list(str(path)) == ("alpha", "two words")
    path.write_text("\n--\n")
    with pytest.raises(ValueError, match="holds no word"):
        filters.read_word_list(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
        filters.read_word_list(str(path))
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
        filters.read_word_list(str(tmp_path / "absent"))
