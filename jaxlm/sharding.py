"""The device mesh, the table from logical axes to mesh axes, and the start of processes.

Model code names logical axes ("batch", "heads"); only this table knows what the mesh does with them.
"""

import contextlib
import functools
import math
import os
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm import peers, trees
from jaxlm.config import MeshConfig

# From the slowest network to the fastest, in the order in which neighbours are laid out.
AXES = ("slice", "data", "fsdp", "stage", "sequence", "tensor", "expert")

# Logical axis -> mesh axes. A logical axis missing here is an error; None is whole on every device.
RULES: Mapping[str, tuple[str, ...] | None] = {
    "batch": ("slice", "data", "fsdp", "expert"),  # rows of a batch
    "layers": ("stage",),
    "embed": ("fsdp",),  # the residual axis of a weight
    "vocab": ("stage", "tensor"),  # embedding and output belong to no stage: all share them
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "feedforward": ("tensor",),
    "expert": ("expert",),
    "routes": None,  # experts as outputs of a router
    "head_size": None,
    "positions": None,
    "types": None,  # kinds of tokens, as of BERT
    "labels": None,
    "rank": None,  # the inner axis of an adapter
    "block": None,  # weights that share a scale
    "sequence": ("sequence",),  # tokens of an activation
    "tokens": ("sequence", "tensor"),  # likewise, of the residual stream between blocks: what each device adds and norms is then its own
    "residual": None,  # the residual axis of an activation
}


def start_processes(coordinator: str = "", processes: int = 0, index: int = -1, *, heartbeat: float = 10) -> None:
    """Joins the processes of one run; does nothing for a single one.

    TPU pods and Slurm are recognised by jax itself. Elsewhere give the address of process 0, the number of processes and this one's index.
    Processes on CPUs talk over gloo.

    Args:
      heartbeat: seconds after which jax itself takes a silent process for dead and aborts the others.

    Raises:
      ValueError: flags given in part.
    """
    if coordinator:
        if processes < 1 or not 0 <= index < processes:
            raise ValueError(f"--coordinator={coordinator} also needs --processes=N and --process=I with 0 <= I < N, got N={processes}, I={index}")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, processes, index, heartbeat_timeout_seconds=math.ceil(heartbeat))
    elif _cluster_size() > 1:
        jax.distributed.initialize(heartbeat_timeout_seconds=math.ceil(heartbeat))


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


def mesh_sizes(cfg: MeshConfig, devices: int) -> dict[str, int]:
    """Axis -> size, with -1 filled in.

    Raises:
      ValueError: sizes whose product is not the number of devices, with sizes that would work.
    """
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if devices % fixed or (-1 not in sizes.values() and fixed != devices):
        text = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if n != 1) or "of 1"
        raise ValueError(f"mesh {text} does not fit {devices} devices: the axes must multiply to {devices}; try {_fitting(sizes, devices)}")
    return {axis: devices // fixed if n == -1 else n for axis, n in sizes.items()}


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, of `AXES`.

    Devices that know their slice (TPUs, GPUs with a fabric) are laid out so that only the axis `slice` leaves one.

    Raises:
      ValueError: sizes whose product is not the number of devices, or slices that are not there, with sizes that would work.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(cfg, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["slice"] == 1 or slices == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    if slices != sizes["slice"]:
        raise ValueError(f"mesh.slice={sizes['slice']}, but the {len(devices)} devices form {slices} slices: set --config.mesh.slice={slices}")
    inside, across = [1, *list(sizes.values())[1:]], [slices, *[1] * (len(AXES) - 1)]
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices), AXES, axis_types=types)


def _fitting(sizes: Mapping[str, int], devices: int) -> str:
    """Flags of a mesh near `sizes` that fits: each given axis cut to what divides the devices left, the rest to the axis with -1, else fsdp."""
    rest = next((axis for axis, n in sizes.items() if n == -1), "fsdp")
    found = {}
    for axis in (axis for axis in reversed(AXES) if axis != rest and sizes[axis] != 1):
        found[axis] = math.gcd(devices, sizes[axis])
        devices //= found[axis]
    return " ".join(f"--config.mesh.{axis}={n}" for axis, n in (*reversed(found.items()), (rest, -1)))


def spec(axes: Sequence[str | None], rules: Mapping[str, tuple[str, ...] | None] = RULES) -> PartitionSpec:
    """Logical axes -> the partition of an array.

    Raises:
      ValueError: two axes of the array want the same mesh axis.
    """
    parts = [None if axis is None else rules[axis] for axis in axes]
    owner: dict[str, str] = {}
    for axis, names in zip(axes, parts):
        for name in names or ():
            if name in owner:
                raise ValueError(f"axes {owner[name]!r} and {axis!r} of {tuple(axes)} both want mesh.{name}: an array is split over a mesh axis once; give "
                                 "one of them another rule, or None")
            owner[name] = axis
    return PartitionSpec(*parts)


def ways(axis: str, mesh: Any = None) -> int:
    """Into how many parts `mesh` (None: that of the surrounding `jax.set_mesh`) splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in RULES[axis] or ())


def platform(mesh: Any = None) -> str:
    """"cpu", "gpu" or "tpu": what the devices of `mesh` are (None: of the surrounding `jax.set_mesh`, outside of one jax's default). They need not be here:
    this is what a program is compiled for."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else getattr(mesh, "abstract_mesh", mesh)
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    kind = mesh.abstract_device.device_kind.lower()
    return next((name for name in ("cpu", "tpu") if kind.startswith(name)), "gpu")


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an activation is split; no effect outside a mesh or on one device. An axis with fewer elements than parts (the one token of a
    step of generation) stays whole."""
    if (mesh := jax.sharding.get_abstract_mesh()).empty or mesh.size == 1:
        return x
    part = spec([None if axis is None or n < ways(axis) else axis for n, axis in zip(x.shape, axes, strict=True)])
    try:
        return jax.lax.with_sharding_constraint(x, part)
    except NotImplementedError:  # jax before 0.8 inside a pipeline's stage: the compiler decides there
        return x


def per_device(f: Callable, inputs: Sequence[Sequence[str | None]], outputs: Any) -> Callable:
    """`f` as each device runs it on its own parts of the arrays, with collectives over the names in `AXES`.

    Args:
      inputs: logical axes of each argument (or of all leaves of one); `f` gets whole what no axis splits.
      outputs: logical axes of the result, or a tuple of those of each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
    several = any(isinstance(axes, tuple) for axes in outputs)
    return jax.shard_map(f, in_specs=tuple(spec(axes) for axes in inputs), out_specs=tuple(spec(a) for a in outputs) if several else spec(outputs),
                         axis_names=free, check_vma=False)


def divides(x: jax.Array, *axes: str | None) -> bool:
    """Whether the surrounding mesh has more than one device and splits `x` evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and all(axis is None or n % ways(axis) == 0 for n, axis in zip(x.shape, axes))


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
            parts = ways(name, mesh)
            if size % parts:
                works = [n for n in range(1, parts + 1) if size % n == 0 and parts % n == 0]
                over = [axis for axis in RULES[name] if mesh.shape[axis] > 1]
                raise ValueError(f"{path}: {name}={size} cannot be split over mesh.{'+'.join(over)}={parts}; sizes that work: {works}")
        return NamedSharding(mesh, spec(names))

    return trees.map_paths(place, shapes)


def like_params(mesh: Mesh, tree: Any, shardings: Any, shapes: Any) -> Any:
    """Shardings for a tree (an optimiser's state, say) that holds copies of the parameters: a leaf that has a parameter's name and shape
    lies where the parameter lies, one that holds a value for each block of it as near as its size allows, every other leaf is whole on each device."""
    places, sizes = trees.flatten(shardings), trees.flatten(shapes)

    def place(path: str, leaf: Any) -> NamedSharding:
        if path not in places or len(sizes[path].shape) != leaf.ndim or any(n % m for n, m in zip(sizes[path].shape, leaf.shape)):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, _dividing(mesh, leaf.shape, places[path].spec)) if sizes[path].shape != leaf.shape else places[path]

    return trees.map_paths(place, tree)


def _dividing(mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """`spec` where it divides `shape`; mesh axes that do not divide their own dimension split the first other one that they do."""
    parts = [() if part is None else part if isinstance(part, tuple) else (part,) for part in (*spec, *[None] * (len(shape) - len(spec)))]
    found: list[tuple[str, ...]] = [()] * len(shape)
    fits = lambda i, names: shape[i] % math.prod(mesh.shape[name] for name in (*found[i], *names)) == 0
    for at, names in enumerate(parts):
        where = next((i for i in (at, *range(len(shape))) if fits(i, names)), None)
        if where is not None:
            found[where] = (*found[where], *names)
    return PartitionSpec(*(names or None for names in found))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T]."""
    return NamedSharding(mesh, spec(("batch", "sequence")))


PER_ROW = ("labels",)  # keys of a batch whose second axis is not its tokens: each device has all of it


def over(axis: str, mesh: Mesh) -> str:
    """The axes of the mesh that split a logical axis, with their sizes: "data x fsdp = 2 x 4"."""
    names = [name for name in RULES[axis] or () if mesh.shape[name] > 1] or ["fsdp"]
    sizes = f"mesh.{' x mesh.'.join(names)} = {ways(axis, mesh)}"
    return sizes if len(names) == 1 else sizes.replace(" = ", f" = {' x '.join(str(mesh.shape[name]) for name in names)} = ")


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """The slice `[start, stop)` of the global batch's rows that this process's devices hold.

    Raises:
      ValueError: rows that do not divide over the devices, with the nearest number that does.
    """
    parts = ways("batch", mesh)
    if batch_size % parts:
        raise ValueError(f"{batch_size} rows do not divide over {over('batch', mesh)} devices; use a multiple of {parts}, such as "
                         f"{max(1, round(batch_size / parts)) * parts}")
    slices = [index[0].indices(batch_size)[:2] for index in batch_sharding(mesh).addressable_devices_indices_map((batch_size, mesh.shape["sequence"])).values()]
    start, stop = min(a for a, _ in slices), max(b for _, b in slices)
    assert sum(b - a for a, b in set(slices)) == stop - start, "a process's rows must be one piece"
    return start, stop


def zigzag(parts: int, length: int) -> np.ndarray:
    """The order in which tokens lie when `parts` devices share a row: int64 `[length]`, the token in each slot.

    Of 2 x `parts` equal pieces device i holds number i and number 2 parts - 1 - i, so that under causal attention, where late tokens see more, all have
    the same work (as in Llama 3's training, Grattafiori et al. 2024, section 3.3.2).

    Raises:
      ValueError: a length that does not divide.
    """
    if length % (2 * parts):
        raise ValueError(f"rows of {length} tokens cannot be split over mesh.sequence={parts}: make data.sequence_length a multiple of 2 x {parts}, such as "
                         f"{max(1, round(length / (2 * parts))) * 2 * parts}")
    pieces = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([pieces[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


def to_device(mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """This process's rows `[b, T]` -> global arrays `[batch_size, T]`.

    Where devices share a row its tokens lie in zig-zag order, in all arrays alike. Nothing on the devices depends on the order: positions and segments
    say what a token sees, and what is computed for each token lies where the token does.
    """
    peers.worked()  # what follows all processes do together: one that does not come to it is behind
    parts = mesh.shape["sequence"]
    place = lambda key: NamedSharding(mesh, spec(("batch", None))) if key in PER_ROW else batch_sharding(mesh)
    if parts == 1:
        return {key: jax.make_array_from_process_local_data(place(key), rows, (batch_size, *rows.shape[1:])) for key, rows in batch.items()}
    start = local_rows(mesh, batch_size)[0]

    def piece(key: str, rows: np.ndarray, index: tuple[slice, slice]) -> np.ndarray:
        first, last, _ = index[0].indices(batch_size)
        return rows[first - start:last - start, slice(None) if key in PER_ROW else zigzag(parts, rows.shape[1])[index[1]]]

    return {key: jax.make_array_from_callback((batch_size, rows.shape[1]), place(key), functools.partial(piece, key, rows)) for key, rows in batch.items()}


def together(work: Callable[[], int | None]) -> int | None:
    """Every process does its `work`. All get the result of process 0, or, when any failed, all raise: none is left waiting for another."""
    value, error = None, None
    try:
        value = work()
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        peers.worked()
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
