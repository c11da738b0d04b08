"""Drawing the next token from logits. Each row has its own key and its own settings, so a row's token does not depend on its neighbours."""

import jax
import jax.numpy as jnp


def sample(logits_BV: jax.Array, keys_B: jax.Array, *, temperature, top_k=0, top_p=1.0, min_p=0.0) -> jax.Array:
    """One token id per row, int32 `[B]`.

    The temperature comes first, then the filters: `top_k` keeps the k likeliest tokens (Fan et al. 2018), `top_p` the fewest of those whose
    share reaches p (Holtzman et al. 2020), `min_p` those at least `min_p` times as likely as the likeliest (Nguyen et al. 2024). The
    likeliest token always stays. Ties go to the lower id.

    Args:
      logits_BV: any float dtype; -inf for what must not be drawn.
      keys_B: typed PRNG keys, one per row.
      temperature: 0 takes the likeliest token and ignores everything else.
      top_k: 0 for off.
      top_p: in (0, 1], 1 for off.
      min_p: in [0, 1], 0 for off.
      Each setting is a scalar or `[B]`.
    """
    rows = logits_BV.shape[0]
    temperature, top_p, min_p = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (rows,))[:, None] for x in (temperature, top_p, min_p))
    top_k = jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), (rows,))[:, None]
    logits = logits_BV.astype(jnp.float32)
    greedy = temperature == 0
    # The maximum becomes 0 before the division, so a tiny temperature cannot overflow.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / jnp.where(greedy, 1, temperature)
    scaled = jnp.where(scaled >= jnp.log(min_p), scaled, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys_B)

    def ranked():
        order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)
        ordered = jnp.take_along_axis(scaled, order, axis=-1)
        rank = jnp.arange(logits.shape[1])[None]
        kept = jnp.where((rank < top_k) | (top_k == 0), ordered, -jnp.inf)
        shares = jax.nn.softmax(kept, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        kept = jnp.where((before < top_p) | (top_p >= 1) | (rank == 0), kept, -jnp.inf)
        # The noise stays with its token, so a row draws the same token in either branch.
        winner = jnp.argmax(kept + jnp.take_along_axis(noise, order, axis=-1), axis=-1)
        return jnp.take_along_axis(order, winner[:, None], axis=-1)[:, 0]

    # Sorting the vocabulary is most of the cost, and plain sampling does not need it.
    drawn = jax.lax.cond(jnp.any((top_k > 0) | (top_p < 1)), ranked, lambda: jnp.argmax(scaled + noise, axis=-1))
    return jnp.where(greedy[:, 0], jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty) -> jax.Array:
    """Makes tokens that have been seen less likely: positive logits are divided by `penalty`, negative ones multiplied (Keskar et al. 2019).

    Args:
      logits_BV: float.
      seen_BV: bool, or counts of any kind; what is not zero has been seen.
      penalty: scalar or `[B]`; 1 is off.
    """
    penalty = jnp.broadcast_to(jnp.asarray(penalty, logits_BV.dtype), logits_BV.shape[:1])[:, None]
    return jnp.where(seen_BV.astype(bool), jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)
