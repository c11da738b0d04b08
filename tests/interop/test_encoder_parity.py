"""Each encoder and head against what transformers and torch computed from the same tiny random checkpoint (tools/make_encoder_fixtures.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from jaxlm import generate
from jaxlm.config import TransformerConfig
from jaxlm.interop import hf, hf_config
from tests.interop.parity import FIXTURES, close, exports_exactly, names, opened, trains_alike

NAMES = names("encoders")
MASKED = FIXTURES / "encoders" / "bert_masked"


def inputs(reference):
    mask = reference["mask"]
    return {"tokens": reference["tokens"], "types": reference["types"], "segments": mask, "positions": np.arange(mask.shape[1])[None] * mask}


def test_every_family_and_head_is_here():
    assert len(NAMES) == 12 and {opened(name)[0].family.architecture for name in NAMES} == {
        name for name, family in hf_config.FAMILIES.items() if family.model_type in ("bert", "roberta", "distilbert")}


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_outputs(name):
    _, model, params, reference = opened(name)
    hidden, outputs = jax.jit(lambda p: (hidden := model.apply(p, inputs(reference))[0], model.head(p, hidden)))(params)
    counts = reference["mask"] > 0
    close(hidden, reference["hidden"], reference, counts)
    if "outputs" not in reference:
        assert outputs.shape == hidden.shape and outputs.dtype == jnp.float32
    else:
        assert outputs.shape == reference["outputs"].shape
        close(outputs, reference["outputs"], reference, counts if outputs.ndim == 3 else slice(None))


@pytest.mark.parametrize("name", ["encoders/bert", "encoders/roberta", "encoders/distilbert"])
def test_packed_rows_compute_the_same(name):
    """All three sequences in one row, each a segment of its own; heads have no part in it."""
    _, model, params, reference = opened(name)
    rows = [np.flatnonzero(mask) for mask in reference["mask"]]
    join = lambda values: np.concatenate(values).astype(np.int32)[None]
    packed = {"tokens": join([reference["tokens"][i, at] for i, at in enumerate(rows)]), "types": join([reference["types"][i, at] for i, at in enumerate(rows)]),
              "positions": join(rows), "segments": join([np.full(len(at), i + 1) for i, at in enumerate(rows)])}
    hidden = jax.jit(lambda p: model.apply(p, packed)[0])(params)
    close(hidden[0], np.concatenate([reference["hidden"][i, at] for i, at in enumerate(rows)]), reference)


@pytest.mark.parametrize("name", [name for name in NAMES if "loss" in np.load(FIXTURES / name / "reference.npz")])
def test_loss_gradients_and_five_steps(name):
    _, model, _, reference = opened(name)
    labels = reference["labels"]

    def loss(p):
        logits = model.head(p, model.apply(p, inputs(reference))[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return (losses * (labels >= 0)).sum() / (labels >= 0).sum(), logits

    trains_alike(name, loss)


@pytest.mark.parametrize("name", NAMES)
def test_export_is_bit_exact(name, tmp_path):
    """The architecture is found without being told; the id of padding is the tokenizer's, but RoBERTa's positions decide its own."""
    exports_exactly(name, tmp_path, extra={"pad_token_id": 7})


def test_older_files_with_gamma_beta_pooler_and_next_sentence_head(tmp_path):
    source, _, params, _ = opened("encoders/bert_masked")
    tensors = safetensors.numpy.load_file(MASKED / "model.safetensors")
    older = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value for name, value in tensors.items()}
    older |= {"bert.embeddings.position_ids": np.arange(24), "bert.pooler.dense.weight": np.ones((16, 16), np.float32), "bert.pooler.dense.bias": np.ones(16, np.float32),
              "cls.seq_relationship.weight": np.ones((2, 16), np.float32), "cls.seq_relationship.bias": np.ones(2, np.float32),
              "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"]}
    safetensors.numpy.save_file(older, tmp_path / "model.safetensors")
    config = json.loads((MASKED / "config.json").read_text()) | {"architectures": ["BertForPreTraining"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = hf.open_directory(tmp_path)
    assert len(found.ignored) == 6 and found.family.architecture == "BertForMaskedLM"
    jax.tree.map(np.testing.assert_array_equal, hf.load(found), params)


@pytest.mark.parametrize("values, words", [
    (dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key', which is not computed here"),
    (dict(is_decoder=True), "is_decoder=True"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
])
def test_what_is_not_computed_is_refused(values, words):
    config = json.loads((MASKED / "config.json").read_text())
    with pytest.raises(ValueError, match=words):
        hf_config.read(config | values)


def test_an_encoder_does_not_generate():
    _, model, params, _ = opened("encoders/bert_masked")
    with pytest.raises(ValueError, match="an encoder fills in masked tokens and does not continue text") as caught:
        generate.generate(model, params, [[3, 4]], max_tokens=4, context=24)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values, words", [
    (dict(kind="encoder"), "set model.causal=false"), (dict(output="pooled"), "is an encoder's"), (dict(token_types=2), "are an encoder's"),
    (dict(position_offset=2), "goes with model.positions=learned"), (dict(kind="encoder", causal=False, labels=2), "does not go with model.output=tokens"),
    (dict(kind="encoder", causal=False, output="token_labels"), "model.labels=0 does not go"),
])
def test_impossible_encoders(values, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**values)
