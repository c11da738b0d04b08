"""What the compiled train step sends: read from the HLO text of 8 emulated devices."""

import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxlm import sharding
from tests.train.test_step import build

_LINE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")

_NAMED = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}")


class Collective(NamedTuple):
    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of the results
    axes: frozenset[str]  # of the mesh, that it crosses


def collectives(parts) -> list[Collective]:
    with jax.set_mesh(parts.mesh):
        text = parts.step.lower(parts.target, parts.batch).compile().as_text()
    place = {device.id: dict(zip(sharding.AXES, index)) for index, device in np.ndenumerate(parts.mesh.devices)}
    found = []
    for line in text.splitlines():
        if match := _LINE.search(line):
            shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w\d+\[([\d,]*)\]", match[1]))
            crossed = {a for group in groups(line) or [list(place)] for a in sharding.AXES if len({place[d][a] for d in group}) > 1}
            found.append(Collective(match[2], shapes, frozenset(crossed)))
    return found


def groups(line: str) -> list[list[int]]:
    """Devices that talk to each other; none where the text names none: all do."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [[int(n) for n in pair.split(",")] for pair in pairs[1].replace("{", "").replace("}", "|").strip("|").replace("|,", "|").split("|")]
    if named := _NAMED.search(line):  # jax 0.10: axes of a mesh of the compiler's own
        sizes = [int(n) for n in re.findall(r"=(\d+)", named[1])]
        dims, order = ([int(n) for n in text.split(",")] if text else None for text in named.groups()[1:3])
        ids = np.arange(np.prod(sizes)).reshape(dims or sizes)
        ids, across = (ids if order is None else ids.transpose(order)).reshape(sizes), [int(n) for n in re.findall(r"'axis_(\d+)'", named[4])]
        assert len(across) == named[4].count("axis_") and ":" not in named[4], line
        return np.moveaxis(ids, across, range(-len(across), 0)).reshape(-1, np.prod([sizes[a] for a in across])).tolist()
    if iota := _IOTA.search(line):
        shape, dims, order = ([int(n) for n in text.split(",")] if text else None for text in iota.groups())
        ids = np.arange(np.prod(dims)).reshape(dims)
        return (ids if order is None else ids.transpose(order)).reshape(shape).tolist()
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", line)
    return [[int(n) for n in group.split(",")] for group in listed[1].split("},{")] if listed else []


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


@pytest.mark.parametrize("line, expected", [
    ("x, replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]), ("x, replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("x, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, y", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("x, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, y", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("x, replica_groups={{0,2},{1,3}}, y", [[0, 2], [1, 3]]), ("x, source_target_pairs={{0,1},{1,0}}, y", [[0, 1], [1, 0]])])
def test_groups_are_read(line, expected):
    assert groups(line) == expected
