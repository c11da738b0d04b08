"""Compiles the real train step for TPUs that are not here, with libtpu's compiler, and reads off what it needs.

Home of `jax.experimental.topologies`. No chip is touched: libtpu runs on any x86 Linux machine.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxlm import sharding
from jaxlm.aot import formula, hlo, roofline, schedule
from jaxlm.chips import Topology
from jaxlm.config import LABELLED, Config, MeshConfig
from jaxlm.data import rows
from jaxlm.train import initial, setup

# libtpu asks a metadata server who it is unless it is told; silence below errors.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3",
                "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "2"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device's program."""
    memory: dict[str, int]  # bytes, see `MEMORY`
    fits: bool  # what the compiler says: it refuses a program of which more than a program may take, arguments included, lives at one time
    flops: float  # of matrix products, one device, one step, recomputation included
    traffic: int  # bytes of main memory read and written in one step, an estimate from the program's text; 0 where the compiler refused
    collectives: tuple[hlo.Collective, ...]
    links: dict[str, int]  # see `roofline.communication`
    schedule: schedule.Schedule | None  # None where the compiler refused
    seconds: float  # of compilation
    error: str  # the compiler's words where it refused


MEMORY = ("parameters", "optimiser", "average", "batch", "padding and rest", "activations and temporaries", "program")


def require_libtpu() -> None:
    """Raises a ValueError that names the extra to install where libtpu is absent."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, the TPU compiler, is not installed: pip install 'jaxlm[tpu]' (no TPU is needed), or give --topology=gpu:h100x8, "
                         "which goes by formula")


@functools.cache
def devices(name: str, slices: int, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr), patience: float = 3600.0) -> tuple[Any, ...]:
    """Stand-ins for the devices of a slice, for compilation only. Waits while another process holds libtpu.

    Raises:
      ValueError: libtpu is absent, or held for longer than `patience` seconds.
    """
    require_libtpu()
    from jax.experimental import topologies

    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    started, told = time.monotonic(), False
    while True:
        try:
            more = {"num_slices": slices} if slices > 1 else {}
            return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices)
        except jax.errors.JaxRuntimeError as error:
            if "lockfile" not in str(error) and "already in use" not in str(error):
                raise
            if time.monotonic() - started > patience:
                raise ValueError("libtpu is held by another process for too long; where none runs, remove /tmp/libtpu_lockfile") from error
            if not told:
                say("another process holds libtpu (one at a time can; /tmp/libtpu_lockfile): waiting for it; Ctrl-C ends")
                told = True
            time.sleep(1.0)


def abstract_mesh(cfg: MeshConfig, chips: int) -> AbstractMesh:
    """The mesh of `sharding.make_mesh` without devices.

    Raises:
      ValueError: axes whose product is not `chips`.
    """
    shape = tuple(sharding.mesh_sizes(cfg, chips).values())
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def build(config: Config, mesh: Mesh | AbstractMesh, platform: str) -> setup.Setup:
    """The parts of a run, as `jaxlm train` builds them, for a corpus that is not here.

    Raises:
      ValueError: as `setup.build`; or a tokenizer of unknown size.
    """
    if config.train.init_from:
        config = initial.sized(config)
    if config.objective.name in LABELLED:  # how many classes there are, only the data know: what a head adds is next to nothing
        classes = 0 if config.objective.name == "regress" else config.model.labels or 2
        config = rows.for_labels(config, rows.Task(config.data.sequence_length, config.objective, label_names=tuple(f"LABEL_{i}" for i in range(classes))))
    if config.model.vocab_size == 0 and config.tokenizer.path:
        raise ValueError(f"tokenizer.path={config.tokenizer.path} is of unknown size here: set --config.model.vocab_size")
    pieces = 259 if config.tokenizer.kind == "bytes" else config.model.vocab_size if config.tokenizer.path else config.tokenizer.vocab_size
    # Some steps: how long a run is changes nothing here, and with a batch many times larger it may be shorter than its own warm-up.
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps="100_000_000 steps"))
    return setup.build(config, mesh, pieces, 10**9, platform)


def state_bytes(parts: setup.Setup) -> dict[str, int]:
    """Bytes of one device by part of the state, and of its share of a batch, without layout padding."""
    def size(tree) -> int:
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return {"parameters": size(parts.target.params), "optimiser": size(parts.target.opt), "average": size(parts.target.ema), "batch": size(parts.batch)}


def compile_step(config: Config, topology: Topology, quick: bool = False, text: Callable[[str], None] = lambda program: None) -> Compiled:
    """Compiles one train step.

    Args:
      config: the recipe; `mesh` must multiply to the chips.
      topology: of TPUs.
      quick: less optimisation: about a third of the time, memory up to a tenth higher (measured on llama_1b).
      text: is given the compiled program's text.

    Raises:
      ValueError: libtpu is absent, or a config that cannot run on these chips.
    """
    mesh = sharding.make_mesh(config.mesh, devices(topology.name, topology.slices))
    parts = build(config, mesh, "tpu")  # before the mesh is set: what it evaluates must not lie on devices that are not there
    memory = state_bytes(parts)
    started = time.perf_counter()
    with jax.set_mesh(mesh), _no_cache():
        traced = parts.step.trace(parts.target, parts.batch)
        flops = (roofline.jaxpr_flops(traced.jaxpr) + formula.kernel_flops(config, "tpu")) / topology.chips
        try:
            program = traced.lower().compile(compiler_options={"exec_time_optimization_effort": -1.0} if quick else {})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            memory = _filled(memory, temporaries=_exceeded(str(error), sum(memory.values())))
            return Compiled(memory, False, flops, 0, (), links(topology, mesh), None, time.perf_counter() - started, str(error).splitlines()[0])
    seconds = time.perf_counter() - started
    sizes = program.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    # At the peak, as the compiler's own check counts. `temp_size_in_bytes` is up to a third more, also of programs that the compiler fits into less.
    code = sizes.generated_code_size_in_bytes
    memory = _filled(memory, max(0, held - sum(memory.values())), max(0, sizes.peak_memory_in_bytes - held - code), code)
    written = program.as_text()
    text(written)
    parsed = hlo.parse(written)
    ways = links(topology, mesh)
    return Compiled(memory, True, flops, hlo.traffic(parsed), tuple(hlo.collectives(parsed, mesh.shape)), ways,
                    schedule.schedule(parsed, topology, mesh.shape, ways), seconds, "")


def _filled(memory: Mapping[str, int], rest: int = 0, temporaries: int = 0, program: int = 0) -> dict[str, int]:
    return {**memory, "padding and rest": rest, "activations and temporaries": temporaries, "program": program}


def _exceeded(message: str, state: int) -> int:
    """Bytes beside the state, from the compiler's out-of-memory message. It says "HLO temporaries" or "Used", and means all that the program needs, its
    arguments included."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)", message)
    return max(0, int(float(found[1]) * units[found[2]]) - state) if found else 0


def links(topology: Topology, mesh: Mesh) -> dict[str, int]:
    """Mesh axis -> a chip's links along it, from where `make_mesh` put the devices; 0 for an axis between slices."""
    found = {}
    for position, (axis, size) in enumerate(mesh.shape.items()):
        if size == 1:
            continue
        line = np.moveaxis(mesh.devices, position, 0).reshape(size, -1)[:, 0]
        if len({getattr(device, "slice_index", None) for device in line}) > 1:
            found[axis] = 0
            continue
        coordinates = np.array([device.coords[:len(topology.shape)] for device in line])
        found[axis] = max(1, roofline.links_of(topology, [len(set(column)) for column in coordinates.T]))
    return found


@contextlib.contextmanager
def _no_cache():
    """Compile times are to be real, and programs for absent chips cannot be loaded again. jax asks its setting once, until the cache is reset."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
