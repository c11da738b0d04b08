import json
import random

import pytest

from jaxlm.config import CleanConfig
from jaxlm.data import contamination

WORDS = [f"{a}{b}" for a in ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu") for b in ("n", "r", "s", "t", "l")]


def sentence(rng, length):
    return " ".join(rng.choices(WORDS, k=length))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("sets")
    items = {"quiz": [sentence(rng, 30) for _ in range(20)] + ["tiny item", sentence(rng, 8), sentence(rng, 30)],
        "cloze": [sentence(rng, 40) for _ in range(5)]}
    for name, texts in items.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"question": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return items, tuple((name, f"{folder}/{name}.jsonl:question") for name in items)


def test_leaked_items_are_found_by_set_and_number(sets):
    items, places = sets
    find = contamination.finder(CleanConfig(decontaminate=places))
    clean = sentence(random.Random(1), 500)
    assert find(clean) == ("", 0.0, {})
    assert find(f"{clean} {items['quiz'][3]} {clean}") == ("quiz", 1.0, {"decontaminate.quiz:3": 1})
    assert find(items["cloze"][4].upper().replace(" ", ", ")) == ("cloze", 1.0, {"decontaminate.cloze:4": 1})  # case and punctuation do not hide it
    name, overlap, found = find(" ".join(items["quiz"][0].split()[:13]) + " " + items["cloze"][0])
    assert (name, overlap) == ("cloze", 1.0) and found == {"decontaminate.cloze:0": 1, "decontaminate.quiz:0": 1}


def test_thirteen_words_are_enough_and_twelve_are_not(sets):
    items, places = sets
    find = contamination.finder(CleanConfig(decontaminate=places))
    words = items["quiz"][7].split()
    assert find("x " + " ".join(words[5:18]) + " y") == ("quiz", pytest.approx(1 / 18), {"decontaminate.quiz:7": 1})
    assert find("x " + " ".join(words[5:17]) + " y")[0] == ""
    assert find(" ".join(words[:12] + ["x"] + words[12:24]))[0] == ""  # not in one piece


def test_share_that_is_needed(sets):
    items, places = sets
    find = contamination.finder(CleanConfig(decontaminate=places, decontaminate_overlap=0.5))
    words = items["quiz"][7].split()  # 18 n-grams of 13 words
    assert find(" ".join(words[:20]))[0] == "" and find(" ".join(words[:21])) == ("quiz", 0.5, {"decontaminate.quiz:7": 1})


def test_short_items_are_compared_whole_and_tiny_ones_not_at_all(sets):
    items, places = sets
    find = contamination.finder(CleanConfig(decontaminate=places))
    short = items["quiz"][21]
    assert find(f"so {short} it goes") == ("quiz", 1.0, {"decontaminate.quiz:21": 1})
    assert find("so " + " ".join(short.split()[:7]) + " it goes")[0] == ""
    assert find("a tiny item here")[0] == ""


def test_other_lengths(sets):
    items, places = sets
    find = contamination.finder(CleanConfig(decontaminate=places, decontaminate_words=8))
    words = items["cloze"][2].split()
    assert find(" ".join(words[3:11]))[0] == "cloze" and find(" ".join(words[3:10]))[0] == ""


@pytest.mark.parametrize("text", ["", " ", "one", "!?", "a b c d"])
def test_short_documents(sets, text):
    assert contamination.finder(CleanConfig(decontaminate=sets[1]))(text) == ("", 0.0, {})


def test_against_a_plain_search(sets):
    items, places = sets
    find = contamination.finder(CleanConfig(decontaminate=places, decontaminate_words=6))
    rng = random.Random(2)
    for _ in range(60):
        pieces = []
        for _ in range(rng.randint(1, 6)):
            words = rng.choice(items["quiz"]).split()
            start = rng.randrange(len(words))
            pieces += words[start:start + rng.randint(1, 9)] + rng.choices(WORDS, k=rng.randint(0, 3))
        grams = {tuple(pieces[i:i + 6]) for i in range(len(pieces))}
        hit = {f"decontaminate.{name}:{i}": 1 for name, texts in items.items() for i, text in enumerate(texts) if len(text.split()) >= 5
               and any(tuple(text.split()[j:j + 6]) in grams for j in range(len(text.split()) - 5))}
        assert find(" ".join(pieces))[2] == hit


def test_items_found():
    counts = {"pii.email": 3, "decontaminate.quiz:3": 2, "decontaminate.quiz:4": 1, "decontaminate.cloze:0": 1}
    assert contamination.items_found(counts) == {"quiz": 2, "cloze": 1}


@pytest.mark.parametrize("place, words", [("{}/absent.jsonl:question", "does not exist"), ("{}/quiz.jsonl:answer", "no key 'answer'"),
    ("{}/tiny.jsonl:q", "no text of at least 5 words")])
def test_bad_sets_are_one_line(sets, tmp_path, place, words):
    folder = sets[1][0][1].rpartition("/")[0]
    (tmp_path / "tiny.jsonl").write_text('{"q": "too short"}\n')
    with pytest.raises(ValueError, match=words) as caught:
        contamination.finder(CleanConfig(decontaminate=(("quiz", place.format(tmp_path if "tiny" in place else folder)),)))
    assert "\n" not in str(caught.value)


def test_shares_of_items_in_all_documents_together():
    items = ["the quick brown fox jumps over the lazy dog", "too short", "one two three four five six seven", "nothing of this is anywhere at all"]
    documents = ["He said: THE QUICK, brown fox jumps", "over the lazy dog", "and one two three four five six", "fox jumps over the lazy dog."]
    found = contamination.shares(items, documents, words=5)
    assert found == [3 / 5, None, 2 / 3, 0]  # of the first, what lies across two documents is in neither
    assert contamination.shares(["a b c"], documents) == [None] and contamination.shares(items, [], words=5) == [0, None, 0, 0]
    assert contamination.shares(["one two three four five"], ["zero one two three four five"], words=13) == [1], "shorter items are compared whole"
