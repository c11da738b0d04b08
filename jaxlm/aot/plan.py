"""Verdicts on a config and a topology: compiled or by formula, the largest batch that fits, and a search for better settings."""

import bisect
import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxlm import sharding, trees
from jaxlm.aot import compiler, formula, roofline
from jaxlm.aot.chips import Topology
from jaxlm.aot.hlo import Collective
from jaxlm.aot.schedule import Operation
from jaxlm.config import Config
from jaxlm.train import setup

Say = Callable[[str], None]
_NARROW = ("tensor", "sequence", "stage")  # axes whose traffic or bubble grows with their size


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a step needs and costs on a topology. All of it is predicted: "compiled" from a program of the real compiler, "formula" from shapes alone."""
    topology: Topology
    config: Config
    method: str  # "compiled" or "formula"
    mesh: dict[str, int]
    memory: dict[str, int]  # bytes of one device
    fits: bool
    flops: float  # of one device
    useful: float  # of all devices
    traffic: float
    collectives: tuple[Collective, ...]
    time: roofline.Estimate | None  # None for a program that does not fit: the compiler gave none
    compile_seconds: float = 0.0
    error: str = ""
    largest_rows: int | None = None  # rows of a batch on one device that fit
    largest_how: str = ""
    operations: tuple[Operation, ...] = ()  # of a compiled program, the longest first

    @property
    def total(self) -> int:
        """Bytes of one device, all parts together."""
        return sum(self.memory.values())

    @property
    def margin(self) -> float:
        """Bytes left (negative: missing)."""
        return self.topology.chip.usable - self.total

    @property
    def rows(self) -> int:
        """Rows of a batch on one device."""
        return self.config.data.batch_size // math.prod(self.mesh[axis] for axis in sharding.RULES["batch"])

    def to_json(self) -> dict[str, Any]:
        """Plain values with their units in the names; `predicted` is always true."""
        config, chip = self.config, self.topology.chip
        return {
            "predicted": True, "method": self.method, "topology": self.topology.name, "num_slices": self.topology.slices, "chips": self.topology.chips,
            "mesh": self.mesh, "batch_size": config.data.batch_size, "sequence_length": config.data.sequence_length, "microbatches": config.train.microbatches,
            "remat": config.model.remat, "rows_per_device": self.rows, "memory_bytes": self.memory, "memory_total_bytes": self.total,
            "memory_limit_bytes": int(chip.usable), "fits": self.fits, "margin_bytes": int(self.margin), "largest_rows_per_device": self.largest_rows,
            "largest_rows_per_device_is": self.largest_how, "flops_per_device": self.flops, "model_flops": self.useful, "hbm_traffic_bytes": self.traffic,
            "collectives": [{"kind": c.kind, "axes": c.axes, "devices": c.devices, "bytes": c.bytes, "arrays": [str(a) for a in c.arrays], "times": c.times,
                             "loop": c.loop, "source": c.source} for c in self.collectives],
            "operations": [dataclasses.asdict(o) for o in self.operations],
            "time": None if self.time is None else dataclasses.asdict(self.time), "compile_seconds": round(self.compile_seconds, 1), "error": self.error,
            "chip": dataclasses.asdict(chip)}


def judge(config: Config, topology: Topology, quick: bool = False, text: Say = lambda program: None) -> Verdict:
    """Compiles the step for TPUs, reckons it for GPUs. The schedule of a `quick` program is ten times as long as a real one's, and is not read: its time
    goes by its operations, traffic and collectives.

    Raises:
      ValueError: a config that cannot run on the topology.
    """
    config = on_slices(config, topology)
    if topology.chip.platform == "gpu":
        return by_formula(config, topology)
    mesh = dict(compiler.abstract_mesh(config.mesh, topology.chips).shape)
    parts = compiler.build(config, compiler.abstract_mesh(config.mesh, topology.chips), "tpu")  # refuses before libtpu is asked
    found = compiler.compile_step(config, topology, quick, text)
    need = formula.needs(parts.config, mesh, _sizes(parts), "tpu")
    time = None
    if found.schedule is not None:
        ici, dcn = roofline.communication(topology, found.collectives, found.links)
        time = roofline.estimate(topology, flops=found.flops, useful=need.useful, traffic=found.traffic, ici=ici, dcn=dcn,
                                 tokens=config.data.batch_size * config.data.sequence_length, bubble=need.bubble,
                                 schedule=None if quick else (found.schedule.compute, found.schedule.ici + found.schedule.dcn))
    return Verdict(topology, config, "compiled", mesh, found.memory, found.fits, found.flops, need.useful, found.traffic, found.collectives, time,
                   found.seconds, found.error, operations=found.schedule.operations if found.schedule and not quick else ())


def by_formula(config: Config, topology: Topology, size: formula.Sizes | None = None) -> Verdict:
    """The verdict without a compiler."""
    config = on_slices(config, topology)
    mesh = dict(compiler.abstract_mesh(config.mesh, topology.chips).shape)
    if size is None:
        parts = compiler.build(config, compiler.abstract_mesh(config.mesh, topology.chips), topology.chip.platform)
        config, size = parts.config, _sizes(parts)
    need = formula.needs(config, mesh, size, topology.chip.platform)
    ici, dcn = roofline.communication(topology, need.collectives, roofline.formula_links(topology, mesh))
    time = roofline.estimate(topology, flops=need.flops, useful=need.useful, traffic=need.traffic, ici=ici, dcn=dcn,
                             tokens=config.data.batch_size * config.data.sequence_length, bubble=need.bubble)
    fits = sum(need.memory.values()) <= topology.chip.usable
    return Verdict(topology, config, "formula", mesh, need.memory, fits, need.flops, need.useful, need.traffic, need.collectives, time)


def on_slices(config: Config, topology: Topology) -> Config:
    """The config with `mesh.slice` set for several slices, unless it says so itself."""
    if topology.slices == 1 or config.mesh.slice != 1:
        return config
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slice=topology.slices))


def _sizes(parts) -> formula.Sizes:
    shapes = {path: leaf.shape for path, leaf in trees.flatten(parts.target.params).items()}
    found, params = formula.sizes(parts.config, shapes, compiler.state_bytes(parts)), parts.target.params
    trained = trees.count(trees.split(params, parts.trainable)[0]) / found.parameters
    optimiser = (trees.nbytes(parts.target.opt) + trees.nbytes(parts.target.ema)) / trees.nbytes(params)
    return dataclasses.replace(found, optimiser=optimiser, width=trees.nbytes(params) / found.parameters, trained=trained, plain=trees.count(parts.plain),
                               work=setup.work(parts))


def with_rows(verdict: Verdict, rows: int) -> Config:
    """The verdict's config with so many rows of a batch on each device."""
    config = verdict.config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows * verdict.config.data.batch_size // verdict.rows))


def largest_batch(verdict: Verdict, quick: bool = False, confirm: bool = False, say: Say = lambda line: None) -> Verdict:
    """The verdict with the most rows that one device holds, a multiple of the microbatches.

    Compiled: temporaries grow with the rows along a line, for which one more compilation gives the second point; near the limit the compiler recomputes
    more by itself and accepts some rows beyond the line. `confirm` compiles the answer and goes down until the compiler accepts it. By formula: bisected.
    """
    step, limit, part = verdict.config.train.microbatches, verdict.topology.chip.usable, "activations and temporaries"
    answer = lambda rows, how: dataclasses.replace(verdict, largest_rows=rows, largest_how=how)
    if verdict.total - verdict.memory[part] >= limit:
        return answer(0, "the state alone is too large")
    if verdict.method == "formula":
        size = _sizes(compiler.build(verdict.config, compiler.abstract_mesh(verdict.config.mesh, verdict.topology.chips), verdict.topology.chip.platform))
        fits = lambda count: by_formula(with_rows(verdict, count * step), verdict.topology, size).fits
        end = 1
        while fits(end):
            end *= 2
        return answer(step * bisect.bisect_left(range(1, end), True, key=lambda count: not fits(count)), "by formula")
    fixed = verdict.total - verdict.memory[part]
    near = int(0.8 * verdict.rows * (limit - fixed) / max(1, verdict.memory[part])) // step * step  # nearer, the line is bent already
    second = max(step, near if near != verdict.rows else verdict.rows + step)
    if second == verdict.rows:
        return answer(verdict.rows if verdict.fits else 0, "the fewest rows there can be")
    say(f"{verdict.topology}: compiling {second} rows on each device, for the largest batch")
    other = judge(with_rows(verdict, second), verdict.topology, quick)
    seen = {verdict.rows: verdict.fits, second: other.fits}
    known = max((rows for rows, fits in seen.items() if fits), default=0)
    slope = (other.memory[part] - verdict.memory[part]) / (second - verdict.rows)
    if slope <= 0:
        return answer(known, "at least: memory did not grow between two compilations")
    rows = max(known, int(verdict.rows + verdict.margin / slope) // step * step)
    while confirm and rows > 0 and not seen.get(rows, False):
        if rows not in seen:
            say(f"{verdict.topology}: compiling {rows} rows on each device to confirm")
            seen[rows] = judge(with_rows(verdict, rows), verdict.topology, quick).fits
        rows -= 0 if seen[rows] else step
    return answer(rows, "confirmed by the compiler" if seen.get(rows) else "extrapolated from two compilations")


def search(config: Config, topology: Topology, top: int = 3, quick: bool = False, say: Say = lambda line: None) -> list[Verdict]:
    """Meshes, remat policies, microbatches and batch sizes, best first: all by formula, then those that should fit compiled, until `top` do or 3 `top` are tried.

    The batch is halved and doubled too: with another batch size the training is another one, with the rest it is not.

    Returns:
      The compiled ones that fit by tokens per second, then the others by formula, last the compiled ones that do not fit.
    """
    config = on_slices(config, topology)
    parts = _first_that_builds(config, topology)
    size = _sizes(parts)
    ranked = []
    for candidate in candidates(parts.config, topology):
        with contextlib.suppress(ValueError):  # a pipeline whose stages would differ
            ranked.append(by_formula(candidate, topology, size))
    ranked.sort(key=rank)
    say(f"{topology}: {len(ranked)} settings by formula, {sum(v.fits for v in ranked)} should fit")
    if topology.chip.platform == "gpu":
        return ranked
    compiled, tried = [], []
    for verdict in ranked:
        if sum(v.fits for v in compiled) == top or len(compiled) == 3 * top or not verdict.fits:
            break
        say(f"{topology}: compiling {describe(verdict)}")
        tried.append(verdict)
        try:
            compiled.append(judge(verdict.config, topology, quick))
        except ValueError as error:  # what only the model's own checks know does not divide
            say(f"  cannot run: {error}")
    compiled.sort(key=rank)
    return [v for v in compiled if v.fits] + [v for v in ranked if v not in tried] + [v for v in compiled if not v.fits]


def _first_that_builds(config: Config, topology: Topology):
    error = None
    for mesh in (config.mesh, *(c.mesh for c in candidates(config, topology))):
        try:
            return compiler.build(dataclasses.replace(config, mesh=mesh), compiler.abstract_mesh(mesh, topology.chips), topology.chip.platform)
        except ValueError as raised:
            error = error or raised
    raise error


def rank(verdict: Verdict) -> tuple:
    """Those that fit first, by tokens per second, equal ones by the lower bound."""
    if verdict.time is None:
        return (True, 0.0, 0.0)
    tokens = verdict.config.data.batch_size * verdict.config.data.sequence_length
    return (not verdict.fits, -round(verdict.time.tokens_per_second, -2), verdict.time.least_seconds / tokens)


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
    """Settings that can run: every mesh that divides the model's sizes, with each remat policy, number of microbatches and batch size."""
    base = config.data.batch_size
    models = [dataclasses.replace(config.model.filled(), remat=remat) for remat in ("none", "dots", "full")]
    trains = [dataclasses.replace(config.train, microbatches=passes) for passes in (1, 2, 4, 8)]
    batches = [dataclasses.replace(config.data, batch_size=batch) for batch in (base // 2, base, base * 2) if batch]
    for mesh in meshes(config, topology):
        ways = math.prod(getattr(mesh, axis) for axis in sharding.RULES["batch"])
        for model, train, data in itertools.product(models, trains, batches):
            if data.batch_size % (ways * train.microbatches) == 0:
                yield dataclasses.replace(config, mesh=mesh, model=model, train=train, data=data)


def meshes(config: Config, topology: Topology) -> Iterator[Any]:
    """Meshes over one topology that the model's sizes divide, of up to three axes, tensor, sequence and stage up to 16; `mesh.slice` is the number of slices."""
    model, chips = config.model.filled(), topology.chips // topology.slices
    divides = {"data": lambda n: True, "fsdp": lambda n: model.width % n == 0,
               "tensor": lambda n: not any(size % n for size in (model.heads, model.kv_heads, model.feedforward, model.vocab_size or n)),
               "sequence": lambda n: n == 1 or (config.data.sequence_length % (2 * n) == 0 and config.data.sequence_length // n >= 1024),
               "stage": lambda n: model.layers % (n * model.pipeline_repeats) == 0 if n > 1 else True, "expert": lambda n: n == 1 or (model.experts and model.experts % n == 0)}
    axes = [axis for axis in sharding.AXES if axis != "slice"]
    options = [[n for n in range(1, chips + 1) if chips % n == 0 and divides[axis](n)] for axis in axes]
    for numbers in itertools.product(*options):
        if math.prod(numbers) == chips and sum(n > 1 for n in numbers) <= 3 and all(n <= 16 for axis, n in zip(axes, numbers) if axis in _NARROW):
            yield dataclasses.replace(config.mesh, slice=topology.slices, **dict(zip(axes, numbers)))


def describe(verdict: Verdict) -> str:
    """Its settings as flags."""
    mesh = " ".join(f"mesh.{axis}={n}" for axis, n in verdict.mesh.items() if n > 1) or "one device"
    return f"{mesh} model.remat={verdict.config.model.remat} train.microbatches={verdict.config.train.microbatches} data.batch_size={verdict.config.data.batch_size}"


def dump(verdicts: Sequence[Verdict]) -> str:
    """All of them as JSON text."""
    return json.dumps([v.to_json() for v in verdicts], indent=1) + "\n"
