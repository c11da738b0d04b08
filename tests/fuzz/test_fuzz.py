"""Every reader with damaged and hostile inputs. tools/fuzz.py runs the same for 10,000 and more of them."""

import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import driver, mutate, targets

HEAVY = ("huggingface", "gguf", "http", "packed", "warc", "task")  # models and engines to compile, bombs to unpack
FAST = [name for name in targets.TARGETS if name not in HEAVY]
SETTINGS = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)


def never(name, files):
    found = driver.feed(name, files)
    assert found is None, found


@pytest.fixture(scope="module")
def seeds():
    kept = {}

    def of(name):
        if name not in kept:
            kept[name] = targets.TARGETS[name].seeds()
            driver.feed(name, kept[name][0])  # what is imported and compiled by the first use is no input's own
        return kept[name]

    return of


@pytest.mark.parametrize("name", FAST)
def test_changed_inputs_are_refused_in_one_line_or_harmless(name, seeds):
    @settings(max_examples=8, **SETTINGS)
    @given(st.randoms(use_true_random=False))
    def changed(draw):
        never(name, mutate.mutated(draw, seeds(name)[draw.randrange(len(seeds(name)))], seeds(name)))

    changed()


@settings(max_examples=25, **SETTINGS)
@given(JSON, st.sampled_from([("jsonl", "a.jsonl"), ("chats", "chat.json"), ("chats", "preference.jsonl"), ("labels", "a.jsonl"), ("tokenizer", "tokenizer.json"),
                              ("corpus", "manifest.json"), ("forged", "manifest.json")]))
def test_any_json(value, place):
    never(place[0], {place[1]: json.dumps(value).encode()})


@settings(max_examples=25, **SETTINGS)
@given(st.binary(max_size=300), st.sampled_from([("text", "a.txt"), ("table", "a.csv"), ("parquet", "a.parquet"), ("arrow", "a.arrow"), ("html", "a.html"),
                                                 ("sentencepiece", "tokenizer.model"), ("safetensors", "model.safetensors")]))
def test_any_bytes(data, place):
    never(place[0], {place[1]: data})


@settings(max_examples=25, **SETTINGS)
@given(st.lists(st.sampled_from(["{{ ", " }}", "{% ", " %}", "for m in messages", "endfor", "if ", "endif", "m", ".content", "['role']", " | ", "join", "list", "tojson",
                                 " ~ ", " + ", " * ", "999999999", "'x'", "range(", ")", "(", "set x = ", "macro f()", "endmacro", "f()", "generation", "endgeneration"]),
                max_size=20))
def test_any_template(parts):
    never("template", {"t.jinja": "".join(parts).encode()})


def test_an_input_is_made_again_from_its_number(seeds):
    first, again = ([driver.made("jsonl", number, seeds("jsonl")) for number in range(30)] for _ in range(2))
    assert first == again and len({str(files) for files in first}) > 20


def test_what_is_not_allowed_is_found(monkeypatch, tmp_path):
    """The watch itself: another exception, another's message, a file outside, much memory, much time."""
    monkeypatch.setattr(driver, "SECONDS", 0.02)
    monkeypatch.setattr(driver, "MEMORY", 32 << 20)
    kept = []

    def busy(folder):
        while sum(range(1000)) and len(kept) < 9000:
            kept.append(1)

    faults = {"KeyError": lambda folder: {}["x"], "invalid literal": lambda folder: int("x"), "reached outside": lambda folder: (tmp_path / "x").write_text(""),
              "os.system": lambda folder: os.system("true"), "slow": busy, "large": lambda folder: kept.append(bytearray(b"x" * (400 << 20)))}
    for words, feed in faults.items():
        monkeypatch.setitem(targets.TARGETS, "made", targets.Target(list, feed))
        if words == "large":
            monkeypatch.setattr(driver, "SECONDS", 60)
        found = driver.feed("made", {"a": b""})
        assert found and words in found.what, (words, found)
    monkeypatch.setitem(targets.TARGETS, "made", targets.Target(list, lambda folder: (folder / "b").write_text("")))
    assert driver.feed("made", {"a": b""}) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", targets.TARGETS)
def test_many_changed_inputs(name, seeds):
    """Those that tools/fuzz.py makes first: as many as a quarter of a second of CPU allows, and 5 at least."""
    first, end = len(seeds(name)), time.process_time() + 0.25
    for number in range(first, first + 2000):
        never(name, driver.made(name, number, seeds(name)))
        if time.process_time() > end and number > first + 5:
            break
