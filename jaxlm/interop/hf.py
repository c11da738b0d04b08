"""Hugging Face directories <-> parameters: names, shapes and types checked before anything is read, one tensor at a time in memory."""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlm import trees
from jaxlm.config import TransformerConfig
from jaxlm.data import sums
from jaxlm.interop import hf_config, hf_files, hf_names
from jaxlm.models import kinds


class Source(NamedTuple):
    """A directory whose headers are read and fit the model; its weights are not read yet."""
    folder: pathlib.Path
    family: hf_config.Family
    cfg: TransformerConfig
    files: hf_files.Files
    names: Mapping[str, str]  # what we call a tensor -> its name in the file
    places: tuple[hf_names.Place, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of our parameters, by path
    ignored: tuple[str, ...]  # tensors in the files that are not needed


def open_directory(folder: pathlib.Path | str) -> Source:
    """Reads config.json and the headers and matches every tensor.

    Raises:
      ValueError: one line: whatever is missing, left over, of another shape, damaged, unknown or unsafe.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory: give one with config.json and model.safetensors")
    sums.check(folder, lambda name: name.endswith(".safetensors") or name in ("config.json", hf_files.INDEX))
    config = hf_files.read_json(folder / "config.json")
    family, cfg = hf_config.read(config)
    files = hf_files.open_files(folder)
    ours = shapes(cfg)
    try:
        places = hf_names.places(family.table, ours, rows(cfg))
    except AssertionError:
        raise ValueError(f"{folder / 'config.json'} describes a model that {family.architecture} is never: download it again") from None
    # Files saved from the model without its head lack the prefix that all other names have.
    prefix = family.prefix or places[0].theirs.partition(".")[0] + "."
    names, missing = {}, []
    for place in places:
        name = next((n for n in hf_names.spellings(place.theirs, prefix) if n in files.tensors), None)
        if name is None:
            missing.append(place.theirs)
        else:
            names[place.theirs] = name
    unused = lambda name: (hf_names.IGNORED.fullmatch(name) or (cfg.tied and name in hf_names.TIED)
                           or ("vision_config" in config and hf_names.PICTURES.fullmatch(name)))
    ignored = {name for name in set(files.tensors) - set(names.values()) if unused(name)}
    left = sorted(set(files.tensors) - set(names.values()) - ignored)
    if missing or left:
        say = lambda what, list_: f"{what} {list_[0]}{f' and {len(list_) - 1} more' * (len(list_) > 1)}" if list_ else ""
        problem = "; ".join(filter(None, (say("lacks the tensor", missing), say("has a tensor that this model has no place for:", left))))
        raise ValueError(f"{folder} {problem}: its config.json describes another {family.architecture} than its weights")
    for place in places:
        tensor, expected = files.tensors[names[place.theirs]], _their_shape(place, ours)
        if tensor.shape != expected:
            raise ValueError(f"{tensor.path}: {names[place.theirs]} has shape {list(tensor.shape)}, and by config.json it must have {list(expected)}")
    return Source(folder, family, cfg, files, names, tuple(places), ours, tuple(sorted(ignored)))


def load(source: Source, shardings: Any = None) -> dict[str, Any]:
    """The parameters, float32, each on its place; the host holds one layer's tensor at a time. In several processes all call this together.

    Args:
      shardings: nested dict like the parameters; None: the first device.
    """
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = trees.flatten(shardings) if shardings is not None else dict.fromkeys(source.shapes, single)
    stacks = {path: jax.jit(functools.partial(jnp.zeros, source.shapes[path], jnp.float32), out_shardings=where[path])()
              for path in source.shapes if "layers" in path.split("/")}
    whole = {}
    for place in source.places:
        name = source.names[place.theirs]
        found = hf_files.finite(source.files.read(name), f"{source.files.tensors[name].path}: {name}")
        parts = hf_names.FORMS[place.entry.form].read(found, hf_names.own_shapes(place, source.shapes))
        for path, part in zip(place.entry.ours, parts):
            part = part.astype(np.float32)
            if not place.index:
                whole[path] = jax.make_array_from_callback(part.shape, where[path], lambda index, part=part: part[index])
            else:
                stacks[path] = _put(stacks[path], part, np.array(place.index, np.int32), where[path])
    return trees.unflatten(stacks | whole)


@functools.partial(jax.jit, static_argnames=("where",), donate_argnums=0)
def _put(stack: jax.Array, part: Any, index: jax.Array, where) -> jax.Array:
    """`stack` with `part` in one row (layer, or layer and expert), in place."""
    starts = (*index, *(jnp.int32(0),) * part.ndim)
    lead = (1,) * (stack.ndim - part.ndim)
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_slice(stack, part.reshape(*lead, *part.shape), starts), where)


def tensors(table: str, cfg: TransformerConfig, params: Any, dtype: np.dtype = np.dtype(np.float32)) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors by name, one at a time, of a tree with the shapes of a model's parameters (parameters, or gradients)."""
    flat = trees.flatten(params)
    for place in hf_names.places(table, shapes(cfg), rows(cfg)):
        ours = [np.asarray(jax.device_get(flat[path][place.index])) for path in place.entry.ours]
        yield place.theirs, hf_names.FORMS[place.entry.form].write(ours).astype(dtype)


def save(folder: pathlib.Path | str, cfg: TransformerConfig, params: Any, *, dtype: str = "float32", architecture: str = "",
         extra: Mapping[str, Any] = {}, shard_bytes: int = hf_files.SHARD_BYTES) -> Source:
    """Writes config.json and safetensors into an existing directory, reads them back and compares every tensor.

    Args:
      dtype: "float32" or "bfloat16".
      architecture: the class in transformers; empty: the first that can express the model.
      extra: more of config.json, such as ids of special tokens.

    Raises:
      ValueError: one line: no architecture of theirs computes this model, or a weight is not finite.
      OSError: what was read back is not what was written.
    """
    folder = pathlib.Path(folder)
    family, config = hf_config.write(cfg, architecture)
    ours, kind = shapes(cfg), np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    names = {place.theirs: (_their_shape(place, ours), kind) for place in hf_names.places(family.table, ours, rows(cfg))}
    checked = ((name, hf_files.finite(array, f"{name} as {dtype}")) for name, array in tensors(family.table, cfg, params, kind))
    hf_files.write_files(folder, names, checked, shard_bytes)
    (folder / "config.json").write_text(json.dumps({**extra, **config, "torch_dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    source = open_directory(folder)
    for name, expected in tensors(family.table, cfg, params, kind):
        found = source.files.read(name)
        if found.tobytes() != np.ascontiguousarray(expected).tobytes():
            raise OSError(f"{source.files.tensors[name].path}: {name} reads back differently from what was written: check the disk")
    return source


def verify(source: Source, params: Any) -> None:
    """Reads every tensor again and compares it with what the parameters hold.

    Raises:
      OSError: one line, for a difference.
    """
    for name, ours in tensors(source.family.table, source.cfg, params):
        theirs = source.files.read(source.names[name]).astype(np.float32)
        if not np.array_equal(theirs.view(np.uint32), np.ascontiguousarray(ours).view(np.uint32)):  # NaN or -0 are compared too, without copies
            raise OSError(f"{source.files.tensors[source.names[name]].path}: {name} was not read the same twice: check the disk")


def mapping(source: Source) -> str:
    """A table of what maps to what: one line per kind of tensor."""
    rows: dict[tuple[str, ...], list] = {}
    for place in source.places:
        rows.setdefault((place.entry.theirs, " ".join(place.entry.ours)), []).append(place)
    lines = [(theirs.replace("{layer}", "*").replace("{expert}", "*"), ours,
              f"{len(found)} x {list(_their_shape(found[0], source.shapes))} {source.files.tensors[source.names[found[0].theirs]].dtype}")
             for (theirs, ours), found in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    text = "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines)
    pictures = [match[2] for name in source.ignored if (match := hf_names.PICTURES.fullmatch(name))]
    text += "".join(f"\n  left out: {part}, {pictures.count(part)} tensors" for part in sorted(set(pictures)))
    other = [name for name in source.ignored if not hf_names.PICTURES.fullmatch(name)]
    return text + (f"\n  not needed: {', '.join(other[:3])}{' ...' * (len(other) > 3)}" if other else "")


def _their_shape(place: hf_names.Place, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(hf_names.FORMS[place.entry.form].shape(hf_names.own_shapes(place, shapes)))


def shapes(cfg: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Of our parameters, by path."""
    return {path: leaf.shape for path, leaf in trees.flatten(jax.eval_shape(kinds.build(cfg).init, jax.random.key(0))).items()}


def rows(cfg: TransformerConfig) -> dict[str, list[int]]:
    """Which layers the rows of each stack belong to."""
    return {"": list(range(cfg.layers)), "encoder": list(range(cfg.encoder_layers)), "decoder": list(range(cfg.layers)), "moe": list(cfg.sparse_layers), "mlp": [i for i in range(cfg.layers) if i not in cfg.sparse_layers]}
