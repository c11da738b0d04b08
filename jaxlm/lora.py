"""Adapters and compact frozen weights: both are another form of the params tree, which `view` turns into what one layer computes with, inside the scan.

LoRA (Hu et al. 2021): beside a matrix W [in, out], which stays as it is, lie A [in, r] and B [r, out], and a layer computes x W + s (x A) B. In the tree
they are the branch `lora` of the module: `layers/attn/q` has `layers/attn/lora/q/a` and `.../b`, stacked over the layers as W is. B begins with 0, so that
the model begins as the base exactly. s is alpha / r, or alpha / sqrt(r) in rsLoRA (Kalajdzievski 2023). DoRA (Liu et al. 2024) also learns the length of each
output's column of W + s A B (`.../m`); the gradient does not pass through the length itself, as there (section 4.3).

Dropout falls on inputs of A: one mask for each matrix and microbatch, rows of A, as in Lin et al. 2024 (arXiv:2404.09610), not one for each token as in PEFT.

Frozen weights may be kept in bfloat16, or matrices of layers in int8 or nf4 (`ops/quantise.py`; with LoRA that is QLoRA): in place of `layers/attn/q` lie
`layers/attn/q/nf4` and `layers/attn/q/scale`.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import trees
from jaxlm.config import LoraConfig
from jaxlm.ops import quantise

Axes = Mapping[str, tuple[str, ...]]
BRANCH = "lora"
_PROJECTIONS = r"(.*/)?layers/(attn/[qkvo]|cross/[qkvo]|mlp/(up|gate|down)|moe/shared/(up|gate|down))"


def is_adapter(path: str) -> bool:
    """Whether a parameter's path lies in an adapter."""
    return BRANCH in path.split("/")


def targets(cfg: LoraConfig, axes: Axes) -> list[str]:
    """Paths of the matrices that get an adapter: those that a regex of `lora.targets` matches, or all projections of attention and MLPs.

    Raises:
      ValueError: one line: a regex that matches none of them.
    """
    able = [path for path in axes if re.fullmatch(_PROJECTIONS, path)]
    for regex in cfg.targets:
        if not any(re.fullmatch(regex, path) for path in able):
            raise ValueError(f"lora.targets: {regex!r} matches none of the matrices that can have an adapter: {', '.join(able)}")
    return [path for path in able if not cfg.targets or any(re.fullmatch(regex, path) for regex in cfg.targets)]


def scale(cfg: LoraConfig) -> float:
    """What an adapter's product is multiplied by: alpha / r (Hu et al. 2021), or alpha / sqrt(r) (Kalajdzievski 2023)."""
    return cfg.alpha / (math.sqrt(cfg.rank) if cfg.rslora else cfg.rank)


def inputs(path: str) -> int:
    """How many axes of a matrix, after that of the layers, are its inputs: heads and their size of the projection out of attention."""
    return 2 if path.endswith("/o") else 1


def adapter_path(path: str, leaf: str) -> str:
    """Where the adapter of a matrix keeps a leaf."""
    module, _, name = path.rpartition("/")
    return f"{module}/{BRANCH}/{name}/{leaf}"


def adapter_axes(cfg: LoraConfig, axes: Axes) -> dict[str, tuple[str, ...]]:
    """Logical axes of all leaves of the adapters."""
    found = {}
    for path in targets(cfg, axes):
        layers, *rest = axes[path]
        split = inputs(path)
        found[adapter_path(path, "a")] = (layers, *rest[:split], "rank")
        found[adapter_path(path, "b")] = (layers, "rank", *rest[split:])
        if cfg.dora:
            found[adapter_path(path, "m")] = (layers, *rest[split:])
    return found


def init(cfg: LoraConfig, axes: Axes, params: Any, key: jax.Array) -> dict[str, Any]:
    """The adapters of plain `params` before training, float32: A as in PEFT (uniform within 1 / sqrt(inputs)), B 0, m the lengths."""
    flat, found = trees.flatten(params), {}
    for number, path in enumerate(targets(cfg, axes)):
        w, split = flat[path], inputs(path) + 1
        size = math.prod(w.shape[1:split])
        shape = (*w.shape[:split], cfg.rank)
        found[adapter_path(path, "a")] = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -1, 1) / math.sqrt(size)
        found[adapter_path(path, "b")] = jnp.zeros((w.shape[0], cfg.rank, *w.shape[split:]), jnp.float32)
        if cfg.dora:
            found[adapter_path(path, "m")] = jnp.sqrt(jnp.square(w).sum(range(1, split)))
    return trees.unflatten(found)


def without(params: Any) -> Any:
    """The tree with its adapters off: the base."""
    return trees.unflatten({path: leaf for path, leaf in trees.flatten(params).items() if not is_adapter(path)})


def merge(cfg: LoraConfig, params: Any) -> Any:
    """The plain model that computes what base (not compact) and adapters do."""
    flat = trees.flatten(params)
    out = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path in out:
        if (a := flat.get(adapter_path(path, "a"))) is not None:
            out[path] = _merged(out[path], a, flat[adapter_path(path, "b")] * scale(cfg), flat.get(adapter_path(path, "m")), inputs(path) + 1)
    return trees.unflatten(out)


def _merged(w, a, b, m, split: int) -> jax.Array:
    layers, rank = a.shape[0], a.shape[-1]
    product = jnp.einsum("lir,lro->lio", a.reshape(layers, -1, rank), b.reshape(layers, rank, -1), precision=jax.lax.Precision.HIGHEST)
    w = w + product.reshape(w.shape)
    return w if m is None else w * jnp.expand_dims(m / jnp.sqrt(jnp.square(w).sum(range(1, split))), tuple(range(1, split)))


# --- the form in which frozen leaves are kept ---


def compact(dtype: str, axes: Axes, frozen: Callable[[str], bool]) -> tuple[dict[str, str], dict[str, int]]:
    """How leaves are kept: path -> bfloat16, int8 or nf4 (others stay float32), and for the last two the axis of the blocks, of the stacked leaf.

    Matrices are all that becomes smaller; in int8 and nf4 those of the layers but routers, whose choices hang on small differences. Blocks do not lie along
    the axis that FSDP splits.

    Raises:
      ValueError: one line: a matrix that nf4 cannot pair.
    """
    if dtype == "float32":
        return {}, {}
    kinds, blocks = {}, {}
    for path, names in axes.items():
        own = [name for name in names if name not in ("layers", "head_size")]
        if len(own) < 2 or not frozen(path):
            continue
        coded = dtype != "bfloat16" and names[0] == "layers" and "routes" not in names
        kinds[path] = dtype if coded else "bfloat16"
        if coded:
            blocks[path] = max(i for i, name in enumerate(names) if name != "embed")
    return kinds, blocks


def stored(params: Any, kinds: Mapping[str, str], blocks: Mapping[str, int]) -> Any:
    """Plain parameters in the form that `compact` says."""
    out: dict[str, jax.Array] = {}
    for path, leaf in trees.flatten(params).items():
        kind = kinds.get(path, "")
        if path in blocks:
            if not quantise.block_size(leaf.shape[blocks[path]], kind):
                raise ValueError(f"optim.frozen_dtype={kind}: {path} has an odd size {leaf.shape[blocks[path]]}, and codes go in pairs: use int8")
            out |= {f"{path}/{name}": part for name, part in quantise.quantise(leaf, blocks[path], kind).items()}
        else:
            out[path] = leaf.astype(jnp.bfloat16) if kind else leaf
    return trees.unflatten(out)


def plain(params: Any, blocks: Mapping[str, int]) -> Any:
    """The inverse of `stored` as far as there is one, float32."""
    flat = trees.flatten(params)
    out = {path: leaf.astype(jnp.float32) for path, leaf in flat.items() if path.rpartition("/")[0] not in blocks}
    for path, axis in blocks.items():
        out[path] = quantise.dequantise({name: flat[f"{path}/{name}"] for name in ("int8", "nf4", "scale") if f"{path}/{name}" in flat}, axis)
    return trees.unflatten(out)


def stored_axes(axes: Axes, kinds: Mapping[str, str], blocks: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Logical axes of the leaves of `stored`."""
    out: dict[str, tuple[str, ...]] = {}
    for path, names in axes.items():
        if path not in blocks:
            out[path] = names
            continue
        moved = tuple(name for i, name in enumerate(names) if i != blocks[path]) + (names[blocks[path]],)
        out |= {f"{path}/{kinds[path]}": (*moved, "block"), f"{path}/scale": moved}
    return out


# --- the model ---


class Form(NamedTuple):
    """In which form training keeps a model's parameters."""
    model: Any  # decoder.Model whose `apply` takes them; its `init` and `axes` are those of the plain model
    axes: dict[str, tuple[str, ...]]  # path -> logical axes, of all leaves
    trainable: dict[str, bool]  # likewise
    dress: Callable[[Any, jax.Array], Any]  # plain parameters, key -> those in this form, with adapters that change nothing
    plain: Callable[[Any], Any]  # the inverse: adapters merged, float32


def form(model: Any, cfg: LoraConfig, frozen_dtype: str, axes: Axes, trainable: Mapping[str, bool], dtype: str) -> Form:
    """The form of a plain model that `lora` and `optim.frozen_dtype` ask for; without them it is the plain one.

    Args:
      axes: path -> logical axes of the plain parameters.
      trainable: path -> trained or frozen, of the plain parameters.
      dtype: what layers compute in.
    """
    if not cfg.rank and frozen_dtype == "float32":
        return Form(model, dict(axes), dict(trainable), lambda params, key: params, lambda params: params)
    kinds, blocks = compact(frozen_dtype, axes, lambda path: not trainable[path])
    adapters = adapter_axes(cfg, axes) if cfg.rank else {}
    whole = stored_axes(axes, kinds, blocks) | adapters
    trained = {path: path in adapters or trainable.get(path, False) for path in whole}

    def dress(params: Any, key: jax.Array) -> Any:
        kept = stored(params, kinds, blocks)
        return trees.merge(kept, init(cfg, axes, plain(kept, blocks), key)) if cfg.rank else kept

    def undress(params: Any) -> Any:
        bare = trees.merge(plain(without(params), blocks), trees.unflatten({p: leaf for p, leaf in trees.flatten(params).items() if is_adapter(p)}))
        return merge(cfg, bare) if cfg.rank else bare

    return Form(dress_model(model, cfg, blocks, dtype), whole, trained, dress, undress)


def dress_model(model: Any, cfg: LoraConfig, blocks: Mapping[str, int], dtype: str) -> Any:
    """`model` (a decoder.Model), whose `apply` also takes params with adapters and compact leaves; its `init` and `axes` stay those of the plain model.

    Args:
      blocks: see `compact`.
      dtype: what layers compute in.
    """
    of_layer = {path.rpartition("layers/")[2]: axis - 1 for path, axis in blocks.items()}

    def view(layer: Any) -> Any:
        """One layer: float leaves in the compute dtype, matrices dequantised, s folded into B (the adapters are joined in `models/stack.py`)."""
        flat = trees.flatten(layer)
        out = {path: (leaf * scale(cfg) if is_adapter(path) and path.endswith("/b") else leaf).astype(dtype)
               for path, leaf in flat.items() if path.rpartition("/")[0] not in of_layer}
        for path, axis in of_layer.items():
            coded = {name: flat[f"{path}/{name}"] for name in ("int8", "nf4", "scale") if f"{path}/{name}" in flat}
            if coded:
                out[path] = quantise.dequantise(coded, axis).astype(dtype)
        return trees.unflatten(out)

    def apply(params: Any, inputs: Any, *, cache: Any = None, key: jax.Array | None = None, view: Callable = view):
        if key is not None and cfg.rank and cfg.dropout:
            params = _dropped(params, cfg.dropout, jax.random.fold_in(key, 1))
        return model.apply(params, inputs, cache=cache, key=key, view=view)

    return model._replace(apply=apply)


def _dropped(params: Any, rate: float, key: jax.Array) -> Any:
    def drop(number: int, leaf: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, (*leaf.shape[:-1], 1))
        return jnp.where(keep, leaf / (1 - rate), 0)

    flat = trees.flatten(params)
    return trees.unflatten({path: drop(number, leaf) if is_adapter(path) and path.endswith("/a") else leaf for number, (path, leaf) in enumerate(flat.items())})


def fingerprint(params: Any) -> str:
    """Tells parameters apart whatever mesh they lie on: of each leaf two sums of its bits, exact modulo 2^32, hashed together with its path and shape."""
    sums = jax.jit(lambda tree: {path: _sums(leaf) for path, leaf in trees.flatten(tree).items()})(params)
    facts = [(path, leaf.shape, *map(int, sums[path])) for path, leaf in trees.flatten(params).items()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    place = sum(jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(2654435761 * (2 * axis + 1) % 2**32) for axis in range(bits.ndim))
    return bits.sum(dtype=jnp.uint32), (bits * (place * 2 + 1)).sum(dtype=jnp.uint32)
