"""In which form a run keeps a model's parameters; reads no files, so that a step can be built where only jax is."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm import lora, optim, sharding, trees
from jaxlm.config import LABELLED, Config, LoraConfig, OptimConfig, TransformerConfig
from jaxlm.models import kinds

FROZEN = "frozen"  # the branch of the parameters that holds the first optim.frozen_layers layers, as `layers` holds the others


def form(config: Config, cfg: TransformerConfig, mesh: Mesh, *, companion: bool = False) -> tuple[lora.Form, dict[str, Any]]:
    """The form in which a run keeps a model, and its plain parameters as `jax.ShapeDtypeStruct` with shardings.

    Args:
      companion: the model is the frozen one of an objective.
    """
    built = kinds.build(cfg)
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    axes = trees.match(built.axes, trees.flatten(shapes), "axes of the model")
    places = sharding.params_shardings(mesh, built.axes, shapes)
    adapters = LoraConfig() if companion else config.lora
    if companion or adapters.rank and not config.optim.trainable:
        trainable = {path: not companion and config.objective.name in LABELLED and is_head(path) for path in axes}
    else:
        trainable = optim.trainable(config.optim, shapes)
    dtype, frozen = config.optim.frozen_dtype, 0 if companion else config.optim.frozen_layers
    if frozen and dtype != "float32" and mesh.shape["stage"] > 1:
        raise ValueError(f"optim.frozen_dtype={dtype} with optim.frozen_layers={frozen} does not go with mesh.stage={mesh.shape['stage']}, whose layers "
                         "are kept alike: set optim.frozen_dtype=float32, or mesh.stage=1")
    found = _upper(built, cfg, config.optim, axes, trainable) if frozen else lora.form(built, adapters, dtype, axes, trainable, cfg.dtype)
    return found, jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)


def is_head(path: str) -> bool:
    """Whether a parameter belongs to what turns states into labels: trained whole beside adapters."""
    return path.startswith(("classifier/", "pooler/"))


def _upper(model: Any, cfg: TransformerConfig, asked: OptimConfig, axes: dict[str, tuple[str, ...]], trainable: dict[str, bool]) -> lora.Form:
    """The form in which the first layers are leaves of their own, frozen as the embedding is, so that no gradient of them is asked for."""
    optim.alike(asked, cfg)
    count = asked.frozen_layers
    in_stack = lambda path: path.startswith("layers/")
    lower = {f"{FROZEN}/{path}": names for path, names in axes.items() if in_stack(path)}
    upper = {path: names for path, names in axes.items() if not in_stack(path) or count < cfg.layers}
    trained = {path: trainable[path] and not path.startswith("embed") for path in upper} | dict.fromkeys(lower, False)

    def cut(params: Any) -> Any:
        rows = {FROZEN: {"layers": jax.tree.map(lambda leaf: leaf[:count], params["layers"])}}
        rest = {name: leaf for name, leaf in params.items() if name != "layers"} | rows
        return rest | ({"layers": jax.tree.map(lambda leaf: leaf[count:], params["layers"])} if count < cfg.layers else {})

    def stacks(params: Any) -> Any:
        if FROZEN not in params:
            return params
        rest = {name: leaf for name, leaf in params.items() if name != FROZEN}
        return rest | {"layers": [params[FROZEN]["layers"], *([params["layers"]] if "layers" in params else [])]}

    def whole(params: Any) -> Any:
        found = stacks(params)
        return found | {"layers": jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found["layers"])}

    parted = model._replace(apply=lambda params, inputs, **options: model.apply(stacks(params), inputs, **options),
                            unstack=lambda params: model.unstack(stacks(params)))
    form = lora.form(parted, LoraConfig(), asked.frozen_dtype, upper | lower, trained, cfg.dtype)
    return form._replace(dress=lambda params, key: form.dress(cut(params), key), plain=lambda params: whole(form.plain(params)))
