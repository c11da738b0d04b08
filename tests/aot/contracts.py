"""Collective contracts: what the compiled step of a recipe sends between devices, per kind, mesh axis and thing, cut to two layers.

Compiled with less effort (`quick`), which takes a third of the time and gathers some weights in float32 that full effort gathers in bfloat16: what is sent,
between whom and how often is the same. tests/golden/collectives/NAME.json holds the contract of each; tools/refresh_golden.py collectives writes them anew (needs libtpu).
"""

import collections
import importlib.metadata
import itertools
import json
import math
import pathlib

from jaxlm import chips, config, sharding, trees
from jaxlm.aot import compiler
from jaxlm.config import Config
from jaxlm.models import axes

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "collectives"
TOPOLOGY = chips.topology("v5e:2x4")
SMALL = 2**16  # bytes; norms' scales and scalars are below and are left out

# Two layers, two rows on each device, and a length that is no size of any model, so that a shape tells weights from activations.
# The loss goes over the tokens in four chunks, between which the output projection stays and its gradient is added up.
_CUT = {"model.layers": "2", "data.sequence_length": "640", "data.batch_size": "16", "train.microbatches": "1", "objective.chunk_rows": "2560"}

# Name of the contract -> recipe and what else differs.
CONTRACTS = {
    "gpt2_124m": ("gpt2_124m", {}), "llama_1b": ("llama_1b", {}), "llama_7b": ("llama_7b", {}), "llama3_8b": ("llama3_8b", {}),
    "mixtral_8x7b": ("mixtral_8x7b", {}), "llama_70b": ("llama_70b", {}), "llama_7b_tensor": ("llama_7b", {"mesh.tensor": "2"}),
    "mixtral_8x7b_expert": ("mixtral_8x7b", {"mesh.expert": "4"}),
}


def recipe(name: str) -> Config:
    source, more = CONTRACTS[name]
    return config.load(source, (_CUT | more).items())


def compiled(cfg: Config) -> dict[str, dict[str, int]]:
    """`{"all-gather over fsdp: layers/mlp/up": {"times": 4, "bytes": ...}}` of one step on one device, for arrays of at least `SMALL` bytes."""
    found = compiler.compile_step(cfg, TOPOLOGY, quick=True)
    assert not found.error, found.error
    mesh = compiler.abstract_mesh(cfg.mesh, TOPOLOGY.chips)
    names = _weights(cfg, mesh)
    rows = collections.defaultdict(lambda: {"times": 0, "bytes": 0})
    for c in found.collectives:
        for array in c.arrays:
            if array.bytes < SMALL:
                continue
            row = rows[f"{c.kind} over {c.axes}: {_what(array.shape, names, cfg)} {array.dtype}"]
            row["times"] += c.times
            row["bytes"] += c.times * array.bytes
    return dict(sorted(rows.items()))


def _weights(cfg: Config, mesh) -> dict[int, str]:
    """Elements of a weight (one layer's), whole or split over any of its mesh axes -> its path; several paths of one size are joined."""
    parts = compiler.build(cfg, mesh, "tpu")
    shapes = trees.flatten(parts.target.params)
    names = collections.defaultdict(set)
    for path, logical in trees.match(axes.decoder_axes(parts.config.model.filled()), shapes, "axes").items():
        shape = shapes[path].shape[1:] if logical[0] == "layers" else shapes[path].shape
        used = [axis for name in logical for axis in sharding.RULES[name] or () if mesh.shape[axis] > 1]
        for n in range(len(used) + 1):
            for chosen in itertools.combinations(used, n):
                names[math.prod(shape) // math.prod(mesh.shape[axis] for axis in chosen)].add(path)
    return {size: "|".join(sorted(paths)) for size, paths in names.items()}


def _what(shape: tuple[int, ...], names: dict[int, str], cfg: Config) -> str:
    length, size = cfg.data.sequence_length, math.prod(shape)
    if {length // 4, length // 2, length, 2 * length, cfg.data.batch_size * length} & set(shape):
        return "activations"
    padded = [weight for weight in names if weight < size <= 1.05 * weight]  # a scattered axis is rounded up to whole tiles
    return names.get(size) or (f"{names[max(padded)]} padded" if padded else "something else")


def contract(name: str) -> dict:
    """What the golden file holds."""
    return {"libtpu": importlib.metadata.version("libtpu"), "topology": TOPOLOGY.name, "recipe": CONTRACTS[name][0], "overrides": _CUT | CONTRACTS[name][1],
            "collectives": compiled(recipe(name))}


def breaches(golden: dict, found: dict[str, dict[str, int]]) -> list[str]:
    """One line for each difference that matters: something sent that the contract does not name, or over 5 % more or fewer bytes of it."""
    agreed, lines = golden["collectives"], []
    for key in sorted({*agreed, *found}):
        if key not in found:
            lines.append(f"gone: {key}")
        elif key not in agreed:
            lines.append(f"new: {key}, {found[key]['times']} x, {found[key]['bytes']} bytes")
        elif abs(found[key]["bytes"] - agreed[key]["bytes"]) > 0.05 * agreed[key]["bytes"]:
            lines.append(f"{key}: {agreed[key]['bytes']} -> {found[key]['bytes']} bytes in {agreed[key]['times']} -> {found[key]['times']}")
    return lines


def write(name: str) -> pathlib.Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(contract(name), indent=1) + "\n")
    return path


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def small(**parts) -> Config:
    """A model that compiles in seconds, for tests of the compiler's verdicts; it looks like a Llama."""
    base = {"model": dict(vocab_size=2048, context=640, layers=2, width=512, heads=4, feedforward=1024, dtype="bfloat16", remat="full", tied=False),
            "data": dict(sequence_length=640, batch_size=16), "tokenizer": dict(kind="bytes")}
    return config.build({name: base.get(name, {}) | parts.get(name, {}) for name in {*base, *parts}})


def with_rules(monkeypatch, **rules) -> None:
    """A mistake in the table of sharding rules, made in place: functions hold the table as a default argument."""
    for axis, value in rules.items():
        monkeypatch.setitem(sharding.RULES, axis, value)


def largest_weight(cfg: Config) -> int:
    """Elements of the largest weight of one layer, or of the embedding."""
    return max(_weights(cfg, compiler.abstract_mesh(cfg.mesh, TOPOLOGY.chips)))
