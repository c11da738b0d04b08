"""Attention over devices equals attention on one: values and gradients, any order of the tokens, packed rows, windows, soft-caps, shared key heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlm.ops import attention, ring
from jaxlm.ops.attention import Tokens
from jaxlm.sharding import zigzag

B, T, N, H = 2, 32, 4, 8


def tokens(rows=B, length=T):
    """Two documents and padding in each row."""
    place = np.arange(length)
    cuts, ends = np.array([[11], [20]])[:rows], np.array([[27], [32]])[:rows]
    segments = np.where(place >= ends, 0, np.where(place >= cuts, 2, 1))
    return Tokens(jnp.array(np.where(segments == 2, place - cuts, place), jnp.int32), jnp.array(segments, jnp.int32))


def inputs(kv_heads, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(kv_heads), 4)
    return [jax.random.normal(key, (B, T, heads, H)).astype(dtype) for key, heads in zip(keys, (N, kv_heads, kv_heads, N))]


def over_devices(parts, f, q, k, v, places, **options):
    """`f` on `parts` devices, tokens in zig-zag order on the way in and undone on the way out."""
    mesh = jax.make_mesh((parts,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:parts])
    order = zigzag(parts, T)
    row = P(None, "sequence")
    device = lambda q, k, v, places: f(q, k, v, places, places, axis="sequence", parts=parts, **options)
    over = jax.shard_map(device, mesh=mesh, in_specs=(row,) * 4, out_specs=row, check_vma=False)
    out = over(*jax.tree.map(lambda a: a[:, order], (q, k, v, places)))
    return out[:, np.argsort(order)]


OPTIONS = [{}, {"window": jnp.int32(5)}, {"softcap": 2.0}, {"causal": False}, {"causal": False, "window": jnp.int32(4), "softcap": 3.0}]


def both(f, options, kv_heads, dtype=jnp.float32):
    q, k, v, pull = inputs(kv_heads, dtype)
    places, loss = tokens(), lambda attend: lambda q, k, v: (attend(q, k, v).astype(jnp.float32) * pull * (tokens().segments > 0)[..., None, None]).sum()
    value = lambda attend: jax.jit(lambda q, k, v: (attend(q, k, v), jax.grad(loss(attend), argnums=(0, 1, 2))(q, k, v)))(q, k, v)
    return value(f), value(lambda q, k, v: attention.reference(q, k, v, places, places, scale=H**-0.5, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts, kv_heads, block", [(2, 4, 512), (4, 2, 2), (1, 1, 4)])
def test_ring_equals_reference(parts, kv_heads, block, options):
    found, expected = both(lambda q, k, v: over_devices(parts, ring.ring, q, k, v, tokens(), scale=H**-0.5, block=block, **options), options, kv_heads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts, kv_heads", [(2, 4), (4, 2), (2, 1)])
def test_exchange_equals_reference(parts, kv_heads, options):
    f = functools.partial(ring.exchange, order=zigzag(parts, T), kernel=attention.blocked if options.get("causal", True) else attention.reference)
    found, expected = both(lambda q, k, v: over_devices(parts, f, q, k, v, tokens(), scale=H**-0.5, **options), options, kv_heads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


def test_in_bfloat16():
    found, expected = both(lambda q, k, v: over_devices(4, ring.ring, q, k, v, tokens(), scale=H**-0.5), {}, 2, jnp.bfloat16)
    assert found[0].dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05), found, expected)


def test_no_scores_of_a_whole_row_exist():
    """Memory grows with the device's own tokens: the largest array in forward and backward is the tile of scores or the tokens themselves."""
    q, k, v, pull = (jnp.zeros((1, 512, n, 4)) for n in (2, 1, 1, 2))
    places = Tokens(jnp.zeros((1, 512), jnp.int32), jnp.ones((1, 512), jnp.int32))
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    device = lambda q, k, v, places: ring.ring(q, k, v, places, places, axis="sequence", parts=4, scale=1.0, block=16)
    f = jax.shard_map(device, mesh=mesh, in_specs=(P(None, "sequence"),) * 4, out_specs=P(None, "sequence"), check_vma=False)
    text = jax.jit(jax.grad(lambda q, k, v: (f(q, k, v, places) * pull).sum(), argnums=(0, 1, 2))).lower(q, k, v).as_text()
    assert "128x128" not in text and "512x512" not in text and "16x16xf32" in text
