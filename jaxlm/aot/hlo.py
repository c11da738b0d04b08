"""Reads a compiled program's text (XLA's HLO): how often each computation runs, what moves between devices, what moves through memory.

XLA's own `cost_analysis` counts the body of a loop once, and a scan over layers is a loop; here every computation is counted as often as it runs.
The names below are XLA's (openxla.org/xla/operation_semantics): three notations of replica groups are in use, `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`
and `mesh['a'=2,'b'=4] {'b'}`.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
          "c64": 8, "c128": 16}
_ARRAY = re.compile(r"([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\](\{[^}]*\})?")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id", "replica-id", "iota",
         "opt-barrier", "custom-call-done", "send", "recv", "send-done", "recv-done"}  # no traffic of their own: the work inside is counted where it happens


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a compiled program."""
    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # laid out in a memory other than the main one (`S(1)` is the TPU's vector memory)

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return int(math.prod(self.shape) * _BYTES.get(self.dtype, 1))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a compiled program."""
    name: str
    arrays: tuple[Array, ...]  # the result, a tuple's parts in order
    opcode: str
    operands: tuple[str, ...]
    inside: str  # the text between the opcode's parentheses
    attributes: str  # all that follows
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of `name=`, None where it is absent."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, as its text says."""
    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of the program, or several that are alike."""
    kind: str  # as XLA names it; "ring permute" is a neighbour's shard of a matrix passed on during its product ("windowed einsum")
    axes: str  # mesh axes between whose devices it goes, joined by "+"; "?" where the groups match none
    devices: int  # that take part in one group
    arrays: tuple[Array, ...]  # what one device holds: the result, of a reduce-scatter or all-to-all what goes in
    times: int  # that it runs in one step
    loop: str  # "" once a step; else the loop's number of repeats, outermost first, as "32" or "4x32"
    source: str  # the operation of the model it comes from, as traced by JAX

    @property
    def bytes(self) -> int:
        """Of one run on one device, the larger side: what is whole after a gather or before a scatter."""
        return sum(a.bytes for a in self.arrays)


def parse(text: str) -> Program:
    """Splits `Compiled.as_text()` into computations and instructions."""
    computations, entry, name, body = {}, "", None, []
    for line in text.splitlines():
        if name is None:
            head = re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$", line)
            if head:
                name, body = head[2], []
                entry = name if head[1] else entry
        elif line.rstrip() == "}":  # a Pallas kernel's attributes have lines of their own, which may begin with a brace
            computations[name], name = tuple(body), None
        else:
            instruction = _instruction(line)
            if instruction:
                body.append(instruction)
    assert entry, "a program without an ENTRY"
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT\s+)?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opcode = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end():close]
    arrays = tuple(Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(1)" in (layout or ""))
                   for dtype, shape, layout in _ARRAY.findall(line[at:end]))
    return Instruction(head[2], arrays, opcode[1], tuple(re.findall(r"%([\w.\-]+)", inside)), inside, line[close + 1:], bool(head[1]))


def _closing(line: str, at: int) -> int:
    """Index of the parenthesis that closes the one at `at`."""
    depth = 0
    for index in range(at, len(line)):
        depth += (line[index] == "(") - (line[index] == ")")
        if not depth:
            return index
    raise AssertionError(f"unbalanced parentheses: {line[:200]}")


def executions(program: Program) -> Iterator[tuple[str, int, tuple[int, ...], Instruction | None]]:
    """Every computation that runs by itself: its name, how often in one step, the loops around it, and the instruction that calls it.

    Computations inside fusions come too (a collective may hide there); those that reduce or compare two numbers do not.
    """
    stack = [(program.entry, 1, (), None)]
    while stack:
        name, times, loops, caller = stack.pop()
        yield name, times, loops, caller
        for instruction in program.computations[name]:
            if instruction.opcode == "while":
                trips = trip_count(program, instruction)
                stack.append((instruction.attribute("body"), times * trips, (*loops, trips), instruction))
                continue
            called = re.findall(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", instruction.attributes)
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            called += re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            for other in called if instruction.opcode in ("fusion", "call", "conditional", "async-start", "custom-call") else ():
                if other in program.computations:
                    stack.append((other, times, loops, instruction))


def trip_count(program: Program, loop: Instruction) -> int:
    """How often a `while` runs: from XLA's `known_trip_count`, else from the comparison of its condition, the first value and the step.

    A loop whose end is not a constant counts once.
    """
    known = re.search(r'known_trip_count"?:?\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = {i.name: i for i in program.computations[loop.attribute("condition")]}
    root = next(i for i in condition.values() if i.root)
    compare, names = _compare(program, root, condition)
    if compare is None:
        return 1
    values = [_constant(condition.get(name)) for name in names]
    if (values[0] is None) == (values[1] is None):
        return 1
    limit, counter = (values[1], names[0]) if values[1] is not None else (values[0], names[1])
    index = condition[counter].attribute("index") if counter in condition else None
    direction = re.search(r"direction=(\w+)", compare.attributes)[1]
    start, step = _start_and_step(program, loop, int(index)) if index is not None else (0, 1)
    span = abs(limit - start) + (direction in ("LE", "GE"))
    return max(1, math.ceil(span / max(1, abs(step))))


def _compare(program: Program, root: Instruction, condition: Mapping[str, Instruction]):
    """The comparison at the end of a condition and the names of its two sides there, looking into a fusion."""
    if root.opcode == "compare":
        return root, root.operands
    if root.opcode == "fusion":
        inner = {i.name: i for i in program.computations[root.attribute("calls")]}
        compare = next((i for i in inner.values() if i.opcode == "compare"), None)
        if compare and all(inner[name].opcode == "parameter" for name in compare.operands):
            return compare, [root.operands[int(inner[name].inside)] for name in compare.operands]
    return None, ()


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.inside) if re.fullmatch(r"-?\d+", instruction.inside) else None


def _start_and_step(program: Program, loop: Instruction, index: int) -> tuple[int, int]:
    """First value and increment of a loop's counter; 0 and 1, as `lax.scan` has them, where the text does not show them."""
    start = step = None
    for computation in program.computations.values():
        names = {i.name: i for i in computation}
        if loop.name in names and names[loop.name] is loop:
            tuple_ = names.get(loop.operands[0])
            if tuple_ is not None and tuple_.opcode == "tuple":
                start = _constant(_through_copies(names, tuple_.operands[index]))
    body = {i.name: i for i in program.computations[loop.attribute("body")]}
    root = next(i for i in body.values() if i.root)
    if root.opcode == "tuple":
        add = _through_copies(body, root.operands[index])
        names = body
        if add is not None and add.opcode == "fusion":
            names = {i.name: i for i in program.computations[add.attribute("calls")]}
            add = next(i for i in names.values() if i.root)
        if add is not None and add.opcode == "add":
            step = next((v for v in (_constant(names.get(name)) for name in add.operands) if v is not None), None)
    return start or 0, step or 1


def _through_copies(names: Mapping[str, Instruction], name: str) -> Instruction | None:
    found = names.get(name)
    while found is not None and found.opcode in ("copy", "bitcast") and found.operands:
        found = names.get(found.operands[0])
    return found


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All communication of one step, equal instructions added up, the most bytes first.

    Args:
      program: of one device of an SPMD program.
      mesh: mesh axis -> size, in the mesh's order; device numbers in the program count through the mesh, last axis fastest.
    """
    found: collections.Counter = collections.Counter()
    counted = set()
    for name, times, loops, caller in executions(program):
        for instruction in program.computations[name]:
            one = collective(instruction, name, loops, caller, mesh)
            # One that runs beside computation stands in the fusion that starts it, in those it runs beside and in the one that ends it.
            again = caller is not None and caller.opcode == "fusion" and not name.startswith("all-reduce-scatter") and channel(instruction) in counted
            if one is not None and not again:
                found[one] += times
                counted |= {channel(instruction)} - {None}
    merged = [dataclasses.replace(one, times=times) for one, times in found.items()]
    return sorted(merged, key=lambda c: (-c.bytes * c.times, c.kind, c.axes, str(c.arrays[0]), c.source))


def channel(instruction: Instruction) -> int | None:
    """The number that is the same in all places where one collective stands."""
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return int(found[1]) if found else None


def collective(instruction: Instruction, computation: str, loops: tuple[int, ...], caller: Instruction | None, mesh: Mapping[str, int]) -> Collective | None:
    """What one instruction sends, once; None where it sends nothing.

    Args:
      computation: the one it stands in.
      loops: those around it.
      caller: the instruction that calls the computation.
      mesh: see `collectives`.
    """
    kind = instruction.opcode.removesuffix("-start")
    between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes) if kind == "send" else None
    if between:  # TPU slices: each hands its part to the host, which exchanges it with the other slices' hosts
        return Collective(between[1].lower().replace("_", "-"), "slice", mesh.get("slice", 1), instruction.arrays[:1], 1, "x".join(map(str, loops)),
                          source(instruction))
    if kind not in KINDS:
        return None
    arrays, origin = instruction.arrays, source(instruction)
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):  # (operands, results, and a permute's two flags)
        data = [a for a in arrays if a.shape or kind == "all-gather"]
        arrays = tuple(data[len(data) // 2:]) or arrays[:1]
    if caller is not None and computation.startswith("all-reduce-scatter"):  # the TPU's reduce-scatter: an all-reduce fused with the slice of its result
        kind, origin = "reduce-scatter", source(caller)
    elif kind == "reduce-scatter":
        arrays = tuple(dataclasses.replace(a, shape=_unscattered(a.shape, instruction)) for a in arrays)
    if kind == "collective-permute":
        pairs = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)[0])]
        axes, devices = _axes([list(pair) for pair in pairs], mesh, whole=False)
        kind = "ring permute" if re.search(r"dot_general|convolution", origin) else kind
    else:
        groups = replica_groups(instruction.attributes, math.prod(mesh.values()))
        axes, devices = _axes(groups, mesh, whole=True)
    if devices <= 1:
        return None
    return Collective(kind, axes, devices, arrays, 1, "x".join(map(str, loops)), origin)


def _unscattered(shape: tuple[int, ...], instruction: Instruction) -> tuple[int, ...]:
    at = int(re.search(r"dimensions=\{(\d+)\}", instruction.attributes)[1])
    ways = len(replica_groups(instruction.attributes, 0)[0])
    return tuple(n * ways if i == at else n for i, n in enumerate(shape))


def source(instruction: Instruction) -> str:
    """The traced operation without what every path has: `bwd mlp/dot_general`, `fwd attn_norm/mul`."""
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    if not name:
        return ""
    path = name[1]
    way = "again" if "rematted_computation" in path else "bwd" if "transpose(" in path else "fwd" if "jvp(" in path else ""
    parts = [part for part in re.split(r"/(?![^()]*\))", path) if not re.match(r"(jit|jvp|transpose|while|body|closed_call|checkpoint|rematted_computation|Block)\b", part)]
    return f"{way} {'/'.join(parts[-2:])}".strip()


@functools.lru_cache(maxsize=4096)
def _grid(sizes: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(sizes)).reshape(sizes)


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices of one collective, from any of the three notations; one group of all `devices` where none is given."""
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_ints(iota[1])).tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", attributes)
    if named:
        sizes = {axis.strip("' "): int(size) for axis, size in (item.split("=") for item in named[1].split(","))}
        ids = _grid(tuple(sizes.values())).ravel()
        if named[2]:
            order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", named[2])
            ids = _iota(order[1], order[2]).ravel() if order else np.array(_ints(named[2].strip("() ")))
        return _named_groups(ids, sizes, [item.strip() for item in named[3].split(",")])
    return [list(range(devices))]


def _named_groups(ids: np.ndarray, sizes: Mapping[str, int], axes: Sequence[str]) -> list[list[int]]:
    """Groups along `axes` of a mesh of `sizes` that holds the devices `ids`; an axis may be a part of one: `'a':(2)4`, the 4 that repeat every 2 blocks."""
    shape, chosen = [], []
    wanted = {item.split(":")[0].strip("'"): item.partition(":")[2] for item in axes}
    for axis, size in sizes.items():
        part = re.match(r"\((\d+)\)(\d+)", wanted.get(axis, ""))
        pieces = [int(part[1]), int(part[2]), size // int(part[1]) // int(part[2])] if part else [size]
        if axis in wanted:
            chosen.append(len(shape) + (1 if part else 0))
        shape += pieces
    grid = ids.reshape(shape)
    rest = [i for i in range(len(shape)) if i not in chosen]
    return grid.transpose(rest + chosen).reshape(-1, math.prod(shape[i] for i in chosen)).tolist()


def _iota(dims: str, order: str | None) -> np.ndarray:
    grid = _grid(_ints(dims))
    return grid.transpose(_ints(order)) if order else grid


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _axes(groups: Sequence[Sequence[int]], mesh: Mapping[str, int], whole: bool) -> tuple[str, int]:
    """Mesh axes along which the devices of a group differ, and their number; "?" for groups that are no product of axes (`whole`)."""
    names, sizes = list(mesh), tuple(mesh.values())
    coordinates = [np.array(np.unravel_index(list(group), sizes)) for group in groups if len(set(group)) > 1]
    if not coordinates:
        return "", 1
    vary = sorted({axis for c in coordinates for axis in range(len(sizes)) if len(set(c[axis])) > 1})
    devices = max(c.shape[1] for c in coordinates) if whole else math.prod(sizes[axis] for axis in vary)
    product = math.prod(sizes[axis] for axis in vary)
    label = "+".join(names[axis] for axis in vary)
    return (label if not whole or devices == product else f"part of {label}"), devices


def traffic(program: Program) -> int:
    """Bytes that one step reads from and writes to a device's main memory, as an estimate.

    Every instruction outside fusions reads its operands and writes its result; a fusion that only slices an operand reads the slice; one that updates a
    slice in place writes the slice. Arrays laid out in on-chip memory cost nothing.
    """
    total = 0
    for name, times, _, caller in executions(program):
        if caller is not None and caller.opcode in ("fusion", "custom-call"):
            continue
        names = {i.name: i for i in program.computations[name]}
        total += times * sum(bytes_moved(program, i, names) for i in names.values())
    return total


def bytes_moved(program: Program, instruction: Instruction, names: Mapping[str, Instruction]) -> int:
    """Bytes of main memory that one run of an instruction reads and writes; `names` are its computation's instructions."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    size = lambda arrays: sum(a.bytes for a in arrays if not a.on_chip)
    if instruction.opcode.endswith("-start"):
        return size(instruction.arrays)  # operands and results stand side by side in its type
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * size(instruction.arrays)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * size(names[instruction.operands[1]].arrays) if instruction.operands[1] in names else 0
    if instruction.opcode == "fusion" and instruction.attribute("calls") in program.computations:
        return _fusion_bytes(program.computations[instruction.attribute("calls")], instruction, names)
    return size(instruction.arrays) + sum(size(names[o].arrays) for o in instruction.operands if o in names)


def _fusion_bytes(inner: Sequence[Instruction], fusion: Instruction, names: Mapping[str, Instruction]) -> int:
    total, updated = 0, set()
    by_name = {i.name: i for i in inner}
    root = next(i for i in inner if i.root)
    results = [by_name[o] for o in root.operands if o in by_name] if root.opcode == "tuple" else [root]
    for result, array in zip(results, fusion.arrays):
        result = _through_copies(by_name, result.name) or result
        if result.opcode == "dynamic-update-slice":  # in place: only the slice is written, and the rest is not read
            updated.add(getattr(_through_copies(by_name, result.operands[0]), "name", ""))
            update = by_name.get(result.operands[1])
            total += 0 if array.on_chip or update is None else sum(a.bytes for a in update.arrays)
        else:
            total += 0 if array.on_chip else array.bytes
    for parameter in (i for i in inner if i.opcode == "parameter"):
        index = int(parameter.inside)
        operand = names.get(fusion.operands[index]) if index < len(fusion.operands) else None
        if operand is None or parameter.name in updated:
            continue
        users = [i for i in inner if parameter.name in i.operands]
        sliced = bool(users) and all(u.opcode in ("dynamic-slice", "slice", "gather") and u.operands[0] == parameter.name for u in users)
        arrays = [a for u in users for a in u.arrays] if sliced else list(operand.arrays)
        total += 0 if all(a.on_chip for a in operand.arrays) else sum(a.bytes for a in arrays)
    return total
