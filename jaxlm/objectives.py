"""What is minimised: `(model, params, batch, key) -> Sums`, where `loss` is the entry that is differentiated.

Sums are `{name: (sum, weight)}`; they add over microbatches, steps and hosts and are divided once, at the end.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import ObjectiveConfig
from jaxlm.models.decoder import Model
from jaxlm.ops import losses

Sums = dict[str, tuple[jax.Array, jax.Array]]


def token_nll(model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None = None, chunk_rows: int = 0):
    """Per token, each float32 `[B, T]`: `-log p(target)` in nats, `log Z`, and whether the target ranks first."""
    hidden, _ = model.apply(params, batch, key=key)
    shape = batch["targets"].shape
    parts = losses.token_losses(lambda h: model.head(params, h), hidden.reshape(-1, hidden.shape[-1]), batch["targets"].reshape(-1), chunk_rows)
    return tuple(part.reshape(shape) for part in parts)


def next_token(cfg: ObjectiveConfig, model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> Sums:
    """Cross-entropy of the next token, plus `z_loss * log(Z)^2` (PaLM, Chowdhery et al. 2022)."""
    nll, log_z, right = token_nll(model, params, batch, key, cfg.chunk_rows)
    weights = batch["weights"]
    weight, cross_entropy = weights.sum(), (nll * weights).sum()
    sums = {"cross_entropy": (cross_entropy, weight), "accuracy": ((right * weights).sum(), weight)}
    if cfg.z_loss:
        penalty = cfg.z_loss * (jnp.square(log_z) * weights).sum()
        return sums | {"loss": (cross_entropy + penalty, weight), "z_loss": (penalty, weight)}
    return sums | {"loss": (cross_entropy, weight)}


OBJECTIVES: dict[str, Callable[..., Sums]] = {"next_token": next_token}
