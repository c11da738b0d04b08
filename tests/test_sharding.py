import io
import types
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlm import peers, sharding
from jaxlm.config import MeshConfig


def sizes(**given):
    return dict.fromkeys(sharding.AXES, 1) | given


def test_minus_one_takes_what_is_left():
    assert dict(sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == sizes(data=2, fsdp=2, tensor=2)
    assert dict(sharding.make_mesh(MeshConfig()).shape) == sizes(fsdp=8)
    assert dict(sharding.make_mesh(MeshConfig(slice=2, stage=-1, fsdp=1, expert=2)).shape) == sizes(slice=2, stage=2, expert=2)


@pytest.mark.parametrize("given, words", [
    ({"fsdp": 3}, "mesh fsdp 3 does not fit 8 devices: the axes must multiply to 8; try --config.mesh.fsdp=-1"),
    ({"fsdp": 1}, "mesh of 1 does not fit 8 devices"),
    ({"fsdp": -1, "tensor": 6}, "mesh fsdp -1 x tensor 6 does not fit 8 devices: .*; try --config.mesh.tensor=2 --config.mesh.fsdp=-1"),
    ({"fsdp": 2, "stage": 4, "expert": 4}, "try --config.mesh.stage=2 --config.mesh.expert=4 --config.mesh.fsdp=-1"),
    ({"data": -1, "fsdp": 1, "sequence": 5}, "try --config.mesh.sequence=1 --config.mesh.data=-1")])
def test_a_mesh_that_does_not_fit_says_which_would(given, words):
    with pytest.raises(ValueError, match=words) as caught:
        sharding.make_mesh(MeshConfig(**given))
    assert "\n" not in str(caught.value)
    flags = str(caught.value).partition("try ")[2].split()
    proposed = {"fsdp": 1} | {flag.partition("=")[0].removeprefix("--config.mesh."): int(flag.partition("=")[2]) for flag in flags}
    assert sharding.make_mesh(MeshConfig(**proposed)).size == 8


class Chip:
    """A device with a slice, as far as laying out a mesh goes."""
    platform, device_kind, process_index = "made up", "made up", 0

    def __init__(self, number):
        self.id, self.slice_index = number, number % 2


def test_slices_are_the_outermost_axis():
    mesh = sharding.make_mesh(MeshConfig(slice=2, fsdp=2, tensor=2), [Chip(i) for i in range(8)])
    assert dict(mesh.shape) == sizes(slice=2, fsdp=2, tensor=2)
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="mesh.slice=4, but the 8 devices form 2 slices: set --config.mesh.slice=2"):
        sharding.make_mesh(MeshConfig(slice=4, fsdp=2), [Chip(i) for i in range(8)])


def test_logical_axes():
    assert sharding.spec(("layers", "embed", "heads", "head_size")) == PartitionSpec(("stage",), ("fsdp",), ("tensor",), None)
    with pytest.raises(ValueError, match="axes 'heads' and 'vocab' of .* both want mesh.tensor"):
        sharding.spec(("heads", "vocab"))
    with pytest.raises(KeyError):
        sharding.spec(("no_such_axis",))


def test_zigzag_gives_all_the_same_work():
    for parts, length in ((1, 4), (2, 16), (4, 32), (3, 18)):
        order = sharding.zigzag(parts, length)
        np.testing.assert_array_equal(np.sort(order), np.arange(length))
        seen = (order + 1).reshape(parts, -1).sum(1)  # keys that the queries of each device see
        assert len(set(seen.tolist())) == 1
    np.testing.assert_array_equal(sharding.zigzag(2, 8), [0, 1, 6, 7, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="rows of 20 tokens cannot be split over mesh.sequence=4: make .* a multiple of 2 x 4, such as 16"):
        sharding.zigzag(4, 20)


def test_tokens_reach_the_devices_in_zigzag_order():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))
    rows = np.arange(32, dtype=np.int32).reshape(4, 8)
    placed = sharding.to_device(mesh, {"tokens": rows}, 4)["tokens"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(placed, rows[:, sharding.zigzag(2, 8)])


def test_constrain_without_a_mesh_is_nothing():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", "residual") is x


def test_rows_reach_the_devices_in_order():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert sharding.local_rows(mesh, 8) == (0, 8)
    rows = np.arange(32, dtype=np.int32).reshape(8, 4)
    placed = sharding.to_device(mesh, {"tokens": rows}, 8)["tokens"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}
    with pytest.raises(ValueError, match="6 rows do not divide over mesh.data x mesh.fsdp = 2 x 2 = 4 devices; use a multiple of 4, such as 8"):
        sharding.local_rows(mesh, 6)


def test_optimiser_state_lies_with_its_parameter():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    shapes = {"a": jax.ShapeDtypeStruct((16, 2), jnp.float32)}
    places = sharding.params_shardings(mesh, (("a", ("embed", "feedforward")),), shapes)
    state = {"count": jax.ShapeDtypeStruct((), jnp.int32)}
    found = sharding.like_params(mesh, {"mu": shapes}, places, shapes)
    assert found["mu"]["a"].is_fully_replicated  # under another name it is another array
    inner = sharding.like_params(mesh, (shapes, state["count"]), places, shapes)
    assert inner[0]["a"] == places["a"] and inner[1].is_fully_replicated


@pytest.mark.parametrize("environment, accelerator, answer, expected", [
    ({}, False, None, 1), ({"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"}, False, None, 4), ({"SLURM_NTASKS": "4"}, False, None, 1),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, None, 2), ({}, True, b"0:1:10.0.0.2,1:2:10.0.0.3", 2), ({}, True, b"0:1:10.0.0.2", 1), ({}, True, None, 1),
    ({"COLAB_RELEASE_TAG": "x"}, True, b"a,b", 1)])
def test_who_starts_processes(monkeypatch, environment, accelerator, answer, expected):
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sharding.os.path, "exists", lambda path: accelerator)

    def urlopen(request, timeout):
        if answer is None:
            raise OSError("no such host")
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert sharding._cluster_size() == expected


def test_coordinator_needs_all_flags():
    with pytest.raises(ValueError, match="also needs --processes=N and --process=I"):
        sharding.start_processes("127.0.0.1:1", 2, -1)


def test_a_batch_counts_before_its_work_begins(monkeypatch):
    """So that a process that waits for the others in its first batch is ahead of one that never came to it."""
    here = types.SimpleNamespace(steps=0)
    monkeypatch.setattr(peers, "_current", here)
    sharding.to_device(sharding.make_mesh(MeshConfig()), {"tokens": np.zeros((8, 4), np.int32)}, 8)
    assert here.steps == 1
