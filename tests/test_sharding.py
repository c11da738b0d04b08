import io
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlm import sharding
from jaxlm.config import MeshConfig


def test_minus_one_takes_what_is_left():
    assert dict(sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


def test_logical_axes():
    assert sharding.spec(("layers", "embed", "heads", "head_size")) == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    with pytest.raises(AssertionError, match="twice"):
        sharding.spec(("heads", "vocab"))
    with pytest.raises(KeyError):
        sharding.spec(("no_such_axis",))


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
    with pytest.raises(ValueError, match="6 rows do not divide over data x fsdp = 4 devices; use a multiple of 4, such as 8"):
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
