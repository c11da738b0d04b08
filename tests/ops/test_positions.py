"""Rotary positions: both ways to turn are the formula, and its transpose turns back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import positions


@pytest.mark.parametrize("turn", [positions._turn_by_halves, positions._turn_by_product])
@pytest.mark.parametrize("rotated", [16, 10])
def test_each_pair_turns_by_its_angle(turn, rotated):
    """In complex numbers; dimensions beyond the rotated ones stay."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 3, 16)).astype(np.float32)
    cos, sin = positions.rotary_angles(jnp.arange(10).reshape(2, 5), positions.frequencies(rotated, 100.0))
    half = rotated // 2
    turned = (x[..., :half] + 1j * x[..., half:rotated]) * (np.asarray(cos) + 1j * np.asarray(sin))
    np.testing.assert_allclose(turn(x, cos, sin), np.concatenate([turned.real, turned.imag, x[..., rotated:]], -1), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_ways_are_the_same_and_so_is_the_gradient(dtype):
    x, g = (jax.random.normal(jax.random.key(seed), (2, 5, 3, 16), dtype) for seed in (0, 1))
    angles = positions.rotary_angles(jnp.arange(10).reshape(2, 5), positions.frequencies(16, 100.0))
    out = positions.rotate(x, angles)
    assert out.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    close = lambda a, b: np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (a, b)), rtol=tolerance, atol=tolerance)
    close(positions._turn_by_product(x, *angles), out)
    expected = jax.vjp(lambda x: positions._turn_by_halves(x, *angles), x)[1](g)[0]
    close(jax.vjp(lambda x: positions.rotate(x, angles), x)[1](g)[0], expected)
