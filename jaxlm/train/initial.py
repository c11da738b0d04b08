"""Where a run's first parameters come from when not from nothing: a Hugging Face directory ("hf:DIR"), a GGUF file ("gguf:FILE") or the workdir
of another run.

An import is a checkpoint of step 0 that holds parameters and no optimiser state; training in its workdir begins with it.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import config as configs
from jaxlm import trees
from jaxlm.config import Config, DataConfig, MeshConfig, ObjectiveConfig, TransformerConfig
from jaxlm.data import ledger
from jaxlm.data import tokenizer as tokenizers
from jaxlm.interop import gguf, hf
from jaxlm.interop.hf_config import COMPUTED
from jaxlm.models import decoder, kinds
from jaxlm.train import checkpoint, saved
from jaxlm.train.lock import Lock
from jaxlm.train.state import State



class Foreign(NamedTuple):
    """A model in another system's files, whose headers are read and fit it; the weights are not read yet."""
    name: str
    cfg: TransformerConfig
    tokenizer: Callable[[], tokenizers.Tokenizer]
    mapping: Callable[[], str]
    load: Callable[[Any], Any]  # shardings -> parameters
    verify: Callable[[Any], None]  # parameters; OSError for a difference


def foreign(path: pathlib.Path | str) -> Foreign:
    """Opens a Hugging Face directory or a .gguf file.

    Raises:
      ValueError: one line; see `hf.open_directory` and `gguf.open_file`.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix == ".gguf":
        file = gguf.open_file(path)

        def verify(found: Any) -> None:
            again = trees.flatten(gguf.load(file, jax.tree.map(lambda leaf: leaf.sharding, found)))
            for name, leaf in trees.flatten(found).items():
                if not bool(jnp.array_equal(leaf, again[name])):
                    raise OSError(f"{path}: {name} was not read the same twice: check the disk")

        return Foreign(f"{path}", file.cfg, functools.partial(gguf.tokenizer, file), functools.partial(gguf.mapping, file),
                       functools.partial(gguf.load, file), verify)
    source = hf.open_directory(path)
    return Foreign(f"{source.family.architecture} in {path}", source.cfg, functools.partial(tokenizers.load, path, vocab_size=source.cfg.vocab_size),
                   functools.partial(hf.mapping, source), functools.partial(hf.load, source), functools.partial(hf.verify, source))


def _foreign(origin: str) -> Foreign | None:
    kind, colon, path = origin.partition(":")
    return foreign(path) if colon and kind in ("hf", "gguf") else None


def resolve(config: Config, workdir: pathlib.Path) -> Config:
    """The config with everything that `train.init_from` decides written out: the model but for how it is computed, and the tokenizer, of which a
    copy is put into the workdir. Without `init_from`, a workdir that `jaxlm import` made is its own beginning. Called with the workdir locked.

    Raises:
      ValueError: one line: nothing there, or a `model` key that asks for another model.
    """
    path = workdir / "config.json"
    before = configs.from_json(path.read_text(encoding="utf-8")) if path.exists() else None
    own = 0 in checkpoint.steps(workdir) or (before is not None and before.train.init_from == str(workdir))
    origin = config.train.init_from or (str(workdir) if own else "")
    if not origin:
        return config
    copy = workdir / "initial"
    if before is not None and before.train.init_from == origin:  # resumed: the origin may have gone
        model, tokenizer = before.model, before.tokenizer
    else:
        model, found = _origin(origin)
        if jax.process_index() == 0:
            copy.mkdir(parents=True, exist_ok=True)
            found.save(copy)
        tokenizer = dataclasses.replace(config.tokenizer, kind="unigram", path=str(copy / found.filename))
    config = dataclasses.replace(config, model=_merge(config.model, model, origin), train=dataclasses.replace(config.train, init_from=origin),
                                 tokenizer=config.tokenizer if config.tokenizer.path else tokenizer)
    if config.data.sequence_length > config.model.context:
        raise ValueError(f"data.sequence_length={config.data.sequence_length} is longer than the context of {origin}, {config.model.context}: "
                         f"set --config.data.sequence_length={config.model.context} or less")
    return config


def _origin(origin: str) -> tuple[TransformerConfig, tokenizers.Tokenizer]:
    if source := _foreign(origin):
        return source.cfg, source.tokenizer()
    step = _step(origin)
    config, tokenizer, _ = saved.read_files(pathlib.Path(origin), step)
    return config.model, tokenizer


def model_of(origin: str) -> TransformerConfig:
    """The model that an origin holds. Raises ValueError, one line, where there is none."""
    return _origin(origin)[0]


def _step(workdir: str, log: Callable[[str], None] = print) -> int:
    step = checkpoint.newest(workdir, log=log)
    if step is None:
        raise ValueError(f"train.init_from={workdir} holds no checkpoint: give the workdir of a run, hf:DIR for a Hugging Face directory, or gguf:FILE")
    return step


def _merge(asked: TransformerConfig, given: TransformerConfig, origin: str) -> TransformerConfig:
    """The model that is given, computed as asked. What the recipe leaves at its default is not asked for: dropout of 0 leaves that of the model."""
    default, given = TransformerConfig(), given.filled()
    for field in dataclasses.fields(asked):
        value, name = getattr(asked, field.name), field.name
        if name not in COMPUTED and value != getattr(default, name) and value != getattr(given, name):
            raise ValueError(f"model.{name}={value!r}, but the model in {origin} has {getattr(given, name)!r}: leave the key out, or train from nothing")
    rates = {name: getattr(asked, name) or getattr(given, name) for name in ("dropout", "attention_dropout")}
    return dataclasses.replace(given, **{name: getattr(asked, name) for name in COMPUTED} | rates)


def params(origin: str, target: Any, init: Callable[[jax.Array], Any], seed: int, *,
           log: Callable[[str], None] = print) -> tuple[Any, list[dict[str, Any]]]:
    """The parameters that `init_from` names, each where `target` (of `jax.ShapeDtypeStruct` with shardings) wants it, and what they were trained on.

    Args:
      init: key -> parameters as `target`; what the origin does not have (a head for labels) comes from it, and its own head is left out.
    """
    source, step = _foreign(origin), 0
    if source is None:
        step = _step(origin, log)
        config, _, data = saved.read_files(pathlib.Path(origin), step)
    model = source.cfg if source else config.model
    wanted, given = trees.flatten(target), trees.flatten(jax.eval_shape(kinds.build(model).init, jax.random.key(0)))
    common = {path for path in wanted if path in given and wanted[path].shape == given[path].shape}
    mesh = next(iter(wanted.values())).sharding.mesh
    place = lambda path: wanted[path].sharding if path in common else NamedSharding(mesh, PartitionSpec())
    if source:
        found, history = source.load(trees.unflatten({path: place(path) for path in given})), ledger.inherited(origin, None)
    else:
        shapes = trees.unflatten({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path)) for path, leaf in given.items()})
        found, history = checkpoint.restore_params(origin, step, shapes, ema=config.optim.ema > 0), ledger.inherited(origin, data)
    fresh = sorted(set(wanted) - common)
    if not fresh and set(given) == common:
        return found, history
    made = jax.jit(lambda key: {path: trees.flatten(init(key))[path] for path in fresh}, out_shardings={path: wanted[path].sharding for path in fresh})
    log(f"from {origin}: all but {', '.join(fresh) or 'nothing'}" + f" (new); left out: {', '.join(sorted(set(given) - common)) or 'nothing'}")
    return trees.unflatten({path: leaf for path, leaf in trees.flatten(found).items() if path in common} | made(jax.random.key(seed))), history


def import_model(path: pathlib.Path, workdir: pathlib.Path, *, dtype: str = "float32", log: Callable[[str], None] = print) -> TransformerConfig:
    """Writes a Hugging Face directory or a .gguf file as the checkpoint of step 0 of a new workdir, then reads that back and compares.

    Args:
      dtype: what the model will compute in; its parameters are float32.

    Raises:
      ValueError: one line: see `foreign`; or the workdir holds checkpoints.
    """
    source = foreign(path)
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
