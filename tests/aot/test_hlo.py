"""Reading compiled programs: loops counted as often as they run, groups of devices named by mesh axis, bytes as they move."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.aot import hlo

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 3)


def compiled(mesh, f, *shaped):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shaped]
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*arguments).compile()


@pytest.fixture(scope="module")
def layered(mesh):
    """Five layers in a scan, weights split over fsdp and gathered, the sum of squares reduced over all."""
    def f(w, x):
        def body(x, w):
            w = jax.lax.with_sharding_constraint(w, P(None, None))
            return jnp.tanh(x @ w), None
        return jnp.square(jax.lax.scan(body, x, w)[0]).sum()
    return compiled(mesh, f, ((5, 64, 64), P(None, "fsdp")), ((16, 64), P(("data", "fsdp"), None))).as_text()


def test_a_scan_is_counted_as_often_as_it_runs(layered):
    found = hlo.collectives(hlo.parse(layered), MESH)
    gather = [c for c in found if c.kind == "all-gather" and c.bytes == 64 * 64 * 4]
    assert [(c.axes, c.devices, c.times, c.loop) for c in gather] == [("fsdp", 2, 5, "5")]
    reduce = [c for c in found if c.kind == "all-reduce"]
    assert sum(c.times for c in reduce) >= 1 and all(c.bytes == 4 and c.loop == "" for c in reduce) and {c.axes for c in reduce} <= {"data+fsdp", "data", "fsdp"}


def test_trip_counts_without_the_compilers_note(layered):
    """TPU programs do not say `known_trip_count`: the comparison at the end of the condition does."""
    plain = re.sub(r'"?known_trip_count"?:\s*\{[^}]*\},?', "", layered)
    assert "known_trip_count" not in plain
    program = hlo.parse(plain)
    loops = [i for body in program.computations.values() for i in body if i.opcode == "while"]
    assert [hlo.trip_count(program, loop) for loop in loops] == [5]


@pytest.mark.parametrize("start, step, limit, direction, trips", [(0, 1, 22, "LT", 22), (0, 2, 8, "LT", 4), (3, 1, 7, "LE", 5), (0, 3, 8, "LT", 3)])
def test_trip_counts_with_any_start_and_step(start, step, limit, direction, trips):
    program = hlo.parse(f"""
%cond (p: (s32[], f32[4])) -> pred[] {{
  %p = (s32[], /*index=1*/f32[4]) parameter(0)
  %n = s32[]{{:T(128)}} constant({limit})
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %n), direction={direction}
}}

%body (q: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %q = (s32[], f32[4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %x = f32[4] get-tuple-element(%q), index=1
  %s = s32[] constant({step})
  %next = s32[] add(%j, %s)
  ROOT %t = (s32[], f32[4]) tuple(%next, %x)
}}

ENTRY %main (a: f32[4]) -> (s32[], f32[4]) {{
  %a = f32[4] parameter(0)
  %zero = s32[] constant({start})
  %init = (s32[], f32[4]) tuple(%zero, %a)
  ROOT %w = (s32[], f32[4]) while(%init), condition=%cond, body=%body
}}
""")
    assert hlo.trip_count(program, program.computations["main"][-1]) == trips


def test_nested_loops_multiply(mesh):
    def f(x):
        inner = lambda x, _: (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, P()) * 2, P("tensor")), None)
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None)
        return jax.lax.scan(outer, x, None, length=4)[0]
    found = hlo.collectives(hlo.parse(compiled(mesh, f, ((8, 8), P("tensor"))).as_text()), MESH)
    assert any(c.kind == "all-gather" and c.axes == "tensor" and c.times == 12 and c.loop == "4x3" for c in found)


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x=1", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("replica_groups=[4,2]<=[8], x", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("replica_groups=[2,4]<=[4,2]T(1,0), x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("replica_groups=[4,2]<=[2,2,2]T(2,1,0), x", [[0, 4], [2, 6], [1, 5], [3, 7]]),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
])
def test_three_notations_of_groups(text, groups):
    assert sorted(map(sorted, hlo.replica_groups(text, 8))) == sorted(groups)


def test_axes_of_permutes_and_partial_groups(mesh):
    def f(x):
        shift = lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
        return jax.shard_map(shift, in_specs=P("tensor"), out_specs=P("tensor"))(x)
    [permute] = hlo.collectives(hlo.parse(compiled(mesh, f, ((8, 8), P("tensor"))).as_text()), MESH)
    assert (permute.kind, permute.axes, permute.devices, permute.bytes) == ("collective-permute", "tensor", 2, 4 * 8 * 4)
    assert hlo._axes([[0, 1], [2, 3]], {"fsdp": 4}, whole=True) == ("part of fsdp", 2)
    assert hlo._axes([[0, 1, 2, 3]], {"data": 2, "fsdp": 2}, whole=True) == ("data+fsdp", 4)


def test_a_tpu_reduce_scatter_is_an_all_reduce_fused_with_its_slice():
    program = hlo.parse("""
%all-reduce-scatter.1 (input: f32[8,4]) -> f32[4,4] {
  %input = f32[8,4]{1,0:T(8,128)S(1)} parameter(0)
  %r = f32[8,4]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %s = f32[4,4]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={4,4}
}

ENTRY %main (a: f32[8,4]) -> f32[4,4] {
  %a = f32[8,4] parameter(0)
  ROOT %f = f32[4,4] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/transpose(jvp())/while/body/mlp/dot_general"}
}
""")
    [found] = hlo.collectives(program, {"fsdp": 2})
    assert (found.kind, found.axes, found.bytes, found.source) == ("reduce-scatter", "fsdp", 8 * 4 * 4, "bwd mlp/dot_general")
    assert hlo.Array("f32", (8, 4), True).bytes == 128


def test_traffic_counts_slices_not_the_whole_stack():
    """A scan over stacked weights reads each layer once, not the stack at every step."""
    def f(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    layers, width, rows = 16, 128, 4
    shapes = jax.ShapeDtypeStruct((layers, width, width), jnp.float32), jax.ShapeDtypeStruct((rows, width), jnp.float32)
    moved = hlo.traffic(hlo.parse(jax.jit(f).lower(*shapes).compile().as_text()))
    once = layers * width * width * 4
    assert once <= moved <= 4 * once


def test_traffic_of_one_product():
    text = jax.jit(lambda a, b: a @ b).lower(jnp.zeros((64, 32)), jnp.zeros((32, 16))).compile().as_text()
    assert hlo.traffic(hlo.parse(text)) == pytest.approx(4 * (64 * 32 + 32 * 16 + 64 * 16), rel=0.3)


def test_what_goes_between_slices_is_a_transfer_to_the_host():
    program = hlo.parse("""
ENTRY %main (a: bf16[64,8]) -> bf16[64,8] {
  %a = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %t = token[] after-all()
  %s = (bf16[64,8]{1,0}, u32[], token[]) send(%a, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %b = bf16[64,8] copy(%a)
}
""")
    [found] = hlo.collectives(program, {"slice": 2, "fsdp": 4})
    assert (found.kind, found.axes, found.devices, found.bytes, found.times) == ("all-reduce", "slice", 2, 64 * 8 * 2, 1)
