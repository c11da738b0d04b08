"""The walk through a scheduled program, on programs written by hand whose times can be added up."""

import pytest

from jaxlm import chips
from jaxlm.aot import hlo, schedule

V5E = chips.topology("v5e:4x4")  # 1.5e9 cycles/s; a gather over fsdp=16 goes over two links of 45 GB/s
MESH, LINKS = {"slice": 1, "fsdp": 16}, {"fsdp": 2}
MILLISECOND = '"estimated_cycles":"1500000"'
GATHER = "channel_id=1, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}"
WHOLE = 96_000_000  # elements of bfloat16, of which 15/16 cross 90 GB/s: 2 ms


def times(body, mesh=MESH, links=LINKS, rest="", topology=V5E):
    text = f"HloModule m, is_scheduled=true\n{rest}\nENTRY %main (p: bf16[8]) -> bf16[8] {{\n  %p = bf16[8]{{0}} parameter(0)\n{body}\n}}\n"
    return schedule.schedule(hlo.parse(text), topology, mesh, links)


def work(name, operand="p", more=""):
    return f'  %{name} = bf16[8]{{0:S(1)}} fusion(%{operand}), kind=kLoop, calls=%none{more}, backend_config={{{MILLISECOND}}}'


def test_what_the_core_does_adds_up_and_a_plain_gather_is_waited_for():
    t = times("\n".join([work("a"), f"  %g = bf16[{WHOLE}]{{0}} all-gather(%a), {GATHER}", work("b")]))
    assert (t.compute, t.ici, t.ici_busy, t.seconds) == tuple(pytest.approx(x) for x in (2e-3, 2e-3, 2e-3, 4e-3))
    assert [(o.kind, o.name, o.times) for o in t.operations if o.name in "g"] == [("ici", "g", 1)]


@pytest.mark.parametrize("between, waits", [(0, 2e-3), (1, 1e-3), (3, 0)])
def test_communication_hides_behind_what_stands_between_its_start_and_its_end(between, waits):
    start = f"  %s = (bf16[8]{{0}}, bf16[{WHOLE}]{{0}}) all-gather-start(%p), {GATHER}"
    t = times("\n".join([start, *(work(f"w{i}") for i in range(between)), f"  %d = bf16[{WHOLE}]{{0}} all-gather-done(%s)"]))
    assert t.compute == pytest.approx(between * 1e-3) and t.ici == pytest.approx(waits, abs=1e-9) and t.ici_busy == pytest.approx(2e-3)


def test_a_gather_fused_with_computation_counts_once():
    """The TPU's way: a fusion that starts it, one that it runs beside, one that ends it, all with the same channel inside."""
    inside = "".join(f"%{name} (q: bf16[8]) -> bf16[8] {{\n  %q.{name} = bf16[8]{{0}} parameter(0)\n  ROOT %g.{name} = bf16[{WHOLE}]{{0}} all-gather(%q.{name}), "
                     f"{GATHER}\n}}\n\n" for name in ("f1", "f2", "f3"))
    body = "\n".join(["  %async-collective-start = (bf16[8]{0}, u32[]) fusion(%p), kind=kCustom, calls=%f1",
                      f"  %beside = bf16[8]{{0:S(1)}} fusion(%p), kind=kOutput, calls=%f2, backend_config={{{MILLISECOND}}}",
                      "  %async-collective-done = bf16[8]{0} fusion(%beside), kind=kCustom, calls=%f3"])
    t = times(body, rest=inside)
    assert (t.compute, t.ici, t.ici_busy) == tuple(pytest.approx(x) for x in (1e-3, 1e-3, 2e-3))
    text = f"HloModule m\n{inside}\nENTRY %main (p: bf16[8]) -> bf16[8] {{\n  %p = bf16[8]{{0}} parameter(0)\n{body}\n}}\n"
    assert [(c.kind, c.times) for c in hlo.collectives(hlo.parse(text), MESH)] == [("all-gather", 1)]


def test_a_gather_beside_a_loop_counts_once():
    """It starts before the loop and ends after it; what runs beside it in the loop carries it too."""
    inside = "".join(f"%{name} (q: bf16[8]) -> bf16[8] {{\n  %q.{at} = bf16[8]{{0}} parameter(0)\n  ROOT %g.{at} = bf16[{WHOLE}]{{0}} all-gather(%q.{at}), "
                     f"{GATHER}\n}}\n\n" for at, name in enumerate(("f1", "async_collective_fusion.7", "f3")))
    loop = f"""%body (p: bf16[8]) -> bf16[8] {{
  %p.1 = bf16[8]{{0}} parameter(0)
  ROOT %beside = bf16[8]{{0:S(1)}} fusion(%p.1), kind=kOutput, calls=%async_collective_fusion.7, backend_config={{{MILLISECOND}}}
}}

%condition (p: bf16[8]) -> pred[] {{
  %p.2 = bf16[8]{{0}} parameter(0)
  ROOT %c = pred[] constant(true)
}}
"""
    body = "\n".join(["  %async-collective-start = (bf16[8]{0}, u32[]) fusion(%p), kind=kCustom, calls=%f1",
                      '  %w = bf16[8]{0} while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}',
                      "  %async-collective-done = bf16[8]{0} fusion(%w), kind=kCustom, calls=%f3"])
    t = times(body, rest=inside + loop)
    assert (t.compute, t.ici, t.ici_busy) == (pytest.approx(5e-3), 0.0, pytest.approx(2e-3))


def test_a_loop_runs_as_often_as_it_does():
    rest = f"""%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {{
  %p.1 = (s32[], bf16[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
{work("inner", "p.1")}
  ROOT %t = (s32[], bf16[8]{{0}}) tuple(%i, %inner)
}}

%condition (p: (s32[], bf16[8])) -> pred[] {{
  %p.2 = (s32[], bf16[8]{{0}}) parameter(0)
  ROOT %c = pred[] constant(true)
}}
"""
    t = times('  %w = (s32[], bf16[8]{0}) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}', rest=rest)
    assert t.compute == pytest.approx(7e-3)
    assert [(o.name, o.times, o.seconds) for o in t.operations] == [("inner", 7, pytest.approx(7e-3))]


def test_neighbours_in_both_directions_share_no_link():
    permute = lambda name, pairs, operand: (f"  %{name} = (bf16[22500000]{{0}}, bf16[22500000]{{0}}, u32[], u32[]) collective-permute-start(%{operand}), "
                                            f"channel_id={name[1:]}, source_target_pairs={{{pairs}}}")
    done = lambda name: f"  %d{name} = bf16[22500000]{{0}} collective-permute-done(%{name})"
    right, left = "{0,1},{1,0}", "{1,0},{0,1}"
    both = times("\n".join([permute("s1", right, "p"), permute("s2", left, "p"), done("s1"), done("s2")]))
    one_way = times("\n".join([permute("s1", right, "p"), permute("s2", right, "p"), done("s1"), done("s2")]))
    assert both.ici == pytest.approx(1e-3) and one_way.ici == pytest.approx(2e-3)


def test_slices_exchange_over_the_network():
    more = '_xla_host_transfer_rendezvous="r", _xla_megascale_transfer_type="ALL_REDUCE"'
    body = "\n".join([f"  %s = (f32[3125000]{{0}}, u32[], token[]) send(%p), channel_id=1, frontend_attributes={{{more}}}", work("w"),
                      f"  %r = (f32[3125000]{{0}}, u32[], token[]) recv(%p), channel_id=2, frontend_attributes={{{more}}}",
                      f"  %d = (f32[3125000]{{0}}, token[]) recv-done(%r), channel_id=2, frontend_attributes={{{more}}}"])
    t = times(body, {"slice": 2, "fsdp": 16}, {"slice": 0, "fsdp": 2}, topology=chips.topology("v5e:4x4", 2))
    assert t.dcn_busy == pytest.approx(12.5e6 / 3.125e9) and t.dcn == pytest.approx(t.dcn_busy - 1e-3) and t.ici == 0


@pytest.mark.parametrize("rows", ["1,", ""])
def test_splash_is_reckoned_by_its_shapes(rows):
    """Its kernels carry no estimate: 2 products forward, 4 and 3 backward, or 5 in one kernel that has the queries' gradient by blocks, of the causal half; one
    row has no axis of rows."""
    def seconds(name, result):
        q = f"  %q = bf16[{rows}32,2048,128]{{2,1,0}} copy(%p), backend_config={{{MILLISECOND}}}"
        kernel = f'  %splash_mha_{name}_residuals.2 = {result} custom-call(%q), custom_call_target="tpu_custom_call"'
        return times(f"{q}\n{kernel}").compute - 1e-3

    product, same = 32 * 2048**2 * 128 / 197e12 / 0.5, f"bf16[{rows}32,2048,128]{{2,1,0}}"
    fused = f"(bf16[2,{rows}32,2048,128]{{3,2,1,0}}, {same})"
    found = [seconds("fwd", same), seconds("dkv", f"({same}, {same})"), seconds("dq", same), seconds("dkv", fused)]
    assert found == [pytest.approx(n * product) for n in (2, 4, 3, 5)]
