"""Attention of rows whose tokens lie on several devices: the part that each device computes, with collectives along one axis of the mesh.

`ring`: keys and values go round, each device attends to what is passing with an online softmax (Liu et al. 2023, Ring Attention; Dao 2023 for the
backward pass). Memory per device is linear in its own tokens. `exchange`: tokens are exchanged for heads, so that each device attends with a few heads
over whole rows (Jacobs et al. 2023, DeepSpeed Ulysses), with any kernel.

Positions and segments travel with the tokens; which key a query sees is decided by them alone (`attention.mask`), so the order of the tokens is free.

Shapes: B rows, T the device's tokens, K key heads, G query heads of a key head, H head size; I and J tiles of queries and keys, t and s tokens of a tile.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.attention import Tokens, mask


class _How(NamedTuple):
    """What is known when the program is compiled."""
    axis: str
    parts: int  # devices along it
    causal: bool
    softcap: float
    scale: float
    block: int  # tokens of a tile at most


def ring(q_BTNH, k_BTKH, v_BTKH, queries: Tokens, keys: Tokens, *, axis: str, parts: int, window=None, causal: bool = True, softcap: float = 0.0,
         scale: float, block: int = 512) -> jax.Array:
    """`attention.reference` of this device's queries to the keys of all devices along `axis`, `[B, T, N, H]`.

    Each tile of queries and keys of which no query sees any key is skipped: with tokens in zig-zag order all devices skip alike under causal attention,
    and windows and packed rows skip more. A step sends keys and values once; the backward pass sends them again, with their gradients in float32.

    Args:
      block: tokens of a tile at most; scores of more than block x block do not exist.
    """
    b, t, n, h = q_BTNH.shape
    how = _How(axis, parts, causal, softcap, scale, block)
    out = _ring(how, q_BTNH.reshape(b, t, k_BTKH.shape[2], -1, h), k_BTKH, v_BTKH, queries, keys, jnp.asarray(0 if window is None else window, jnp.int32))
    return out.reshape(b, t, n, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how: _How, q_BTKGH, k_BTKH, v_BTKH, queries, keys, window):
    return _forward(how, q_BTKGH, k_BTKH, v_BTKH, queries, keys, window)[0]


def _forward(how: _How, q, k, v, queries, keys, window):
    # Without the barrier the masks hang on positions and segments alone, and jax computes those of all tiles and turns once, before the scan over the layers,
    # and keeps them: T^2 of them on each device.
    q, queries, keys, window = jax.lax.optimization_barrier((q, queries, keys, window))
    size = _tile(q.shape[1], how.block)
    q_tiles, tokens = _tiles(q, size), jax.tree.map(lambda a: _tiles(a, size), queries)
    b, t, kh, g, h = q_tiles.shape[1:]
    begin = (jnp.full((len(q_tiles), b, kh, g, t), jnp.finfo(jnp.float32).min), jnp.zeros((len(q_tiles), b, kh, g, t)),
             jnp.zeros((len(q_tiles), b, kh, g, t, h)))

    def attend(found, passing):
        tiles = jax.tree.map(lambda a: _tiles(a, size), passing)

        def one(tile):
            q, at, found = tile

            def add(found, key):
                k, v, to = key
                seen = mask(at, to, window, how.causal)[:, None, None]

                def update(most, total, out):
                    scores = jnp.where(seen, _scores(how, q, k), jnp.finfo(jnp.float32).min)
                    new = jnp.maximum(most, scores.max(-1))
                    weights, kept = jnp.where(seen, jnp.exp(scores - new[..., None]), 0), jnp.exp(most - new)
                    return new, total * kept + weights.sum(-1), out * kept[..., None] + jnp.einsum(
                        "bkgts,bskh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

                return jax.lax.cond(seen.any(), update, lambda *found: found, *found), None

            return jax.lax.scan(add, found, tiles)[0]

        return jax.lax.map(one, (q_tiles, tokens, found))

    passing = (k, v, keys)
    if how.parts > 1:
        # The next keys are on their way while these are attended to.
        turn = lambda carry, _: ((_pass_on(how, carry[0]), attend(carry[1], carry[0])), None)
        (passing, begin), _ = jax.lax.scan(turn, (passing, begin), None, length=how.parts - 1)
    most, total, out = attend(begin, passing)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # a query that sees nothing gets zeros
    out = _untiled(jnp.moveaxis(out / total[..., None], 4, 2)).astype(q.dtype)
    log_z = most + jnp.log(total)
    return out, (q, k, v, queries, keys, window, out, log_z)


def _backward(how: _How, saved, d_out):
    q, k, v, queries, keys, window, out, log_z = saved
    d_out, queries, keys, window = jax.lax.optimization_barrier((d_out, queries, keys, window))
    size = _tile(q.shape[1], how.block)
    dots = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    dots = jnp.moveaxis(_tiles(dots, size), 2, -1)  # [I, B, K, G, t]
    mine = (_tiles(q, size), jax.tree.map(lambda a: _tiles(a, size), queries), _tiles(d_out, size), dots, log_z)

    def attend(dq, passing):
        (k, v, keys), (dk, dv) = passing
        tiles = jax.tree.map(lambda a: _tiles(a, size), (k, v, keys))

        def one(grads, tile):
            (q, at, d_out, dots, log_z), dq = tile

            def add(dq, key):
                (k, v, to), (dk, dv) = key
                seen = mask(at, to, window, how.causal)[:, None, None]

                def update(dq, dk, dv):
                    scores = _scores(how, q, k)
                    weights = jnp.where(seen, jnp.exp(scores - log_z[..., None]), 0)
                    dv = dv + jnp.einsum("bkgts,btkgh->bskh", weights.astype(v.dtype), d_out, preferred_element_type=jnp.float32)
                    d_scores = weights * (jnp.einsum("btkgh,bskh->bkgts", d_out, v, preferred_element_type=jnp.float32) - dots[..., None])
                    if how.softcap:
                        d_scores = d_scores * (1 - jnp.square(scores / how.softcap))
                    d_scores = (d_scores * how.scale).astype(q.dtype)
                    return (dq + jnp.einsum("bkgts,bskh->btkgh", d_scores, k, preferred_element_type=jnp.float32),
                            dk + jnp.einsum("bkgts,btkgh->bskh", d_scores, q, preferred_element_type=jnp.float32), dv)

                dq, *grads = jax.lax.cond(seen.any(), update, lambda *grads: grads, dq, dk, dv)
                return dq, tuple(grads)

            dq, grads = jax.lax.scan(add, dq, (tiles, grads))
            return grads, dq

        (dk, dv), dq = jax.lax.scan(one, (_tiles(dk, size), _tiles(dv, size)), (mine, dq))
        return dq, ((k, v, keys), (_untiled(dk), _untiled(dv)))

    def turn(carry, _):
        dq, passing = attend(*carry)
        return (dq, _pass_on(how, passing)), None  # after as many turns as devices the gradients are at home

    zeros = lambda a: jnp.zeros(a.shape, jnp.float32)
    begin = (_tiles(zeros(q), size), ((k, v, keys), (zeros(k), zeros(v))))
    (dq, (_, (dk, dv))), _ = jax.lax.scan(turn, begin, None, length=how.parts)
    return _untiled(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_ring.defvjp(_forward, _backward)


def _scores(how: _How, q_BtKGH, k_BsKH) -> jax.Array:
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BtKGH * how.scale, k_BsKH, preferred_element_type=jnp.float32)
    return how.softcap * jnp.tanh(scores / how.softcap) if how.softcap else scores


def _pass_on(how: _How, tree):
    """To the next device of the ring."""
    return jax.tree.map(lambda a: jax.lax.ppermute(a, how.axis, [(i, (i + 1) % how.parts) for i in range(how.parts)]), tree)


def _tile(tokens: int, block: int) -> int:
    """The largest size up to `block` that divides half of the device's tokens, which in zig-zag order are two pieces of a row."""
    half = tokens // 2 if tokens % 2 == 0 else tokens
    return max(n for n in range(1, min(half, block) + 1) if half % n == 0)


def _tiles(a: jax.Array, size: int) -> jax.Array:
    """`[B, T, ...]` -> `[I, B, t, ...]`."""
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)


def _untiled(a: jax.Array) -> jax.Array:
    """The inverse of `_tiles`."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])


def exchange(q_BTNH, k_BTKH, v_BTKH, queries: Tokens, keys: Tokens, *, axis: str, parts: int, order, kernel: Callable, **options) -> jax.Array:
    """The same by all-to-all: N / parts heads of whole rows pass `kernel`, `[B, T, N, H]`.

    Keys and values with fewer heads than `parts` are repeated. Sends 2 (N + K) / parts heads of a whole row per device, at once and not hidden.

    Args:
      order: int `[parts T]`, the token in each slot of the devices' rows one after the other (`sharding.zigzag`); the kernel gets them in time order.
      kernel: any of `attention.KERNELS`.
    """
    sorted_slots = jnp.argsort(jnp.asarray(order))
    repeats = max(1, parts // k_BTKH.shape[2])
    heads = lambda a: jax.lax.all_to_all(a, axis, 2, 1, tiled=True)[:, sorted_slots]
    rows = lambda tokens: jax.tree.map(lambda a: jax.lax.all_gather(a, axis, axis=1, tiled=True)[:, sorted_slots], tokens)
    out = kernel(heads(q_BTNH), heads(jnp.repeat(k_BTKH, repeats, axis=2)), heads(jnp.repeat(v_BTKH, repeats, axis=2)), rows(queries), rows(keys), **options)
    return jax.lax.all_to_all(out[:, jnp.asarray(order)], axis, 1, 2, tiled=True)
