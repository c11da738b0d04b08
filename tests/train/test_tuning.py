"""Fine-tuning from start to end: chats, adapters, preferences, distillation; what is saved, resumed, merged, exported and refused."""

import json
import shutil

import numpy as np
import pytest

from jaxlm import cli, config, trees
from jaxlm.interop import peft
from jaxlm.train import checkpoint, evaluation, loop, origin, report, saved
from tests.train import runs

pytestmark = pytest.mark.slow
MODEL = {"model.context": "64", "model.layers": "2", "model.width": "32", "model.heads": "2", "model.kv_heads": "1", "model.tied": "false",
         "model.feedforward": "48"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    words = ["red", "green", "blue", "black", "white", "grey"]
    chats = [{"instruction": f"say {a} {b}", "output": f"{a}, {b}"} for a in words for b in words]
    (folder / "chats.json").write_text(json.dumps(chats))
    (folder / "pairs.json").write_text(json.dumps([{"prompt": c["instruction"], "chosen": c["output"], "rejected": c["output"][::-1] + "!"} for c in chats]))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": c["output"]}) + "\n" for c in chats))
    (folder / "t.jinja").write_text("{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}")
    (folder / "recipe.py").write_text("from ml_collections import ConfigDict\nget_config = ConfigDict\n")
    run(folder, "base", source="text.jsonl", more={**MODEL, "tokenizer.kind": "bytes"})
    return folder


def settings(folder, source, more):
    form = {"chats.json": "chat", "pairs.json": "preference"}.get(source, "text")
    values = {"data.source": f"({str(folder / source)!r},)", "data.format": form, "data.sequence_length": "64",
              "data.batch_size": "4", "data.validation": "0.2", "data.test": "0", "data.threads": "0", "optim.lr": "1e-2", "optim.warmup": "0",
              "train.steps": "4", "train.log_every": "1", "train.eval_every": "50%", "checkpoint.every": "50%", "checkpoint.keep_last": "9",
              "eval.bootstrap": "10", "mesh.fsdp": "-1"} | ({"data.chat_template": str(folder / "t.jinja")} if form != "text" else {})
    return config.load(str(folder / "recipe.py"), (values | more).items())


def run(folder, name, *, source, more, sample=False, devices=1):
    """Trains on so many devices, which split the parameters; a sample, which compiles generation, is drawn only if asked for."""
    with runs.devices(devices), pytest.MonkeyPatch.context() as patch:
        if not sample:
            patch.setattr(evaluation, "sample", lambda *_: "")
        assert loop.run(settings(folder, source, more), folder / name) == 0
    return folder / name


def params(workdir, step=None):
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(saved.open_run(workdir, step, log=lambda line: None).params).items()}


def losses(workdir):
    return [row["train/loss"] for row in report.read_metrics(workdir) if "train/loss" in row]


LORA = {"objective.name": "sft", "lora.rank": "4", "lora.alpha": "8", "lora.dropout": "0.1"}


@pytest.fixture(scope="module")
def tuned(folder):
    return run(folder, "lora", source="chats.json", more=LORA | {"train.init_from": str(folder / "base")}, sample=True)


def test_adapters_are_all_that_is_saved_and_resume_bitwise(folder, tuned, tmp_path):
    arrays = json.loads((tuned / "checkpoints/4/MANIFEST.json").read_text())["arrays"]
    assert all("/lora/" in name for name in arrays if name.startswith("params/")) and not any("embed" in name for name in arrays)
    base, merged = params(folder / "base"), params(tuned)
    same = {path for path in base if np.array_equal(base[path], merged[path])}
    assert base.keys() - same == {f"layers/{name}" for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/gate", "mlp/down")}
    assert losses(tuned)[-1] < losses(tuned)[0]
    again = shutil.copytree(tuned, tmp_path / "again")
    shutil.rmtree(again / "checkpoints/4")
    (again / "FINISHED").unlink()
    run(folder, again, source="chats.json", more=LORA | {"train.init_from": str(folder / "base"), "data.dir": str(tuned / "data")})
    for path, leaf in params(again).items():
        np.testing.assert_array_equal(leaf, merged[path], path)
    assert losses(again) == losses(tuned)


def test_export_and_import(folder, tuned, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", f"--workdir={tuned}", f"--to={tmp_path / 'adapter'}", "--adapter"])
    assert not ended.value.code
    cfg, step, adapters, told = saved.adapters(tuned)
    fingerprint, found = peft.load(tmp_path / "adapter", cfg.model, cfg.lora)
    assert fingerprint == told["fingerprint"] and told["origin"] == str(folder / "base")
    for path, leaf in trees.flatten(adapters).items():
        np.testing.assert_array_equal(found[path], np.asarray(leaf), path)
    listed = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert listed["r"] == 4 and "model.layers.1.mlp.down_proj" in listed["target_modules"]
    with pytest.raises(SystemExit), runs.devices(1):
        cli.main(["export", f"--workdir={tuned}", f"--to={tmp_path / 'whole'}"])
    assert (tmp_path / "whole/chat_template.jinja").read_text() == (folder / "t.jinja").read_text()
    # On another base it is refused, and so are other matrices.
    other = run(folder, "other", source="text.jsonl", more={**MODEL, "tokenizer.kind": "bytes", "train.seed": "1", "train.steps": "1"})
    for start, words in (({"lora.init_from": str(tmp_path / "adapter")}, "another base"), ({"lora.init_from": str(tuned)}, "another base"),
                         ({"lora.init_from": str(tmp_path / "adapter"), "lora.rank": "2"}, "lora.rank=2, and the adapter")):
        with pytest.raises(ValueError, match=words) as caught:
            run(folder, "refused", source="chats.json", more=LORA | {"train.init_from": str(other)} | start)
        assert "\n" not in str(caught.value)
        shutil.rmtree(folder / "refused")
    # A base that has changed since is noticed when the run is opened.
    told_path = shutil.copytree(tuned, tmp_path / "moved")
    target = saved.open_run(other, log=lambda line: None).params
    with pytest.raises(ValueError, match="was trained on another base than this one"):
        origin.same_base(told, target, f"the adapter in {told_path}")


def test_preferences_and_a_second_adapter(folder, tuned):
    dpo = run(folder, "dpo", source="pairs.json", more={"objective.name": "preference", "lora.rank": "4", "lora.alpha": "8",
                                                       "train.init_from": str(folder / "base"), "optim.frozen_dtype": "int8", "lora.init_from": str(tuned)},
              devices=2)
    rows = [row for row in report.read_metrics(dpo) if "train/reward_margin" in row]
    assert rows[-1]["train/reward_margin"] > rows[0]["train/reward_margin"] and 0 <= rows[-1]["train/reward_accuracy"] <= 1
    assert any("eval/preferred" in row for row in report.read_metrics(dpo))
    full = run(folder, "full", source="pairs.json", more={"objective.name": "preference", "train.init_from": str(tuned), "optim.lr": "1e-3"}, devices=2)
    first = losses(full)[0]
    assert abs(first - np.log(2)) < 1e-6  # the reference is what training began with: the merged model
    assert "companion" in json.loads(checkpoint.read_file(full, 4, origin.BASE)) and not any(path.startswith("companion") for path in params(full))


def test_distillation_from_every_other_layer(folder):
    more = {"objective.name": "next_token", "objective.teacher": str(folder / "base"), "train.init_from": str(folder / "base"), "train.init_layers": "(1,)",
            "objective.teacher_cosine": "0.5", "optim.frozen_dtype": "bfloat16"}
    small = run(folder, "small", source="text.jsonl", more=more, devices=2)
    base, found = params(folder / "base"), params(small, 2)
    assert found["layers/attn/q"].shape[0] == 1 and found.keys() == base.keys()
    assert np.abs(found["layers/attn/q"][0] - base["layers/attn/q"][1]).mean() < np.abs(found["layers/attn/q"][0] - base["layers/attn/q"][0]).mean()
    rows = [row for row in report.read_metrics(small) if "train/teacher_kl" in row]
    assert rows and all(np.isfinite(row["train/teacher_kl"]) for row in rows)
    with pytest.raises(ValueError, match="model.width=32 and the student 64"):
        run(folder, "narrow", source="text.jsonl", more={"objective.teacher": str(folder / "base"), "objective.teacher_cosine": "1", "tokenizer.kind": "bytes",
                                                         **MODEL, "model.width": "64"})


@pytest.mark.parametrize("more, words", [
    ({"lora.rank": "2", "objective.name": "sft"}, "lora.rank needs a model to begin with"),
    ({"train.init_layers": "(0, 5)", "train.init_from": "base"}, r"train.init_layers=\(0, 5\) must be different numbers in \[0, 2\)"),
])
def test_bad_input(folder, more, words):
    more = {key: str(folder / "base") if value == "base" else value for key, value in more.items()}
    with pytest.raises(ValueError, match=words) as caught:
        run(folder, "bad", source="chats.json" if "objective.name" in more else "text.jsonl", more=more)
    assert "\n" not in str(caught.value)
