"""A model as StableHLO programs with their weights beside them, which jax runs without this package (https://docs.jax.dev/en/latest/export/export.html).

The weights are arguments, not constants: the programs stay small, one file of weights serves both, and can be looked at or replaced.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import export

from jaxlm import trees
from jaxlm.config import TransformerConfig
from jaxlm.interop import hf_files
from jaxlm.models.decoder import Model

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class _Program(NamedTuple):
    call: Any  # of flat weights and `inputs`
    inputs: tuple[Any, ...]  # shapes, rows symbolic
    about: dict[str, Any]


def write(folder: pathlib.Path, cfg: TransformerConfig, model: Model, params: Any, length: int, dtype: str = "float32") -> float:
    """Writes programs, weights, a sample, what they are, and `run.py`, which computes the sample again in a process that imports jax alone.

    Args:
      folder: empty, there.
      length: tokens of a row of `forward`, and that the cache of `decode` holds.
      dtype: of the weights: "float32" or "bfloat16".

    Returns:
      The largest difference of that process from the model, over the largest value.

    Raises:
      ValueError: one line: a model with an encoder and a decoder, more tokens than its context, a missing package, or a weight that is not finite.
      OSError: the programs compute something else than the model.
    """
    cfg = cfg.filled()
    if model.start is not None:
        raise ValueError("a model with an encoder and a decoder is not exported as StableHLO: export it as a directory")
    if not 2 <= length <= cfg.context:
        raise ValueError(f"--length={length} must be 2 to {cfg.context}, the model's context")
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("jax writes StableHLO with flatbuffers: pip install 'jaxlm[export]'")
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    weights = {path: hf_files.finite(np.asarray(jax.device_get(leaf)).astype(kind), path) for path, leaf in trees.flatten(params).items()}
    hf_files.write_files(folder, {path: (leaf.shape, leaf.dtype) for path, leaf in weights.items()}, iter(weights.items()))
    programs = {"forward": _forward(cfg, model, length)} | ({"decode": _decode(cfg, model, length)} if cfg.kind == "decoder" and not cfg.labels else {})
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in weights.items()}
    for name, program in programs.items():
        found = export.export(jax.jit(program.call), platforms=PLATFORMS)(shapes, *program.inputs)
        (folder / f"{name}.jax_export").write_bytes(found.serialize())
    # Rounding of sums differs between programs and machines: the least in float32, 2^-8 of a value in bfloat16.
    about = {"model": f"{cfg.kind}, {trees.count(weights):,} parameters", "length": length, "vocabulary": cfg.vocab_size, "compute_dtype": cfg.dtype,
             "labels": list(cfg.label_names), "platforms": PLATFORMS, "jax": jax.__version__, "tolerance": 1e-5 if cfg.dtype == "float32" else 2e-2,
             "programs": {name: program.about for name, program in programs.items()}, "weights": list(weights)}
    (folder / "program.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (folder / "run.py").write_text(pathlib.Path(__file__).with_name("stablehlo_run.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "README.md").write_text(_readme(about), encoding="utf-8")
    np.savez(folder / "sample.npz", **_sample(cfg, programs["forward"].call, weights, length))
    return _checked(folder)


def _inputs(tokens: jax.Array, positions: jax.Array, inside: jax.Array) -> dict[str, jax.Array]:
    return {"tokens": jnp.where(inside, tokens, 0), "positions": jnp.where(inside, positions, 0), "segments": inside.astype(jnp.int32)}


def _forward(cfg: TransformerConfig, model: Model, length: int) -> _Program:
    def forward(weights, tokens, lengths):
        places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        params = trees.unflatten(weights)
        hidden, _, _ = model.apply(params, _inputs(tokens, places, places < lengths[:, None]))
        if cfg.output == "sequence_labels":  # where a text's label is read (data/tasks.py)
            at = lengths - 1 if cfg.causal else jnp.zeros_like(lengths)
            hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)
        return model.head(params, hidden)

    rows, = export.symbolic_shape("rows")
    shapes = (jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32))
    ends = {"tokens": "logits [rows, length, vocabulary]", "token_labels": "logits of labels [rows, length, labels]",
            "sequence_labels": "logits of labels [rows, labels]", "pooled": "pooled states [rows, width]", "hidden": "states [rows, length, width]"}
    about = {"inputs": {"weights": "those below, by name", "tokens": f"int32 [rows, {length}]",
                        "lengths": "int32 [rows], tokens of each row that count, 1 or more"},
             "outputs": f"float32 {ends[cfg.output]}"}
    return _Program(forward, shapes, about)


def _decode(cfg: TransformerConfig, model: Model, length: int) -> _Program:
    def decode(weights, cache, tokens):
        params = trees.unflatten(weights)
        places = jnp.broadcast_to(cache["length"], tokens.shape)[:, None]
        hidden, found, _ = model.apply(params, _inputs(tokens[:, None], places, jnp.ones(places.shape, bool)), cache=_nested(cache))
        return model.head(params, hidden[:, 0]), _flat(found)

    rows, = export.symbolic_shape("rows")
    # Which of an array's dimensions are rows: those that differ between caches of 2 and of 3.
    two, three = (_flat(jax.eval_shape(lambda n=n: model.init_cache(n, length))) for n in (2, 3))
    cache = {name: jax.ShapeDtypeStruct(tuple(rows if a != b else a for a, b in zip(leaf.shape, three[name].shape)), leaf.dtype) for name, leaf in two.items()}
    kinds = {name: {"shape": [n if isinstance(n, int) else "rows" for n in leaf.shape], "dtype": leaf.dtype.name} for name, leaf in cache.items()}
    about = {"inputs": {"weights": "those below, by name", "cache": "zeros at the beginning, then what the last call gave (it may be donated)",
                        "tokens": "int32 [rows], the next of each row; all rows are equally long"},
             "outputs": f"float32 logits [rows, vocabulary] of what follows, and the cache, which holds {length} tokens", "cache": kinds}
    return _Program(decode, (cache, jax.ShapeDtypeStruct((rows,), jnp.int32)), about)


def _flat(cache: dict) -> dict[str, Any]:
    """The cache of a decoder (`models/cache.empty`) by names."""
    layers = {f"layers/{i}/{side}": leaf for i, layer in enumerate(cache["layers"]) for side, leaf in layer.items()}
    return {name: leaf for name, leaf in cache.items() if name != "layers"} | layers


def _nested(cache: dict[str, Any]) -> dict:
    count = len({name.split("/")[1] for name in cache if "/" in name})
    layers = tuple({name.split("/")[2]: leaf for name, leaf in cache.items() if name.startswith(f"layers/{i}/")} for i in range(count))
    return {name: leaf for name, leaf in cache.items() if "/" not in name} | {"layers": layers}


def _sample(cfg: TransformerConfig, forward: Any, weights: dict, length: int) -> dict[str, np.ndarray]:
    """Three rows of random tokens, and what the model says of them, computed here and now; of a large vocabulary the first 1024 ids."""
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, length)).astype(np.int32)
    lengths = np.array([min(8, length), length, max(2, length // 2)], np.int32)
    return {"tokens": tokens, "lengths": lengths, "output": np.asarray(jax.jit(forward)(weights, tokens, lengths)[..., :1024], np.float32)}


def _checked(folder: pathlib.Path) -> float:
    """What `run.py --check` finds, in a process that sees neither this package nor this folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import runpy, sys; sys.modules['jaxlm'] = None; sys.argv = ['run.py', '--check']; runpy.run_path('run.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"the exported programs do not compute what the model does: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    return float(done.stdout.split()[2].rstrip(","))


def _readme(about: dict[str, Any]) -> str:
    programs = "\n".join(f"* `{name}.jax_export`: {', '.join(f'{key}: {value}' for key, value in of['inputs'].items())}; gives {of['outputs']}"
                         for name, of in about["programs"].items())
    return f"""# {about['model']}, as StableHLO

{programs}
* `model*.safetensors`: the weights, arguments of the programs; `sample.npz`: tokens and what the model said of them
* `program.json`: all shapes, names and types; `run.py`: how to run it, with jax, flatbuffers and numpy alone

`rows` is any number. Compute dtype {about['compute_dtype']}; compiled for {', '.join(about['platforms'])}; written with jax {about['jax']}. Which
versions of jax read it: https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees

    pip install jax flatbuffers
    python run.py --check
"""
