"""Each family and knob against what transformers and torch computed from the same tiny random checkpoint (tools/make_parity_fixtures.py)."""

import json

import jax
import numpy as np
import optax
import pytest

from jaxlm import generate, trees
from jaxlm.interop import hf_config
from jaxlm.models import decoder
from tests.interop.parity import FIXTURES, close, exports_exactly, names, opened, trains_alike

NAMES = [name for name in names() if hf_config.FAMILIES.keys() & set(json.loads((FIXTURES / name / "config.json").read_text())["architectures"])]
WIDTH = 24


def batch(reference):
    """Document 0 in a row of its own, 1 with padding after it, 2 and 3 packed into one row; and where each lies."""
    rows, where = np.zeros((3, 4, WIDTH), np.int32), [(0, 0), (1, 0), (2, 0), (2, 9)]
    tokens, positions, segments = rows[0], np.zeros((3, WIDTH), np.int32), np.zeros((3, WIDTH), np.int32)
    tokens, targets = np.zeros((3, WIDTH), np.int32), np.zeros((3, WIDTH), np.int32)
    weights, spans = np.zeros((3, WIDTH), np.float32), []
    for i, (row, start) in enumerate(where):
        ids = reference[f"tokens_{i}"]
        span = slice(start, start + len(ids))
        tokens[row, span], positions[row, span], segments[row, span] = ids, np.arange(len(ids)), 1 + (start > 0)
        targets[row, start:start + len(ids) - 1], weights[row, start:start + len(ids) - 1] = ids[1:], 1
        spans.append((row, span))
    return {"tokens": tokens, "targets": targets, "weights": weights, "positions": positions, "segments": segments}, spans


def loss(model, params, rows):
    logits = model.head(params, model.apply(params, rows)[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
    return (losses * rows["weights"]).sum() / rows["weights"].sum(), logits


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_gradients_and_five_steps(name):
    _, model, _, reference = opened(name)
    rows, spans = batch(reference)

    def outputs(logits):
        for i, (row, span) in enumerate(spans):
            close(logits[row, span], reference[f"logits_{i}"], reference)

    trains_alike(name, lambda p: loss(model, p, rows), outputs)


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name):
    source, model, params, reference = opened(name)
    prompts = [reference["prompt"].tolist(), reference["tokens_1"].tolist()]  # the second makes the first one ragged
    [found, _] = generate.generate(model, params, prompts, max_tokens=10, context=source.cfg.context, settings=generate.Settings(temperature=0))
    assert found == reference["greedy"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_export_is_bit_exact(name, tmp_path):
    exports_exactly(name, tmp_path, architecture=opened(name)[0].family.architecture)


@pytest.mark.parametrize("name", NAMES)
def test_exported_architecture_is_found(name):
    """Without being told, a family that computes the same is found."""
    source = opened(name)[0]
    family, config = hf_config.write(source.cfg)
    assert hf_config.read(config)[1] == source.cfg and trees.count(jax.eval_shape(decoder.build(source.cfg).init, jax.random.key(0))) > 0
    same = {"mistral": {"MistralForCausalLM"}, "qwen2": {"Qwen2ForCausalLM"}, "mixtral": {"MixtralForCausalLM"}}
    assert family.architecture in same.get(name, {family.architecture})
