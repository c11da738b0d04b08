"""The time of a compiled TPU step from its own schedule: the compiler's static cycles of each operation in order, and the communication that waits.

libtpu writes what it expects each operation to take into the program's text (`estimated_cycles`: the same figures that its static LLO profile,
`LIBTPU_INIT_ARGS=--xla_jf_dump_static_llo_profile_to=DIR`, lists per operation), and the text is in the order of execution. So one walk through it gives
the time that the core computes; a collective adds what it takes over the links (`roofline.seconds`), but for what runs beside computation between its
start and its end. Pallas kernels carry no estimate: splash attention is taken at `_KERNEL_SHARE` of the peak. All of it is predicted.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from jaxlm.aot import hlo, roofline
from jaxlm.aot.chips import Topology

# Share of the peak at which splash attention's kernels run, an assumption; docs/performance.md has the check against published steps.
_KERNEL_SHARE = 0.5
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3, "fused": 5}  # matrix products of each kernel: the backward pass is two, or one that is named for the keys and values


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one kind of operation adds to a step."""
    seconds: float  # of one step, all runs together; of a collective what it takes, hidden or not
    times: int
    kind: str  # "compute", "ici" or "dcn"
    name: str  # the instruction's name without its number, of the run that takes longest
    source: str  # where in the model, as in `hlo.Collective`


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Predicted seconds of one step on one device."""
    compute: float  # the core works
    ici: float  # the core waits for other chips of the slice
    dcn: float  # it waits for other slices
    ici_busy: float  # communication, hidden behind computation or not
    dcn_busy: float
    operations: tuple[Operation, ...]  # the longest first

    @property
    def seconds(self) -> float:
        """The parts one after the other."""
        return self.compute + self.ici + self.dcn


def schedule(program: hlo.Program, topology: Topology, mesh: Mapping[str, int], links: Mapping[str, int]) -> Schedule:
    """Walks through a scheduled program.

    Args:
      program: of one device.
      topology: where it runs.
      mesh: mesh axis -> size, in the mesh's order.
      links: see `roofline.communication`.
    """
    walk = _Walk(program, topology, mesh, links)
    total = walk.run(program.entry)
    times = {name: sum(t for other, t, _, _ in hlo.executions(program) if other == name) for name in walk.found}
    grouped: dict[tuple, list] = collections.defaultdict(list)
    for name, operations in walk.found.items():
        for seconds, kind, label, source in operations:
            grouped[kind, re.sub(r"[.\d]+$", "", label), source].append((seconds, times[name]))
    operations = [Operation(sum(s * t for s, t in runs), sum(t for _, t in runs), *key) for key, runs in grouped.items()]
    return Schedule(*total, tuple(sorted(operations, key=lambda o: -o.seconds)))


class _Walk:
    """Times of computations, each walked once; `found` has the operations of each."""

    def __init__(self, program, topology, mesh, links):
        self.program, self.topology, self.mesh, self.links = program, topology, mesh, links
        self.found: dict[str, list[tuple[float, str, str, str]]] = {}
        self.run = functools.cache(self._run)

    def _run(self, name: str) -> tuple[float, float, float, float, float]:
        """Compute, waits for ici and dcn, communication over ici and dcn: seconds of one run."""
        now = compute = 0.0
        wait, busy, free = collections.Counter(), collections.Counter(), collections.Counter()  # free: when each set of links is free again
        pending: dict[str | int, tuple[str, float]] = {}  # what was started, by name or channel -> (network, when it ends)
        found = self.found[name] = []
        inside = {i.name: i for i in self.program.computations[name]}
        for one in self.program.computations[name]:
            if one.opcode in ("while", "call", "conditional"):
                parts = self._called(one)
                compute, now = compute + parts[0], now + sum(parts[:3])
                for kind, waited, total in (("ici", parts[1], parts[3]), ("dcn", parts[2], parts[4])):
                    wait[kind] += waited
                    busy[kind] += total
                continue
            moved, channel = self._communication(one, name)
            if one.opcode.endswith("-done") or one.name.startswith("async-collective-done"):
                kind, end = pending.get(channel if moved else one.operands[0] if one.operands else "", ("", 0.0))
                kind, end = pending.get(_rendezvous(one), (kind, end)) if one.opcode == "recv-done" else (kind, end)
                wait[kind] += max(0.0, end - now)
                now = max(now, end)
            elif moved is not None and channel not in pending:
                kind, seconds, way = moved
                busy[kind] += seconds
                found.append((seconds, kind, one.name, hlo.source(one)))
                begin = max(now, free[way])
                free[way] = end = begin + seconds
                if one.opcode == "send" or one.opcode.endswith("-start") or one.name.startswith("async-collective-start"):
                    pending |= dict.fromkeys((one.name, channel, _rendezvous(one)), (kind, end))
                else:
                    wait[kind] += end - now
                    now = end
            elif one.opcode in ("copy-start", "slice-start"):  # between memories, beside the core; what waits for it is the core's own time
                moving = [a.bytes for a in one.arrays if a.shape]
                free["hbm"] = max(now, free["hbm"]) + (min(moving) if moving else 0) / self.topology.chip.hbm_bandwidth
                pending[one.name] = ("hbm", free["hbm"])
            else:
                seconds = self._seconds(one, inside)
                if seconds:
                    found.append((seconds, "compute", one.name, hlo.source(one)))
                compute, now = compute + seconds, now + seconds
        return compute + wait["hbm"], wait["ici"], wait["dcn"], busy["ici"], busy["dcn"]

    def _called(self, one: hlo.Instruction) -> tuple[float, ...]:
        if one.opcode == "while":
            trips = hlo.trip_count(self.program, one)
            return tuple(trips * part for part in self.run(one.attribute("body")))
        names = re.findall(r"\b(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)", one.attributes)
        branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        names += re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        return max((self.run(name) for name in names if name in self.program.computations), key=lambda parts: sum(parts[:3]), default=(0.0,) * 5)

    def _communication(self, one: hlo.Instruction, name: str) -> tuple[tuple[str, float, str] | None, int | None]:
        """(network, seconds, the links it holds) of an instruction that communicates, or of a fusion around one, and its channel."""
        found, caller = one, None
        if one.opcode == "fusion":
            name = one.attribute("calls") or ""
            if name.startswith("async_collective_fusion") and not one.name.startswith("async-collective"):
                return None, None  # computation beside what another instruction started, perhaps outside of the loop that this one is in
            found, caller = next((i for i in self.program.computations.get(name, ()) if i.opcode in hlo.KINDS), None), one
        moved = None if found is None else hlo.collective(found, name, (), caller, self.mesh)
        if moved is None:
            return None, None
        ici, dcn = roofline.communication(self.topology, [moved], self.links)
        way = moved.axes
        if ici and moved.kind in ("ring permute", "collective-permute"):  # one direction of one link each
            ici, way = moved.bytes / self.topology.chip.link, f"{way} {re.search(r'source_target_pairs=.(.[0-9,]+)', found.attributes)[1]}"
        return ("dcn" if dcn else "ici", ici + dcn, way), hlo.channel(found)

    def _seconds(self, one: hlo.Instruction, inside: Mapping[str, hlo.Instruction]) -> float:
        """Of an instruction that computes: the compiler's estimate, else its traffic."""
        chip = self.topology.chip
        cycles = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        if cycles and int(cycles[1]):
            return int(cycles[1]) / chip.clock
        if 'custom_call_target="tpu_custom_call"' in one.attributes:
            return _kernel_flops(one, inside) / (chip.flops * _KERNEL_SHARE)
        return hlo.bytes_moved(self.program, one, inside) / chip.hbm_bandwidth


def _rendezvous(one: hlo.Instruction) -> str:
    """What the two ends of a transfer between slices have in common; the name where it is none."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', one.attributes)
    return found[1] if found else one.name


def _kernel_flops(one: hlo.Instruction, inside: Mapping[str, hlo.Instruction]) -> float:
    """Operations of one of splash attention's kernels over the causal half of `[B, N, T, H]`, or `[N, T, H]` where B is 1, by its name."""
    kind = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", one.name)
    queries = next((a for o in one.operands if o in inside for a in inside[o].arrays if len(a.shape) >= 3 and a.dtype == "bf16"), None)
    if kind is None or queries is None:
        return 0.0
    fused = kind[1] == "dkv" and any(len(a.shape) > len(queries.shape) for a in one.arrays)  # it returns the gradient of the queries by blocks of keys
    products = _PRODUCTS["fused" if fused else kind[1]]
    return products * math.prod(queries.shape) * queries.shape[-2]
