"""Parameters from elsewhere: a Hugging Face directory ("hf:DIR"), a GGUF file ("gguf:FILE") or the workdir of another run; and in which form a run keeps them.

A run with adapters saves only these and, in `base.json`, where its base came from and what tells it apart; the base itself is read from there again.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxlm import config as configs
from jaxlm import lora, sharding, trees
from jaxlm.config import Config, TransformerConfig
from jaxlm.data import chat, ledger
from jaxlm.data import tokenizer as tokenizers
from jaxlm.interop import gguf, hf
from jaxlm.models import decoder, kinds
from jaxlm.train import best, checkpoint
from jaxlm.train.form import form, is_head

BASE = "base.json"


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


def absolute(origin: str) -> str:
    """The same place, however the working folder changes."""
    kind, colon, path = origin.partition(":")
    return f"{kind}:{os.path.abspath(os.path.expanduser(path))}" if colon and kind in ("hf", "gguf") else os.path.abspath(origin)


def step_of(origin: str, log: Callable[[str], None] = print) -> int:
    """The checkpoint of a workdir that evaluation and use begin with, too: the newest whole one, or where the run says what is best (`best.chooses`) the
    best; 0 for files of others.

    Raises:
      ValueError: one line: nothing there.
    """
    if origin.partition(":")[0] in ("hf", "gguf") and ":" in origin:
        return 0
    step = checkpoint.newest(origin, log=log)
    if step is not None and best.chooses(read_files(pathlib.Path(origin), step)[0]):
        step = best.step(pathlib.Path(origin)) or step
    if step is None:
        raise ValueError(f"{origin} holds no checkpoint: give the workdir of a run, hf:DIR for a Hugging Face directory, or gguf:FILE")
    return step


def model(origin: str) -> tuple[TransformerConfig, tokenizers.Tokenizer]:
    """The model that lies there, and its tokenizer."""
    if source := _foreign(origin):
        return source.cfg, source.tokenizer()
    config, tokenizer, _ = read_files(pathlib.Path(origin), step_of(origin))
    return config.model, tokenizer


def _config(origin: str) -> TransformerConfig:
    """The model that lies there; a tokenizer need not."""
    source = _foreign(origin)
    return source.cfg if source else read_files(pathlib.Path(origin), step_of(origin))[0].model


def template(origin: str) -> str:
    """The chat template that a run was trained with, as Jinja; "" where there is none but the tokenizer's."""
    return "" if _foreign(origin) else read_template(pathlib.Path(origin), step_of(origin))


def read_files(workdir: pathlib.Path, step: int) -> tuple[Config, tokenizers.Tokenizer, dict[str, Any]]:
    """Config with the vocabulary filled in, tokenizer, and position in the data of a checkpoint, each verified."""
    config = configs.from_json(checkpoint.read_file(workdir, step, "config.json").decode())
    names = sorted(path.name for path in (workdir / "checkpoints" / str(step) / "files").glob("tokenizer.*"))
    tokenizer = tokenizers.from_bytes(checkpoint.read_file(workdir, step, names[0] if names else "tokenizer.model"))
    data = json.loads(checkpoint.read_file(workdir, step, ledger.FILE))
    return dataclasses.replace(config, model=decoder.vocabulary(config.model, tokenizer.vocab_size)), tokenizer, data


def read_template(workdir: pathlib.Path, step: int) -> str:
    """The chat template in a checkpoint; empty: none."""
    there = (workdir / "checkpoints" / str(step) / "files" / chat.FILE).exists()
    return checkpoint.read_file(workdir, step, chat.FILE).decode() if there else ""


# --- parameters ---


def params(origin: str, target: Any, layers: Sequence[int] = (), *, step: int | None = None, log: Callable[[str], None] = print) -> Any:
    """The plain parameters that lie there, each where `target` (of `jax.ShapeDtypeStruct` with shardings) wants it; adapters are merged.

    Args:
      layers: numbers of those that `target` has; none: all.
      step: of a workdir; None: the newest whole one.
    """
    if layers:
        whole = _shapes(_config(origin), target)
        full = params(origin, whole, step=step, log=log)
        places = jax.tree.map(lambda leaf: leaf.sharding, target)
        return jax.jit(functools.partial(_take, tuple(layers)), out_shardings=places)(full)
    if source := _foreign(origin):
        return source.load(jax.tree.map(lambda leaf: leaf.sharding, target))
    return saved(pathlib.Path(origin), step_of(origin, log) if step is None else step, target)


def headed(origin: str, target: Any, init: Callable[[jax.Array], Any], seed: int, layers: Sequence[int] = (), *, step: int | None = None,
           log: Callable[[str], None] = print) -> Any:
    """`params` for a model that may have another head: what the origin does not have comes from `init(key of seed)`, and its own head is left out."""
    wanted, given = trees.flatten(target), trees.flatten(jax.eval_shape(kinds.build(_config(origin)).init, jax.random.key(0)))
    common = {path for path in wanted if path in given and (wanted[path].shape == given[path].shape or layers and path.startswith("layers/"))}
    fresh = sorted(set(wanted) - common)
    if not any(path.startswith(("classifier/", "pooler/")) for path in wanted) or not fresh and len(common) == len(given):
        return params(origin, target, layers, step=step, log=log)
    whole = NamedSharding(next(iter(wanted.values())).sharding.mesh, sharding.spec(()))
    asked = {path: wanted[path] if path in common else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole) for path, leaf in given.items()}
    found = trees.flatten(params(origin, trees.unflatten(asked), layers, step=step, log=log))
    made = jax.jit(lambda key: {path: trees.flatten(init(key))[path] for path in fresh}, out_shardings={path: wanted[path].sharding for path in fresh})
    log(f"from {origin}: all but {', '.join(fresh) or 'nothing'} (new); left out: {', '.join(sorted(set(given) - common)) or 'nothing'}")
    return trees.unflatten({path: leaf for path, leaf in found.items() if path in common} | made(jax.random.key(seed)))


def _shapes(cfg: TransformerConfig, like: Any) -> Any:
    """Parameters of a model as `jax.ShapeDtypeStruct`, lying as those of `like` do, which has other layers."""
    shapes, places = jax.eval_shape(kinds.build(cfg).init, jax.random.key(0)), trees.flatten(like)
    unknown = trees.flatten(shapes).keys() ^ places.keys()
    if unknown:
        raise ValueError(f"train.init_layers: {sorted(unknown)[0]} is not in both models: layers can be taken only from a model of the same kind")
    return trees.map_paths(lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path].sharding), shapes)


def _take(layers: tuple[int, ...], tree: Any) -> Any:
    return trees.map_paths(lambda path, leaf: leaf[jnp.array(layers)] if path.startswith("layers/") else leaf, tree)


def saved(workdir: pathlib.Path, step: int, target: Any) -> Any:
    """The plain parameters of a checkpoint: the average where the run keeps one, adapters merged into their base, compact leaves in float32 again.

    Raises:
      ValueError: one line: damaged, or the base of the adapters is gone or has changed.
    """
    config, _, _ = read_files(workdir, step)
    ema = config.optim.ema > 0
    mesh = jax.tree.leaves(target)[0].sharding.mesh
    kept, _ = form(config, config.model, mesh)
    if all(kept.trainable.values()):
        return checkpoint.restore_params(workdir, step, target, ema=ema)
    dressed = jax.eval_shape(kept.dress, target, jax.random.key(0))
    stored = trees.map_paths(lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, sharding.spec(kept.axes[path]))),
                             dressed)
    trained, frozen = trees.split(stored, kept.trainable)
    if config.lora.rank:
        own = checkpoint.restore_params(workdir, step, trained, ema=ema)
        whole = trees.merge(_dress(kept, base(workdir, step, config, target), trees.map_paths(lambda _, leaf: leaf.sharding, frozen)), own)
    else:
        whole = checkpoint.restore_params(workdir, step, stored)
        if ema:
            whole = trees.merge(checkpoint.restore_params(workdir, step, trained, ema=True), trees.split(whole, kept.trainable)[1])
    return jax.jit(kept.plain, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))(whole)


def _dress(kept: lora.Form, plain: Any, places: Any) -> Any:
    """The frozen leaves in their form."""
    return jax.jit(lambda tree: trees.split(kept.dress(tree, jax.random.key(0)), kept.trainable)[1], out_shardings=places)(plain)


def note(origin: str, step: int, found: Any) -> dict[str, Any]:
    """What a checkpoint says of parameters that it does not hold."""
    return {"origin": absolute(origin), "step": step, "fingerprint": lora.fingerprint(found)}


def base(workdir: pathlib.Path, step: int, config: Config, target: Any) -> Any:
    """The base of a checkpoint's adapters, read again from where it came from.

    Raises:
      ValueError: one line: it is not there any more, or is another one.
    """
    told = json.loads(checkpoint.read_file(workdir, step, BASE))["base"]
    try:
        found = headed(told["origin"], target, kinds.build(config.model).init, config.train.seed, config.train.init_layers, step=told["step"],
                       log=lambda line: None)
    except ValueError as error:
        raise ValueError(f"the adapter in {workdir} needs its base {told['origin']} (step {told['step']}), which cannot be read: {error}") from None
    same_base(told, body(found), f"the adapter in {workdir}")
    return found


def body(params: Any) -> Any:
    """What of a base adapters leave as it is: all but a head for labels, which is trained beside them and saved with them."""
    return trees.unflatten({path: leaf for path, leaf in trees.flatten(params).items() if not is_head(path)})


def same_base(told: dict[str, Any], found: Any, what: str) -> None:
    """Refuses adapters on a base that is not theirs."""
    if lora.fingerprint(found) != told["fingerprint"]:
        raise ValueError(f"{what} was trained on another base than this one ({told['origin']}, fingerprint {told['fingerprint'][:12]}): give it its own base")
