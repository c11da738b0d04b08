"""Labelled texts: their forms, their splits, their rows, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from jaxlm import config
from jaxlm.data import labels, loader, pack, prepare, rows, stages, tasks, tokenizer, tokenizer_json

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "tokenizers"


def prepared(folder, lines, objective="classify", source=None, **data):
    """The corpus and the task of JSON lines."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = config.build({"data": {"source": source or (str(path),), "label_key": "label", "validation": 0.2, "test": 0.2, "sequence_length": 32, "batch_size": 4,
                                 "workers": 1, **data},
                        "objective": {"name": objective}, "tokenizer": {"kind": "bytes"}, "model": {"kind": "encoder", "causal": False, "context": 64}})
    corpus = prepare.prepare(cfg.data, cfg.tokenizer, folder / "data", clean=cfg.clean, dedup=cfg.dedup, objective=objective, log=lambda line: None)
    return cfg, corpus, rows.build(cfg, tokenizer.load(corpus.tokenizer_path), corpus)


def texts(count, label=lambda i: i % 2):
    return [{"text": f"text number {i} " + "x" * (i % 23), "label": label(i), "site": "ab"[i % 3 == 0]} for i in range(count)]


@pytest.mark.parametrize("objective, given, form", [
    ("classify", "1", "1"), ("classify", "1.0", "1"), ("classify", "true", "true"), ("classify", '" spam "', "spam"),
    ("multi_label", '["b", "a", "a"]', "a|b"), ("multi_label", '"b|a"', "a|b"), ("multi_label", '""', ""), ("regress", '"2.50"', "2.5"),
    ("token_classify", '["O", "B-x"]', "O B-x"), ("token_classify", '"O 1"', "O 1")])
def test_forms(objective, given, form):
    assert labels.parse(objective, given) == form


@pytest.mark.parametrize("objective, given, words", [
    ("classify", "NaN", "nan, not a class"), ("classify", "null", "empty"), ("classify", '"nan"', "not a class"), ("classify", "0.5", "not a class"),
    ("classify", '"a|b"', "must not hold"), ("regress", '"NaN"', "not a finite number"), ("regress", '"high"', "not a number"), ("regress", "null", "not a number"),
    ("multi_label", '["a", null]', "empty")])
def test_useless_labels(objective, given, words):
    with pytest.raises(ValueError, match=words):
        labels.parse(objective, given)


def test_names_are_in_their_order():
    assert labels.names("classify", ["10", "9", "b", "a"]) == ("9", "10", "a", "b")
    assert labels.names("token_classify", ["B-x O", "I-x"]) == ("O", "B-x", "I-x")


def test_each_label_has_its_share_of_every_split(tmp_path):
    lines = texts(200, lambda i: "rare" if i % 10 == 0 else "usual")
    lines += [{"text": "the same text", "label": name, "site": "a"} for name in ("rare", "usual", "usual")]
    _, corpus, _ = prepared(tmp_path, lines)
    found = {split: corpus.examples(split) for split in ("train", "validation", "test")}
    for split, share in (("validation", 0.2), ("test", 0.2)):
        assert found[split].labels.count("rare") == pytest.approx(20 * share, abs=1) and found[split].labels.count("usual") == pytest.approx(180 * share, abs=1)
    holding = [split for split in found if "the same text" in found[split].texts]
    assert len(holding) == 1  # equal texts stay together; of one label the second is a duplicate
    assert [label for text, label in zip(found[holding[0]].texts, found[holding[0]].labels) if text == "the same text"] == ["rare", "usual"]
    again = labels.stratified(np.arange(100, dtype=np.uint64), np.arange(100) % 3, 0.1, 0.2)
    assert np.array_equal(again, labels.stratified(np.arange(100, dtype=np.uint64), np.arange(100) % 3, 0.1, 0.2)) and np.bincount(again).tolist() == [70, 9, 21]


def test_sources_may_be_the_splits(tmp_path):
    for name, start in (("train", 0), ("test", 100)):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"sentence {i} of it,{i % 2}\n" for i in range(start, start + 20)))
    _, corpus, _ = prepared(tmp_path, [], source=(f"train={tmp_path}/train.csv", f"test={tmp_path}/test.csv"))
    assert sorted(corpus.examples("test").texts) == sorted(f"sentence {i} of it" for i in range(100, 120))
    assert len(corpus.examples("train").texts) == 16 and len(corpus.examples("validation").texts) == 4


def test_epochs_and_evaluations_have_every_text_once(tmp_path):
    _, corpus, task = prepared(tmp_path, texts(60))
    size = loader.epoch_size(corpus, "train", task, 4)
    count = len(corpus.splits["train"].tokens)
    assert count == 36 == size.rows
    seen, lengths = [], set()
    for _, batch in loader.batches(corpus, "train", task, batch_size=4, seed=0, start_step=0, stop_step=9, threads=0):
        size = (batch["segments"] > 0).sum(axis=1)
        assert batch["tokens"].shape[1] == min(n for n in task.lengths if n >= size.max())  # no longer than the longest text asks for
        assert (batch["weights"].sum(axis=1) == 1).all() and (batch["weights"][:, 0] == 1).all()
        seen += [bytes(row[:n].tolist()[1:-1]).decode() if n < 32 else None for row, n in zip(batch["tokens"], size)]
        lengths.add(batch["tokens"].shape[1])
    short = [text for text in corpus.examples("train").texts if len(text) < 30]
    assert sorted(filter(None, seen)) == sorted(short) and lengths == {32} | lengths and len(seen) == count
    plan = pack.grouped_plan(np.zeros((50, 4), np.int64), np.arange(50)[:, None], 8, 0, 1)
    assert [len(pack.row(plan, i)) for i in range(56)].count(0) == 6 and all(pack.row(plan, i) for i in range(48))  # padding only at the epoch's end
    documents = [d for b in loader.evaluation_batches(corpus, "test", task, batch_size=5, overlap=0) for d in b["documents"][:, 0] if d >= 0]
    assert sorted(documents) == list(range(len(corpus.splits["test"].tokens)))


def test_pairs_types_and_truncation():
    task = rows.Task(10, config.ObjectiveConfig(name="classify"), eos=2, batch_size=2, types=True)
    tokens = np.array([1, *range(10, 20), 2, *range(30, 34), 2])
    cut, first = rows.cut_text(task, tokens, 12)
    assert cut.tolist() == [1, 10, 11, 12, 2, 30, 31, 32, 33, 2] and first == 5  # the longer text loses its end
    assert rows.cut_text(task, np.array([1, *range(5, 30), 2]), 0)[0].tolist() == [1, *range(5, 13), 2]
    two = np.array([1, *range(10, 20), 2, 2, *range(30, 34), 2])  # RoBERTa's separators
    assert rows.cut_text(task, two, 13)[0].tolist() == [1, 10, 11, 12, 2, 2, 30, 31, 32, 2] and rows.cut_text(task, two, 13)[1] == 6
    batch = tasks.text_batch([(cut, first), (np.zeros(0, int), 0)], np.array([3, -1]), 16, last=True, types=True)
    assert batch["types"][0].tolist() == [0] * 5 + [1] * 5 + [0] * 6 and batch["weights"][0].argmax() == 9 and not batch["weights"][1].any()


def test_a_pair_is_framed_as_its_model_has_it(tmp_path):
    special, of = lambda name: {"SpecialToken": {"id": name}}, lambda name: {"Sequence": {"id": name}}
    template = lambda n: {"type": "TemplateProcessing", "pair": [special("<s>"), of("A"), *[special("</s>")] * n, of("B"), special("</s>")]}
    assert [tokenizer_json.separators(step) for step in (None, template(1), template(2), {"type": "RobertaProcessing"}, {"type": "BertProcessing"},
                                                        {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template(2)]})] == [1, 1, 2, 2, 1, 2]
    folder = shutil.copytree(FIXTURES / "byte_level_legacy", tmp_path / "t")
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<s>": len(vocab), "</s>": len(vocab) + 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    for name, count in ((folder, 2), (FIXTURES / "word_piece", 1)):
        tok = tokenizer.load(name)
        tokens, first = stages.pair_of(tok, np.array([7, 8]), np.array([9]))
        assert tokens.tolist() == [tok.bos, 7, 8, *[tok.eos] * count, 9, tok.eos] and first == 3 + count


def test_tags_stand_at_the_first_token_of_each_word(tmp_path):
    lines = [{"text": ["Anna", "lives", "in", f"Rome{i}"], "label": ["B-per", "O", "O", "B-loc"]} for i in range(30)]
    lines += [{"text": f"word {'long' * 20} end{i}", "label": "O B-loc O"} for i in range(10)]
    cfg, corpus, task = prepared(tmp_path, lines, "token_classify")
    assert task.label_names == ("O", "B-loc", "B-per")
    weighed = dataclasses.replace(cfg, objective=config.ObjectiveConfig(name="token_classify", class_weights=(("B-loc", 3.0), ("B-per", 0.5))))
    weighed = rows.build(weighed, tokenizer.load(corpus.tokenizer_path), corpus)
    _, batch = next(iter(loader.batches(corpus, "train", weighed, batch_size=8, seed=0, start_step=0, stop_step=1, threads=0)))
    tagged = batch["weights"] > 0
    assert np.array_equal(batch["weights"][tagged], np.array([1, 3, 0.5], np.float32)[batch["targets"][tagged]]) and len(set(batch["weights"][tagged])) > 1
    [batch] = loader.evaluation_batches(corpus, "test", task, batch_size=8, overlap=0)
    for row in range(8):
        example = corpus.examples("test")
        text = example.texts[batch["documents"][row, 0]]
        places = np.flatnonzero(batch["weights"][row])
        first = [bytes([batch["tokens"][row, p + (k > 0)]]).decode() for k, p in enumerate(places)]
        assert first == [word[0] for word in text.split()][:len(places)] and len(places) == (4 if "Anna" in text else 2)  # a word beyond the row is left out
        assert [task.label_names[t] for t in batch["targets"][row, places]] == example.labels[batch["documents"][row, 0]].split()[:len(places)]


def test_class_labels_of_hugging_face_get_their_names(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    feature = {"info": {"features": {"label": {"names": ["cold", "hot"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"text": [f"text {i}" for i in range(20)], "label": [i % 2 for i in range(20)]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    with pyarrow.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    _, _, task = prepared(tmp_path, [], source=(str(tmp_path / "data.arrow"),))
    assert task.label_names == ("cold", "hot")


def test_class_weights(tmp_path):
    cfg, corpus, task = prepared(tmp_path, texts(60, lambda i: "rare" if i % 4 == 0 else "usual"))
    assert task.class_weights.tolist() == [1, 1]
    even = dataclasses.replace(cfg, objective=config.ObjectiveConfig(name="classify", class_balance=1.0, class_weights=(("usual", 2.0),)))
    tok = tokenizer.load(corpus.tokenizer_path)
    train = corpus.examples("train").labels
    weighed = rows.build(even, tok, corpus)
    assert weighed.class_weights == pytest.approx([len(train) / 2 / train.count("rare"), 2 * len(train) / 2 / train.count("usual")])
    [(_, batch)] = loader.batches(corpus, "train", weighed, batch_size=36, seed=0, start_step=0, stop_step=1, threads=0)
    assert batch["weights"].sum(axis=1) == pytest.approx(batch["labels"] @ weighed.class_weights)  # in training; evaluations count each text once
    assert {float(w) for b in loader.evaluation_batches(corpus, "test", weighed, batch_size=4, overlap=0) for w in b["weights"].sum(axis=1)} == {1.0}
    wrong = dataclasses.replace(cfg, objective=config.ObjectiveConfig(name="classify", class_weights=(("spam", 2.0),)))
    with pytest.raises(ValueError, match="names the class 'spam'"):
        rows.build(wrong, tok, corpus)


def test_class_weights_of_several_classes(tmp_path):
    """They stand in place of 1 in training, so that the loss of a text that has the class is multiplied; evaluations know nothing of them."""
    lines = texts(60, lambda i: ["rare", "usual"] if i % 4 == 0 else ["usual"] if i % 2 else [])
    cfg, corpus, task = prepared(tmp_path, lines, "multi_label")
    cfg = dataclasses.replace(cfg, objective=config.ObjectiveConfig(name="multi_label", class_weights=(("rare", 3.0),)))
    task = rows.build(cfg, tokenizer.load(corpus.tokenizer_path), corpus)
    assert task.class_weights.tolist() == [3, 1]
    [(_, batch)] = loader.batches(corpus, "train", task, batch_size=36, seed=0, start_step=0, stop_step=1, threads=0)
    assert set(np.unique(batch["labels"][:, 0])) == {0, 3} and set(np.unique(batch["labels"][:, 1])) == {0, 1} and batch["weights"].sum() == 36
    [batch] = loader.evaluation_batches(corpus, "test", task, batch_size=12, overlap=0)
    assert set(np.unique(batch["labels"])) == {0, 1}


@pytest.mark.parametrize("change, words", [
    (lambda lines: [line.pop("label") for line in lines[3:4]], "texts.jsonl, line 4: no key 'label'; its keys: 'text', 'site'; set data.label_key"),
    (lambda lines: [line.update(label=1) for line in lines], "one class only \\('1'\\)"),
    (lambda lines: lines[5].update(label=float("nan")), "texts.jsonl:6: the label 'label' is nan, not a class"),
    (lambda lines: lines[5].update(text="  "), "line 6: 'text' is empty"),
])
def test_bad_input_is_one_line(tmp_path, change, words):
    lines = texts(30)
    change(lines)
    with pytest.raises(ValueError, match=words) as caught:
        prepared(tmp_path, lines)
    assert "\n" not in str(caught.value)


def test_a_label_that_training_does_not_have(tmp_path):
    for name, classes in (("train", "ab"), ("test", "abc")):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"sentence {i} {name},{classes[i % len(classes)]}\n" for i in range(12)))
    with pytest.raises(ValueError, match=r"test.csv:4 \(test\) has the label 'c', which the training split does not have"):
        prepared(tmp_path, [], source=(f"train={tmp_path}/train.csv", f"test={tmp_path}/test.csv"))


def test_what_cannot_be_read_is_passed_over_if_asked(tmp_path):
    lines = texts(40)
    lines[5]["label"], lines[6]["text"], lines[7]["label"] = None, "", "nan"
    _, corpus, _ = prepared(tmp_path, lines, on_error="skip")
    assert sum(len(corpus.examples(split).labels) for split in ("train", "validation", "test")) == 37


@pytest.mark.parametrize("tree, words", [
    ({"objective": {"name": "classify"}, "data": {"source": ("a.csv",)}}, "needs data.label_key"),
    ({"data": {"label_key": "y"}}, "go with objective.name=classify"),
    ({"objective": {"name": "regress", "class_balance": 1.0}, "data": {"label_key": "y"}}, "go with objective.name=classify, multi_label and token_classify"),
    ({"objective": {"name": "classify"}, "data": {"label_key": "y"}, "dedup": {"line_length": 9}}, "set it to 0")])
def test_config(tree, words):
    with pytest.raises(ValueError, match=words):
        config.build(tree)
