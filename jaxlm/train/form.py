"""In which form a run keeps a model's parameters; reads no files, so that a step can be built where only jax is."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm import lora, optim, sharding, trees
from jaxlm.config import Config, LoraConfig, TransformerConfig
from jaxlm.models import kinds


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
    still = companion or adapters.rank and not config.optim.trainable
    trainable = dict.fromkeys(axes, False) if still else optim.trainable(config.optim, shapes)
    found = lora.form(built, adapters, config.optim.frozen_dtype, axes, trainable, cfg.dtype)
    return found, jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
