"""Learning-rate schedules and the optimiser chain, built from the config and the model's own table of axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxlm import moments, mup, trees
from jaxlm.config import OptimConfig, TransformerConfig, steps_of


def schedule(cfg: OptimConfig, total: int, tokens_per_step: int, tokens_per_epoch: int | None = None) -> Callable[[Any], jax.Array]:
    """Learning rate of step 0, 1, ... `total - 1`.

    constant, linear, cosine (Loshchilov & Hutter 2017; with restarts: equal cycles), wsd (warm-up, stable, linear decay: Hu et al. 2024),
    step (times `step_ratio` at each multiple), inverse_sqrt (Vaswani et al. 2017), each after a linear warm-up whose first step is already above 0.

    Raises:
      ValueError: a warm-up, or a warm-up and final decay, longer than the run.
    """
    steps = lambda key: steps_of(f"optim.{key}", getattr(cfg, key), tokens_per_step=tokens_per_step, tokens_per_epoch=tokens_per_epoch, total=total)
    warmup = steps("warmup")
    if warmup > total:
        raise ValueError(f"optim.warmup={cfg.warmup!r} is {warmup} steps, longer than the run of {total}: shorten it or raise train.steps")
    rest, low = max(total - warmup, 1), cfg.lr * cfg.end_lr_ratio
    if cfg.schedule == "constant":
        after = optax.constant_schedule(cfg.lr)
    elif cfg.schedule == "linear":
        after = optax.linear_schedule(cfg.lr, low, rest)
    elif cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.lr, rest, alpha=cfg.end_lr_ratio)
    elif cfg.schedule == "cosine_restarts":
        cycles = cfg.restarts + 1
        ends = [rest * (i + 1) // cycles for i in range(cycles)]
        parts = [optax.cosine_decay_schedule(cfg.lr, max(b - a, 1), alpha=cfg.end_lr_ratio) for a, b in zip([0, *ends], ends)]
        after = optax.join_schedules(parts, ends[:-1])
    elif cfg.schedule == "wsd":
        decay = steps("decay")
        if warmup + decay > total:
            raise ValueError(f"optim.warmup={cfg.warmup!r} and optim.decay={cfg.decay!r} are {warmup} + {decay} steps, longer than the run of {total}")
        after = optax.join_schedules([optax.constant_schedule(cfg.lr), optax.linear_schedule(cfg.lr, low, max(decay, 1))], [rest - decay])
    elif cfg.schedule == "step":
        every = max(steps("step_every"), 1)
        after = optax.piecewise_constant_schedule(cfg.lr, {every * i: cfg.step_ratio for i in range(1, rest // every + 1)})
    else:
        assert cfg.schedule == "inverse_sqrt"
        after = lambda step: cfg.lr * jnp.sqrt(max(warmup, 1) / (max(warmup, 1) + step))
    if not warmup:
        return after
    # Warm-up counts from 1, so that the first update is not lost on a learning rate of 0.
    return lambda step: jnp.where(step < warmup, cfg.lr * (step + 1) / warmup, after(jnp.maximum(step - warmup, 0)))


def trainable(cfg: OptimConfig, params: Any) -> dict[str, bool]:
    """path -> whether it is trained, by the strict rules `optim.trainable` (empty: everything)."""
    paths = trees.flatten(params)
    return trees.match(cfg.trainable, paths, "optim.trainable") if cfg.trainable else dict.fromkeys(paths, True)


def decays(cfg: OptimConfig, axes: dict[str, tuple[str, ...]]) -> dict[str, bool]:
    """path -> whether weight decay applies: by `optim.decay_rules`, else to whatever has two dimensions of its own (not norms and biases)."""
    if cfg.decay_rules:
        return trees.match(cfg.decay_rules, axes, "optim.decay_rules")
    return {path: len([a for a in names if a not in ("layers", "head_size")]) > 1 for path, names in axes.items()}


def build(cfg: OptimConfig, rate: Callable, axes: dict[str, tuple[str, ...]], model: TransformerConfig = TransformerConfig()) -> optax.GradientTransformation:
    """The optimiser: clip by global norm, then the named method with decoupled weight decay, its moments kept as `cfg.state_dtype` says; then the
    factors of layers.

    Args:
      rate: learning rate by step.
      axes: path -> logical axes of each trained parameter.
      model: for optim.layer_decay how many layers there are; for model.mup_width how wide it is.
    """
    decay = decays(cfg, axes)
    mask = lambda tree: trees.map_paths(lambda path, _: decay[path], tree)
    clip = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    keep = (lambda tx: tx) if cfg.state_dtype == "float32" else (lambda tx: moments.compressed(tx, cfg.state_dtype, axes))
    method = _method(cfg, rate, mask, axes) if model.wider == 1 else _wider_adamw(cfg, rate, mask, mup.rates(model, axes))
    if cfg.layer_decay == 1:
        return keep(optax.chain(*clip, method))
    factors = layer_factors(cfg, axes, model)
    scale = lambda updates, state, params=None: (trees.map_paths(lambda path, u: u * factors[path].astype(u.dtype).reshape(-1, *[1] * (u.ndim - 1))
                                                                 if factors[path].ndim else u * factors[path].astype(u.dtype), updates), state)
    return keep(optax.chain(*clip, method, optax.GradientTransformation(lambda params: optax.EmptyState(), scale)))


def layer_factors(cfg: OptimConfig, axes: dict[str, tuple[str, ...]], model: TransformerConfig) -> dict[str, jax.Array]:
    """path -> what an update is multiplied by, weight decay included: of a stack of the layers that are trained [layers], else a scalar. 1 above the
    layers, layer_decay^(layers - i) in layer i = 0, 1, ..., layer_decay^(layers + 1) in the embedding (Clark et al. 2020, ELECTRA).

    Raises:
      ValueError: one line: see `alike`.
    """
    alike(cfg, model)
    layers = cfg.layer_decay ** np.arange(model.layers - cfg.frozen_layers, 0, -1)
    kind = lambda path, names: layers if "layers" in names else cfg.layer_decay ** (model.layers + 1) if path.startswith("embed") else 1.0
    return {path: jnp.asarray(kind(path, names), jnp.float32) for path, names in axes.items()}


def alike(cfg: OptimConfig, model: TransformerConfig) -> None:
    """Raises ValueError, one line, for optim.layer_decay or optim.frozen_layers of a model whose layers are not one stack, and for more frozen layers than
    there are."""
    if model.encoder_layers or (model.experts and len(model.sparse_layers) < model.layers):
        raise ValueError("optim.layer_decay and optim.frozen_layers are for models whose layers are alike: leave them out, or use optim.trainable")
    if cfg.frozen_layers > model.layers:
        raise ValueError(f"optim.frozen_layers={cfg.frozen_layers} is more than the {model.layers} layers of the model")


def _method(cfg: OptimConfig, rate: Callable, mask: Callable, axes: dict[str, tuple[str, ...]]) -> optax.GradientTransformation:
    if cfg.name == "adamw":
        return optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=mask)
    if cfg.name == "lion":
        return optax.lion(rate, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=mask)
    if cfg.name == "sgd":
        return optax.chain(optax.add_decayed_weights(cfg.weight_decay, mask), optax.sgd(rate, momentum=cfg.b1))
    if cfg.name == "adafactor":  # without the relative step: the schedule above is the learning rate
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.add_decayed_weights(cfg.weight_decay, mask),
                           optax.scale_by_learning_rate(rate))
    assert cfg.name == "muon"
    # Jordan et al. 2024; update scaled to AdamW's RMS (Liu et al. 2025), so that lr means the same in both.
    matrices = lambda tree: trees.map_paths(lambda path, _: _matrix(path, axes[path]), tree)
    return contrib.muon(rate, beta=0.95, weight_decay=cfg.weight_decay, weight_decay_mask=mask, adam_b1=cfg.b1, adam_b2=cfg.b2, eps=cfg.eps,
                        adam_weight_decay=0.0, muon_weight_dimension_numbers=matrices, consistent_rms=0.2)


def _wider_adamw(cfg: OptimConfig, rate: Callable, mask: Callable, factors: dict[str, float]) -> optax.GradientTransformation:
    """AdamW whose rate has a factor for each path. The weight decay has none: decoupled, it shrinks weights by rate x decay in a step, which is to stay as it
    was found (as in the authors' package `mup`)."""
    scale = lambda updates, state, params=None: (trees.map_paths(lambda path, u: u * jnp.asarray(factors[path], u.dtype), updates), state)
    return optax.chain(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps), optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
                       optax.add_decayed_weights(cfg.weight_decay, mask), optax.scale_by_learning_rate(rate))


def _matrix(path: str, axes: tuple[str, ...]) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a stacked weight are a matrix's rows and columns; None for what Muon leaves to AdamW."""
    if "layers" not in path.split("/") or len(axes) < 3 or "embed" not in axes:
        return None
    inner = tuple(range(2 if axes[1] == "expert" else 1, len(axes)))  # axis 0 is the layer; each expert has a matrix of its own
    return contrib.MuonDimensionNumbers(inner[:1], inner[1:]) if axes[inner[0]] == "embed" else contrib.MuonDimensionNumbers(inner[:-1], inner[-1:])
