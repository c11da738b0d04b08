"""Roofline arithmetic against figures worked out by hand, and operations counted on traced programs."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm import chips
from jaxlm.aot import roofline
from jaxlm.aot.hlo import Array, Collective

V5E = chips.topology("v5e:4x4")


def collective(kind, axes, devices, size, times=1):
    return Collective(kind, axes, devices, (Array("u8", (size,), False),), times, "", "")


def test_a_step_by_hand():
    """16 chips of 197 TFLOP/s: 98.5 TFLOP each take 0.5 s; 40.5 GB at 810 GB/s take 0.05 s; 2**20 tokens in 0.5 s."""
    t = roofline.estimate(V5E, flops=98.5e12, useful=16 * 78.8e12, traffic=40.95e9, ici=0.2, dcn=0.0, tokens=2**20, schedule=(0.4, 0.1))
    assert (t.compute, t.hbm, t.ici, t.bound) == (pytest.approx(0.5), pytest.approx(0.05), 0.2, "compute")
    assert t.step_seconds == t.least_seconds == pytest.approx(0.5)
    assert t.mfu == pytest.approx(0.8)
    assert t.tokens_per_second == pytest.approx(2**21)
    hours = 1e9 / 2**21 / 3600
    assert t.dollars_per_billion == pytest.approx(hours * 16 * 1.20)
    assert t.kwh_per_billion == pytest.approx(hours * 16 * 0.2)


def test_the_schedule_is_the_step_and_a_bubble_stretches_it():
    t = roofline.estimate(V5E, flops=1e12, useful=1e12, traffic=1e9, ici=0.3, dcn=0.4, tokens=1000, bubble=0.2, schedule=(0.5, 0.1))
    assert t.bound == "dcn" and t.least_seconds == pytest.approx(0.5) and t.step_seconds == pytest.approx(0.75)


def test_no_step_is_shorter_than_its_bound():
    t = roofline.estimate(V5E, flops=197e12, useful=1e12, traffic=1e9, ici=0.3, dcn=0.4, tokens=1000, schedule=(0.5, 0.1))
    assert t.step_seconds == t.least_seconds == pytest.approx(1.0)


@pytest.mark.parametrize("kind, expected", [("all-gather", 0.75), ("reduce-scatter", 0.75), ("all-reduce", 1.5), ("collective-permute", 1.0), ("all-to-all", 0.75)])
def test_collectives_by_hand(kind, expected):
    """90 GB over 90 GB/s between four devices: each misses three quarters; a reduction goes round twice."""
    assert roofline.seconds(kind, 90e9, 4, 90e9) == pytest.approx(expected)


def test_links_of_a_torus():
    v5p, v5e = chips.topology("v5p:4x4x8"), chips.topology("v5e:16x16")
    assert roofline.links_of(v5p, (4, 1, 1)) == 2 and roofline.links_of(v5p, (4, 4, 8)) == 6  # rings
    assert roofline.links_of(v5p, (1, 1, 4)) == 1  # half of a ring is a line
    assert roofline.links_of(V5E, (4, 4)) == 2 and roofline.links_of(v5e, (16, 1)) == 2


def test_communication_goes_over_the_right_network():
    gather = collective("all-gather", "fsdp", 16, int(1.6e9), times=3)
    assert roofline.communication(V5E, [gather], {"fsdp": 2}) == (pytest.approx(3 * 1.5e9 / 90e9), 0.0)
    across = collective("all-reduce", "slice", 2, int(1e9))
    assert roofline.communication(V5E, [across], {"slice": 0, "fsdp": 2}) == (0.0, pytest.approx(1e9 / 3.125e9))
    hop = collective("ring permute", "fsdp", 16, int(0.9e9))
    assert roofline.communication(V5E, [hop], {"fsdp": 2})[0] == pytest.approx(0.01)


def test_links_by_formula():
    assert roofline.formula_links(V5E, {"slice": 1, "fsdp": 16, "tensor": 1}) == {"fsdp": 2}
    assert roofline.formula_links(V5E, {"fsdp": 4, "tensor": 4}) == {"tensor": 1, "fsdp": 1}
    assert roofline.formula_links(chips.topology("v5e:4x4", 2), {"slice": 2, "fsdp": 16}) == {"slice": 0, "fsdp": 2}
    assert roofline.formula_links(chips.topology("gpu:h100x16"), {"fsdp": 2, "tensor": 8}) == {"tensor": 1, "fsdp": 0}


def test_operations_of_products_and_loops():
    w = jnp.zeros((5, 32, 32))
    f = lambda x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0].sum()
    assert roofline.jaxpr_flops(jax.make_jaxpr(f)(jnp.zeros((8, 32)))) == 5 * 2 * 8 * 32 * 32
    backward = roofline.jaxpr_flops(jax.make_jaxpr(jax.grad(lambda w, x: (x @ w).sum(), argnums=(0, 1)))(w[0], jnp.zeros((8, 32))))
    assert backward == 3 * 2 * 8 * 32 * 32


def test_recomputation_counts():
    g = lambda w, x: jnp.sin(jnp.sin(x @ w) @ w).sum()
    count = lambda f: roofline.jaxpr_flops(jax.make_jaxpr(jax.grad(f))(jnp.zeros((32, 32)), jnp.zeros((8, 32))))
    assert count(jax.checkpoint(g)) > count(g)


def test_ragged_products_count_each_row_once():
    f = lambda x, w, n: jax.lax.ragged_dot(x, w, n).sum()
    shapes = jnp.zeros((24, 16)), jnp.zeros((4, 16, 8)), jnp.array([6, 6, 6, 6])
    assert roofline.jaxpr_flops(jax.make_jaxpr(f)(*shapes)) == 2 * 24 * 16 * 8
    both = roofline.jaxpr_flops(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(*shapes))
    assert both == 3 * 2 * 24 * 16 * 8


def test_operations_agree_with_xla_where_there_is_no_loop():
    f = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
    a, b = jnp.zeros((3, 16, 32)), jnp.zeros((3, 32, 8))
    xla = jax.jit(f).lower(a, b).compile().cost_analysis()["flops"]
    assert roofline.jaxpr_flops(jax.make_jaxpr(f)(a, b)) == pytest.approx(xla, rel=0.01)
