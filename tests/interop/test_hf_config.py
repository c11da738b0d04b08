"""config.json: both spellings, rates of dropout, names of labels, models that also see pictures, and the export that is found for a model."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxlm import config as configs
from jaxlm.config import Config, DataConfig, TransformerConfig
from jaxlm.interop import hf, hf_config
from jaxlm.models.presets import PRESETS
from jaxlm.train import initial
from tests.interop.parity import FIXTURES, opened

OLD = dict(vocab_size=64, max_position_embeddings=48, num_hidden_layers=6, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24)


@pytest.mark.parametrize("old, new", [
    (dict(architectures=["LlamaForCausalLM"], rope_theta=5e5, torch_dtype="bfloat16", rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
     dict(architectures=["LlamaForCausalLM"], dtype="bfloat16", rope_parameters=dict(
         rope_theta=5e5, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16))),
    (dict(architectures=["LlamaForCausalLM"], rope_scaling=dict(type="linear", factor=2.0)),
     dict(architectures=["LlamaForCausalLM"], rope_parameters=dict(rope_theta=1e4, rope_type="linear", factor=2.0))),
    (dict(model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=500),
     dict(model_type="gpt_neox", rope_parameters=dict(rope_theta=500, rope_type="default", partial_rotary_factor=0.5))),
    (dict(model_type="gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=dict(rope_type="linear", factor=8.0), sliding_window=4,
          sliding_window_pattern=6, query_pre_attn_scalar=256),
     dict(model_type="gemma3_text", sliding_window=4, layer_types=["sliding_attention"] * 5 + ["full_attention"], rope_parameters=dict(
         full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6), sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
    (dict(model_type="gemma2", sliding_window=4), dict(model_type="gemma2", sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 3)),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2),
     dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=["full_attention"] * 2 + ["sliding_attention"] * 4)),
    (dict(model_type="qwen2", use_sliding_window=False, sliding_window=4), dict(model_type="qwen2", sliding_window=None)),
], ids=lambda c: c.get("model_type", "llama"))
def test_both_spellings(old, new):
    assert hf_config.read(OLD | old)[1] == hf_config.read(OLD | new)[1]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_their_family_says(name):
    start = name.partition("_")[0]
    expected = "gptneox" if start in ("neox", "pythia") else "llama" if start.startswith("llama") else "bert" if start == "minilm" else start.removesuffix(".5")
    assert hf_config.write(PRESETS[name])[0].architecture.lower().startswith(expected)


def test_a_model_of_no_family_says_what_differs():
    cfg = TransformerConfig(vocab_size=64, width=16, heads=4, qk_norm="full")
    with pytest.raises(ValueError, match="nearest: LlamaForCausalLM has another qk_norm"):
        hf_config.write(cfg)
    with pytest.raises(ValueError, match="'ElectraModel' is not known; known: Llama"):
        hf_config.write(cfg, "ElectraModel")
    assert hf_config.write(dataclasses.replace(cfg, qk_norm="none"))[0].architecture == "LlamaForCausalLM"


RATES = {  # the families' own keys: of branches and of attention probabilities
    "gpt2": ("resid_pdrop", "attn_pdrop"), "gpt_neox": ("hidden_dropout", "attention_dropout"), "qwen3": (None, "attention_dropout"),
    "gemma3": (None, "attention_dropout"), "encoders/bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "encoders/distilbert": ("dropout", "attention_dropout"), "encdec/t5": ("dropout_rate", "dropout_rate"),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_of_dropout_go_in_and_out(name):
    branches, probabilities = RATES[name]
    given = json.loads((FIXTURES / name / "config.json").read_text()) | {branches or "x": 0.25, probabilities: 0.25 if branches == probabilities else 0.125}
    family, cfg = hf_config.read(given)
    assert (cfg.dropout, cfg.attention_dropout) == (0.25 if branches else 0.0, given[probabilities])
    written = hf_config.write(cfg, family.architecture)[1]
    assert all(written[key] == given[key] for key in RATES[name] if key)


def test_rates_that_are_not_said_are_those_of_the_family():
    for name, expected in (("gpt2", 0.1), ("qwen3", 0.0), ("encoders/bert", 0.1)):
        given = json.loads((FIXTURES / name / "config.json").read_text())
        given = {key: value for key, value in given.items() if "drop" not in key}
        assert hf_config.read(given)[1].attention_dropout == expected


def test_a_recipe_without_dropout_keeps_that_of_the_model():
    given = TransformerConfig(vocab_size=64, dropout=0.1, attention_dropout=0.2)
    merged = initial._merge(TransformerConfig(attention_dropout=0.3), given, "hf:DIR")
    assert (merged.dropout, merged.attention_dropout) == (0.1, 0.3)


NAMED = {"0": "bad", "2": "great", "1": "good"}


@pytest.mark.parametrize("name", ["bert_sequence", "roberta_tokens", "distilbert_sequence"])
def test_names_of_labels_are_carried(name, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(FIXTURES / "encoders" / name, folder)
    assert hf.open_directory(folder).cfg.label_names == ()  # the fixture has LABEL_0 ...
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": NAMED, "label2id": {text: int(i) for i, text in NAMED.items()}}))
    source = hf.open_directory(folder)
    assert source.cfg.label_names == ("bad", "good", "great")
    assert configs.from_json(configs.to_json(Config(model=source.cfg, data=DataConfig(sequence_length=16)))).model == source.cfg  # what a checkpoint keeps
    (tmp_path / "out").mkdir()
    assert hf.save(tmp_path / "out", source.cfg, hf.load(source)).cfg == source.cfg
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == NAMED and written["label2id"] == {"bad": 0, "good": 1, "great": 2}


def test_bad_names_of_labels():
    given = json.loads((FIXTURES / "encoders" / "bert_sequence" / "config.json").read_text())
    with pytest.raises(ValueError, match="in id2label, which must be 0, 1, 2"):
        hf_config.read(given | {"id2label": {"0": "a", "5": "b"}})
    with pytest.raises(ValueError, match="must be model.labels=3 different names"):
        TransformerConfig(kind="encoder", causal=False, output="token_labels", labels=3, label_names=("a", "a", "b"))


@pytest.mark.parametrize("place, ends", [("language_model.model.", "language_model.lm_head.weight"), ("model.language_model.", "lm_head.weight")])
def test_the_text_model_of_one_that_sees_pictures(place, ends, tmp_path):
    """Both layouts of transformers; the tower and the projector are left out by name, all else must fit."""
    source, _, params, _ = opened("gemma3")
    tensors = {name.replace("model.", place, 1): array for name, array in safetensors.numpy.load_file(FIXTURES / "gemma3" / "model.safetensors").items()}
    tensors[ends] = tensors[f"{place}embed_tokens.weight"].copy()
    lead = "model." if place.startswith("model.") else ""
    tensors |= {f"{lead}vision_tower.vision_model.post_layernorm.weight": np.ones(4, np.float32), f"{lead}vision_tower.vision_model.head.weight": np.ones(4, np.float32),
                f"{lead}multi_modal_projector.mm_soft_emb_norm.weight": np.ones(4, np.float32)}
    text = json.loads((FIXTURES / "gemma3" / "config.json").read_text())
    text.pop("architectures")
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 4}}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = hf.open_directory(tmp_path)
    assert found.cfg == source.cfg and found.family.architecture == "Gemma3ForCausalLM"
    jax.tree.map(np.testing.assert_array_equal, hf.load(found), params)
    table = hf.mapping(found)
    assert "left out: vision_tower, 2 tensors" in table and "left out: multi_modal_projector, 1 tensors" in table
    safetensors.numpy.save_file(tensors | {"audio_tower.weight": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no place for: audio_tower.weight"):
        hf.open_directory(tmp_path)


def test_the_text_part_of_googles_gemma_3_says_little():
    """What the config.json of gemma-3-4b holds; the rest is what transformers takes for granted."""
    text = dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34, sliding_window=1024,
                rope_scaling={"factor": 8.0, "rope_type": "linear"})
    cfg = hf_config.read({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}})[1]
    assert cfg == PRESETS["gemma3_4b"].filled()
    with pytest.raises(ValueError, match="lacks text_config"):
        hf_config.read({"architectures": ["Gemma3ForConditionalGeneration"]})
