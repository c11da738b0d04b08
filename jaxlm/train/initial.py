"""Where a run's first parameters come from when not from nothing: a Hugging Face directory ("hf:DIR"), a GGUF file ("gguf:FILE") or the workdir
of another run.

An import is a checkpoint of step 0 that holds parameters and no optimiser state; training in its workdir begins with it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import config as configs
from jaxlm import trees
from jaxlm.config import Config, DataConfig, MeshConfig, ObjectiveConfig, TransformerConfig
from jaxlm.data import ledger, sums
from jaxlm.data import tokenizer as tokenizers
from jaxlm.interop import peft
from jaxlm.interop.hf_config import COMPUTED
from jaxlm.models import decoder, kinds
from jaxlm.train import checkpoint, saved
from jaxlm.train import origin as origins
from jaxlm.train.lock import Lock
from jaxlm.train.state import State


def resolve(config: Config, workdir: pathlib.Path) -> Config:
    """The config with everything that `train.init_from` decides written out: the model but for how it is computed, and the tokenizer, of which a
    copy is put into the workdir. Without `init_from`, a workdir that `jaxlm import` made is its own beginning. Called with the workdir locked.

    Raises:
      ValueError: one line: nothing there, or a `model` key that asks for another model.
    """
    path = workdir / "config.json"
    before = configs.read(path) if path.exists() else None
    own = 0 in checkpoint.steps(workdir) or (before is not None and before.train.init_from == str(workdir))
    origin = config.train.init_from or (str(workdir) if own else "")
    if not origin:
        if config.lora.rank or config.objective.name == "preference":
            raise ValueError(f"{'lora.rank' if config.lora.rank else 'objective.name=preference'} needs a model to begin with: set train.init_from to a "
                             "workdir, hf:DIR or gguf:FILE")
        return config
    if own and (config.lora.rank or config.objective.name == "preference"):
        raise ValueError(f"{workdir} is where the base lies, whose checkpoint this run would replace: choose another --workdir, with "
                         f"--config.train.init_from={workdir}")
    copy = workdir / "initial"
    if before is not None and before.train.init_from == origin:  # resumed: the origin may have gone
        model, tokenizer = before.model, before.tokenizer
    else:
        model, found = origins.model(origin)
        model = _of_layers(model, config.train.init_layers)
        if jax.process_index() == 0:
            copy.mkdir(parents=True, exist_ok=True)
            sums.write(copy, [found.save(copy).name])
        tokenizer = dataclasses.replace(config.tokenizer, kind="unigram", path=str(copy / found.filename))
    config = dataclasses.replace(config, model=_merge(config.model, model, origin), train=dataclasses.replace(config.train, init_from=origin),
                                 tokenizer=config.tokenizer if config.tokenizer.path else tokenizer)
    if config.data.sequence_length > config.model.context:
        raise ValueError(f"data.sequence_length={config.data.sequence_length} is longer than the context of {origin}, {config.model.context}: "
                         f"set --config.data.sequence_length={config.model.context} or less")
    return config


def sized(config: Config) -> Config:
    """The config of a run from nothing with the model that `train.init_from` names, of which no weight is read.

    Raises:
      ValueError: one line: nothing there, or a `model` key that asks for another model.
    """
    origin = config.train.init_from
    try:
        given, tokenizer = origins.model(origin)
    except ValueError as error:
        raise ValueError(f"train.init_from={origin}, whose sizes are needed: {error}; or say them: --config.train.init_from= "
                         "--config.model.layers=12 ...") from None
    model = _merge(config.model, _of_layers(given, config.train.init_layers), origin)
    return dataclasses.replace(config, model=decoder.vocabulary(model, tokenizer.vocab_size),
                               tokenizer=dataclasses.replace(config.tokenizer, path=config.tokenizer.path or origin),
                               train=dataclasses.replace(config.train, init_from="", init_layers=()))


def teacher(config: Config) -> TransformerConfig:
    """The model that `objective.teacher` names, as the student's run computes it.

    Raises:
      ValueError: one line: nothing there, or a model that this student cannot be compared with.
    """
    origin, student = config.objective.teacher, config.model
    given = origins.model(origin)[0].filled()
    for name in ("kind", "vocab_size", *(["width"] if config.objective.teacher_cosine else [])):
        if getattr(given, name) != getattr(student, name):
            raise ValueError(f"objective.teacher={origin} has model.{name}={getattr(given, name)} and the student {getattr(student, name)}: they must be equal"
                             + " where objective.teacher_cosine compares hidden states" * (name == "width"))
    if given.context < config.data.sequence_length or given.encoder_layers:
        raise ValueError(f"objective.teacher={origin} " + ("is an encoder-decoder, which is no teacher of tokens" if given.encoder_layers else
                         f"has a context of {given.context} tokens: set data.sequence_length={given.context} or less"))
    return dataclasses.replace(given, **{name: getattr(student, name) for name in ("dtype", "attention", "sequence_attention", "remat")})


def same_tokens(origin: str, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuses a model with another tokenizer than the corpus has."""
    found = origins.model(origin)[1]
    ids = range(tokenizer.vocab_size)
    if found.fingerprint != tokenizer.fingerprint and (found.vocab_size != tokenizer.vocab_size or found.pieces(ids) != tokenizer.pieces(ids)):
        raise ValueError(f"objective.teacher={origin} has another tokenizer than the student: prepare the corpus with the teacher's (tokenizer.path)")


def _of_layers(given: TransformerConfig, layers: tuple[int, ...]) -> TransformerConfig:
    """A model of these layers of the given one."""
    if not layers:
        return given
    if given.encoder_layers or given.experts:
        raise ValueError("train.init_layers takes layers of decoders and encoders without experts only")
    if not all(0 <= layer < given.layers for layer in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"train.init_layers={layers} must be different numbers in [0, {given.layers}), the layers of train.init_from")
    windows = tuple(given.windows[layer % len(given.windows)] for layer in layers)
    return dataclasses.replace(given, layers=len(layers), windows=windows if len(set(windows)) > 1 else windows[:1])


def _merge(asked: TransformerConfig, given: TransformerConfig, origin: str) -> TransformerConfig:
    """The model that is given, computed as asked. What the recipe leaves at its default is not asked for: dropout of 0 leaves that of the model."""
    default, given = TransformerConfig(), given.filled()
    for field in dataclasses.fields(asked):
        value, name = getattr(asked, field.name), field.name
        if name not in COMPUTED and value != getattr(default, name) and value != getattr(given, name):
            raise ValueError(f"model.{name}={value!r}, but the model in {origin} has {getattr(given, name)!r}: leave the key out, or train from nothing")
    rates = {name: getattr(asked, name) or getattr(given, name) for name in ("dropout", "attention_dropout")}
    return dataclasses.replace(given, **{name: getattr(asked, name) for name in COMPUTED} | rates)


def start(config: Config, target: Any, companion: Any, *, log: Callable[[str], None] = print) -> tuple[Any, Any, dict[str, Any], list[dict[str, Any]]]:
    """What a run begins with and what it borrows.

    Args:
      target, companion: `Setup.plain` and `Setup.companion`.

    Returns:
      The plain parameters (new ones where `train.init_from` is empty), those of the companion (None without one), notes on those that no checkpoint of the run
      will hold ("base", "companion"), and what the first were trained on.
    """
    origin, layers, notes, history, step = config.train.init_from, config.train.init_layers, {}, [], 0
    if origin:
        step = origins.step_of(origin, log)
        found = origins.headed(origin, target, kinds.build(config.model).init, config.train.seed, layers, step=step, log=log)
        foreign = origin.partition(":")[0] in ("hf", "gguf")
        history = ledger.inherited(origin, None if foreign else origins.read_files(pathlib.Path(origin), step)[2])
    else:
        found = jax.jit(kinds.build(config.model).init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))(jax.random.key(config.train.seed))
    if config.lora.rank:
        notes["base"] = origins.note(origin, step, origins.body(found))
    mate = None
    if companion is not None and config.objective.teacher:
        mate = origins.params(config.objective.teacher, companion, log=log)
        notes["companion"] = origins.note(config.objective.teacher, origins.step_of(config.objective.teacher, log), mate)
    elif companion is not None:
        mate = jax.tree.map(jnp.copy, found)
        notes["companion"] = origins.note(origin, step, mate)
    return found, mate, notes, history


def borrowed(workdir: pathlib.Path, step: int, config: Config, target: Any, companion: Any, *, log: Callable[[str], None] = print) -> tuple[Any, Any]:
    """The parameters that the checkpoint of a run does not hold, read again: the base of adapters (else None), and the companion (else None).

    Raises:
      ValueError: one line: they are gone, or are others.
    """
    notes = json.loads(checkpoint.read_file(workdir, step, origins.BASE))
    found = origins.base(workdir, step, config, target) if config.lora.rank else None
    if companion is None:
        return found, None
    told = notes["companion"]
    mate = origins.params(told["origin"], companion, () if config.objective.teacher else config.train.init_layers, step=told["step"], log=log)
    origins.same_base(told, mate, f"the run in {workdir}")
    return found, mate


def adapter(config: Config, base_note: dict[str, Any], target: Any) -> Any:
    """The adapters that `lora.init_from` names, as `target` (of `jax.ShapeDtypeStruct` with shardings) wants them.

    Raises:
      ValueError: one line: nothing there, other matrices or another rank, or adapters of another base.
    """
    given = pathlib.Path(config.lora.init_from).expanduser()
    if (given / peft.CONFIG).is_file():
        told, flat = peft.load(given, config.model, config.lora)
        if told and told != base_note["fingerprint"]:
            raise ValueError(f"lora.init_from={given} was trained on another base than train.init_from={config.train.init_from}: give it its own base")
        places = trees.flatten(target)
        peft.check(given, {path: leaf.shape for path, leaf in flat.items()}, {path: leaf.shape for path, leaf in places.items()})
        return trees.unflatten({path: jax.make_array_from_callback(leaf.shape, places[path].sharding, lambda index, leaf=leaf: leaf[index])
                                for path, leaf in flat.items()})
    step = origins.step_of(str(given))
    theirs, _, _ = origins.read_files(given, step)
    if not theirs.lora.rank:
        raise ValueError(f"lora.init_from={given} is a run without adapters: give it as train.init_from")
    for name in ("alpha", "rslora"):
        if getattr(theirs.lora, name) != getattr(config.lora, name):
            raise ValueError(f"lora.{name}={getattr(config.lora, name)}, and the adapter in {given} was trained with {getattr(theirs.lora, name)}: "
                             "set it to that")
    told = json.loads(checkpoint.read_file(given, step, origins.BASE))["base"]
    if told["fingerprint"] != base_note["fingerprint"]:
        raise ValueError(f"lora.init_from={given} was trained on another base ({told['origin']}) than train.init_from="
                         f"{config.train.init_from}: give it its own base")
    return checkpoint.restore_params(given, step, target, ema=theirs.optim.ema > 0)


def import_model(path: pathlib.Path, workdir: pathlib.Path, *, dtype: str = "float32", log: Callable[[str], None] = print) -> TransformerConfig:
    """Writes a Hugging Face directory or a .gguf file as the checkpoint of step 0 of a new workdir, then reads that back and compares.

    Args:
      dtype: what the model will compute in; its parameters are float32.

    Raises:
      ValueError: one line: see `origin.foreign`; or the workdir holds checkpoints.
    """
    source = origins.foreign(path)
    tokenizer = source.tokenizer()
    cfg = dataclasses.replace(source.cfg, dtype=dtype)
    config = Config(model=decoder.vocabulary(cfg, tokenizer.vocab_size), data=DataConfig(sequence_length=min(1024, cfg.context)),
                    objective=ObjectiveConfig(name="masked_token" if cfg.kind == "encoder" else "seq2seq" if cfg.encoder_layers else "next_token"))
    if checkpoint.steps(workdir) or (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds a run already: choose another --to")
    log(f"{source.name}:\n{source.mapping()}")
    model = kinds.build(config.model)
    mesh, places = saved.place(MeshConfig(), model, jax.eval_shape(model.init, jax.random.key(0)))
    found = source.load(places)
    count = trees.count(found)
    whole = NamedSharding(mesh, PartitionSpec())
    state = State(jax.device_put(jnp.zeros((), jnp.int32), whole), found, (), None, jax.device_put(jax.random.key_data(jax.random.key(0)), whole))
    data = {"step": 0, "dir": str((workdir / "data").absolute()), "manifest": "", "history": ledger.inherited(str(path), None)}
    files = {"config.json": configs.to_json(config).encode(), tokenizer.filename: tokenizer.model, ledger.FILE: json.dumps(data).encode()}
    with Lock(workdir) as lock, checkpoint.Checkpoints(lock, keep_last=1, keep_best=0, keep_every=0, log=log) as checkpoints:
        checkpoints.save(0, state, files)
        checkpoints.wait()
    del state, found
    source.verify(saved.open_run(workdir, 0, log=log).params)
    log(f"{count:,} parameters and {tokenizer.vocab_size:,} tokens in {workdir}, read back and equal to the files bit by bit")
    return config.model
