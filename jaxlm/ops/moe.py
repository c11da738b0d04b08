"""Mixture of experts: routing, dispatch without capacity (no token is ever dropped), and what the router's auxiliary losses are made of.

Dispatch sorts the (token, expert) pairs by expert and multiplies each run of rows with its expert's matrix. Two kernels do that product:
`ragged_dot` of jax, and one by blocks of rows for CPUs, where XLA lowers `ragged_dot` to as many dense products as there are experts
(measured with 16 experts, values and gradients: 30 and 24 times one dense product; by blocks 1.5 and 3 times).

Shapes: R tokens, K experts of a token, E experts, D in, F out, M rows of the sorted buffer.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def route(logits: jax.Array, k: int, *, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    """The experts of each token, of logits `[..., E]`: weights float32 `[..., K]` and numbers int32 `[..., K]`, likeliest first; of equals the lower number.

    Args:
      renormalise: the weights of the k chosen sum to 1; else they are their shares of the softmax over all experts.
    """
    shares = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(shares, k)
    return weights / weights.sum(-1, keepdims=True) if renormalise else weights, chosen


def statistics(logits: jax.Array, chosen: jax.Array, counted: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens with `counted` (`[...]`, one value for each), float32: `chosen` `[E]` (how often each expert was taken), `shares` `[E]` (of
    the softmax), `z` (of log(Z)^2) and `tokens`."""
    logits, counted = logits.astype(jnp.float32), counted.astype(jnp.float32)
    taken = jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32).sum(-2)
    sums = lambda values: (values * counted[..., None]).sum(range(counted.ndim))
    return {"chosen": sums(taken), "shares": sums(jax.nn.softmax(logits, axis=-1)),
            "z": (jnp.square(jax.nn.logsumexp(logits, axis=-1)) * counted).sum(), "tokens": counted.sum()}


def balance(chosen: jax.Array, shares: jax.Array, tokens: jax.Array) -> jax.Array:
    """`E sum_e f_e P_e` over the last axis, where f is how often expert e is taken by a token and P its mean share (Fedus et al. 2021; with k
    experts of a token as in Mixtral's code): k when all experts are taken alike, more when not."""
    tokens = jnp.maximum(tokens, 1)[..., None]
    return chosen.shape[-1] * (chosen / tokens * shares / tokens).sum(-1)


def dispatch(x_RD: jax.Array, weights_RK: jax.Array, chosen_RK: jax.Array, experts: int, mlp: Callable, kernel: str) -> jax.Array:
    """The weighted sum of each token's experts, `[R, D]`.

    Args:
      mlp: `(rows [M, D], multiply) -> [M, D]`, where `multiply(rows [M, A], w [E, A, B]) -> [M, B]` takes each row times its expert's matrix.
      kernel: "blocks", which is fast on CPUs, or "ragged": `jax.lax.ragged_dot`, elsewhere.
    """
    r, k = chosen_RK.shape
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


def dispatch_over(x_RD: jax.Array, weights_RK: jax.Array, chosen_RK: jax.Array, experts: int, mlp: Callable, kernel: str, *, axis: str, parts: int,
                  everywhere: Sequence[str]) -> jax.Array:
    """`dispatch` of one of `parts` devices along `axis`, each with its own tokens and with `experts / parts` neighbouring experts.

    Exact for any routing, with fixed sizes: pairs travel by all-to-all in rounds of a fixed number of slots between each two devices, a quarter more
    than an even share. One round is always done; the others, computed again in the backward pass, only when some device still has pairs for another,
    in the worst case (all pairs of a device to one other) about 0.8 x `parts` of them. A round moves 1.25 R K rows of D each way and as many pass the
    experts, so that balanced routing costs a quarter more than the rows themselves.

    Args:
      everywhere: all axes over which the devices must agree whether there is another round.
    """
    if parts == 1:
        return dispatch(x_RD, weights_RK, chosen_RK, experts, mlp, kernel)
    (r, k), own = chosen_RK.shape, experts // parts
    pairs = chosen_RK.reshape(-1)
    owner = pairs // own
    slots = -(-5 * r * k // (4 * parts))
    order = jnp.argsort(owner, stable=True)
    counts = jnp.bincount(owner, length=parts)
    rank = jnp.zeros_like(pairs).at[order].set(jnp.arange(r * k, dtype=pairs.dtype) - (jnp.cumsum(counts) - counts)[owner[order]].astype(pairs.dtype))
    rows = jnp.repeat(x_RD, k, axis=0)
    swap = lambda a: jax.lax.all_to_all(a.reshape(parts, slots, *a.shape[1:]), axis, 0, 0).reshape(a.shape)

    def add_round(total: jax.Array, number: jax.Array | int) -> jax.Array:
        # What is not of this round points behind the buffer: it is dropped on the way in, and zero on the way out.
        place = jnp.where(rank // slots == number, owner * slots + rank % slots, parts * slots)
        send = jnp.zeros((parts * slots, x_RD.shape[1]), x_RD.dtype).at[place].set(rows, mode="drop")
        wanted = jnp.zeros(parts * slots, pairs.dtype).at[place].set(pairs % own, mode="drop")  # empty slots are zeros for the first expert
        out = dispatch(swap(send), jnp.ones((parts * slots, 1), jnp.float32), swap(wanted)[:, None], own, mlp, kernel)
        return total + swap(out).at[place].get(mode="fill", fill_value=0)

    total, rounds = add_round(jnp.zeros_like(rows), 0), -(-r * k // slots)
    most = jax.lax.pmax(counts.max(), everywhere)
    further = lambda total, number: (jax.lax.cond(number * slots < most, jax.checkpoint(add_round), lambda total, _: total, total, number), None)
    total, _ = jax.lax.scan(further, total, jnp.arange(1, rounds, dtype=pairs.dtype))
    return (total.reshape(r, k, -1) * weights_RK[..., None].astype(total.dtype)).sum(1)


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
