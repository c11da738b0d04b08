"""Adapters in the layout of the package PEFT: adapter_config.json and adapter_model.safetensors, for the Hugging Face model that `hf.py` writes or reads.

PEFT keeps A as [r, in] and B as [out, r] of a linear layer [out, in], by the layer's name; ours are flat views of the same numbers. Where a family has
queries, keys and values in one matrix (GPT-2, GPT-NeoX) their adapters have no form there.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxlm import lora, trees
from jaxlm.config import LoraConfig, TransformerConfig
from jaxlm.data import sums
from jaxlm.interop import hf, hf_config, hf_files, hf_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = "jaxlm.json"  # what PEFT has no place for: the fingerprint of the base
_PREFIX = "base_model.model."
_FORMS = {"linear", "linear_out", "conv", "conv_out"}


def save(folder: pathlib.Path, cfg: TransformerConfig, adapters: LoraConfig, params: Any, *, base: str, fingerprint: str, architecture: str = "") -> list[str]:
    """Writes adapters into an existing directory and reads them back; returns the short names of the modules that have one.

    Args:
      cfg: of the base.
      params: the adapters, a nested dict of the leaves `.../lora/NAME/{a,b,m}`.
      base: where the base lies, for people and for PEFT's `base_model_name_or_path`.
      fingerprint: of the base's parameters.
      architecture: of the base's class in transformers; empty: the first that can express the model.

    Raises:
      ValueError: one line: a matrix of theirs holds several of ours.
    """
    family, _ = hf_config.write(cfg, architecture)
    flat = trees.flatten(params)
    tensors = dict(_tensors(family.table, cfg, flat))
    modules = _modules(tensors)
    names = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    hf_files.write_files(folder, names, iter(tensors.items()), shard_bytes=1 << 60)
    (folder / "model.safetensors").rename(folder / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if cfg.kind == "decoder" else None, "base_model_name_or_path": base, "r": adapters.rank,
              "lora_alpha": adapters.alpha, "lora_dropout": adapters.dropout, "use_rslora": adapters.rslora, "use_dora": adapters.dora,
              "target_modules": modules, "bias": "none", "fan_in_fan_out": family.table == "gpt2", "inference_mode": True, "init_lora_weights": True,
              "modules_to_save": None}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / _OURS).write_text(json.dumps({"base": base, "fingerprint": fingerprint}, indent=2) + "\n", encoding="utf-8")
    _, found = load(folder, cfg, adapters)
    for path, leaf in flat.items():
        if not np.array_equal(found[path], np.asarray(jax.device_get(leaf))):
            raise OSError(f"{folder / WEIGHTS}: {path} reads back differently from what was written: check the disk")
    return sorted({module.rpartition(".")[2] for module in modules})


def _modules(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Full names of the modules: short ones ("o") might match others too."""
    return sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})


def load(folder: pathlib.Path, cfg: TransformerConfig, adapters: LoraConfig) -> tuple[str, dict[str, np.ndarray]]:
    """The fingerprint of the base ("" where the adapter does not say), and the adapters by path, float32.

    Raises:
      ValueError: one line: not LoRA, another rank or scale than `adapters` says, names or shapes of another base.
    """
    sums.check(folder, lambda name: name in (CONFIG, WEIGHTS, _OURS))
    config = hf_files.read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"{folder / CONFIG}: only LoRA with one rank and without biases can be read, not peft_type={config.get('peft_type')!r}")
    for key, name in (("r", "rank"), ("lora_alpha", "alpha"), ("use_rslora", "rslora"), ("use_dora", "dora")):
        given = config.get(key, False)
        if given != getattr(adapters, name):
            raise ValueError(f"lora.{name}={getattr(adapters, name)}, and the adapter in {folder} has {given}: set it to that")
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}: a pickle (adapter_model.bin) is refused; save it with safetensors")
    file = hf_files.Files(folder, hf_files.header(path))
    found: dict[str, np.ndarray] = {}
    used = set()
    for ours, theirs, shapes, index in _places(hf_config.write(cfg)[0].table, cfg):
        for leaf, suffixes in _SUFFIXES.items():
            name = next((name for suffix in suffixes if (name := f"{_PREFIX}{theirs}.{suffix}") in file.tensors), None)
            if name is None:
                continue
            used.add(name)
            target = lora.adapter_path(ours, leaf)
            layers, shape = shapes
            own = _own(leaf, shape, ours, adapters.rank)
            array = hf_files.finite(file.read(name), f"{path}: {name}").astype(np.float32)
            if array.size != math.prod(own):
                raise ValueError(f"{path}: {name} has shape {list(array.shape)}, which does not fit {ours} of this base, {list(shape)}: it is an adapter "
                                 "for another base")
            stack = found.setdefault(target, np.zeros((layers, *own), np.float32))
            stack[index] = array.reshape(own) if leaf == "m" else array.T.reshape(own)
    left = sorted(set(file.tensors) - used)
    if left:
        raise ValueError(f"{path} has {left[0]}{f' and {len(left) - 1} more' * (len(left) > 1)}, which this base has no place for: it is an adapter "
                         "for another base")
    note = folder / _OURS
    return (hf_files.read_json(note).get("fingerprint", "") if note.is_file() else ""), found


def check(folder: pathlib.Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses adapters of other matrices than a run has."""
    wrong = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
    if wrong:
        raise ValueError(f"the adapter in {folder} does not fit: {wrong[0]} is {found.get(wrong[0], 'missing')} in it and {wanted.get(wrong[0], 'missing')} "
                         "here: set lora.targets and lora.rank to its own")


_SUFFIXES = {"a": ("lora_A.weight",), "b": ("lora_B.weight",), "m": ("lora_magnitude_vector", "lora_magnitude_vector.weight")}


def _own(leaf: str, shape: tuple[int, ...], path: str, rank: int) -> tuple[int, ...]:
    """Our shape of an adapter's leaf, of one layer's matrix of `shape`."""
    split = lora.inputs(path)
    return {"a": (*shape[:split], rank), "b": (rank, *shape[split:]), "m": shape[split:]}[leaf]


def _places(table: str, cfg: TransformerConfig) -> Iterator[tuple[str, str, tuple[int, tuple[int, ...]], int]]:
    """Of each matrix of each layer that a linear layer of theirs holds alone: our path, their module, layers and shape of one, and the layer."""
    shapes = hf.shapes(cfg)
    for place in hf_names.places(table, shapes, hf.rows(cfg)):
        if place.index and place.entry.form in _FORMS and len(place.entry.ours) == 1 and len(place.index) == 1:
            path = place.entry.ours[0]
            yield path, place.theirs.removesuffix(".weight"), (shapes[path][0], shapes[path][1:]), place.index[0]


def _tensors(table: str, cfg: TransformerConfig, flat: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    arrays, used = {path: np.asarray(jax.device_get(leaf), np.float32) for path, leaf in flat.items()}, set()
    for ours, theirs, _, index in _places(table, cfg):
        for leaf, suffixes in _SUFFIXES.items():
            if (path := lora.adapter_path(ours, leaf)) in arrays:
                used.add(path)
                array = arrays[path][index]
                flatter = array.reshape(-1) if leaf == "m" else array.reshape(-1, array.shape[-1]).T if leaf == "a" else array.reshape(array.shape[0], -1).T
                yield f"{_PREFIX}{theirs}.{suffixes[0]}", np.ascontiguousarray(flatter)
    left = sorted(arrays.keys() - used)
    if left:
        raise ValueError(f"{left[0]} has no form in PEFT: the family keeps queries, keys and values in one matrix; export without --adapter, which merges it, "
                         "or train with lora.targets that leave them out")
