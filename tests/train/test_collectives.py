"""What the compiled train step sends: read from the HLO text of 8 emulated devices."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxlm.aot import hlo
from tests.train.test_step import build


class Collective(NamedTuple):
    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of the results
    axes: frozenset[str]  # of the mesh, that it crosses


def collectives(parts) -> list[Collective]:
    with jax.set_mesh(parts.mesh):
        text = parts.step.lower(parts.target, parts.batch).compile().as_text()
    return [Collective(c.kind, tuple(array.shape for array in c.arrays), frozenset(c.axes.split("+")))
            for c in hlo.collectives(hlo.parse(text), parts.mesh.shape)]


def size(shape) -> int:
    return int(np.prod(shape))


LAYERS = 6  # no other axis of the model has this size


def test_fsdp_gathers_one_layer_at_a_time():
    """Each weight of a layer inside the scan; nothing has all layers."""
    found = collectives(build((1, 8, 1), model__layers=LAYERS))
    gathered = [shape for c in found if c.kind == "all-gather" for shape in c.shapes]
    largest = 64 * 4 * 64  # one MLP matrix
    assert largest in map(size, gathered)
    assert all(size(shape) <= largest and LAYERS not in shape for shape in gathered), gathered


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_fsdp_keeps_no_whole_weights(remat):
    """Neither gathered weights nor gradients of all layers lie whole on a device, for the backward pass or the optimiser."""
    parts = build((1, 8, 1), model__layers=LAYERS, model__remat=remat)
    with jax.set_mesh(parts.mesh):
        text = parts.step.lower(parts.target, parts.batch).compile().as_text()
    assert f"f32[{LAYERS},8,256]" in text or f"f32[{LAYERS},1,8,256]" in text
    assert f"f32[{LAYERS},64,256]" not in text and f"f32[{LAYERS},256,64]" not in text


def test_only_gradients_leave_a_slice():
    """Hybrid FSDP: weights are gathered inside a slice; between slices there are sums alone."""
    found = collectives(build((1, 4, 1), mesh__slice=2, model__layers=LAYERS))
    crossing = [c for c in found if "slice" in c.axes]
    assert crossing and {c.kind for c in crossing} <= {"all-reduce", "reduce-scatter"}
    assert any(c.kind == "all-gather" and c.axes == {"fsdp"} for c in found)


def test_between_blocks_tensor_parallel_devices_share_the_tokens():
    """The residual stream is split by tokens between blocks: what is kept for the backward pass and normed is a device's own part."""
    parts = build((1, 1, 4), model__kv_heads=4, model__layers=LAYERS, model__remat="full")
    with jax.set_mesh(parts.mesh):
        memory = parts.step.lower(parts.target, parts.batch).compile()
    text = memory.as_text()
    assert f"f32[{LAYERS},8,8,64]" in text and f"f32[{LAYERS},8,32,64]" not in text  # saved inputs of the layers: [L, B, T / 4, D]
    kinds = {c.kind for c in collectives(parts) if c.axes == {"tensor"}}
    assert "all-gather" in kinds
