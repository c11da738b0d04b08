"""What is minimised: `(model, params, batch, key) -> Sums`, where `loss` is the entry that is differentiated.

Sums are `{name: (sum, weight)}`; they add over microbatches, steps and hosts and are divided once, at the end.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import ObjectiveConfig
from jaxlm.models.decoder import Model
from jaxlm.ops import losses, moe
from jaxlm.sharding import constrain, ways

Sums = dict[str, tuple[jax.Array, jax.Array]]


def token_nll(model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None = None, chunk_rows: int = 0):
    """Per token, each float32 `[B, T]`: `-log p(target)` in nats, `log Z`, and whether the target ranks first; and the routers' statistics."""
    hidden, _, routing = model.apply(params, batch, key=key)
    hidden = constrain(hidden, "batch", "sequence", "residual")
    return *losses.token_losses(model.projection(params), hidden, batch["targets"], chunk_rows, ways("sequence")), routing


def next_token(cfg: ObjectiveConfig, model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> Sums:
    """Cross-entropy of the next token, plus `z_loss * log(Z)^2` (PaLM, Chowdhery et al. 2022), plus what keeps a mixture of experts in balance."""
    nll, log_z, right, routing = token_nll(model, params, batch, key, cfg.chunk_rows)
    weights = batch["weights"]
    weight, loss = weights.sum(), (nll * weights).sum()
    sums = {"cross_entropy": (loss, weight), "accuracy": ((right * weights).sum(), weight)}
    if cfg.z_loss:
        penalty = cfg.z_loss * (jnp.square(log_z) * weights).sum()
        loss, sums["z_loss"] = loss + penalty, (penalty, weight)
    if routing:
        found = expert_balance(routing, weight)
        loss = loss + cfg.moe_balance * found["moe_balance"][0] + cfg.moe_z * found["moe_z"][0]
        sums |= found
    return sums | {"loss": (loss, weight)}


def masked_token(cfg: ObjectiveConfig, model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> Sums:
    """Cross-entropy of the hidden tokens of a batch that `data/tasks.py` has masked: the targets and weights differ, the sums are the same."""
    return next_token(cfg, model, params, batch, key)


def expert_balance(routing: Mapping[str, jax.Array], weight: jax.Array) -> Sums:
    """How evenly the experts of a model are used, means over its sparse layers: the balance loss, the router's log(Z)^2, and the share of the most
    and the least used expert over an even share.

    The balance of a batch is not a sum over its tokens: it is taken of each microbatch and weighed by the microbatch's targets.
    """
    even = routing["chosen"].sum(-1) / routing["chosen"].shape[-1]
    share = routing["chosen"] / jnp.maximum(even, 1)[:, None]
    values = {"moe_balance": moe.balance(routing["chosen"], routing["shares"], routing["tokens"]), "moe_z": routing["z"] / jnp.maximum(routing["tokens"], 1),
              "expert_max": share.max(-1), "expert_min": share.min(-1)}
    return {name: (value.mean() * weight, weight) for name, value in values.items()}


# Of an encoder-decoder the decoder's next token counts: of hidden spans, or of the second text of a pair.
OBJECTIVES: dict[str, Callable[..., Sums]] = {"next_token": next_token, "masked_token": masked_token, "span_corruption": next_token, "seq2seq": next_token}
# The kind of model that each is for: model.kind, or one with model.encoder_layers.
KINDS = {"next_token": "decoder", "masked_token": "encoder", "span_corruption": "encoder-decoder", "seq2seq": "encoder-decoder"}
