import json
import pathlib

import pytest

from jaxlm import config

GOLDEN = pathlib.Path(__file__).parent / "golden" / "config_keys.json"


def test_keys_are_a_decision():
    now = json.loads(json.dumps(config.keys()))
    assert now == json.loads(GOLDEN.read_text()), (
        "the configuration's keys or defaults changed: if that is meant, refresh tests/golden/config_keys.json with tools/refresh_golden.py config_keys "
        "and say in the commit why one more key is worth it")


def test_json_round_trip():
    cfg = config.build({"model": {"windows": (0, 128), "heads": 8}, "optim": {"decay_rules": ((".*", True),)}, "train": {"steps": "2 epochs"}})
    assert config.from_json(config.to_json(cfg)) == cfg


@pytest.mark.parametrize("tree, words", [
    ({"optim": {"lrr": 1.0}}, ["config.optim.lrr", "did you mean config.optim.lr?"]),
    ({"train": {"lr": 1.0}}, ["did you mean config.optim.lr?"]),
    ({"optimiser": {"lr": 1.0}}, ["config.optimiser", "did you mean config.optim", "tokenizer, data, model"]),
    ({"optim": 3}, ["config.optim holds keys"]),
    ({"optim": {"lr": "fast"}}, ["config.optim.lr='fast' is text; it must be a number"]),
    ({"model": {"layers": 2.5}}, ["config.model.layers=2.5 is a number; it must be a whole number"]),
    ({"model": {"tied": 1}}, ["it must be true or false"]),
    ({"model": {"norm": "rmsnorm"}}, ["did you mean 'rms'?", "layer, rms"]),
    ({"model": {"width": 100, "heads": 3}}, ["model.heads=3 must divide model.width=100: try 2"]),
    ({"model": {"heads": 4, "kv_heads": 3}}, ["model.kv_heads=3 must divide"]),
    ({"model": {"width": 12, "heads": 4}}, ["even head size"]),
    ({"data": {"batch_size": 9}, "train": {"microbatches": 2}}, ["train.microbatches=2 must divide data.batch_size=9"]),
    ({"data": {"sequence_length": 1024}}, ["longer than model.context=512"]),
    ({"data": {"validation": 0.6, "test": 0.5}}, ["leave something to train on"]),
    ({"train": {"steps": "7 parsecs"}}, ["config.train.steps='7 parsecs' is not a duration", "3 epochs"]),
    ({"mesh": {"data": -1, "fsdp": -1}}, ["only one axis may be -1"]),
    ({"tokenizer": {"vocab_size": 100}}, ["at least 300"]),
])
def test_errors_are_one_line_that_helps(tree, words):
    with pytest.raises(ValueError) as caught:
        config.build(tree)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_load_overrides(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("from ml_collections import ConfigDict\ndef get_config(arg=None):\n"
                      "  c = ConfigDict(); c.optim = ConfigDict(); c.optim.lr = 1e-2 if arg == 'hot' else 1e-4; return c\n")
    cfg = config.load(f"{recipe}:hot", [("train.steps", "2 epochs"), ("model.layers", "1e1"), ("data.source", "a.txt,b/*.jsonl"), ("model.tied", "false"),
                                        ("optim.trainable", "(('layers/.*', True), ('embed/.*', False))"), ("model.windows", "0,64"), ("optim.warmup", "7")])
    assert cfg.optim.lr == 1e-2 and cfg.train.steps == "2 epochs" and cfg.model.layers == 10 and not cfg.model.tied
    assert cfg.data.source == ("a.txt", "b/*.jsonl") and cfg.model.windows == (0, 64) and cfg.optim.warmup == "7"
    assert cfg.optim.trainable == (("layers/.*", True), ("embed/.*", False))
    with pytest.raises(ValueError, match="config.optim.lrr does not exist"):
        config.load(str(recipe), [("optim.lrr", "1")])


@pytest.mark.parametrize("text, words", [
    ("raise RuntimeError('x')", "could not be read as a config: RuntimeError: x"), ("def get_config(: pass", "SyntaxError"),
    ("def get_config(): return {}", "must return an ml_collections.ConfigDict"), ("x = 1", "AttributeError")])
def test_broken_recipe(tmp_path, text, words):
    recipe = tmp_path / "bad.py"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=words):
        config.load(str(recipe))


def test_recipes_load_by_name_and_path():
    names = sorted(p.stem for p in config.recipes_folder().glob("[a-z]*.py"))
    assert {"quickstart", "gpt2_124m", "llama_150m", "llama_1b", "llama_7b"} <= set(names)
    for name in names:
        assert config.load(name) == config.load(f"configs/{name}.py")
    assert config.load("quickstart:long") != config.load("quickstart")
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        config.load("quikstart")
    with pytest.raises(ValueError, match="long"):
        config.load("quickstart:longest")


@pytest.mark.parametrize("duration, steps", [("30", 30), ("30 steps", 30), ("1e3 tokens", 8), ("2 epochs", 16), ("0.5 epoch", 4), ("5%", 10), ("0", 0),
                                             ("0.1%", 1), ("1_000 tokens", 8)])
def test_durations(duration, steps):
    assert config.steps_of("k", duration, tokens_per_step=128, tokens_per_epoch=1000, total=200) == steps


def test_percent_of_itself_is_refused():
    with pytest.raises(ValueError, match="cannot define the run itself"):
        config.steps_of("train.steps", "5%", tokens_per_step=1, tokens_per_epoch=1)


def test_difference_names_keys():
    a, b = config.build({}), config.build({"optim": {"lr": 0.5}})
    assert config.difference(a, b) == ["optim.lr: 0.001 -> 0.5"]
