"""Task files: what they mean, what is wrong with them, and the catalogue on the real files where these are here."""

import gzip
import hashlib
import json
import pathlib

import pytest

from jaxlm.evaluate import definition, sources

REAL = pathlib.Path("/work/shared/data/eval")
TASK = """
[questions]
kind = "choice"
prompt = "Q: {question}\\nA:"
metrics = ["acc"]
licence = "CC0-1.0"
get = "make it yourself"
[[questions.from]]
file = "q.jsonl"
examples = "train.jsonl"
"""
GOOD = {"question": "2 + 2?", "choices": ["four", "five"], "target": 0}


def write(folder, task=TASK, *records, name="q.jsonl"):
    (folder / "tasks.toml").write_text(task)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records or (GOOD,)))
    return str(folder / "tasks.toml")


def read(folder, task=TASK, *records, shots=0, name="q.jsonl"):
    [found] = definition.find([write(folder, task, *records, name=name)])
    return sources.read(found, [], shots=shots)


def test_an_item(tmp_path):
    [item] = read(tmp_path).items
    assert item.contexts == ("Q: 2 + 2?\nA:",) * 2 and item.continuations == (" four", " five") and item.right == 0


@pytest.mark.parametrize("target, right", [(1, 1), ("1", 1), ("B", 1), ("five", 1), (True, 1), ("a", 0)])
def test_a_target_is_a_number_a_letter_or_a_text(tmp_path, target, right):
    assert read(tmp_path, TASK, GOOD | {"target": target}).items[0].right == right


def test_fields_are_found_in_records(tmp_path):
    task = TASK.replace('examples = "train.jsonl"', """first = 1
[questions.from.fields]
question = { at = "meta.text", find = "ask: (.*)", replace = [["\\\\?", "!"]] }
choices = "answers.*.text"
target = { at = "key", find = "\\\\d" }
""")
    record = {"meta": {"text": "ask: who?"}, "answers": [{"text": "he"}, {"text": "she"}], "key": "answer2"}
    [item] = read(tmp_path, task, record).items
    assert item.contexts[0] == "Q: who!\nA:" and item.choices == ("he", "she") and item.right == 1
    two = task.replace('"answers.*.text"', '["answers.0.text", "meta.text"]')
    assert read(tmp_path, two, record).items[0].choices == ("he", "ask: who?")
    every = task.replace('"answers.*.text"', '{ at = "meta.text", find = "\\\\w+", all = true }')
    assert read(tmp_path, every, record).items[0].choices == ("ask", "who")


def test_the_context_may_hold_the_choice(tmp_path):
    task = TASK.replace("Q: {question}\\nA:", "{choice} is").replace('kind = "choice"', 'kind = "choice"\ncontinuation = " {question}"')
    [item] = read(tmp_path, task).items
    assert item.contexts == ("four is", "five is") and item.continuations == (" 2 + 2?",) * 2


def test_examples_stand_before_each_prompt(tmp_path):
    write(tmp_path, TASK, GOOD | {"question": "1 + 4?", "target": "five"}, name="train.jsonl")
    found = read(tmp_path, shots=1)
    [item] = definition.with_examples(definition.find([str(tmp_path / "tasks.toml")])[0], found.items, found.examples, 1)
    assert item.contexts[0] == "Q: 1 + 4?\nA: five\n\nQ: 2 + 2?\nA:" and item.right == 0
    with pytest.raises(ValueError, match="has 1 examples and --shots=2 needs more"):
        definition.with_examples(definition.find([str(tmp_path / "tasks.toml")])[0], found.items, found.examples, 2)


@pytest.mark.parametrize("name, content, source", [
    ("q.json", json.dumps([{"a": "1"}, {"a": "2"}]), {}), ("q.jsonl.gz", gzip.compress(b'{"a": "1"}\n\n{"a": "2"}\n'), {}),
    ("q.csv", 'a,b\n1,"x\ny"\n2,z\n', {}),
    ("q.tsv", 'a\tb\n1\t"\n2\tz\n', {})], ids=lambda x: str(x)[:10])
def test_forms_of_files(name, content, source):
    data = content if isinstance(content, bytes) else content.encode()
    assert [record["a"] for record in sources.records_of(pathlib.Path(name), data)] == ["1", "2"]


def test_blocks_of_lines_and_parts_of_a_text():
    lines = definition.Source(file="x.txt", lines=2)
    assert sources.records_of(pathlib.Path("x.txt"), b"a\nb\r\nc\nd", lines) == [{"0": "a", "1": "b"}, {"0": "c", "1": "d"}]
    with pytest.raises(ValueError, match="has 3 lines, and an item is 2 lines"):
        sources.records_of(pathlib.Path("x.txt"), b"a\nb\nc\n", lines)
    parts = sources.records_of(pathlib.Path("x.txt"), b" \n = A = \n one\n = B = \n two", definition.Source(file="x.txt", split="(?=\n = )"))
    assert [part["text"] for part in parts] == ["\n = A = \n one", "\n = B = \n two"]


@pytest.mark.parametrize("change, message", [
    (("kind = \"choice\"\n", ""), "no key 'kind'"), (('prompt = "Q: {question}\\nA:"\n', ""), "no key 'prompt', which a task of kind 'choice' needs"),
    (('licence = "CC0-1.0"\n', ""), "no key 'licence'"), (('file = "q.jsonl"', ""), "either 'file' or 'tfds'"),
    (("metrics", "metric"), "did you mean 'metrics'"),
    (('["acc"]', '["f1"]'), "metric 'f1' does not go with kind=choice; its metrics: acc, acc_norm"), (('"choice"', '"choise"'), "kind='choise' is not known"),
    (("[questions]", "[questions"), "is not TOML"), (('["acc"]', '"acc"'), "must be a list"),
    (('file = "q', 'fields = { choices = "c", target = "t" }\nfile = "q'),
     "no field 'question', which the task's prompt"), (('file = "q', 'fields = { target = { at = "t", find = "(" } }\nfile = "q'), "not a regular expression"),
    (("[questions]\n", "[questions]\nshots = -1\n"), "shots=-1 is too small"), (("[questions]\n", "[questions]\nshots = 'x'\n"), "must be a whole number")],
    ids=lambda x: str(x)[:30])
def test_what_is_wrong_with_a_task_file_is_one_line(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, TASK.replace(*change))
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("record, message", [
    ({"target": 2}, "the target is choice 2, and there are 2 choices, numbered from 0"), ({"target": -1}, "the target is choice -1"),
    ({"target": "C"}, "is none of the 2 choices"),
    ({"target": None}, "is not the number"), ({"choices": ["one"]}, "1 choices; at least 2"), ({"choices": ["one", " "]}, "is empty"),
    ({"question": ["x"]}, "not text")], ids=str)
def test_what_is_wrong_with_an_item_is_one_line(tmp_path, record, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, TASK, GOOD, GOOD | record)
    assert "q.jsonl, item 1" in str(raised.value) and "\n" not in str(raised.value)
    (tmp_path / sources.SUMS).unlink()
    missing = {key: value for key, value in GOOD.items() if key != next(iter(record))}
    with pytest.raises(ValueError, match=f"item 1: no field {next(iter(record))!r}"):
        read(tmp_path, TASK, GOOD, missing)


def test_no_items_no_file_no_task(tmp_path):
    path = write(tmp_path)
    (tmp_path / "q.jsonl").write_text("\n")
    [task] = definition.find([path])
    with pytest.raises(ValueError, match="q.jsonl holds no item of task questions"):
        sources.read(task, [])
    (tmp_path / "q.jsonl").unlink()
    with pytest.raises(ValueError, match="its data are not here .*Get them: make it yourself; then --task_data=FOLDER"):
        sources.read(task, [])
    with pytest.raises(ValueError, match="there is no task 'helaswag' in the catalogue; did you mean hellaswag"):
        definition.find(["helaswag"])
    with pytest.raises(ValueError, match="there is no task 'question' in .*tasks.toml; did you mean questions"):
        definition.find([path + ":question"])
    with pytest.raises(ValueError, match="absent.toml cannot be read"):
        definition.find([str(tmp_path / "absent.toml")])


def test_a_file_is_held_to_its_sum(tmp_path):
    digest = hashlib.sha256((json.dumps(GOOD) + "\n").encode()).hexdigest()
    recorded = TASK.replace('file = "q', f'sha256 = "{digest}"\nfile = "q')
    assert read(tmp_path, recorded).origin == {"file": "q.jsonl", "sha256": digest, "checked": "against the task's definition"}
    with pytest.raises(ValueError, match="is another file than the one on record"):
        read(tmp_path, recorded, GOOD, GOOD)
    assert read(tmp_path).origin["checked"] == "no: first use, noted" and read(tmp_path).origin["checked"] == "the same as on first use"
    with pytest.raises(ValueError, match="another file than the one on record .* remove its line from .*sha256.json"):
        read(tmp_path, TASK, GOOD, GOOD)


def test_tfds_is_a_source_where_the_files_are_not(tmp_path, monkeypatch):
    """Features as TFDS gives those of ARC (tests/data/test_tfds.py reads a real data set)."""
    arc = {"question": "née?", "choices": {"text": ["yes", "no"], "label": [0, 1]}, "answerKey": 1}
    monkeypatch.setattr(sources.tfds, "examples", lambda name, folder: [arc] if name == "tfds:ai2_arc/ARC-Easy:test" else [arc] * 3)
    [task] = definition.find(["arc_easy"])
    found = sources.read(task, [tmp_path], shots=2)
    assert found.items[0].contexts[0] == "Question: née?\nAnswer:" and found.items[0].choices == ("yes", "no") and found.items[0].right == 1
    assert found.origin["tfds"] == "ai2_arc/ARC-Easy:test" and len(found.examples) == 3


def test_the_catalogue_is_whole():
    tasks = definition.load(definition.CATALOGUE)
    assert {"hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "boolq", "openbookqa", "lambada", "gsm8k", "squad"} <= set(tasks)
    assert all(task.licence and task.get for task in tasks.values())


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
def test_the_catalogue_reads_the_real_files_as_the_reference_did():
    names = {"hellaswag": 10042, "arc_easy": 2376, "piqa": 1838, "lambada": 5153}
    found = {task.name: sources.read(task, [REAL]).items for task in definition.find(list(names))}
    assert {name: len(items) for name, items in found.items()} == names
    with gzip.open(REAL / "smollm2_135m_instruct.items.jsonl.gz", "rt") as file:
        reference = [row for row in map(json.loads, file) if row["task"] != "crows_pairs"]
    for row in reference:
        item = found[row["task"].removesuffix("_openai")][row["item"]]
        assert (item.contexts[row["choice"]], item.continuations[row["choice"]]) == (row["context"], row["continuation"])
        assert item.right in (-1, row["gold"])
