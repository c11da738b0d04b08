"""transformers loads what is exported and computes the same. Needs torch; .ci/run has it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import TransformerConfig
from jaxlm.interop import hf
from jaxlm.models import decoder
from tests.interop.test_parity import FIXTURES, NAMES

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TRAINED = TransformerConfig(vocab_size=64, context=32, layers=2, width=16, heads=4, kv_heads=2, init_std=0.3)


def theirs(folder, tokens):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def ours(cfg, params, tokens):
    model = decoder.build(cfg)
    batch = {"tokens": jnp.array(tokens), "positions": jnp.arange(tokens.shape[1])[None], "segments": jnp.ones(tokens.shape, jnp.int32)}
    return np.asarray(model.head(params, model.apply(params, batch)[0]))


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_an_export(name, tmp_path):
    source = hf.open_directory(FIXTURES / name)
    params = jax.tree.map(lambda leaf: leaf * 1.01, hf.load(source))  # not what any file there holds
    hf.save(tmp_path, source.cfg, params, architecture=source.family.architecture)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 20))
    np.testing.assert_allclose(theirs(tmp_path, tokens), ours(source.cfg, params, tokens), atol=1e-4)


@pytest.mark.parametrize("change", [{}, dict(norm="layer", positions="learned", activation="gelu_tanh", gated=False, bias=True, kv_heads=0)])
def test_transformers_reads_a_model_made_here(change, tmp_path):
    cfg = TransformerConfig(**(vars(TRAINED) | change)).filled()
    params = decoder.build(cfg).init(jax.random.key(0))
    hf.save(tmp_path, cfg, params, extra={"eos_token_id": 3})
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 3
    tokens = np.random.default_rng(0).integers(0, 64, (1, 20))
    np.testing.assert_allclose(theirs(tmp_path, tokens), ours(cfg, params, tokens), atol=1e-4)
