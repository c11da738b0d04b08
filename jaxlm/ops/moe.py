"""Mixture of experts: routing, dispatch without capacity (no token is ever dropped), and what the router's auxiliary losses are made of.

Dispatch sorts the (token, expert) pairs by expert and multiplies each run of rows with its expert's matrix. Two kernels do that product:
`ragged_dot` of jax, and one by blocks of rows for CPUs, where XLA lowers `ragged_dot` to as many dense products as there are experts
(measured with 16 experts, values and gradients: 30 and 24 times one dense product; by blocks 1.5 and 3 times).

Shapes: R tokens, K experts of a token, E experts, D in, F out, M rows of the sorted buffer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def route(logits_RE: jax.Array, k: int, *, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    """The experts of each token: weights float32 `[R, K]` and numbers int32 `[R, K]`, likeliest first; of equals the lower number.

    Args:
      renormalise: the weights of the k chosen sum to 1; else they are their shares of the softmax over all experts.
    """
    shares = jax.nn.softmax(logits_RE.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(shares, k)
    return weights / weights.sum(-1, keepdims=True) if renormalise else weights, chosen


def statistics(logits_RE: jax.Array, chosen_RK: jax.Array, counted_R: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens with `counted_R`, float32: `chosen` `[E]` (how often each expert was taken), `shares` `[E]` (of the softmax), `z` (of
    log(Z)^2) and `tokens`."""
    logits, counted = logits_RE.astype(jnp.float32), counted_R.astype(jnp.float32)
    taken = jax.nn.one_hot(chosen_RK, logits.shape[-1], dtype=jnp.float32).sum(1)
    return {"chosen": (taken * counted[:, None]).sum(0), "shares": (jax.nn.softmax(logits, axis=-1) * counted[:, None]).sum(0),
            "z": (jnp.square(jax.nn.logsumexp(logits, axis=-1)) * counted).sum(), "tokens": counted.sum()}


def balance(chosen: jax.Array, shares: jax.Array, tokens: jax.Array) -> jax.Array:
    """`E sum_e f_e P_e` over the last axis, where f is how often expert e is taken by a token and P its mean share (Fedus et al. 2021; with k
    experts of a token as in Mixtral's code): k when all experts are taken alike, more when not."""
    tokens = jnp.maximum(tokens, 1)[..., None]
    return chosen.shape[-1] * (chosen / tokens * shares / tokens).sum(-1)


def dispatch(x_RD: jax.Array, weights_RK: jax.Array, chosen_RK: jax.Array, experts: int, mlp: Callable, kernel: str = "auto") -> jax.Array:
    """The weighted sum of each token's experts, `[R, D]`.

    Args:
      mlp: `(rows [M, D], multiply) -> [M, D]`, where `multiply(rows [M, A], w [E, A, B]) -> [M, B]` takes each row times its expert's matrix.
      kernel: "ragged", "blocks", or "auto": what is fast on this backend.
    """
    r, k = chosen_RK.shape
    if kernel == "auto":
        kernel = "blocks" if jax.default_backend() == "cpu" else "ragged"
    pairs = chosen_RK.reshape(-1)
    order = jnp.argsort(pairs, stable=True)
    sizes_E = jnp.bincount(pairs, length=experts)
    # Blocks belong to one expert each, so runs begin at multiples of the block size; the rows that this skips stay zero.
    block = _block_size(r * k, experts) if kernel == "blocks" else 1
    blocks = (r * k) // block + min(experts, r * k) if kernel == "blocks" else r * k
    blocks_E = -(-sizes_E // block)
    ends_E = jnp.cumsum(blocks_E)
    rank = jnp.arange(r * k) - (jnp.cumsum(sizes_E) - sizes_E)[pairs[order]]
    slots = jnp.zeros(r * k, jnp.int32).at[order].set(((ends_E - blocks_E)[pairs[order]] * block + rank).astype(jnp.int32))
    rows = jnp.zeros((blocks * block, x_RD.shape[1]), x_RD.dtype).at[slots].set(jnp.repeat(x_RD, k, axis=0))
    if kernel == "blocks":
        owner = jnp.minimum(jnp.searchsorted(ends_E, jnp.arange(blocks), side="right"), experts - 1)
        multiply = lambda rows, w: _multiply_blocks(rows.reshape(blocks, block, -1), w, owner).reshape(blocks * block, -1)
    else:
        multiply = lambda rows, w: jax.lax.ragged_dot(rows, w, sizes_E.astype(jnp.int32))
    out_RKD = mlp(rows, multiply)[slots].reshape(r, k, -1)
    return (out_RKD * weights_RK[..., None].astype(out_RKD.dtype)).sum(1)


def _block_size(rows: int, experts: int) -> int:
    """About half of an expert's rows, so that little of the buffer is empty; a power of two in [8, 128]."""
    return min(128, max(8, 1 << max(0, (rows // (2 * experts)).bit_length() - 1)))


@jax.custom_vjp
def _multiply_blocks(x_GBD: jax.Array, w_EDF: jax.Array, owner_G: jax.Array) -> jax.Array:
    """`x[g] @ w[owner[g]]`, one block after the other: `[G, B, F]`."""
    return jax.lax.map(lambda block: block[0] @ w_EDF[block[1]], (x_GBD, owner_G))


def _forward(x_GBD, w_EDF, owner_G):
    return _multiply_blocks(x_GBD, w_EDF, owner_G), (x_GBD, w_EDF, owner_G)


def _backward(saved, g_GBF):
    """The gradient of `w` grows in place; the derivative that jax would make of the loop adds a whole `[E, D, F]` for each block."""
    x_GBD, w_EDF, owner_G = saved

    def body(total, block):
        x, g, owner = block
        old = jax.lax.dynamic_index_in_dim(total, owner, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, old + (x.T @ g).astype(total.dtype), owner, 0), g @ w_EDF[owner].T

    dw, dx = jax.lax.scan(body, jnp.zeros_like(w_EDF), (x_GBD, g_GBF, owner_G))
    return dx, dw, None


_multiply_blocks.defvjp(_forward, _backward)
