"""Classifiers from a table of texts to labels with probabilities, in this process: training, resuming, meshes, evaluation, answers, what is refused."""

import json
import math
import pathlib
import random
import shutil
import types

import jax
import numpy as np
import pytest

from jaxlm import cli, config, optim, sharding, trees, verify
from jaxlm.config import MeshConfig, ObjectiveConfig, OptimConfig, TransformerConfig
from jaxlm.data import rows, tasks
from jaxlm.evaluate import follow
from jaxlm.interop import hf
from jaxlm.models import kinds
from jaxlm.objectives import OBJECTIVES, label_logits
from jaxlm.serve import http
from jaxlm.serve.app import Options
from jaxlm.serve.engine import Limits
from jaxlm.train import best, checkpoint, classified, loop, mistakes, saved
from jaxlm.train import origin as origins
from jaxlm.train.report import read_metrics
from jaxlm.train.stop import StopRequest
from tests.train import runs

RECIPE = {
    "data": {"label_key": "label", "slice_keys": ("site",), "validation": 0.2, "test": 0.25, "sequence_length": 32, "batch_size": 8, "workers": 1},
    "tokenizer": {"kind": "bytes"}, "objective": {"name": "classify"},
    "model": {"kind": "encoder", "causal": False, "context": 32, "layers": 2, "width": 32, "heads": 2, "dropout": 0.1, "token_types": 2, "positions": "learned"},
    "optim": {"lr": 1e-2, "layer_decay": 0.8, "warmup": "5%"}, "mesh": {"data": 1, "fsdp": 1},
    "train": {"steps": "60 steps", "log_every": "1", "eval_every": "15", "eval_documents": 0}, "checkpoint": {"every": "15", "metric": "loss", "keep_last": 1},
    "eval": {"bootstrap": 20}}


def corpus(path, count=240):
    draw = random.Random(3)
    with open(path, "w") as file:
        for i in range(count):
            word = draw.choice(("good", "fine") if i % 2 else ("bad", "awful"))
            file.write(json.dumps({"text": f"{word} {draw.choice(('cup', 'film', 'book'))} {i}{' again' * (i % 3)}", "label": ("neg", "pos")[i % 2],
                                   "site": "ab"[i % 3 == 0]}) + "\n")


def recipe(folder, **changes):
    source = folder / "texts.jsonl"
    if not source.exists():
        corpus(source)
    tree = {part: dict(values) for part, values in RECIPE.items()}
    for key, value in changes.items():
        part, _, name = key.partition("__")
        tree[part][name] = value
    tree["data"].setdefault("source", (str(source),))
    return config.build(tree)


def jaxlm(*arguments):
    with pytest.raises(SystemExit) as ended, runs.devices(1):
        cli.main(list(arguments))
    return ended.value.code


def train(cfg, workdir):
    with runs.devices(1):
        return loop.run(cfg, workdir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, and the same one stopped on its way and gone on with."""
    folder = tmp_path_factory.mktemp("classify")
    cfg = recipe(folder)
    assert train(cfg, folder / "run") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "at", lambda self, step: step >= 13)
        train(cfg, folder / "cut")
    assert checkpoint.newest(folder / "cut") == 13
    assert train(cfg, folder / "cut") == 0
    return folder


def test_it_learns_and_resumes_bitwise(trained):
    logs = {name: read_metrics(trained / name) for name in ("run", "cut")}
    pick = lambda name, key: [row[key] for row in logs[name] if key in row]
    assert pick("run", "train/loss") == pick("cut", "train/loss") and pick("run", "eval/loss") == pick("cut", "eval/loss")
    assert logs["run"][-1]["test/accuracy"] > 0.9 and logs["run"][-1]["test/accuracy"] == logs["cut"][-1]["test/accuracy"]
    losses = dict(zip((row["step"] for row in logs["run"] if "eval/loss" in row), pick("run", "eval/loss")))
    first = next(row for row in logs["run"] if "perf/step_seconds" in row)  # speed counts the tokens of batches as long as they are
    assert 8 * 16 < first["perf/tokens_per_second"] * first["perf/step_seconds"] < 8 * 32
    assert best.step(trained / "run") == min(losses, key=lambda step: (losses[step], -step)) == saved.open_run(trained / "run").step


def test_eval_report_and_answers(trained, capsys):
    assert jaxlm("eval", f"--workdir={trained / 'run'}", "--split=test", "--report") == 0
    out = capsys.readouterr().out
    for words in ("accuracy", "Matthews", "95 % interval", "confusion: a row", "this model", "majority", "TF-IDF + logistic regression", "points of accuracy"):
        assert words in out
    [row] = follow.read(trained / "run" / "eval.jsonl")
    assert row["accuracy"] == read_metrics(trained / "run")[-1]["test/accuracy"] and row["temperature"] != 1 and np.sum(row["confusion"]) == row["documents"]
    assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] and row["baselines"]["majority"]["mcc"] == 0
    page = (trained / "run" / "report-test.html").read_text()
    for title in ("Confusion", "Worst mistakes", "Slices", "Suspected label errors", "Near-duplicates", "Learning curve", "Words that move answers"):
        assert f">{title}" in page
    assert "http" not in page.split("</style>")[1] and "<script" not in page and "good</td>" in page
    assert jaxlm("generate", f"--workdir={trained / 'run'}", "--classify", "--prompt=good cup 7", "--prompt=awful book 8", "--json") == 0
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert good["labels"][0][0] == "pos" and bad["labels"][0][0] == "neg" and good["calibrated"] and sum(good["probabilities"].values()) == pytest.approx(1, abs=2e-4)
    run = saved.open_run(trained / "run")
    assert classified.temperature(run.workdir, run.step) == row["temperature"]
    odds = []
    for temperature in (40.0, 80.0):  # far from what rounds to 0 or 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classified, "temperature", lambda *_, t=temperature: t)
            said = classified.label(run, ["good cup 7"])[0]["probabilities"]
            texts = http.build(run, Limits(), Options("labels")).texts
        [served] = texts.classify([texts.ids("good cup 7")])
        assert dict(zip(texts.labels, served)) == pytest.approx(said, abs=2e-4)  # the server takes the checkpoint's temperature too
        odds.append(math.log(said["pos"] / said["neg"]))
    assert odds[0] > 0 and odds[0] == pytest.approx(2 * odds[1], rel=0.02)
    assert jaxlm("generate", f"--workdir={trained / 'run'}", "--prompt=a") == 2 and "ask with --classify" in capsys.readouterr().err
    assert jaxlm("generate", f"--workdir={trained / 'run'}", "--classify", "--prompt= ") == 2 and "is empty" in capsys.readouterr().err


def test_a_finished_run_begins_another_with_other_labels(trained, capsys):
    """init_from a workdir: the body is taken over bit by bit, the head is new where the classes are others; frozen layers stay as they were."""
    source = trained / "other.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}", "label": "abc"[i % 3], "site": "x"}) + "\n" for i in range(120)))
    cfg = recipe(trained, data__source=(str(source),), train__init_from=str(trained / "run"), train__steps="3 steps", optim__frozen_layers=1, train__patience=0,
                 model__dropout=0.0)
    cfg = config.build({**config.to_dict(cfg), "tokenizer": {}, "model": {}})
    assert train(cfg, trained / "next") == 0
    assert "all but classifier/bias, classifier/kernel (new)" in capsys.readouterr().out
    origin = saved.open_run(trained / "run").params  # the best checkpoint, not the newest
    before, after = trees.flatten(origin), trees.flatten(saved.open_run(trained / "next").params)
    for path, leaf in before.items():
        if path.startswith("embed"):
            assert np.array_equal(leaf, after[path]), path
        elif path.startswith("layers"):
            assert np.array_equal(leaf[0], after[path][0]), path
            assert not np.array_equal(leaf[1], after[path][1]), path
    assert saved.open_run(trained / "next").config.model.label_names == ("a", "b", "c")
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), origin)
    params = origins.headed(str(trained / "run"), target, None, 0)  # nothing new is asked for
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(origin)))


def test_frozen_layers_cost_a_forward_pass_alone():
    """Gradients of the layers that are trained are those of full tuning; of the frozen ones there is none, nor an optimiser's state, nor what a backward pass
    would keep: of a model of which three layers of four are frozen the gradient needs less than half of the memory."""
    tree = {"data": {"label_key": "x", "batch_size": 8, "sequence_length": 32}, "objective": {"name": "classify"}, "optim": {"layer_decay": 0.8},
            "model": {**RECIPE["model"], "layers": 4, "dropout": 0.0, "output": "sequence_labels", "labels": 3, "vocab_size": verify.VOCABULARY}}
    found, memory, scans, random, plain = {}, {}, {}, np.random.default_rng(0), {}
    for frozen in (0, 3):
        parts = verify.build(config.build({**tree, "optim": {"layer_decay": 0.8, "frozen_layers": frozen}}), "fsdp=1")
        batch = verify.labelled(verify.batch(0, 8, False), 0, parts.config)
        plain = plain or {path: 0.1 * random.normal(size=leaf.shape).astype(np.float32) for path, leaf in trees.flatten(parts.plain).items()}
        cut = {path: plain[path.removeprefix("frozen/")] for path in trees.flatten(parts.target.params)}
        cut = {path: leaf if "layers/" not in path else leaf[:frozen] if path.startswith("frozen/") else leaf[frozen:] for path, leaf in cut.items()}
        with jax.set_mesh(parts.mesh):
            gradient = verify.compiled(parts.gradient, parts.target.params, parts.batch)
            found[frozen] = trees.flatten(gradient(trees.unflatten(cut), sharding.to_device(parts.mesh, batch, 8))[0])
            used = gradient.memory_analysis()
            memory[frozen] = used.temp_size_in_bytes + used.output_size_in_bytes
            scans[frozen] = str(jax.make_jaxpr(parts.gradient)(parts.target.params, parts.batch)).count("scan[")
        assert trees.nbytes(parts.target.opt) < 2 * trees.nbytes(found[frozen]) + 100
    assert not any(path.startswith(("frozen/", "embed")) for path in found[3]) and found[3]["layers/attn/q"].shape[0] == 1
    for path, leaf in found[3].items():
        expected = found[0][path][3:] if path.startswith("layers/") else found[0][path]
        np.testing.assert_allclose(leaf, expected, atol=1e-6 * np.abs(leaf).max(), rtol=1e-4, err_msg=path)
    assert memory[3] < memory[0] / 2 and scans == {0: 2, 3: 3}  # forward and backward; of the frozen layers forward alone


def test_adapters_beside_a_head(trained, tmp_path, capsys):
    """LoRA on a classifier: the body is frozen and not saved, the head is trained whole and saved; eval, answers and export have both; a head of other classes
    is begun anew, and the base is found again without it."""
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"{('good', 'bad', 'fine')[i % 3]} cup {i}", "label": "abc"[i % 3], "site": "x"}) + "\n" for i in range(120)))
    cfg = recipe(trained, data__source=(str(source),), train__init_from=str(trained / "run"), train__steps="6 steps", train__eval_every="3",
                 checkpoint__every="3", data__sequence_length=16, model__dropout=0.0, optim__layer_decay=1.0)
    tree = {**config.to_dict(cfg), "tokenizer": {}, "model": {}, "lora": {"rank": 2, "dropout": 0.1}}
    assert train(config.build(tree), tmp_path / "lora") == 0
    step = best.step(tmp_path / "lora")
    arrays = json.loads((tmp_path / "lora" / "checkpoints" / str(step) / "MANIFEST.json").read_text())["arrays"]
    kept = [name for name in arrays if name.startswith("params/")]
    assert kept and all("/lora/" in name or name.startswith(("params/classifier/", "params/pooler/")) for name in kept)
    body, tuned = (trees.flatten(saved.open_run(folder).params) for folder in (trained / "run", tmp_path / "lora"))
    adapted = {f"layers/{name}" for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/gate", "mlp/down")}
    for path, leaf in body.items():
        if not path.startswith(("classifier", "pooler")):
            assert np.array_equal(leaf, tuned[path]) == (path not in adapted), path
    assert not np.array_equal(body["pooler/kernel"], tuned["pooler/kernel"]) and tuned["classifier/kernel"].shape[1] == 3
    assert jaxlm("eval", f"--workdir={tmp_path / 'lora'}", "--split=test") == 0
    [row] = follow.read(tmp_path / "lora" / "eval.jsonl")
    assert row["accuracy"] == read_metrics(tmp_path / "lora")[-1]["test/accuracy"]
    capsys.readouterr()
    assert jaxlm("generate", f"--workdir={tmp_path / 'lora'}", "--classify", "--prompt=good cup 7", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["probabilities"]) == set("abc")
    assert jaxlm("export", f"--workdir={tmp_path / 'lora'}", f"--to={tmp_path / 'adapter'}", "--adapter") == 2
    assert "also trained classifier/" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "lora" / "checkpoints" / "6")  # gone on with from the third step
    (tmp_path / "lora" / "FINISHED").unlink()
    losses = lambda: [row["train/loss"] for row in read_metrics(tmp_path / "lora") if "train/loss" in row]
    before = losses()
    assert train(config.build(tree), tmp_path / "lora") == 0 and losses() == before


def test_tags_of_words_from_the_command_line(tmp_path, capsys):
    """token_classify: trained, stopped at the best entity F1, evaluated, and asked."""
    draw, lines = random.Random(5), []
    for _ in range(160):
        name, place = draw.choice(("Anna", "Ben", "Cleo")), draw.choice(("Rome", "Oslo", "New York"))
        words = [name, *draw.choice((("lives", "in"), ("left",), ("never", "saw"))), *place.split()]
        tags = ["B-PER", *["O"] * (len(words) - 1 - len(place.split())), "B-LOC", *["I-LOC"] * (len(place.split()) - 1)]
        lines.append(json.dumps({"tokens": [*words, str(draw.randrange(9))], "tags": [*tags, "O"]}))
    (tmp_path / "sentences.jsonl").write_text("\n".join(lines) + "\n")
    flags = {"data.source": tmp_path / "sentences.jsonl", "data.sequence_length": 33, "data.batch_size": 16, "data.validation": 0.2, "data.test": 0.2,
             "data.workers": 1, "tokenizer.kind": "bytes", "model.kind": "encoder", "model.causal": "false", "model.context": 33, "model.layers": 1,
             "model.width": 32, "model.heads": 2, "mesh.fsdp": 1, "optim.lr": 1e-2, "train.init_from": "", "train.steps": 60, "train.eval_every": 20,
             "checkpoint.every": 20, "eval.bootstrap": 20, "dedup.exact": "false"}
    assert jaxlm("train", "--config=token_classify", f"--workdir={tmp_path / 'run'}", *(f"--config.{key}={value}" for key, value in flags.items())) == 0
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["test/f1"] > 0.9 and max(row["eval/f1"] for row in metrics if "eval/f1" in row) > 0.9
    assert jaxlm("eval", f"--workdir={tmp_path / 'run'}", "--split=test", "--report") == 0
    out = capsys.readouterr().out
    for words in ("of entities, both ends and type right", "LOC", "PER", "commonest tag of each word", "confusion"):
        assert words in out
    [row] = follow.read(tmp_path / "run" / "eval.jsonl")
    page = (tmp_path / "run/report-test.html").read_text()
    assert row["f1"] == metrics[-1]["test/f1"] and row["f1_low"] <= row["f1"] <= row["f1_high"] and "Worst mistakes" in page
    assert f"{row['words']:,} words</h3>" in page
    assert jaxlm("generate", f"--workdir={tmp_path / 'run'}", "--classify", "--prompt=Anna left New York 3", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [(word, tag) for word, tag, _ in said["tags"]] == [("Anna", "B-PER"), ("left", "O"), ("New", "B-LOC"), ("York", "I-LOC"), ("3", "O")]


def test_what_is_best_and_when_nothing_is_gained():
    assert best.exhausted([3, 2, 2, 2], 2) and not best.exhausted([3, 2, 2, 1], 2) and not best.exhausted([3, 3, 3], 0) and not best.exhausted([1, 2], 2)
    cost = lambda metric, value: best.cost(config.build({"checkpoint": {"metric": metric}}), {metric: value})
    assert cost("loss", 0.3) == 0.3 and cost("accuracy", 0.9) == -0.9 < cost("accuracy", 0.8) and cost("brier", 0.2) == 0.2
    assert cost("loss", float("nan")) is None and best.cost(config.Config(), None) is None


@pytest.mark.slow
def test_early_stopping(trained, capsys):
    cfg = recipe(trained, optim__lr=1e-9, optim__schedule="constant", checkpoint__metric="accuracy", train__patience=2, train__eval_every="4", checkpoint__every="4")
    assert train(cfg, trained / "early") == 0
    out = capsys.readouterr().out
    assert "2 evaluations without a better accuracy" in out and json.loads((trained / "early" / "FINISHED").read_text())["step"] == 12
    assert train(cfg, trained / "early") == 0 and "this run is finished" in capsys.readouterr().out


@pytest.mark.parametrize("change, words", [
    ({"checkpoint__metric": "acuracy"}, "did you mean 'accuracy'?"), ({"checkpoint__metric": "perplexity"}, "is not known for objective.name=classify"),
    ({"optim__frozen_layers": 9}, "more than the 2 layers"), ({"data__label_key": "lable"}, "no key 'lable'; its keys: 'text', 'label', 'site'; set data.label_key")])
def test_bad_input_is_one_line(trained, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        train(recipe(tmp_path, **change), tmp_path / "run")


TEXTS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
CHATS = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(20)]


@pytest.mark.parametrize("lines, flags, words", [
    (TEXTS, ["data.label_key=sentiment"], "line 1: no key 'sentiment'; its keys: 'text', 'label'; set data.label_key"),
    (TEXTS, ["data.text_key=body"], "no key 'body'"),
    ([{**line, "label": "a"} for line in TEXTS], [], "has one class only ('a')"),
    ([*TEXTS, {"text": "odd", "label": float("nan")}], [], ":21: the label 'label' is nan, not a class"),
    ([*TEXTS, {"text": " ", "label": "a"}], [], "line 21: 'text' is empty"),
    ([{**line, "label": "a b"} for line in TEXTS], ["objective.name=token_classify", "data.label_key=label", "data.text_key=text", "model.context=1"],
     "is longer than model.context=1"),
    ([{**line, "label": "O"} for line in TEXTS], ["objective.name=token_classify"], "2 words in 'text' and 1 tags in 'label'; each word needs one"),
    ([{**line, "label": "high"} for line in TEXTS], ["objective.name=regress"], "is 'high', not a number"),
    ([{"messages": chat["messages"][:1]} for chat in CHATS], ["objective.name=sft"], "line 1: the assistant says nothing in this chat: there is nothing to "
     "learn"),
    (CHATS, ["objective.name=sft", "data.chat_template=FOLDER/plain.jinja"], "plain.jinja writes nothing of what the assistant says"),
    (CHATS, ["objective.name=sft", "data.sequence_length=2"], "nothing that an assistant says is left in rows of data.sequence_length=2 tokens"),
    (TEXTS, ["data.source=train=FOLDER/data.jsonl,test=FOLDER/other.jsonl"], "has the label 'c', which the training split does not have"),
    (TEXTS, ["train.init_from=nowhere"], "nowhere holds no checkpoint"),
    (TEXTS, ["lora.rank=2"], "lora.rank needs a model to begin with"),
    (TEXTS, ["lora.rank=2", "optim.frozen_layers=1"], "with lora.rank all layers are frozen"),
])
def test_bad_input_from_the_command_line(tmp_path, capsys, lines, flags, words):
    """One line, exit code 2, and no checkpoint."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "another", "label": "c"}) + "\n")
    (tmp_path / "plain.jinja").write_text("{% for m in messages if m.role == 'user' %}<u>{{ m.content }}\n{% endfor %}")
    (tmp_path / "recipe.py").write_text("from ml_collections import ConfigDict\nget_config = ConfigDict\n")
    chats = "messages" in lines[0]
    usual = {"data.source": tmp_path / "data.jsonl", "tokenizer.kind": "bytes", "data.workers": 1, "data.sequence_length": 32, "model.layers": 1,
             "model.width": 16, "model.heads": 2} | ({"data.format": "chat", "data.chat_template": "chatml"} if chats else
                                  {"data.label_key": "label", "objective.name": "classify", "model.kind": "encoder", "model.causal": "false"})
    usual |= dict(flag.replace("FOLDER", str(tmp_path)).split("=", 1) for flag in flags)
    keys = [f"--config.{key}={value}" for key, value in usual.items()]
    assert jaxlm("train", f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'run'}", *keys) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said.removeprefix("jaxlm: ") and "Traceback" not in said and not (tmp_path / "run" / "checkpoints").exists()


def test_suspects_among_sets_and_tags():
    """A class that a text lacks and a tag that is another's: each is found alone, by its name."""
    sure = np.eye(2)[np.arange(12) % 2]
    given = sure.copy()
    given[3] = [1, 0]
    here = types.SimpleNamespace(split="train", names=("a", "b"), probs=0.1 + 0.8 * sure, truth=given, texts=[f"text {i}" for i in range(12)],
                                 ids=[f"f:{i}" for i in range(12)], row=np.arange(12), place=np.zeros(12, int), name="multi_label")
    found = mistakes._suspects(here, None, None, "")
    assert "train: 2 of 12 texts, class by class" in found and found.count("text 3<") == 2 and "not a" in found and "not b" in found
    here.name, here.texts, here.ids = "token_classify", ["one two three four five six"] * 2, ["f:1", "f:2"]
    here.row, here.place = np.repeat([0, 1], 6), np.tile(np.arange(6), 2)
    found = mistakes._suspects(here, None, None, "")
    assert "train: 1 of 12 words" in found and found.count("four: one two three four five six<small>f:1") == 1


def test_factors_of_layers():
    axes = {"embed/tokens": ("vocab", "embed"), "layers/attn/q": ("layers", "embed", "heads", "head_size"), "classifier/kernel": ("embed", "labels")}
    found = optim.layer_factors(OptimConfig(layer_decay=0.5), axes, TransformerConfig(layers=3))
    assert found["layers/attn/q"].tolist() == [0.125, 0.25, 0.5] and float(found["embed/tokens"]) == 0.0625 and float(found["classifier/kernel"]) == 1
    found = optim.layer_factors(OptimConfig(layer_decay=0.5, frozen_layers=2), axes, TransformerConfig(layers=3))
    assert found["layers/attn/q"].tolist() == [0.5]  # of those that are trained


@pytest.mark.parametrize("name, model", [("classify", {"kind": "encoder", "causal": False}), ("multi_label", {}), ("regress", {}), ("token_classify", {})])
def test_heads_and_losses(name, model):
    """Each objective on an encoder and a decoder: the loss by hand, padding does not matter, and a decoder reads its last token."""
    labels = {"regress": 1}.get(name, 3)
    cfg = TransformerConfig(vocab_size=64, context=16, layers=1, width=16, heads=2, labels=labels, init_std=0.5,
                            output="token_labels" if name == "token_classify" else "sequence_labels", **model)
    made = kinds.build(cfg)
    data = config.build({"data": {"label_key": "x", "batch_size": 8, "sequence_length": 16}, "objective": {"name": name}})
    batch = verify.labelled(verify.batch(0, 8, False, 16, 64), 0, config.Config(objective=data.objective, data=data.data, model=cfg))
    chosen = batch["weights"].argmax(axis=1)

    @jax.jit
    def compute(key):
        params = made.init(key)
        hidden = made.apply(params, batch)[0]
        return OBJECTIVES[name](ObjectiveConfig(name=name), made, params, batch, None), made.head(params, hidden if name == "token_classify" else
                                                                                                 hidden[np.arange(8), chosen][:, None])

    sums, logits = compute(jax.random.key(0))
    logits = np.asarray(logits, np.float64)
    weights = batch["weights"] if name == "token_classify" else batch["weights"].max(axis=1)
    if name == "regress":
        expected = np.square(logits[:, 0] - batch["labels"][:, 0])
    elif name == "multi_label":
        p = 1 / (1 + np.exp(-logits))
        expected = -(batch["labels"] * np.log(p) + (1 - batch["labels"]) * np.log(1 - p)).mean(axis=1)
    else:
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        expected = -np.log((p * (np.eye(3)[batch["targets"]] if name == "token_classify" else batch["labels"])).sum(axis=-1))
    assert float(sums["loss"][0]) == pytest.approx((expected * weights).sum(), rel=1e-4) and float(sums["loss"][1]) == pytest.approx(weights.sum())


@pytest.mark.slow
def test_meshes_agree_with_one_device():
    cfg = config.build({"data": {"label_key": "x", "input_key": "y"}, "objective": {"name": "classify"}, "optim": {"layer_decay": 0.7},
                        "model": {"kind": "encoder", "causal": False, "token_types": 2, "positions": "learned"}, "train": {"microbatches": 2}})
    for row in verify.verify(cfg, ["fsdp=2+tensor=2+sequence=2"], 2):
        assert row.ok, row


def test_labels_go_whole_to_the_devices_of_their_rows():
    mesh = sharding.make_mesh(MeshConfig(data=2, sequence=4, fsdp=1))
    batch = sharding.to_device(mesh, {"tokens": np.arange(64).reshape(4, 16), "labels": np.arange(12.0).reshape(4, 3)}, 4)
    assert np.array_equal(batch["labels"], np.arange(12.0).reshape(4, 3)) and batch["labels"].addressable_shards[0].data.shape == (2, 3)


@pytest.mark.parametrize("name, pooler, kept", [("encoders/bert", "tanh", True), ("encoders/roberta", "tanh", True), ("encoders/distilbert", "relu", False),
                                                ("encoders/bert_masked", "tanh", False), ("llama", "tanh", False)])
def test_every_family_gets_a_head(name, pooler, kept):
    """The body of a directory is taken over bit by bit; a pooler is kept where there is one; the state is that of the first token, in a decoder of the last."""
    folder = pathlib.Path(__file__).parents[1] / "interop" / "fixtures" / name
    given = hf.open_directory(folder).cfg
    task = rows.Task(8, config.ObjectiveConfig(name="classify"), label_names=("a", "b", "c"), last=given.kind == "decoder")
    cfg = rows.for_labels(config.Config(model=given, data=config.DataConfig(sequence_length=8)), task).model
    assert (cfg.output, cfg.labels, cfg.label_names) == ("sequence_labels", 3, ("a", "b", "c")) and (cfg.kind == "decoder" or cfg.pooler_activation == pooler)
    model = kinds.build(cfg)
    place = jax.sharding.NamedSharding(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), jax.sharding.PartitionSpec())
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), jax.eval_shape(model.init, jax.random.key(0)))
    params = origins.headed(f"hf:{folder}", target, model.init, 0, log=lambda line: None)
    own, theirs = trees.flatten(params), trees.flatten(hf.load(hf.open_directory(folder)))
    assert set(own) - set(theirs) == {path for path in own if path.startswith("classifier") or path.startswith("pooler") and not kept}
    for path in set(own) & set(theirs):
        assert np.array_equal(own[path], theirs[path]), path
    batch = tasks.text_batch([(np.arange(5, 9), 0), (np.arange(5, 13), 0)], np.arange(2), 8, last=task.last, types=False)
    say = jax.jit(lambda tokens: label_logits(model, params, {**batch, "tokens": tokens, "labels": np.zeros((2, 3), np.float32)})[0])
    filled = np.where(batch["segments"] > 0, batch["tokens"], 9)
    first, second = say(batch["tokens"]), say(filled)
    assert np.array_equal(first, second) and not np.allclose(first[0], first[1])  # padding changes nothing, the end of a text does
