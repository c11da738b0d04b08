"""The mesh-parity certificate: the same few steps on several meshes and on one device, in float32, and how far apart they end.

Error model. Sums of the same numbers in another order differ by rounding; how much of it shows in a loss, a gradient or an updated parameter depends on the
model, so that is measured: one device computes the steps twice more from parameters of which each is moved at random by up to one unit of rounding
(eps = 2^-23, relative). The largest change that makes, relative to the largest entry of the leaf (of an updated parameter: to how far the leaf has moved),
is the leaf's sensitivity s. With n devices an error up to

    bound = 4 n (s + 4 eps), at most CEILING for losses and gradients

passes: each device adds a rounding of its own at the sensitive places, and four is what layers, microbatches and rounds add in our own runs with room. A
collective that is missing, over a wrong axis or counted twice, a wrong mask or a wrong weight of a microbatch is 10^2 to 10^5 times that. Adam-like optimisers
turn the sign of a gradient that is rounding alone into a step of full size: the sensitivity of such parameters says so, and their gradients still count.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import sharding, trees
from jaxlm.config import LABELLED, Config, MeshConfig, TransformerConfig
from jaxlm.models import encdec
from jaxlm.train import setup

EPS = 2.0**-23
CEILING = 1e-4  # more than this in a loss or gradient is no rounding, however sensitive the model
VOCABULARY = 128

# Every axis alone, and the pairs and triples that people use; those that the model has no use for are left out.
MESHES = ("slice=2", "data=2", "fsdp=2", "fsdp=4", "stage=2", "stage=4", "sequence=2", "sequence=4", "tensor=2", "tensor=4", "expert=2", "expert=4",
          "slice=2+fsdp=2", "data=2+fsdp=4", "fsdp=4+tensor=2", "fsdp=2+expert=4", "tensor=2+expert=2", "fsdp=2+sequence=4", "fsdp=2+sequence=2+tensor=2",
          "fsdp=2+stage=2+tensor=2", "stage=2+sequence=2", "stage=2+expert=2")


class Run(NamedTuple):
    """What a mesh made of the batches."""
    losses: np.ndarray  # float64 [steps]
    grads: dict[str, np.ndarray]  # of the first step
    params: dict[str, np.ndarray]  # after the last


class Row(NamedTuple):
    """One mesh against one device: the largest error over its bound decides."""
    mesh: str
    loss: float  # relative errors
    grads: float
    params: float
    worst: str  # the leaf nearest to, or farthest beyond, its bound
    bound: float  # of that leaf
    ok: bool
    refused: str = ""  # why this mesh cannot be used with this model


def parse(text: str) -> list[str]:
    """Names of meshes, "fsdp=4+tensor=2,sequence=4" -> ["fsdp=4+tensor=2", "sequence=4"]; nothing: `MESHES`.

    Raises:
      ValueError: one line that shows how it is written.
    """
    names = [name.strip() for name in text.split(",") if name.strip()] or list(MESHES)
    for name in names:
        for part in name.split("+"):
            if not re.fullmatch(rf"({'|'.join(sharding.AXES)})=[1-9]\d*", part):
                raise ValueError(f"--meshes: {part!r} is no axis with a size: write AXIS=SIZE, joined by + in a mesh and by , between meshes, with axes of "
                                 f"{', '.join(sharding.AXES)}, such as fsdp=4+tensor=2,sequence=4")
    return names


def _mesh(name: str) -> MeshConfig:
    return MeshConfig(**{"fsdp": 1} | {axis: int(size) for axis, size in (part.split("=") for part in name.split("+"))})


def devices(name: str) -> int:
    """How many devices a mesh of that name has."""
    return math.prod(dataclasses.astuple(_mesh(name)))


def shrink(config: Config, steps: int) -> Config:
    """The config made tiny, with every knob of it still on.

    Width 32, 4 layers for each group of a stage, up to 4 key heads of 8 with up to 2 query heads each, up to 8 experts, 128 ids, rows of 32 tokens, 8 rows for
    each of up to 2 microbatches; windows become a few tokens. In float32, without dropout (its random numbers depend on how the batch is cut), with wider
    initial weights, so that attention is not flat, a constant learning rate, and the kernel that runs anywhere. A teacher is a model like the student (see
    `build`). With microbatches the losses that balance experts are off: their values are not sums over tokens.
    """
    old = config.model.filled()
    kv_heads = min(old.kv_heads, 4)
    sizes = tuple(dict.fromkeys(old.windows))
    small = {size: 3 + 4 * i if size else 0 for i, size in enumerate(sorted(sizes))}
    layers = 4 * old.pipeline_repeats
    dense = tuple(i for i in old.dense_layers if i < layers)
    inner = 256 if config.optim.frozen_dtype in ("int8", "nf4") else 0  # four blocks of quantised weights, so that mesh.tensor can divide them
    head_size = next(n for n in range(8, 65, 8) if int(n * old.rotary_fraction) % 2 == 0 and int(n * old.rotary_fraction) > 0)
    model = dataclasses.replace(
        old, vocab_size=VOCABULARY, context=32, layers=layers, width=32, kv_heads=kv_heads, heads=kv_heads * min(old.heads // old.kv_heads, 2),
        head_size=head_size, feedforward=inner or 64, windows=tuple(small[size] for size in sizes), experts=min(old.experts, 8),
        experts_per_token=min(old.experts_per_token, max(old.experts, 1), 2), expert_feedforward=inner or 32,
        shared_feedforward=(inner or 32) if old.shared_feedforward else 0, dense_layers=dense if len(dense) < layers else dense[:1],
        dropout=0.0, attention_dropout=0.0, embedding_noise=0.0, dtype="float32", init="normal", init_std=0.1, attention="auto", pipeline_microbatches=0,
        encoder_layers=layers if old.encoder_layers else 0)
    if config.objective.name in LABELLED:
        labels = 1 if config.objective.name == "regress" else 3
        model = dataclasses.replace(model, output={"token_classify": "token_labels"}.get(config.objective.name, "sequence_labels"),
                                    labels=labels, label_names=())
    parts = min(config.train.microbatches, 2)
    balance = {"moe_balance": 0.0, "moe_z": 0.0} if parts > 1 else {}
    objective = dataclasses.replace(config.objective, chunk_rows=64 if config.objective.chunk_rows else 0, **balance)
    optim = dataclasses.replace(config.optim, schedule="constant", warmup="0", frozen_layers=min(config.optim.frozen_layers, layers // 2))
    return dataclasses.replace(
        config, model=model, objective=objective, optim=optim,
        data=dataclasses.replace(config.data, sequence_length=32, target_length=32 if model.encoder_layers else 0, batch_size=8 * parts),
        train=dataclasses.replace(config.train, steps=str(steps), microbatches=parts, init_from="", init_layers=()),
        lora=dataclasses.replace(config.lora, rank=min(config.lora.rank, 4), dropout=0.0, init_from=""))


def batch(step: int, rows: int, paired: bool, length: int = 32, ids: int = VOCABULARY) -> dict[str, np.ndarray]:
    """Rows of two documents and padding, with ragged weights: what packing makes. `paired`: with what an encoder reads, of other lengths."""
    if paired:
        read = batch(step + 1000, rows, False)
        return batch(step, rows, False) | {name: read[name.removeprefix("encoder_")] for name in encdec.ENCODER_INPUTS}
    random = np.random.default_rng(step)
    cut, end = random.integers(4, length - 8, (rows, 1)), random.integers(length - 8, length + 1, (rows, 1))
    place = np.arange(length)
    segments = np.where(place >= end, 0, np.where(place >= cut, 2, 1)).astype(np.int32)
    tokens = random.integers(0, ids, (rows, length + 1)).astype(np.int32)
    weights = (segments > 0) & (random.random((rows, length)) < 0.8)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights.astype(np.float32), "segments": segments,
            "positions": np.where(segments == 2, place - cut, place).astype(np.int32)}


def labelled(made: dict[str, np.ndarray], step: int, config: Config) -> dict[str, np.ndarray]:
    """The rows with labels, of other weights: of each token, or of each row at its first token, in decoders its last."""
    random, rows, classes = np.random.default_rng(1000 + step), len(made["tokens"]), config.model.labels
    if config.objective.name == "token_classify":
        return made | {"targets": (made["targets"] % classes).astype(np.int32)}
    weights = np.zeros_like(made["weights"])
    place = (made["segments"] > 0).sum(axis=1) - 1 if config.model.kind == "decoder" else np.zeros(rows, int)
    weights[np.arange(rows), place] = random.choice([0.5, 1, 2], rows)
    truth = {"classify": np.eye(classes)[random.integers(0, classes, rows)], "multi_label": random.integers(0, 2, (rows, classes)),
             "regress": random.normal(size=(rows, 1))}[config.objective.name]
    types = {"types": (made["segments"] == 2).astype(np.int32)} if config.data.input_key and config.model.token_types > 1 else {}
    return {key: value for key, value in made.items() if key != "targets"} | {"weights": weights, "labels": truth.astype(np.float32)} | types


def build(config: Config, name: str) -> setup.Setup:
    """The parts of a run on that mesh."""
    return setup.build(config, sharding.make_mesh(_mesh(name), jax.devices()[:devices(name)]), VOCABULARY, teacher=config.model)


class Programs(NamedTuple):
    """The compiled functions of a `setup.Setup`."""
    gradient: Callable
    step: Callable


def compiled(function: Callable, *arguments: Any) -> Callable:
    """The jitted function for arguments of these shapes. Half of the time that a tiny model takes is LLVM's optimisation, which emulated devices do not need."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    return function.lower(*arguments).compile(compiler_options=options)


def programs(parts: setup.Setup) -> Programs:
    """What is compared, compiled."""
    with jax.set_mesh(parts.mesh):
        return Programs(compiled(parts.gradient, parts.target.params, parts.batch), compiled(parts.step, parts.target, parts.batch))


def train(parts: setup.Setup, run: Programs, steps: int, params: Any) -> Run:
    """The steps on the mesh of `parts`, from these parameters (a nested dict of numpy arrays)."""
    mesh, rows, losses, grads = parts.mesh, parts.config.data.batch_size, [], {}
    host = lambda tree: {path: np.asarray(leaf) for path, leaf in trees.flatten(tree).items()}
    with jax.set_mesh(mesh):
        state = parts.begin(jax.tree.map(lambda leaf, target: jax.device_put(leaf, target.sharding), params, parts.target.params))
        for step in range(steps):
            made = batch(step, rows, parts.config.model.encoder_layers > 0)
            made = labelled(made, step, parts.config) if parts.config.objective.name in LABELLED else made
            given = sharding.to_device(mesh, made, rows)
            if step == 0:
                grads = host(run.gradient(state.params, given)[0])
            state, metrics = run.step(state, given)
            total, weight = metrics["sums"]["loss"]
            losses.append(float(total) / float(weight))
        return Run(np.array(losses), grads, host(state.params))


def _errors(found: Run, expected: Run, start: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """By kind and leaf, the relative errors of the module's error model."""
    largest = lambda a: float(np.abs(a).max(initial=0))
    error = lambda a, b, scale: largest(a.astype(np.float64) - b) / scale if scale else largest(a.astype(np.float64) - b)
    return {"loss": {"loss": error(found.losses, expected.losses, largest(expected.losses))},
            "grads": {path: error(found.grads[path], leaf, largest(leaf)) for path, leaf in expected.grads.items()},
            "params": {path: error(found.params[path], leaf, largest(leaf - start[path])) for path, leaf in expected.params.items()}}


def verify(config: Config, names: Sequence[str], steps: int, progress: Callable[[Row], None] = lambda row: None, chosen: bool = True) -> list[Row]:
    """Compares each mesh with one device.

    Args:
      config: as given by the user; it is shrunk here.
      names: see `parse`.
      steps: of training.
      progress: called with each row when it is known.
      chosen: the user asked for these meshes: one that cannot be used is an error. Else it is a row with `refused`.

    Raises:
      ValueError: one line: a mesh that asks for more devices than there are, or that this model cannot use.
    """
    config = shrink(config, steps)
    too_many = [name for name in names if devices(name) > jax.device_count()]
    if too_many:
        raise ValueError(f"--meshes: {too_many[0]} needs {devices(too_many[0])} devices, and there are {jax.device_count()}")
    known = reference(dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=1)), steps)
    rows = []
    for name in names:
        rows.append(_compare(config, name, steps, known, chosen))
        progress(rows[-1])
    return rows


class Reference(NamedTuple):
    """What one device makes of the batches, and how much of a rounding shows in it."""
    params: Any  # it begins with
    run: Run
    sensitivity: dict[str, dict[str, float]]  # by kind and leaf, see the module


def reference(config: Config, steps: int) -> Reference:
    """One device, with a config that `shrink` made."""
    alone = build(config, "fsdp=1")
    params = jax.tree.map(np.asarray, alone.init().params)
    run = programs(alone)
    start, expected = trees.flatten(params), train(alone, run, steps, params)
    sensitivity: dict[str, dict[str, float]] = {}
    for seed in (0, 1):
        random = np.random.default_rng(seed)
        move = lambda leaf: (leaf * (1 + EPS * random.uniform(-1, 1, leaf.shape))).astype(np.float32) if leaf.dtype == np.float32 else leaf
        moved = jax.tree.map(move, params)
        for kind, errors in _errors(train(alone, run, steps, moved), expected, start).items():
            for path, error in errors.items():
                sensitivity.setdefault(kind, {})[path] = max(error, sensitivity.get(kind, {}).get(path, 0.0))
    return Reference(params, expected, sensitivity)


def _compare(config: Config, name: str, steps: int, known: Reference, chosen: bool) -> Row:
    try:
        parts = build(config, name)
        run = programs(parts)
    except ValueError as error:
        if chosen:
            raise ValueError(f"{name}: {error}") from error
        return Row(name, 0.0, 0.0, 0.0, "", 0.0, True, str(error))
    found = train(parts, run, steps, known.params)
    errors, shares = _errors(found, known.run, trees.flatten(known.params)), {}
    for kind, leaves in errors.items():
        for path, error in leaves.items():
            bound = 4 * devices(name) * (known.sensitivity[kind][path] + 4 * EPS)
            bound = bound if kind == "params" else min(bound, CEILING)
            shares[f"{kind} {path}" if kind != "loss" else "loss"] = ((error if math.isfinite(error) else math.inf) / bound, bound)
    worst = max(shares, key=lambda leaf: shares[leaf][0])
    return Row(name, *(max(leaves.values()) for leaves in errors.values()), worst, shares[worst][1], shares[worst][0] <= 1)


def used(model: TransformerConfig, name: str) -> bool:
    """Whether a mesh of `MESHES` says anything about this kind of model."""
    return model.experts > 0 or "expert" not in name


HEADER = f"{'mesh':<28} {'loss':>8} {'grads':>8} {'params':>8}  {'bound':>8}  worst leaf (its bound)"


def line(row: Row) -> str:
    """A row of the table."""
    if row.refused:
        return f"{row.mesh:<28} not possible with this model: {row.refused}"
    return f"{row.mesh:<28} {row.loss:8.1e} {row.grads:8.1e} {row.params:8.1e}  {row.bound:8.1e}  {row.worst:<32} {'ok' if row.ok else 'DIFFERS'}"
