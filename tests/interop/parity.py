"""What the parity tests share: a fixture opened, five steps of AdamW held against torch's, an export compared bit by bit."""

import functools
import pathlib

import jax
import numpy as np
import optax
import pytest

from jaxlm.interop import hf
from jaxlm.models import kinds

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def names(folder: str = "") -> list[str]:
    """The fixtures in a folder, each as `opened` takes it."""
    return sorted(path.parent.relative_to(FIXTURES).as_posix() for path in (FIXTURES / folder).glob("*/reference.npz"))


@functools.cache
def opened(name: str):
    """The directory, the model, its parameters, and what torch computed of it."""
    source = hf.open_directory(FIXTURES / name)
    return source, kinds.build(source.cfg), hf.load(source), dict(np.load(FIXTURES / name / "reference.npz"))


def close(found, expected, reference, counts=slice(None)) -> None:
    """Equal to max(1e-4, 20 x the reference's own float32 error) where `counts` says so."""
    assert np.abs(np.asarray(found) - expected)[counts].max() < max(1e-4, 20 * reference["error"])


def trains_alike(name: str, loss, outputs=lambda logits: None) -> None:
    """The loss of the parameters, the norm of its gradient in every tensor, and five steps of AdamW; one program for all.

    Args:
      loss: parameters -> loss, logits.
      outputs: is given the logits of the parameters as they were.
    """
    source, _, params, reference = opened(name)
    tx = optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.0)

    @jax.jit
    def step(params, state):
        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return value, logits, gradient, optax.apply_updates(params, updates), state

    state, losses = tx.init(params), []
    for i in range(5):
        value, logits, gradient, params, state = step(params, state)
        losses.append(float(value))
        if i == 0:
            outputs(np.asarray(logits))
            expected = {key[5:]: float(norm) for key, norm in reference.items() if key.startswith("grad_")}
            found = {key: float(np.linalg.norm(array)) for key, array in hf.tensors(source.family.table, source.cfg, gradient)}
            assert found.keys() == expected.keys()
            for key, norm in expected.items():
                assert found[key] == pytest.approx(norm, rel=1e-3, abs=1e-5 * max(expected.values())), key
    assert losses[0] == pytest.approx(float(reference["loss"]), abs=1e-4)
    np.testing.assert_allclose(losses, reference["losses"], atol=2e-3)


def exports_exactly(name: str, folder: pathlib.Path, **options) -> None:
    """The export holds the very bytes of the fixture, and its config.json says the same model."""
    source, _, params, _ = opened(name)
    hf.verify(source, params)
    written = hf.save(folder, source.cfg, params, **options)
    assert written.family.architecture == source.family.architecture and written.cfg == source.cfg
    assert {key: tensor.shape for key, tensor in written.files.tensors.items()} == {key: tensor.shape for key, tensor in source.files.tensors.items()}
    for key in source.files.tensors:
        assert written.files.read(key).tobytes() == source.files.read(key).tobytes(), key
