"""Classifiers from a table of texts to labels with probabilities, in this process: training, resuming, meshes, evaluation, answers, what is refused."""

import json
import pathlib
import random

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
from jaxlm.train import best, checkpoint, loop, saved
from jaxlm.train import origin as origins
from jaxlm.train.report import read_metrics
from jaxlm.train.stop import StopRequest

RECIPE = {
    "data": {"label_key": "label", "slice_keys": ("site",), "validation": 0.2, "test": 0.25, "sequence_length": 32, "batch_size": 8, "workers": 1},
    "tokenizer": {"kind": "bytes"}, "objective": {"name": "classify"},
    "model": {"kind": "encoder", "causal": False, "context": 32, "layers": 2, "width": 32, "heads": 2, "dropout": 0.1, "token_types": 2, "positions": "learned"},
    "optim": {"lr": 1e-2, "layer_decay": 0.8, "warmup": "5%"}, "mesh": {"data": -1, "fsdp": 1},
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
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, and the same one stopped on its way and gone on with."""
    folder = tmp_path_factory.mktemp("classify")
    cfg = recipe(folder)
    assert loop.run(cfg, folder / "run") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "at", lambda self, step: step >= 13)
        loop.run(cfg, folder / "cut")
    assert checkpoint.newest(folder / "cut") == 13
    assert loop.run(cfg, folder / "cut") == 0
    return folder


def test_it_learns_and_resumes_bitwise(trained):
    logs = {name: read_metrics(trained / name) for name in ("run", "cut")}
    pick = lambda name, key: [row[key] for row in logs[name] if key in row]
    assert pick("run", "train/loss") == pick("cut", "train/loss") and pick("run", "eval/loss") == pick("cut", "eval/loss")
    assert logs["run"][-1]["test/accuracy"] > 0.9 and logs["run"][-1]["test/accuracy"] == logs["cut"][-1]["test/accuracy"]
    losses = dict(zip((row["step"] for row in logs["run"] if "eval/loss" in row), pick("run", "eval/loss")))
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
    assert jaxlm("generate", f"--workdir={trained / 'run'}", "--prompt=a") == 2 and "ask with --classify" in capsys.readouterr().err
    assert jaxlm("generate", f"--workdir={trained / 'run'}", "--classify", "--prompt= ") == 2 and "is empty" in capsys.readouterr().err


def test_a_finished_run_begins_another_with_other_labels(trained, capsys):
    """init_from a workdir: the body is taken over bit by bit, the head is new where the classes are others; frozen layers stay as they were."""
    source = trained / "other.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}", "label": "abc"[i % 3], "site": "x"}) + "\n" for i in range(120)))
    cfg = recipe(trained, data__source=(str(source),), train__init_from=str(trained / "run"), train__steps="3 steps", optim__frozen_layers=1, train__patience=0,
                 model__dropout=0.0)
    cfg = config.build({**config.to_dict(cfg), "tokenizer": {}, "model": {}})
    assert loop.run(cfg, trained / "next") == 0
    assert "all but classifier/bias, classifier/kernel (new)" in capsys.readouterr().out
    origin = saved.open_run(trained / "run", checkpoint.newest(trained / "run")).params
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


@pytest.mark.slow
def test_early_stopping(trained, capsys):
    cfg = recipe(trained, optim__lr=1e-9, optim__schedule="constant", checkpoint__metric="accuracy", train__patience=2, train__eval_every="4", checkpoint__every="4")
    assert loop.run(cfg, trained / "early") == 0
    out = capsys.readouterr().out
    assert "2 evaluations without a better accuracy" in out and json.loads((trained / "early" / "FINISHED").read_text())["step"] == 12
    assert loop.run(cfg, trained / "early") == 0 and "this run is finished" in capsys.readouterr().out
    assert best.exhausted([3, 2, 2, 2], 2) and not best.exhausted([3, 2, 2, 1], 2) and not best.exhausted([3, 3, 3], 0) and not best.exhausted([1, 2], 2)


@pytest.mark.parametrize("change, words", [
    ({"checkpoint__metric": "acuracy"}, "did you mean 'accuracy'?"), ({"checkpoint__metric": "perplexity"}, "is not known for objective.name=classify"),
    ({"optim__frozen_layers": 9}, "more than the 2 layers"), ({"data__label_key": "lable"}, "no key 'lable'; its keys: 'text', 'label', 'site'; set data.label_key")])
def test_bad_input_is_one_line(trained, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        loop.run(recipe(tmp_path, **change), tmp_path / "run")


def test_factors_of_layers():
    axes = {"embed/tokens": ("vocab", "embed"), "layers/attn/q": ("layers", "embed", "heads", "head_size"), "classifier/kernel": ("embed", "labels")}
    found = optim.layer_factors(OptimConfig(layer_decay=0.5), axes, TransformerConfig(layers=3))
    assert found["layers/attn/q"].tolist() == [0.125, 0.25, 0.5] and float(found["embed/tokens"]) == 0.0625 and float(found["classifier/kernel"]) == 1
    found = optim.layer_factors(OptimConfig(frozen_layers=2), axes, TransformerConfig(layers=3))
    assert found["layers/attn/q"].tolist() == [0, 0, 1] and float(found["embed/tokens"]) == 0


@pytest.mark.parametrize("name, model", [("classify", {"kind": "encoder", "causal": False}), ("multi_label", {}), ("regress", {}), ("token_classify", {})])
def test_heads_and_losses(name, model):
    """Each objective on an encoder and a decoder: the loss by hand, padding does not matter, and a decoder reads its last token."""
    labels = {"regress": 1}.get(name, 3)
    cfg = TransformerConfig(vocab_size=64, context=16, layers=1, width=16, heads=2, labels=labels, init_std=0.5,
                            output="token_labels" if name == "token_classify" else "sequence_labels", **model)
    made = kinds.build(cfg)
    params = made.init(jax.random.key(0))
    data = config.build({"data": {"label_key": "x", "batch_size": 8, "sequence_length": 16}, "objective": {"name": name}})
    batch = verify.labelled(verify.batch(0, 8, False, 16, 64), 0, config.Config(objective=data.objective, data=data.data, model=cfg))
    sums = OBJECTIVES[name](ObjectiveConfig(name=name), made, params, batch, None)
    hidden = made.apply(params, batch)[0]
    logits = np.asarray(made.head(params, hidden if name == "token_classify" else hidden[np.arange(8), batch["weights"].argmax(axis=1)][:, None]), np.float64)
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
    place = jax.sharding.NamedSharding(sharding.make_mesh(MeshConfig()), jax.sharding.PartitionSpec())
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), jax.eval_shape(model.init, jax.random.key(0)))
    params = origins.headed(f"hf:{folder}", target, model.init, 0, log=lambda line: None)
    own, theirs = trees.flatten(params), trees.flatten(hf.load(hf.open_directory(folder)))
    assert set(own) - set(theirs) == {path for path in own if path.startswith("classifier") or path.startswith("pooler") and not kept}
    for path in set(own) & set(theirs):
        assert np.array_equal(own[path], theirs[path]), path
    tokens = np.array([[5, 6, 7, 8, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 12]])
    batch = tasks.text_batch([(row[row > 0], 0) for row in tokens], np.arange(2), 8, last=task.last, types=False)
    logits, _ = label_logits(model, params, {**batch, "labels": np.zeros((2, 3), np.float32)})
    alone = tasks.text_batch([(tokens[0, :4], 0)], np.arange(1), 4, last=task.last, types=False)
    assert np.allclose(logits[0], label_logits(model, params, {**alone, "labels": np.zeros((1, 3), np.float32)})[0][0], atol=1e-5)  # padding changes nothing
