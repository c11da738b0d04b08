"""Each family and knob against what transformers and torch computed from the same tiny random checkpoint (tools/make_parity_fixtures.py)."""

import functools
import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from jaxlm import generate, trees
from jaxlm.interop import hf, hf_config
from jaxlm.models import decoder

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/reference.npz") if hf_config.FAMILIES.keys()
               & set(json.loads((path.parent / "config.json").read_text())["architectures"]))
WIDTH = 24


@functools.cache
def opened(name):
    source = hf.open_directory(FIXTURES / name)
    return source, decoder.build(source.cfg), hf.load(source), dict(np.load(FIXTURES / name / "reference.npz"))


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
    return (losses * rows["weights"]).sum() / rows["weights"].sum()


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    _, model, params, reference = opened(name)
    rows, spans = batch(reference)
    logits = np.asarray(jax.jit(lambda p: model.head(p, model.apply(p, rows)[0]))(params))
    for i, (row, span) in enumerate(spans):
        assert np.abs(logits[row, span] - reference[f"logits_{i}"]).max() < max(1e-4, 20 * reference["error"]), f"document {i}"


@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_and_five_steps(name):
    source, model, params, reference = opened(name)
    rows, _ = batch(reference)
    tx, step = optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.0), jax.jit(jax.value_and_grad(lambda p: loss(model, p, rows)))
    state, losses = tx.init(params), []
    for i in range(5):
        value, gradient = step(params)
        losses.append(float(value))
        if i == 0:
            expected = {key[5:]: float(norm) for key, norm in reference.items() if key.startswith("grad_")}
            found = {key: float(np.linalg.norm(array)) for key, array in hf.tensors(source.family.table, source.cfg, gradient)}
            assert found.keys() == expected.keys()
            largest = max(expected.values())
            for key, norm in expected.items():
                assert found[key] == pytest.approx(norm, rel=1e-3, abs=1e-5 * largest), key
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert losses[0] == pytest.approx(float(reference["loss"]), abs=1e-4)
    np.testing.assert_allclose(losses, reference["losses"], atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name):
    source, model, params, reference = opened(name)
    prompts = [reference["prompt"].tolist(), reference["tokens_1"].tolist()]  # the second makes the first one ragged
    [found, _] = generate.generate(model, params, prompts, max_tokens=10, context=source.cfg.context, settings=generate.Settings(temperature=0))
    assert found == reference["greedy"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_export_is_bit_exact(name, tmp_path):
    source, _, params, _ = opened(name)
    hf.verify(source, params)
    written = hf.save(tmp_path, source.cfg, params, architecture=source.family.architecture)
    assert {key: tensor.shape for key, tensor in written.files.tensors.items()} == {key: tensor.shape for key, tensor in source.files.tensors.items()}
    for key in source.files.tensors:
        assert written.files.read(key).tobytes() == source.files.read(key).tobytes(), key
    assert written.cfg == source.cfg


@pytest.mark.parametrize("name", NAMES)
def test_exported_architecture_is_found(name):
    """Without being told, a family that computes the same is found."""
    source = opened(name)[0]
    family, config = hf_config.write(source.cfg)
    assert hf_config.read(config)[1] == source.cfg and trees.count(jax.eval_shape(decoder.build(source.cfg).init, jax.random.key(0))) > 0
    same = {"mistral": {"MistralForCausalLM"}, "qwen2": {"Qwen2ForCausalLM"}, "mixtral": {"MixtralForCausalLM"}}
    assert family.architecture in same.get(name, {family.architecture})
