"""StableHLO programs: what a process with jax alone computes is what the model computes, for any number of rows."""

import dataclasses
import json
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm.config import TransformerConfig
from jaxlm.generate import Settings, generate
from jaxlm.interop import stablehlo
from jaxlm.models import kinds

CFG = TransformerConfig(vocab_size=320, context=64, layers=2, width=16, heads=2, kv_heads=1, windows=(0, 6))
CLASSIFIER = dataclasses.replace(CFG, kind="encoder", causal=False, output="sequence_labels", labels=3, kv_heads=0, windows=(0,), layers=1,
                                 norm_position="post", positions="learned")


def model_of(cfg):
    model = kinds.build(cfg)
    return model, jax.jit(lambda key: jax.tree.map(lambda w: w * 8 if w.ndim > 1 else w, model.init(key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    model, params = model_of(CFG)
    assert stablehlo.write(folder, CFG, model, params, 24) <= 1e-5  # a process of its own, that cannot import jaxlm, has run it
    return folder, model, params


def test_forward_and_decode_are_the_models_own_for_any_number_of_rows(decoder):
    folder, model, params = decoder
    found = runpy.run_path(str(folder / "run.py"))["load"](folder)
    prompts = [[5, 1, 7], [9, 9, 2]]
    cache, logits = found.start(2), None
    for column in np.array(prompts).T:
        logits, cache = found.decode(column, cache)
    said = []
    for _ in range(8):
        said.append(np.argmax(logits, axis=-1))
        logits, cache = found.decode(said[-1], cache)
    want = generate(model, params, prompts, max_tokens=8, context=64, settings=Settings(temperature=0.0))
    assert np.stack(said, 1).tolist() == want and len({*want[0], *want[1]}) > 3
    rows = np.zeros((1, 24), np.int32)
    rows[0, :4] = [5, 1, 7, want[0][0]]
    [row] = np.asarray(found.forward(rows, [4]))
    assert row[:4].argmax(-1).tolist()[2:] == want[0][:2]
    about = json.loads((folder / "program.json").read_text())
    assert set(about["programs"]) == {"forward", "decode"} and "layers/attn/q" in about["weights"] and "tpu" in about["platforms"]


@pytest.mark.slow
def test_other_weights_are_noticed(decoder, tmp_path):
    folder = shutil.copytree(decoder[0], tmp_path / "broken")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-400:] = bytes(400)
    (folder / "model.safetensors").write_bytes(data)
    done = subprocess.run([sys.executable, "run.py", "--check"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "largest difference" in done.stdout


@pytest.mark.slow
def test_a_classifier_in_bfloat16_weights(tmp_path):
    model, params = model_of(CLASSIFIER)
    assert stablehlo.write(tmp_path, CLASSIFIER, model, params, 16, "bfloat16") <= 1e-5
    assert json.loads((tmp_path / "program.json").read_text())["programs"].keys() == {"forward"} and np.load(tmp_path / "sample.npz")["output"].shape == (3, 3)


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, monkeypatch):
    model, params = model_of(CFG)
    with pytest.raises(ValueError, match="--length=65 must be 2 to 64"):
        stablehlo.write(tmp_path, CFG, model, params, 65)
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        stablehlo.write(tmp_path, CFG, model._replace(start=0), params, 8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[export\]'"):
        stablehlo.write(tmp_path, CFG, model, params, 8)
    assert not any(tmp_path.iterdir())
