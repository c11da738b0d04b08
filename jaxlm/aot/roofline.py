"""How long a step takes, and what that costs: the time its core works and waits, beside what operations, memory and communication take at their peaks.

Of a compiled program the time comes from its own schedule (`schedule.py`); by formula from the peaks and the three shares below, which were read off compiled
programs. Each resource's time at its peak is a lower bound of the step (Williams et al. 2009). All of it is predicted.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxlm.aot.hlo import Collective
from jaxlm.chips import Topology

# By formula: the share of the peak at which matrix products run, and the shares of memory traffic and of communication inside a slice that nothing hides,
# as in the schedules of our compiled programs (docs/performance.md).
_PRODUCTS_SHARE, _TRAFFIC_SHARE, _EXPOSED_SHARE = 0.75, 0.75, 0.3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted; seconds of one step, and what follows."""
    compute: float  # all operations at the chip's peak
    hbm: float  # all traffic of its memory at full bandwidth
    ici: float  # the links inside a slice or node, busy
    dcn: float  # the network between them, busy
    bound: str  # the resource of these four that binds
    core: float  # the core works
    waits: float  # it waits for communication
    step_seconds: float  # both, over 1 - `bubble`
    least_seconds: float  # the longest of the four, likewise: a lower bound
    bubble: float  # share of the step in which a pipeline stage waits
    mfu: float  # useful operations over peak in step_seconds
    tokens_per_second: float
    dollars_per_billion: float  # dollars per 10^9 tokens
    kwh_per_billion: float


def estimate(topology: Topology, *, flops: float, useful: float, traffic: float, ici: float, dcn: float, tokens: int, bubble: float = 0.0,
             schedule: tuple[float, float] | None = None) -> Estimate:
    """The time of a step.

    Args:
      flops: operations that one device executes (recomputation included).
      useful: operations of the model for one step, all devices together (`train.report.flops_per_token`).
      traffic: bytes of one device's memory read and written.
      ici: seconds of communication inside a slice or node.
      dcn: seconds of communication between them.
      tokens: of one step, all devices together.
      bubble: share of the step that a pipeline stage waits.
      schedule: seconds that the core works and waits, from a compiled program; None: by formula.
    """
    chip = topology.chip
    times = {"compute": flops / chip.flops, "hbm": traffic / chip.hbm_bandwidth, "ici": ici, "dcn": dcn}
    bound = max(times, key=times.get)
    core, waits = schedule or (times["compute"] / _PRODUCTS_SHARE + _TRAFFIC_SHARE * times["hbm"], _EXPOSED_SHARE * ici + dcn)
    least = max(times[bound], 1e-12) / (1 - bubble)
    step = max((core + waits) / (1 - bubble), least)
    rate = tokens / step
    return Estimate(**times, bound=bound, core=core, waits=waits, step_seconds=step, least_seconds=least, bubble=bubble,
                    mfu=useful / (topology.chips * chip.flops * step), tokens_per_second=rate,
                    dollars_per_billion=1e9 / rate / 3600 * topology.chips * chip.dollars_per_hour,
                    kwh_per_billion=1e9 / rate / 3600 * topology.chips * chip.watts / 1000)


def seconds(kind: str, size: int, devices: int, speed: float) -> float:
    """Time of one collective over a ring of links (Thakur et al. 2005; Austin et al. 2025, "How to Scale Your Model", ch. 3).

    Args:
      kind: as in `hlo.Collective`.
      size: bytes of the whole: gathered, to be scattered or reduced; what one device sends in a permute or all-to-all.
      devices: in the group.
      speed: bytes/s into one chip, over all its links that the group uses.
    """
    share = (devices - 1) / devices
    if kind == "all-reduce":  # a reduce-scatter and an all-gather
        return 2 * size * share / speed
    if kind in ("all-to-all", "ragged-all-to-all"):  # each piece crosses a quarter of the ring on average
        return size * share * max(1.0, devices / 4) / speed
    if kind in ("collective-permute", "ring permute"):
        return size / speed
    return size * share / speed  # all-gather, reduce-scatter, collective-broadcast


def communication(topology: Topology, collectives: Sequence[Collective], links: Mapping[str, int]) -> tuple[float, float]:
    """Seconds of one step inside slices or nodes, and between them.

    Args:
      topology: where.
      collectives: from `hlo.collectives` or `plan.collectives`.
      links: mesh axis -> links over which a chip takes data in from the others on the axis; 0 for an axis that leaves the slice or node.
    """
    ici = dcn = 0.0
    for one in collectives:
        axes = [axis for axis in one.axes.removeprefix("part of ").split("+") if axis in links]
        if any(not links[axis] for axis in axes):
            dcn += one.times * seconds(one.kind, one.bytes, one.devices, topology.chip.dcn)
            continue
        ways = sum(links[axis] for axis in axes) or 1
        if one.kind in ("ring permute", "collective-permute"):  # to one neighbour; a ring's come in pairs, one for each direction
            ways = min(ways, 2 if one.kind == "ring permute" else 1)
        ici += one.times * seconds(one.kind, one.bytes, one.devices, topology.chip.link * ways)
    return ici, dcn


def links_of(topology: Topology, sizes: Sequence[int]) -> int:
    """Links of a chip that a group stretching over `sizes` chips of the slice's dimensions (1: not over this one) can use: two where it fills a
    dimension that is a ring, one on a line."""
    wraps = topology.chip.wraps
    return sum(2 if wraps and size == whole and size % wraps == 0 else 1 for size, whole in zip(sizes, topology.shape, strict=True) if size > 1)


def formula_links(topology: Topology, mesh: Mapping[str, int]) -> dict[str, int]:
    """`links` of a mesh that is not placed on devices: the axes, from the last, take the slice's dimensions from the last.

    On GPUs the last axes fill a node; the one that does not fit in goes over the network, with all before it.
    """
    links, left, inside = {}, list(topology.shape), 1
    for axis in reversed([axis for axis in mesh if mesh[axis] > 1]):
        size = mesh[axis]
        inside *= size
        if axis == "slice" or (topology.chip.node and inside > topology.chip.node):
            links[axis] = 0
        elif topology.chip.node:
            links[axis] = 1
        else:
            used = [1] * len(left)
            for i in reversed(range(len(left))):
                used[i] = math.gcd(size, left[i])
                size, left[i] = size // used[i], left[i] // used[i]
            links[axis] = max(1, links_of(topology, used))
    return links


def jaxpr_flops(jaxpr) -> float:
    """Operations of all matrix products in a traced function, loops multiplied out, all devices together.

    A `while` of unknown length counts once, a Pallas kernel not at all (`formula.kernel_flops`); inside `shard_map` each device's part is counted on all.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contract = params["dimension_numbers"][0][0]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
    if name in ("ragged_dot", "ragged_dot_general"):
        # [m, k] x [groups, k, n] -> [m, n]: each row meets one group; for the weights' gradient [m, k] x [m, n] -> [groups, k, n] likewise.
        return 2.0 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1]
    if name == "pallas_call":
        return 0.0
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        mesh = params["mesh"]
        times = math.prod(mesh.shape[axis] for axis in params.get("manual_axes", mesh.axis_names))
    inner = [value for value in params.values()] + [v for value in params.values() if isinstance(value, (tuple, list)) for v in value]
    bodies = [value for value in inner if hasattr(getattr(value, "jaxpr", value), "eqns")]
    counts = [jaxpr_flops(body) for body in bodies]
    return times * (max(counts, default=0.0) if name == "cond" else sum(counts))
