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
    logits, greedy = logits_BV.astype(jnp.float32), temperature == 0
    likeliest = jnp.argmax(logits, axis=-1)
    drawn = lambda: jnp.where(greedy[:, 0], likeliest, _drawn(logits, keys_B, jnp.where(greedy, 1, temperature), top_k, top_p, min_p))
    return jax.lax.cond(jnp.all(greedy), lambda: likeliest, drawn).astype(jnp.int32)


def _drawn(logits: jax.Array, keys_B: jax.Array, temperature, top_k, top_p, min_p) -> jax.Array:
    vocabulary = logits.shape[1]
    # The maximum becomes 0 before the division, so a tiny temperature cannot overflow.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    scaled = jnp.where(scaled >= jnp.log(min_p), scaled, -jnp.inf)
    off = lambda scaled: scaled
    scaled = jax.lax.cond(jnp.any(top_k > 0), lambda scaled: _likeliest(scaled, jnp.where(top_k > 0, top_k, vocabulary)), off, scaled)
    scaled = jax.lax.cond(jnp.any(top_p < 1), lambda scaled: _nucleus(scaled, jnp.where(top_p < 1, top_p, jnp.inf)), off, scaled)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,)))(keys_B)  # argmax(log p + noise) is a draw from p
    return jnp.argmax(scaled + noise, axis=-1)


# The filters keep tokens up to some distance from the likeliest. They find it by halving the range of float32 bit patterns, 31 passes over the
# logits: sorting a vocabulary of 50,000 takes ten times as long.


def _likeliest(scaled_BV: jax.Array, k_B1: jax.Array) -> jax.Array:
    distance = _distance(scaled_BV)
    cut = _smallest(distance, lambda near: near.sum(axis=-1, keepdims=True) >= k_B1)
    return _keep(scaled_BV, distance, cut, k_B1 - (distance < cut).sum(axis=-1, keepdims=True))


def _nucleus(scaled_BV: jax.Array, p_B1: jax.Array) -> jax.Array:
    distance, weights = _distance(scaled_BV), jnp.exp(scaled_BV)
    mass = lambda kept: jnp.where(kept, weights, 0).sum(axis=-1, keepdims=True)
    needed = p_B1 * weights.sum(axis=-1, keepdims=True)
    cut = _smallest(distance, lambda near: mass(near) >= needed)
    each = jnp.where(distance == cut, weights, 0).max(axis=-1, keepdims=True)
    return _keep(scaled_BV, distance, cut, jnp.maximum(1, jnp.ceil((needed - mass(distance < cut)) / each)))


def _distance(scaled_BV: jax.Array) -> jax.Array:
    """How far below the maximum, as int32 in the same order: the bits of floats that are not negative order like whole numbers."""
    return jax.lax.bitcast_convert_type(jnp.abs(scaled_BV), jnp.int32)


def _smallest(distance_BV: jax.Array, enough) -> jax.Array:
    """The smallest cut `[B, 1]` with `enough(distance <= cut)`; that of infinity where there is none."""
    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    ends = jnp.full((distance_BV.shape[0], 1), -1, jnp.int32), jnp.full((distance_BV.shape[0], 1), infinity)

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        found = enough(distance_BV <= middle)
        return jnp.where(found, low, middle), jnp.where(found, middle, high)

    return jax.lax.fori_loop(0, 31, halve, ends)[1]


def _keep(scaled_BV: jax.Array, distance_BV: jax.Array, cut_B1: jax.Array, ties_B1: jax.Array) -> jax.Array:
    """What is nearer than the cut, and the first `ties` of what is as far; -inf elsewhere."""
    tied = distance_BV == cut_B1
    return jnp.where((distance_BV < cut_B1) | (tied & (jnp.cumsum(tied, axis=-1) <= ties_B1)), scaled_BV, -jnp.inf)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty) -> jax.Array:
    """Makes tokens that have been seen less likely: positive logits are divided by `penalty`, negative ones multiplied (Keskar et al. 2019).

    Args:
      logits_BV: float.
      seen_BV: bool, or counts of any kind; what is not zero has been seen.
      penalty: scalar or `[B]`; 1 is off.
    """
    penalty = jnp.broadcast_to(jnp.asarray(penalty, logits_BV.dtype), logits_BV.shape[:1])[:, None]
    return jnp.where(seen_BV.astype(bool), jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)
