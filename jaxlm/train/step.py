"""One optimiser step as a pure function: microbatches, exact averaging, skipping what is not finite."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm import trees
from jaxlm.objectives import Sums
from jaxlm.sharding import PER_ROW, constrain
from jaxlm.train.state import State


def init_state(params: Any, tx: optax.GradientTransformation, trainable: Mapping[str, bool], key: jax.Array, ema: bool) -> State:
    """The state before step 0; only trained parameters have optimiser state and an average.

    Args:
      params: nested dict of arrays.
      trainable: path -> trained or frozen.
      key: raw key data, uint32, of the run's random numbers.
      ema: keep an average of the parameters.
    """
    trained = trees.split(params, trainable)[0]
    return State(jnp.zeros((), jnp.int32), params, tx.init(trained), jax.tree.map(jnp.copy, trained) if ema else None, key)


def train_step(state: State, batch: Mapping[str, jax.Array], limits: jax.Array | None = None, *, objective: Callable[..., Sums],
               tx: optax.GradientTransformation, rate: Callable[[jax.Array], jax.Array], trainable: Mapping[str, bool], microbatches: int = 1,
               ema: float = 0.0, layer_norms: bool = False) -> tuple[State, dict[str, Any]]:
    """Gradient of the sum of losses over the sum of weights of the whole batch, however it is cut; then one update.

    A loss or gradient that is not finite leaves parameters and moments as they are; only the step and the optimiser's counters (whole scalars) go on.

    Args:
      batch: arrays `[B, T]`; see `data/tasks.py`.
      limits: float32 [2], the largest mean loss and the largest gradient norm that are no spike: beyond them a step is skipped too (train/health.py).
      objective: `(params, batch, key) -> Sums` with the entry "loss".
      rate: the learning rate by step, as `tx` has it; only reported.
      trainable: path -> trained or frozen; frozen parameters get no gradient.
      microbatches: parts of the batch, computed one after the other.
      ema: decay of the average, 0 for none.
      layer_norms: tell the norms of gradient and update of each parameter too.

    Returns:
      The next state, and `{"sums": Sums, "lr", "grad_norm", "param_norm", "skipped"}` as float32 scalars; the norms are of what is trained. With
      `layer_norms` also `"norms": {"grad": {path: norm}, "update": {path: norm}}`, of stacked layers float32 [L].
    """
    train, frozen = trees.split(state.params, trainable)
    grads, sums = mean_gradient(train, frozen, batch, jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), objective, microbatches)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums["loss"][0]) & jnp.isfinite(norm)
    if limits is not None:
        total, weight = sums["loss"]
        finite &= (total / jnp.where(weight == 0, 1, weight) <= limits[0]) & (norm <= limits[1])
    updates, opt = tx.update(grads, state.opt, train)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o) if n.ndim or jnp.issubdtype(n.dtype, jnp.floating) else n, new, old)
    trained = keep(optax.apply_updates(train, updates), train)
    params = trees.merge(trained, frozen)
    average = None if state.ema is None else jax.tree.map(lambda a, p: a * ema + p * (1 - ema), state.ema, trained)
    metrics = {"sums": sums, "lr": jnp.asarray(rate(state.step), jnp.float32), "grad_norm": norm, "param_norm": optax.tree.norm(trained), "skipped": 1.0 - finite.astype(jnp.float32)}
    if layer_norms:
        metrics["norms"] = {"grad": _norms(grads), "update": _norms(updates)}
    return State(state.step + 1, params, keep(opt, state.opt), average, state.key), metrics


def _norms(tree: Any) -> dict[str, jax.Array]:
    """Euclidean norm of each leaf, float32; of one under `layers`, whose first axis is the layer, [L]."""
    size = lambda path, x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1 if "layers" in path.split("/") and x.ndim else 0, x.ndim))))
    return {path: size(path, x) for path, x in trees.flatten(tree).items()}


def mean_gradient(train: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, objective: Callable[..., Sums], microbatches: int) -> tuple[Any, Sums]:
    """The gradient of the sum of losses over the sum of weights, float32 like `train`, and the sums; see `train_step`."""
    def loss(train, part, key):
        sums = objective(trees.merge(train, frozen), part, key)
        return sums["loss"][0], sums

    gradient = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        grads, sums = gradient(train, batch, key)
    else:
        parts = {key: _microbatches(x, microbatches, None if key in PER_ROW else "sequence") for key, x in batch.items()}
        add = lambda total, new: jax.tree.map(jnp.add, total, new)
        body = lambda total, i_part: (add(total, gradient(train, i_part[1], jax.random.fold_in(key, i_part[0]))), None)
        shapes = jax.eval_shape(gradient, train, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(body, zeros, (jnp.arange(microbatches), parts))
    weight = jnp.maximum(sums["loss"][1], 1)  # a batch of padding alone has no gradient rather than NaN
    return jax.tree.map(lambda g: g / weight, grads), sums


def _microbatches(x: jax.Array, parts: int, second: str | None) -> jax.Array:
    """[B, T] -> [parts, B / parts, T]. Part m takes rows m, m + parts, ...: each device cuts its own rows and none moves."""
    return constrain(jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), None, "batch", second)
