"""From a config to the compiled parts of a run: the model, the optimiser, where everything lies on the mesh, the step."""

import ctypes
import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import lora, optim, sharding, trees
from jaxlm.config import LABELLED, Config, TransformerConfig, steps_of
from jaxlm.models import attend, decoder, encdec, pipeline
from jaxlm.objectives import COMPANION, KINDS, OBJECTIVES, Sums, distilled
from jaxlm.train import form as forms
from jaxlm.train.state import State
from jaxlm.train.step import init_state, mean_gradient, train_step


def layout(config: Config, mesh: Mesh, platform: str = "") -> str:
    """How attention and layers are laid out on the mesh, in a few words for the run's introduction; `platform` as in `build`.

    Raises:
      ValueError: one line, for what kernel, heads, layers or rows do not allow.
    """
    cfg, found = config.model.filled(), []
    found.append(f"attention {attend.check(cfg, mesh, config.data.sequence_length, platform or sharding.platform(mesh))}")
    for length in (config.data.sequence_length, *([config.data.target_length] if cfg.encoder_layers else [])):
        if mesh.shape["sequence"] > 1:
            sharding.zigzag(mesh.shape["sequence"], length)  # refuses what does not divide
    if mesh.shape["expert"] > 1 and not cfg.experts:
        raise ValueError(f"mesh.expert={mesh.shape['expert']} splits the experts of a mixture, and model.experts=0: give these devices to mesh.fsdp")
    if mesh.shape["stage"] > 1:
        rows = config.data.batch_size // (config.train.microbatches * sharding.ways("batch", mesh))
        plan = pipeline.plan(cfg, mesh.shape["stage"], rows)
        if cfg.pipeline_microbatches and plan.microbatches != cfg.pipeline_microbatches:
            raise ValueError(f"model.pipeline_microbatches={cfg.pipeline_microbatches} must divide the {rows} rows of a device: try {plan.microbatches}")
        found.append(f"pipeline of {plan.stages} stages x {plan.repeats} groups of {plan.layers} layers, {plan.microbatches} microbatches, "
                     f"bubble {plan.bubble:.0%} of the time")
    return ", ".join(found)


def row_tokens(config: Config) -> int:
    """Tokens of one row of a batch, on both sides of an encoder-decoder: what a step's tokens are counted in."""
    return config.data.sequence_length + (config.data.target_length if config.model.encoder_layers else 0)


def _batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    array = lambda length: jax.ShapeDtypeStruct((config.data.batch_size, length), jnp.int32, sharding=sharding.batch_sharding(mesh))
    paired = config.model.encoder_layers > 0
    assert config.data.target_length or not paired, "data/rows.py fills in data.target_length"
    tokens = array(config.data.target_length if paired else config.data.sequence_length)
    batch = {key: tokens for key in ("tokens", "targets", "positions", "segments")} | {"weights": tokens.update(dtype=jnp.float32)}
    if config.objective.name in LABELLED:
        if config.data.input_key and config.model.token_types > 1:
            batch["types"] = tokens
        if config.objective.name != "token_classify":
            del batch["targets"]
            place = NamedSharding(mesh, sharding.spec(("batch", None)))
            batch["labels"] = jax.ShapeDtypeStruct((config.data.batch_size, config.model.labels), jnp.float32, sharding=place)
    return batch | (dict.fromkeys(encdec.ENCODER_INPUTS, array(config.data.sequence_length)) if paired else {})


def shortened(batch: dict[str, jax.ShapeDtypeStruct], length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch whose rows have `length` tokens."""
    return {key: leaf if key in sharding.PER_ROW else leaf.update(shape=(leaf.shape[0], length)) for key, leaf in batch.items()}


class Setup(NamedTuple):
    """All that training needs, as functions; nothing is allocated yet."""
    config: Config  # with the vocabulary and the length of targets filled in
    mesh: Mesh
    model: decoder.Model
    total: int  # steps of the run
    target: State  # of jax.ShapeDtypeStruct with shardings: what `init` makes
    plain: dict[str, Any]  # likewise, the parameters of the model that `train.init_from` gives: `target.params` without adapters and companion, in float32
    companion: dict[str, Any] | None  # likewise, of the frozen model beside it: a teacher, or the reference of preferences
    trainable: dict[str, bool]  # path -> whether the parameter has a gradient
    kept: dict[str, bool]  # path -> whether a checkpoint holds the parameter; the others come from where they came from
    batch: dict[str, jax.ShapeDtypeStruct]  # what `step` is given
    init: Callable[[], State]
    begin: Callable[[Any], State]  # the state before step 0 with these parameters (as `target.params`), which are donated
    dress: Callable[..., Any]  # parameters as `plain`, and as `companion` -> as `target.params`; the first are donated
    step: Callable[[State, dict[str, jax.Array]], tuple[State, dict[str, Any]]]  # jitted, donates the state
    gradient: Callable[[Any, dict[str, jax.Array]], tuple[Any, Any]]  # jitted: parameters, batch -> the first step's gradient of those trained, and its sums
    steps: Callable[[str, str], int]  # (config key, duration) -> steps
    objective: Callable[..., Sums]  # (params, batch, key) -> Sums, as `step` has it


def build(config: Config, mesh: Mesh, tokenizer_size: int, tokens_per_epoch: int | None = None, platform: str = "",
          teacher: TransformerConfig | None = None) -> Setup:
    """Checks what only the tokenizer, the corpus and the devices can tell, and builds the run.

    Args:
      config: the recipe.
      mesh: from `sharding.make_mesh`.
      tokenizer_size: pieces of the tokenizer.
      tokens_per_epoch: targets of the training split; None where there is none (benchmarks).
      platform: "cpu", "gpu" or "tpu", of a mesh without devices; empty: what the devices of `mesh` are.
      teacher: the model of a teacher whose files are not read; None: what objective.teacher names.

    Raises:
      ValueError: one line, for a vocabulary that is too small, sizes that the mesh does not divide, a warm-up longer than the run, a rule
        that matches nothing.
    """
    config = dataclasses.replace(config, model=decoder.vocabulary(config.model, tokenizer_size))
    given, kind = f"model.kind={config.model.kind}", config.model.kind
    if config.model.encoder_layers:
        given, kind = f"model.encoder_layers={config.model.encoder_layers} (an encoder-decoder)", "encoder-decoder"
    if kind not in KINDS[config.objective.name]:
        fits = " or ".join(name for name, fitting in KINDS.items() if kind in fitting)
        raise ValueError(f"objective.name={config.objective.name} does not train {given}: set objective.name={fits}")
    output = {"token_classify": "token_labels"}.get(config.objective.name, "sequence_labels") if config.objective.name in LABELLED else "tokens"
    if config.model.output != output:
        raise ValueError(f"objective.name={config.objective.name} trains models with model.output={output}, not {config.model.output}")
    rows, parts, ways = config.data.batch_size, config.train.microbatches, sharding.ways("batch", mesh)
    if rows % (parts * ways):
        raise ValueError(f"data.batch_size={rows} must be a multiple of train.microbatches={parts} times {sharding.over('batch', mesh)}: "
                         f"try {max(1, round(rows / (parts * ways))) * parts * ways}")
    layout(config, mesh, platform)
    tokens_per_step = rows * row_tokens(config)
    total = steps_of("train.steps", config.train.steps, tokens_per_step=tokens_per_step, tokens_per_epoch=tokens_per_epoch)
    if total < 1:
        raise ValueError(f"train.steps={config.train.steps!r} is no step at all; give at least one")
    steps = lambda key, duration: steps_of(key, duration, tokens_per_step=tokens_per_step, tokens_per_epoch=tokens_per_epoch, total=total)

    form, plain = forms.form(config, config.model, mesh)
    mate, model = _companion(config, mesh, teacher), form.model
    axes, trainable = form.axes, form.trainable
    if mate is not None:
        axes = axes | {f"{COMPANION}/{path}": names for path, names in mate[0].axes.items()}
        trainable = trainable | {f"{COMPANION}/{path}": False for path in mate[0].axes}
    if not any(trainable.values()):
        raise ValueError("optim.trainable leaves nothing to train: one rule at least must say True")
    rate = optim.schedule(config.optim, total, tokens_per_step, tokens_per_epoch)
    tx = optim.build(config.optim, rate, {path: names for path, names in axes.items() if trainable[path]}, config.model)

    def dress(key: jax.Array, params: Any, companion: Any = None) -> Any:
        params = form.dress(params, key)
        return params if mate is None else params | {COMPANION: mate[0].dress(companion, None)}

    def init(key: jax.Array, params: Any = None) -> State:
        k_params, k_run = jax.random.split(key)
        if params is None:
            params = dress(jax.random.fold_in(k_params, 1), model.init(k_params), None if mate is None else mate[0].model.init(jax.random.fold_in(k_params, 2)))
        return init_state(params, tx, trainable, jax.random.key_data(k_run), config.optim.ema > 0)

    state_shapes = jax.eval_shape(init, jax.random.key(0))
    shapes, whole = state_shapes.params, NamedSharding(mesh, PartitionSpec())
    places = sharding.params_shardings(mesh, tuple((re.escape(path), names) for path, names in axes.items()), shapes)
    trained_places = trees.split(places, trainable)[0]
    state_places = State(whole, places, sharding.like_params(mesh, state_shapes.opt, places, shapes), trained_places if config.optim.ema else None, whole)
    target = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), state_shapes, state_places)
    batch = _batch(config, mesh)
    objective = OBJECTIVES[config.objective.name]
    objective = functools.partial(distilled, objective) if config.objective.teacher else objective
    objective = functools.partial(objective, config.objective, model, **({} if mate is None else {"companion": mate[0].model}))
    step = functools.partial(train_step, objective=objective, tx=tx, rate=rate, trainable=trainable, microbatches=parts, ema=config.optim.ema,
                             layer_norms=config.train.layer_norms)
    borrowed = lambda path: path.startswith(COMPANION + "/") or config.lora.rank > 0 and not trainable[path]

    def gradient(params: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any]:
        key = jax.random.fold_in(jax.random.split(jax.random.key(config.train.seed))[1], 0)
        return mean_gradient(*trees.split(params, trainable), batch, key, objective, parts)

    begin = functools.partial(jax.jit, init, out_shardings=state_places, compiler_options=_compiled_quickly(platform or sharding.platform(mesh)))
    return Setup(config, mesh, model, total, target, plain, mate and mate[1], trainable, {path: not borrowed(path) for path in axes}, batch,
                 lambda: begin()(jax.random.key(config.train.seed)),
                 lambda params: begin(donate_argnums=1)(jax.random.key(config.train.seed), params),
                 functools.partial(_without_warning, jax.jit(dress, out_shardings=places, donate_argnums=1), jax.random.key(config.train.seed)),
                 jax.jit(step, donate_argnums=0, out_shardings=(state_places, whole)),
                 jax.jit(gradient, out_shardings=(trained_places, whole)), steps, objective)


def compiled(step: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
    """The program of a step for arguments of these shapes. What the compiler needed goes back to the system, where the C library would keep it: 0.2 GiB of the 1.2 that
    training a model of 11 M parameters reaches on CPUs."""
    program = step.lower(*arguments).compile()
    if hasattr(libc := ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim"):  # GNU's
        libc.malloc_trim(0)
    return program


def _compiled_quickly(platform: str) -> dict[str, int] | None:
    """Compiler options of the program that draws the first parameters. At LLVM's level 3, XLA's default, it takes four times as long to compile on CPUs as at
    level 2 (4.6 s of processor time against 1.2 for quickstart), for the same numbers as fast. Steps gain nothing, and other platforms do not compile so."""
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {"xla_backend_optimization_level": 2} if platform == "cpu" and not chosen else None


def work(parts: Setup) -> float:
    """Operations of a step as a share of those of training all weights: a third each for the forward pass, the gradients of activations and those of weights,
    of which frozen ones have none; the first layers, frozen, have a forward pass alone; the frozen model beside it has a forward pass more."""
    config = parts.config  # of labels the embedding is no matrix that is multiplied by
    whole = trees.count({name: part for name, part in parts.plain.items() if name != "embed" or config.objective.name not in LABELLED})
    beside = trees.count(parts.companion) / whole if parts.companion is not None else 1.0 if config.objective.name == "preference" else 0.0
    still = trees.count(parts.plain["layers"]) / whole * config.optim.frozen_layers / config.model.layers if config.optim.frozen_layers else 0.0
    trained = trees.count(trees.split(parts.target.params, parts.trainable)[0]) / whole
    return (1 + (1 - still) + min(trained, 1 - still) + beside) / 3


def _without_warning(function: Callable, *arguments: Any) -> Any:
    """A jitted function whose donated arguments may have no result of their shape: of layers that are cut or quantised only some can be used again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return function(*arguments)


def _companion(config: Config, mesh: Mesh, teacher: TransformerConfig | None) -> tuple[lora.Form, dict[str, Any]] | None:
    """The frozen model that an objective compares with: a teacher; or, of preferences without adapters, the model that training began with."""
    if config.objective.teacher and teacher is None:
        from jaxlm.train import initial  # reads files, for which more is imported than a step needs

        teacher = initial.teacher(config)
    if config.objective.teacher:
        return forms.form(config, teacher, mesh, companion=True)
    if config.objective.name == "preference" and not config.lora.rank:
        return forms.form(config, config.model, mesh, companion=True)
    return None
