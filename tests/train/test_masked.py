"""An encoder trained on masked tokens, from recipe to evaluation, in this process."""

import json
import math

import pytest

from jaxlm import cli
from jaxlm.config import build, to_dict
from jaxlm.train import loop, saved
from tests.train import runs

ENCODER = [("model.kind", "encoder"), ("model.causal", "false"), ("model.positions", "learned"), ("model.norm", "layer"), ("model.norm_position", "post"),
           ("model.bias", "true"), ("model.gated", "false"), ("model.activation", "gelu"), ("model.token_types", "2"), ("objective.name", "masked_token"),
           ("optim.lr", "3e-3"), ("mesh.data", "-1"), ("mesh.fsdp", "1")]


def jaxlm(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code


def test_train_and_evaluate(tmp_path, capsys):
    cfg = runs.load(tmp_path, ENCODER, steps=60, every=30)
    assert loop.run(cfg, tmp_path / "run") == 0
    losses = runs.losses(tmp_path / "run")
    assert sum(losses[i] for i in range(51, 61)) / 10 < losses[1] - 2  # ln 320 = 5.8 at the start
    out = capsys.readouterr().out
    assert "of the masked tokens right" in out and "bits per byte" not in out.lower() and "jaxlm generate" not in out
    assert saved.open_run(tmp_path / "run").config.model.kind == "encoder"
    rows = []
    for size in (3, 8):
        assert jaxlm("eval", f"--workdir={tmp_path / 'run'}", f"--batch_size={size}") == 0
    out = capsys.readouterr().out
    assert "nats per masked token: no likelihood of a text, so no perplexity" in out and "of the masked tokens" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert "perplexity" not in rows[0] and "bits_per_byte" not in rows[0] and rows[0]["tokens"] == rows[1]["tokens"] > 0
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-4) and math.isfinite(rows[0]["loss_low"])
    assert jaxlm("generate", f"--workdir={tmp_path / 'run'}", "--prompt=a") == 2
    assert "holds an encoder, which fills in masked tokens and does not continue text" in capsys.readouterr().err


@pytest.mark.parametrize("name, kind, output, words", [
    ("next_token", "encoder", "tokens", "does not train model.kind=encoder: set objective.name=masked_token"),
    ("masked_token", "decoder", "tokens", "does not train model.kind=decoder: set objective.name=next_token"),
    ("masked_token", "encoder", "hidden", "trains models with model.output=tokens, not hidden"),
])
def test_objective_and_model_must_fit(tmp_path, name, kind, output, words):
    tree = to_dict(runs.load(tmp_path))
    tree["objective"]["name"] = name
    tree["model"] |= {"kind": kind, "output": output, "causal": kind == "decoder"}
    with pytest.raises(ValueError, match=words):
        loop.run(build(tree), tmp_path / "run")
