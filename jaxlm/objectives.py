"""What is minimised: `(model, params, batch, key) -> Sums`, where `loss` is the entry that is differentiated.

Sums are `{name: (sum, weight)}`; they add over microbatches, steps and hosts and are divided once, at the end.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import lora
from jaxlm.config import LABELLED, PAIRS, ObjectiveConfig
from jaxlm.models.decoder import Model
from jaxlm.ops import distil, losses, moe
from jaxlm.sharding import constrain, ways

COMPANION = "companion"  # the branch of the parameters that holds a teacher or a reference: frozen, and in no checkpoint

Sums = dict[str, tuple[jax.Array, jax.Array]]


def token_nll(model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None = None, chunk_rows: int = 0):
    """Per token, each float32 `[B, T]`: `-log p(target)` in nats, `log Z`, and whether the target ranks first; and the routers' statistics."""
    hidden, _, routing = model.apply(params, batch, key=key)
    hidden = constrain(hidden, "batch", "sequence", "residual")
    return *losses.token_losses(model.projection(params), hidden, batch["targets"], chunk_rows, ways("sequence")), routing


def next_token(cfg: ObjectiveConfig, model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> Sums:
    """Cross-entropy of the next token, plus `z_loss * log(Z)^2` (PaLM, Chowdhery et al. 2022), plus what keeps a mixture of experts in balance."""
    nll, log_z, right, routing = token_nll(model, params, batch, key, cfg.chunk_rows)
    return _token_sums(cfg, nll, log_z, right, routing, batch["weights"])


def _token_sums(cfg: ObjectiveConfig, nll: jax.Array, log_z: jax.Array, right: jax.Array, routing: Mapping[str, jax.Array], weights: jax.Array) -> Sums:
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


def label_logits(model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> tuple[jax.Array, dict]:
    """What the model's head says of each text, float32 `[B, classes]`, or of each token, `[B, T, classes]`; and the routers' statistics.

    The state of a text is that of the token whose weight is not 0 (data/tasks.py): a sum, so that it does not matter on which device the token lies.
    """
    hidden, _, routing = model.apply(params, batch, key=key)
    if "labels" not in batch:
        return model.head(params, hidden), routing
    chosen = (batch["weights"] > 0).astype(hidden.dtype)
    return model.head(params, jnp.einsum("btd,bt->bd", hidden, chosen)[:, None]), routing


def labels(cfg: ObjectiveConfig, model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> Sums:
    """The loss of labelled texts: cross-entropy of the class (classify) or of each word's (token_classify), in both with the weights of classes; binary
    cross-entropy, the mean over classes, where a text that has a class counts with its weight, which stands for 1 in the batch (multi_label); squared error
    (regress)."""
    logits, routing = label_logits(model, params, batch, key)
    if cfg.name == "token_classify":
        weights, target = batch["weights"], jax.nn.one_hot(batch["targets"], logits.shape[-1])
    else:
        weights, target = batch["weights"].sum(axis=1), batch["labels"]
    counted = weights > 0
    if cfg.name == "regress":
        losses = jnp.square(logits[:, 0] - target[:, 0])
    elif cfg.name == "multi_label":
        losses = jnp.where(target > 0, target * jax.nn.softplus(-logits), jax.nn.softplus(logits)).mean(axis=-1)
    else:
        losses = -(jax.nn.log_softmax(logits) * target).sum(axis=-1)
    weight, loss = weights.sum(), (losses * weights).sum()
    sums = {}
    if cfg.name != "regress":
        right = ((logits > 0) == (target > 0)).all(axis=-1) if cfg.name == "multi_label" else jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1)
        sums["accuracy"] = ((right * counted).sum().astype(jnp.float32), counted.sum().astype(jnp.float32))
    if routing:
        found = expert_balance(routing, weight)
        loss = loss + cfg.moe_balance * found["moe_balance"][0] + cfg.moe_z * found["moe_z"][0]
        sums |= found
    return sums | {"loss": (loss, weight)}


def distilled(objective: Callable[..., Sums], cfg: ObjectiveConfig, model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None, *,
              companion: Model) -> Sums:
    """The token objective, the divergence from a teacher's distribution and the angle between the last hidden states, each with its weight, over the tokens
    that the objective counts (Hinton et al. 2015; DistilBERT: Sanh et al. 2019, whose angle counts all tokens). `params["companion"]` is the teacher."""
    assert objective in (next_token, masked_token)
    taught = companion.apply(params[COMPANION], batch)[0]
    hidden, _, routing = model.apply(params, batch, key=key)
    hidden, taught = (constrain(h, "batch", "sequence", "residual") for h in (hidden, jax.lax.stop_gradient(taught)))
    nll, log_z, right, apart = distil.token_losses(model.projection(params), companion.projection(params[COMPANION]), hidden, taught, batch["targets"],
                                                   cfg.teacher_temperature, cfg.chunk_rows, ways("sequence"))
    weights = batch["weights"]
    sums = _token_sums(cfg, nll, log_z, right, routing, weights)
    hard, weight = sums["loss"]
    kl = (apart * weights).sum()
    loss, sums["teacher_kl"] = cfg.teacher_hard * hard + cfg.teacher_kl * kl, (kl, weight)
    if cfg.teacher_cosine:
        angle = (distil.angle(hidden, taught) * weights).sum()
        loss, sums["teacher_cosine"] = loss + cfg.teacher_cosine * angle, (angle, weight)
    return sums | {"loss": (loss, weight)}


def preference(cfg: ObjectiveConfig, model: Model, params: Any, batch: Mapping[str, jax.Array], key: jax.Array | None, *,
               companion: Model | None = None) -> Sums:
    """Direct preference optimisation: the chosen answer of each pair should gain on the reference more than the rejected one.

    With r = log p(chosen)/p_ref(chosen) - log p(rejected)/p_ref(rejected) the loss of a pair is, sigmoid, -(1 - e) log s(beta r) - e log s(-beta r)
    (Rafailov et al. 2023, equation 7; e: `preference_smoothing`, Mitchell 2023), or, ipo, (r - 1 / (2 beta))^2 (Azar et al. 2023, equation 17).

    Args:
      batch: rows of up to `PAIRS` pairs, of which number k has the chosen answer in segment 2 k - 1 and the rejected one in segment 2 k, each after the
        prompt; weights are 1 on the answers.
      companion: the reference, whose parameters are `params["companion"]`; None: the model with its adapters off.
    """
    nll, _, _, routing = token_nll(model, params, batch, key, cfg.chunk_rows)
    reference = (companion, params[COMPANION]) if companion else (model, lora.without(params))
    held = jax.lax.stop_gradient(token_nll(*reference, batch, None, cfg.chunk_rows)[0])
    side = jax.nn.one_hot(batch["segments"] - 1, 2 * PAIRS, dtype=jnp.float32) * batch["weights"][..., None]
    lengths = side.sum(1)
    divide = jnp.maximum(lengths, 1) if cfg.preference_per_token else 1.0
    total = lambda values: jnp.einsum("bt,bts->bs", -values, side, precision=jax.lax.Precision.HIGHEST) / divide
    log_p, gain = total(nll), total(nll - held)
    pairs = lambda values: (values[:, ::2], values[:, 1::2])
    counts = jnp.minimum(*pairs(lengths)) > 0
    chosen, rejected = pairs(gain)
    margin = chosen - rejected
    if cfg.preference_loss == "ipo":
        losses = jnp.square(margin - 1 / (2 * cfg.preference_beta))
    else:
        sign = lambda x: jax.nn.log_sigmoid(cfg.preference_beta * x)
        losses = -(1 - cfg.preference_smoothing) * sign(margin) - cfg.preference_smoothing * sign(-margin)
    weight = counts.sum().astype(jnp.float32)
    over = lambda values: (jnp.where(counts, values, 0).sum(), weight)
    loss = over(losses)[0]
    sums = {"preference": (loss, weight), "reward_accuracy": over(margin > 0), "reward_margin": over(cfg.preference_beta * margin),
            "chosen_log_p": over(pairs(log_p)[0]), "rejected_log_p": over(pairs(log_p)[1])}
    if routing:
        found = expert_balance(routing, weight)
        loss = loss + cfg.moe_balance * found["moe_balance"][0] + cfg.moe_z * found["moe_z"][0]
        sums |= found
    return sums | {"loss": (loss, weight)}


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
# Of chats (sft) the tokens count that the assistant says: the weights differ, the sums are the same.
OBJECTIVES: dict[str, Callable[..., Sums]] = {"next_token": next_token, "masked_token": masked_token, "span_corruption": next_token, "seq2seq": next_token,
                                              "sft": next_token, "preference": preference, **dict.fromkeys(LABELLED, labels)}
# The kinds of model that each is for: model.kind, or one with model.encoder_layers.
KINDS = {"next_token": ("decoder",), "masked_token": ("encoder",), "span_corruption": ("encoder-decoder",), "seq2seq": ("encoder-decoder",), "sft": ("decoder",),
         "preference": ("decoder",), **dict.fromkeys(LABELLED, ("encoder", "decoder"))}
