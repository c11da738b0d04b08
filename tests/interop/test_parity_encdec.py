"""Encoder-decoders against what transformers and torch computed from the same tiny random checkpoints (tools/make_parity_fixtures.py)."""

import jax
import numpy as np
import pytest

from jaxlm import generate
from jaxlm.config import ObjectiveConfig
from jaxlm.objectives import next_token
from jaxlm.ops import positions
from tests.interop.parity import close, exports_exactly, names, opened, trains_alike

NAMES = names("encdec")


def pair_batch(reference, where=((0, 0, 0), (1, 0, 0), (2, 0, 0), (2, 9, 6)), read=32, said=24):
    """Pair 0 in a row of its own, 1 with padding after it, 2 and 3 packed into one row; and where each lies."""
    batch = {side + key: np.zeros((3, size), np.int32) for side, size in (("encoder_", read), ("", said)) for key in ("tokens", "positions", "segments")}
    batch |= {"targets": np.zeros((3, said), np.int32), "weights": np.zeros((3, said), np.float32)}
    spans = []
    for i, (row, a, b) in enumerate(where):
        for side, start, ids in (("encoder_", a, reference[f"inputs_{i}"]), ("", b, reference[f"tokens_{i}"])):
            span = slice(start, start + len(ids))
            batch[f"{side}tokens"][row, span], batch[f"{side}positions"][row, span] = ids, np.arange(len(ids))
            batch[f"{side}segments"][row, span] = 1 + (start > 0)
        batch["targets"][row, span], batch["weights"][row, span] = reference[f"targets_{i}"], 1
        spans.append((row, span))
    return batch, spans


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_gradients_and_five_steps(name):
    _, model, _, reference = opened(name)
    batch, spans = pair_batch(reference)

    def mean(p):
        total, weight = next_token(ObjectiveConfig(), model, p, batch, None)["loss"]
        return total / weight, model.head(p, model.apply(p, batch)[0])

    def outputs(logits):
        for i, (row, span) in enumerate(spans):
            close(logits[row, span], reference[f"logits_{i}"], reference)

    trains_alike(name, mean, outputs)


@pytest.mark.parametrize("name", NAMES)
def test_export_is_bit_exact(name, tmp_path):
    exports_exactly(name, tmp_path)


def test_buckets():
    far, expected = np.arange(-300, 301)[None], opened(NAMES[0])[3]["buckets"]
    for causal in (False, True):
        found = positions.relative_buckets(np.zeros((1, 1), np.int32), far, buckets=32, distance=128, causal=causal)
        np.testing.assert_array_equal(found[0, 0], expected[int(causal)])


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name):
    source, model, params, reference = opened(name)
    prompts = [reference["inputs_0"].tolist(), reference["inputs_1"].tolist()]  # the second makes the batch ragged
    found = generate.generate(model, params, prompts, max_tokens=10, context=source.cfg.context, settings=generate.Settings(temperature=0))
    assert found[0] == reference["greedy"].tolist()
    # The second against the whole sequence at once, without a cache.
    batch, spans = pair_batch({"inputs_0": np.array(prompts[1]), "tokens_0": np.array([source.cfg.decoder_start, *found[1][:-1]]),
                               "targets_0": np.array(found[1])}, where=[(0, 0, 0)])
    logits = jax.jit(lambda p: model.head(p, model.apply(p, batch)[0]))(params)
    assert np.asarray(logits[0, :10].argmax(-1)).tolist() == found[1]


@pytest.mark.parametrize("prompt, max_tokens, words", [([], 1, "1 to 8"), ([5] * 9, 1, "1 to 8"), ([5], 9, "max_tokens=9 is more than")])
def test_generation_without_room(prompt, max_tokens, words):
    _, model, params, _ = opened(NAMES[0])
    with pytest.raises(ValueError, match=words):
        generate.generate(model, params, [prompt], max_tokens=max_tokens, context=8)
