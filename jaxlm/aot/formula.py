"""A train step's needs by formula, without compiling anything: for GPUs, and to rank what `--search` then compiles.

Bytes of state are exact (they follow from the shardings); activations, traffic and collectives follow the shapes of one block: what is saved for the
backward pass (Korthikanti et al. 2022, section 4, with jaxlm's own remat policies) and what each mesh axis sends (Rajbhandari et al. 2020 for fsdp, Shoeybi
et al. 2019 for tensor, Liu et al. 2023 for a ring over sequence, Lepikhin et al. 2020 for experts, Huang et al. 2019 for the bubble of stages).
Everything here is predicted, and coarser than a compiled program: tests hold it within a factor of two of those.
"""

import dataclasses
import math
from collections.abc import Mapping

from jaxlm import sharding
from jaxlm.aot.hlo import Array, Collective
from jaxlm.config import Config
from jaxlm.models import pipeline
from jaxlm.ops import attention
from jaxlm.train import report


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model, by counting its parameters."""
    parameters: int
    layer: int  # of one layer, its experts included
    experts: int  # of one layer's experts
    outside: int  # embedding and output
    optimiser: float  # bytes of optimiser state over bytes of parameters
    width: float = 4.0  # bytes of a number, on average: frozen ones may be kept in less
    trained: float = 1.0  # share of the numbers that have a gradient
    plain: int = 0  # numbers of the model alone, without adapters and the frozen model of an objective; 0: `parameters`
    work: float = 1.0  # see `setup.work`


def sizes(config: Config, shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, int]) -> Sizes:
    """Counts parameters.

    Args:
      shapes: path -> shape of each parameter.
      state: from `compiler.state_bytes` on any mesh.
    """
    count = {path: math.prod(shape) for path, shape in shapes.items()}
    in_stack = lambda path: path.removeprefix("frozen/").startswith("layers/")
    layers = sum(n for path, n in count.items() if in_stack(path))
    experts = sum(n for path, n in count.items() if path.startswith("layers/moe/") and "shared" not in path and not path.endswith("router"))
    total = sum(count.values())
    return Sizes(total, layers // config.model.layers, experts // max(1, len(config.model.sparse_layers)),
                 sum(n for path, n in count.items() if not in_stack(path) and not path.startswith("companion/")),
                 (state["optimiser"] + state["average"]) / state["parameters"])


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a step needs, by formula."""
    memory: dict[str, int]  # bytes of one device, as in `compiler.MEMORY`
    flops: float  # of one device, recomputation included
    useful: float  # of all devices, by `report.flops_per_token`
    traffic: float  # bytes of one device's memory
    collectives: tuple[Collective, ...]
    bubble: float  # share of the step that a stage waits


def needs(config: Config, mesh: Mapping[str, int], size: Sizes, platform: str) -> Needs:
    """What one step of `config` needs on one device of `mesh` (axis -> size; axes that are absent count as 1), a "tpu" or "gpu"."""
    kernel = attention.choose(config.model, config.data.sequence_length, platform)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=kernel))
    model, c = config.model.filled(), 2 if config.model.dtype == "bfloat16" else 4
    at = lambda axis: mesh.get(axis, 1)
    chips, tensor, stages = math.prod(mesh.values()), at("tensor"), at("stage")
    batch_ways = math.prod(at(axis) for axis in sharding.RULES["batch"])
    rows = config.data.batch_size / batch_ways / config.train.microbatches
    tokens = rows * config.data.sequence_length / at("sequence")  # of one device and microbatch
    layers, passes = model.layers / stages, config.train.microbatches
    spread = at("fsdp") * tensor * stages  # devices that share a weight
    expert_share = size.experts * model.layers / size.parameters
    held = size.parameters / spread * (1 - expert_share + expert_share / at("expert"))

    block = _block(config, tokens, tensor, c)
    layer_whole = (size.layer - size.experts + size.experts / at("expert")) / tensor * c  # one layer's weights, gathered
    outside_whole = size.outside / (tensor * stages) * c
    logits = min(tokens, (config.objective.chunk_rows or 10**12) / (batch_ways * at("sequence"))) * model.vocab_size / (tensor * stages) * (2 * 4 + c)
    saved = layers * block[config.model.remat]  # of a pipeline's parts together as much as of the whole batch
    working = (0 if config.model.remat == "none" else block["none"]) + block["gradients"] + 4 * layer_whole * (at("fsdp") > 1)  # two layers' weights, one's gradients
    gradients = 4 * held * size.trained * (1 if passes == 1 else 2)
    memory = {"parameters": size.width * held, "optimiser": size.width * held * size.optimiser, "average": 0, "batch": 20 * tokens * passes, "padding and rest": 0,
              "activations and temporaries": gradients + saved + max(working, logits + 3 * outside_whole * (at("fsdp") > 1)), "program": 0}

    per_token = report.flops_per_token(config.model, size.plain or size.parameters, config.data.sequence_length) * size.work
    useful = per_token * config.data.batch_size * config.data.sequence_length
    causal_half = 6 * model.layers * config.data.sequence_length * model.heads * model.head_size  # forward and backward
    executed = per_token + (causal_half if model.causal and kernel in ("reference", "xla") else 0)  # these compute the hidden half too
    executed *= 4 / 3 if config.model.remat == "full" else 1
    recomputed = config.model.remat != "none"
    traffic = passes * layers * ((2 + recomputed) * layer_whole + (3 + recomputed) * 2 * block["none"]) + passes * 6 * outside_whole
    traffic += 3 * 2 * passes * tokens * model.vocab_size / (tensor * stages) * 4 + (1 + 2 * size.trained + 2 * size.optimiser) * size.width * held
    bubble = pipeline.plan(config.model, stages, max(1, int(rows))).bubble if stages > 1 else 0.0
    return Needs({name: int(n) for name, n in memory.items()}, executed * useful / per_token / chips, useful, traffic,
                 _collectives(config, mesh, size, tokens, c), bubble)


def kernel_flops(config: Config, platform: str) -> float:
    """Operations, all devices together, of the attention kernels that a traced program does not show: Pallas's splash.

    Per pair of tokens of the causal half: two products forward (again when recomputed, which remat=dots does not), seven backward, of which five are needed.
    """
    model = config.model.filled()
    if attention.choose(config.model, config.data.sequence_length, platform) != "splash":
        return 0.0
    products = 11 if model.remat == "full" else 9
    return products * model.layers * config.data.batch_size * config.data.sequence_length ** 2 * float(model.heads * model.head_size)


def _block(config: Config, tokens: float, tensor: int, c: int) -> dict[str, float]:
    """Bytes that one layer keeps for its backward pass under each remat policy, and ("gradients") that its backward pass adds."""
    model = config.model.filled()
    heads, kv = model.heads * model.head_size / tensor, model.kv_heads * model.head_size / tensor
    inner = model.feedforward / tensor
    if model.experts:
        inner = model.expert_feedforward * model.experts_per_token / tensor + model.shared_feedforward / tensor
    matrices = (2 if model.gated else 1) * inner
    seen = config.data.sequence_length * (0.5 if model.attention == "blocked" else 1)
    scores = 0 if model.attention in ("cudnn", "splash") else seen * model.heads / tensor * (4 + c)
    dots = c * (model.width + heads + 2 * kv + model.width + matrices + model.width)
    full = c * 3 * model.width + c * (2 * heads + 2 * kv) + c * (matrices + 2 * inner) + c * model.width + scores + 4 * (2 * model.width + inner)
    return {"full": tokens * c * model.width, "dots": tokens * dots, "none": tokens * full, "gradients": tokens * (c * 2 * model.width + scores + c * matrices)}


def _collectives(config: Config, mesh: Mapping[str, int], size: Sizes, tokens: float, c: int) -> tuple[Collective, ...]:
    model = config.model.filled()
    at = lambda axis: mesh.get(axis, 1)
    passes, tensor, stages = config.train.microbatches, at("tensor"), at("stage")
    layers = int(model.layers // stages)
    activation = tokens * model.width * c
    layer = (size.layer - size.experts + size.experts / at("expert")) / tensor * c
    found = []

    def add(kind: str, axis: str, amount: float, times: float, source: str) -> None:
        if at(axis) > 1 and times:
            found.append(Collective(kind, axis, at(axis), (Array("u8", (int(amount),), False),), int(times), "", source))

    add("all-gather", "fsdp", layer, 2 * layers * passes, "weights of a layer")
    add("reduce-scatter", "fsdp", layer * size.trained, layers * passes, "gradients of a layer")
    add("all-gather", "fsdp", size.outside / (tensor * stages) * c, 2 * passes, "embedding and output")
    add("reduce-scatter", "fsdp", size.outside / (tensor * stages) * c, passes, "gradients of embedding and output")
    for axis in ("data", "slice"):
        add("all-reduce", axis, 4 * size.trained * size.parameters / (at("fsdp") * tensor * stages), 1, "gradients")
    add("all-reduce", "tensor", activation, (6 if config.model.remat == "full" else 4) * layers * passes, "activations of a layer")
    add("all-reduce", "tensor", activation, 2 * passes, "embedding and output")
    ring = at("sequence")
    add("collective-permute", "sequence", 2 * c * tokens * model.kv_heads * model.head_size / tensor, (ring - 1) * layers * passes * 3, "keys and values")
    add("all-reduce", "sequence", 4 * size.trained * size.parameters / (at("fsdp") * tensor * stages), 1, "gradients")
    add("all-to-all", "expert", activation * model.experts_per_token, 4 * layers * passes, "tokens to experts and back")
    add("all-reduce", "expert", 4 * size.trained * (size.parameters - size.experts * model.layers) / (at("fsdp") * tensor * stages), 1,
        "gradients outside the experts")
    add("collective-permute", "stage", activation, 2 * passes, "activations between stages")
    return tuple(found)
