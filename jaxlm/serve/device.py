"""What the engine does on the device: one pure function that feeds some rows their next tokens and draws what follows.

A prompt is one row of many tokens, generation is many rows of one token each: the same function. Shapes are rounded up to a few sizes, so little is
compiled. What is drawn for a row depends on that row alone: on its tokens, its settings, its seed, and how many tokens it has drawn before.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.models import cache as caches
from jaxlm.models.decoder import Model
from jaxlm.ops import sampling
from jaxlm.sharding import constrain

TOP = 20  # alternatives whose log-probabilities may be asked for (OpenAI's limit)


class Rows(NamedTuple):
    """What a call feeds, B rows of T tokens each. Padding has segment 0."""
    tokens: Any  # int32 [B, T], or [B] for one token each
    positions: Any  # int32 [B, T]
    segments: Any  # int32 [B, T]
    last: Any  # int32 [B], which of the T tokens is followed by the drawn one
    table: Any  # int32 [B, N], each row's pages


class Draw(NamedTuple):
    """How each row's token is drawn: `[B]` each, but `history`."""
    temperature: Any  # float32; 0: the likeliest
    top_k: Any  # int32; 0: off
    top_p: Any  # float32; 1: off
    min_p: Any  # float32; 0: off
    seed: Any  # uint32
    count: Any  # int32, tokens that the row has drawn
    repetition: Any  # float32, see `sampling.penalise`; 1: off
    presence: Any  # float32, taken from the logits of tokens that were drawn before; 0: off
    frequency: Any  # float32, the same as often as they were drawn
    history: Any  # int32 [B, S]: the row's tokens, those of the prompt as -1 - id; behind the vocabulary: padding. [B, 0] where no row has a penalty


class Drawn(NamedTuple):
    """What a call drew."""
    token: jax.Array  # int32 [B]
    logprob: jax.Array | None  # float32 [B], of the token by the model's own distribution; None unless asked for
    top: tuple[jax.Array, jax.Array] | None  # log-probabilities and ids [B, TOP], the likeliest first


@functools.partial(jax.jit, static_argnames=("model", "vocab", "logprobs"), donate_argnames=("pages",))
def step(model: Model, params: Any, pages: tuple[dict, ...], rows: Rows, draw: Draw, *, vocab: int, logprobs: bool) -> tuple[Drawn, tuple[dict, ...]]:
    """Feeds `rows`, whose keys and values go to their `pages` (donated, updated in place), and draws a token for each.

    Args:
      params: of the model, unstacked.
      vocab: ids from here on are never drawn.
      logprobs: whether log-probabilities are wanted.
    """
    tokens = rows.tokens if rows.tokens.ndim == 2 else rows.tokens[:, None]
    inputs = {"tokens": tokens, "positions": rows.positions, "segments": rows.segments}
    hidden, cache, _ = model.apply(params, inputs, cache={"layers": pages, "table": rows.table})
    logits = model.head(params, jnp.take_along_axis(hidden, rows.last[:, None, None], axis=1)[:, 0])
    logits = jnp.where(jnp.arange(logits.shape[1])[None] < vocab, constrain(logits, "batch", None), -jnp.inf)
    keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(draw.seed, draw.count)
    token = sampling.sample(_penalised(logits, draw), keys, temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p, min_p=draw.min_p)
    drawn = Drawn(constrain(token, None), None, None)
    if logprobs:
        shares = jax.nn.log_softmax(logits, axis=-1)
        drawn = Drawn(drawn.token, jnp.take_along_axis(shares, token[:, None], axis=1)[:, 0], tuple(jax.lax.top_k(shares, min(TOP, shares.shape[1]))))
    return drawn, caches.placed_pages(cache["layers"])


def _penalised(logits: jax.Array, draw: Draw) -> jax.Array:
    if not draw.history.shape[1]:
        return logits
    row, vocabulary = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
    prompt = draw.history < 0
    seen = jnp.zeros(logits.shape, bool).at[row, jnp.where(prompt, -1 - draw.history, draw.history)].set(True, mode="drop")
    drawn = jnp.zeros(logits.shape, jnp.float32).at[row, jnp.where(prompt, vocabulary, draw.history)].add(1, mode="drop")
    return sampling.penalise(logits, seen, draw.repetition) - (drawn > 0) * draw.presence[:, None] - drawn * draw.frequency[:, None]
