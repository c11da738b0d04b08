"""The device mesh, the table from logical axes to mesh axes, and the start of processes.

Model code names logical axes ("batch", "heads"); only this table knows what the mesh does with them.
"""

import contextlib
import math
import os
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm import trees
from jaxlm.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. A logical axis missing here is an error; None is whole on every device.
RULES: Mapping[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # rows of a batch
    "layers": None,
    "embed": ("fsdp",),  # the residual axis of a weight
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "feedforward": ("tensor",),
    "expert": None,
    "head_size": None,
    "positions": None,
    "types": None,  # kinds of tokens, as of BERT
    "labels": None,
    "sequence": None,  # tokens of an activation
    "residual": None,  # the residual axis of an activation
}


def start_processes(coordinator: str = "", processes: int = 0, index: int = -1) -> None:
    """Joins the processes of one run; does nothing for a single one.

    TPU pods and Slurm are recognised by jax itself. Elsewhere give the address of process 0, the number of processes and this one's index.
    Processes on CPUs talk over gloo.

    Raises:
      ValueError: flags given in part.
    """
    if coordinator:
        if processes < 1 or not 0 <= index < processes:
            raise ValueError(f"--coordinator={coordinator} also needs --processes=N and --process=I with 0 <= I < N, got N={processes}, I={index}")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, processes, index, heartbeat_timeout_seconds=10)
    elif _cluster_size() > 1:
        jax.distributed.initialize()


def _cluster_size() -> int:
    """Processes that the surroundings announce: a Slurm step, GKE's variable, or the metadata server of a Cloud TPU VM."""
    slurm = int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_STEP_NODELIST" in os.environ else 1
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not workers and slurm == 1 and "COLAB_RELEASE_TAG" not in os.environ and (os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")):
        address = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
        request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2) as answer:  # no such server: not a Cloud TPU VM
            workers = answer.read().decode()
    return max(slurm, len(workers.split(",")))


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices.

    Raises:
      ValueError: sizes whose product is not the number of devices, with one that would work.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    text = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise ValueError(f"mesh {text} does not fit {len(devices)} devices: the axes must multiply to {len(devices)}; "
                         f"try --config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor={math.gcd(len(devices), max(1, sizes['tensor']))}")
    sizes = {axis: len(devices) // fixed if n == -1 else n for axis, n in sizes.items()}
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes -> the partition of an array, by `RULES`."""
    parts = [None if axis is None else RULES[axis] for axis in axes]
    used = [name for part in parts if part for name in part]
    assert len(used) == len(set(used)), f"{axes} use a mesh axis twice: {parts}"
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an activation is split; no effect outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def params_shardings(mesh: Mesh, axes: Sequence[tuple[str, tuple[str, ...]]], shapes: Any) -> Any:
    """A `NamedSharding` for each parameter.

    Args:
      mesh: the device mesh.
      axes: strict rules, path regex -> logical axes.
      shapes: nested dict of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: a dimension that its mesh axes do not divide, with the sizes that would.
    """
    table = trees.match(axes, trees.flatten(shapes), "axes of the model")

    def place(path: str, leaf) -> NamedSharding:
        names = table[path]
        assert len(names) == leaf.ndim, f"{path} has shape {leaf.shape} but axes {names}"
        for size, name in zip(leaf.shape, names):
            ways = math.prod(mesh.shape[axis] for axis in RULES[name] or ())
            if size % ways:
                works = [n for n in range(1, ways + 1) if size % n == 0 and ways % n == 0]
                raise ValueError(f"{path}: {name}={size} cannot be split over mesh.{'+'.join(RULES[name])}={ways}; sizes that work: {works}")
        return NamedSharding(mesh, spec(names))

    return trees.map_paths(place, shapes)


def like_params(mesh: Mesh, tree: Any, shardings: Any, shapes: Any) -> Any:
    """Shardings for a tree (an optimiser's state, say) that holds copies of the parameters: a leaf that has a parameter's name and shape
    lies where the parameter lies, every other leaf is whole on each device."""
    places, sizes = trees.flatten(shardings), trees.flatten(shapes)
    whole = NamedSharding(mesh, PartitionSpec())
    return trees.map_paths(lambda path, leaf: places[path] if path in places and sizes[path].shape == leaf.shape else whole, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, tokens whole."""
    return NamedSharding(mesh, spec(("batch", "sequence")))


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """The slice `[start, stop)` of the global batch's rows that this process's devices hold.

    Raises:
      ValueError: rows that do not divide over the devices, with the nearest number that does.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(f"{batch_size} rows do not divide over data x fsdp = {ways} devices; use a multiple of {ways}, such as "
                         f"{max(1, round(batch_size / ways)) * ways}")
    slices = [index[0].indices(batch_size)[:2] for index in batch_sharding(mesh).addressable_devices_indices_map((batch_size, 1)).values()]
    start, stop = min(a for a, _ in slices), max(b for _, b in slices)
    assert sum(b - a for a, b in set(slices)) == stop - start, "a process's rows must be one piece"
    return start, stop


def to_device(mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """This process's rows `[b, T]` -> global arrays `[batch_size, T]`."""
    place = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(place, rows, (batch_size, *rows.shape[1:])) for key, rows in batch.items()}


def together(work: Callable[[], int | None]) -> int | None:
    """Every process does its `work`. All get the result of process 0, or, when any failed, all raise: none is left waiting for another."""
    value, error = None, None
    try:
        value = work()
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        rows = multihost_utils.process_allgather(np.array([-1 if value is None else value, error is not None], np.int32))
        value = None if rows[0, 0] < 0 else int(rows[0, 0])
        failed = np.flatnonzero(rows[:, 1])
        if error is None and failed.size:
            error = OSError(f"process {failed[0]} failed; the line it printed says why")
    if error is not None:
        raise error
    return value


def first(work: Callable[[], int | None]) -> int | None:
    """Process 0 does the `work` for all."""
    return together(work if jax.process_index() == 0 else lambda: None)
