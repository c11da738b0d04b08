"""Experts against a dense reference: nothing dropped, whatever the routing; both kernels, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.ops import moe

D, F, E = 6, 5, 7


def weights(key):
    a, b = jax.random.split(key)
    return jax.random.normal(a, (E, D, F)), jax.random.normal(b, (E, F, D))


def by_dispatch(x, share, chosen, w, kernel):
    return moe.dispatch(x, share, chosen, E, lambda rows, multiply: multiply(jax.nn.silu(multiply(rows, w[0])), w[1]), kernel)


def densely(x, share, chosen, w):
    every = jnp.einsum("ref,efd->red", jax.nn.silu(jnp.einsum("rd,edf->ref", x, w[0])), w[1])
    return (jnp.take_along_axis(every, chosen[..., None], axis=1) * share[..., None]).sum(1)


@pytest.mark.parametrize("rows, k, skew", [(1, 1, 0), (3, 2, 0), (130, 3, 0), (64, 2, 100), (600, 1, 1)])
def test_dispatch_equals_dense(rows, k, skew):
    key = jax.random.split(jax.random.key(rows), 4)
    x, w = jax.random.normal(key[0], (rows, D)), weights(key[1])
    logits = jax.random.normal(key[2], (rows, E)) + skew * (jnp.arange(E) == 4)  # skew: (almost) all choose expert 4
    share, chosen = moe.route(logits, k, renormalise=True)
    pull = jax.random.normal(key[3], (rows, D))

    @jax.jit
    def values(x, share, w):  # of each kernel and of the reference: the output, and the gradient of its product with `pull`
        kernels = [lambda *a, kernel=kernel: by_dispatch(*a, kernel) for kernel in ("blocks", "ragged")]
        return [(f(x, share, chosen, w), jax.grad(lambda x, s, w, f=f: (f(x, s, chosen, w) * pull).sum(), argnums=(0, 1, 2))(x, share, w))
                for f in (densely, *kernels)]

    expected, *found = values(x, share, w)
    for output, gradient in found:
        np.testing.assert_allclose(output, expected[0], atol=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), gradient, expected[1])


def test_routing():
    logits = jnp.array([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    shares = jax.nn.softmax(logits)
    plain, chosen = moe.route(logits, 2, renormalise=False)
    assert chosen.tolist() == [[1, 2], [0, 1]]
    np.testing.assert_allclose(plain, jnp.take_along_axis(shares, chosen, 1))
    np.testing.assert_allclose(moe.route(logits, 2, renormalise=True)[0].sum(1), 1, rtol=1e-6)


def test_balance_is_k_when_even_and_more_when_not():
    k, tokens = 2, 32
    even = jnp.tile(jnp.eye(8)[:, None] * 4.0, (1, 1, 1)).reshape(8, 8).repeat(4, 0)  # each expert first for the same number of tokens
    even = even + jnp.roll(even, 1, axis=1) * 0.9
    statistics = moe.statistics(even, moe.route(even, k, renormalise=True)[1], jnp.ones(tokens, bool))
    assert float(moe.balance(statistics["chosen"], statistics["shares"], statistics["tokens"])) == pytest.approx(k, rel=1e-5)
    skewed = even.at[:, 0].add(20.0)
    statistics = moe.statistics(skewed, moe.route(skewed, k, renormalise=True)[1], jnp.ones(tokens, bool))
    assert float(moe.balance(statistics["chosen"], statistics["shares"], statistics["tokens"])) > 4 * k - 1


def test_padding_does_not_count():
    logits = jax.random.normal(jax.random.key(0), (10, E))
    chosen = moe.route(logits, 2, renormalise=True)[1]
    part = moe.statistics(logits, chosen, jnp.arange(10) < 6)
    whole = moe.statistics(logits[:6], chosen[:6], jnp.ones(6, bool))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), part, whole)


@pytest.mark.parametrize("parts, k", [(2, 2), (4, 1), (8, 3)])
def test_dispatch_over_devices_equals_dense(parts, k):
    """Any routing, also all tokens to one expert, which takes every round."""
    experts = 8
    key = jax.random.split(jax.random.key(parts), 5)
    x, w = jax.random.normal(key[0], (48, D)), (jax.random.normal(key[1], (experts, D, F)), jax.random.normal(key[2], (experts, F, D)))
    pull = jax.random.normal(key[4], (48, D))

    def device(x, share, chosen, w0, w1):
        mlp = lambda rows, multiply: multiply(jax.nn.silu(multiply(rows, w0)), w1)
        return moe.dispatch_over(x, share, chosen, experts, mlp, "blocks", axis="expert", parts=parts, everywhere=("expert",))

    mesh = jax.make_mesh((parts,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:parts])
    over = jax.shard_map(device, mesh=mesh, in_specs=(P("expert"),) * 5, out_specs=P("expert"), check_vma=False)
    value = lambda f: jax.jit(jax.value_and_grad(lambda x, s, w, chosen: (f(x, s, chosen, w) * pull).sum(), argnums=(0, 1, 2)))
    split, whole = value(lambda x, s, c, w: over(x, s, c, *w)), value(densely)
    for skew in (0, 100):
        logits = jax.random.normal(key[3], (48, experts)) + skew * (jnp.arange(experts) == 5)
        share, chosen = moe.route(logits, k, renormalise=True)
        with jax.set_mesh(mesh):
            found = split(x, share, w, chosen)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), found, whole(x, share, w, chosen))
