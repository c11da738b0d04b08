"""With the real TPU compiler: collective contracts of the recipes, verdicts on memory against its own errors, the formula against its figures."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from jaxlm import chips, cli
from jaxlm.aot import compiler, plan
from tests.aot import contracts

pytestmark = [pytest.mark.tpu_aot, pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxlm[tpu]'")]


@pytest.mark.parametrize("name", contracts.CONTRACTS)
def test_the_contract_of_each_recipe(name):
    golden = contracts.read(name)
    broken = contracts.breaches(golden, contracts.compiled(contracts.recipe(name)))
    assert not broken, (f"{name} sends other things between devices than agreed (with libtpu {golden['libtpu']}):\n  " + "\n  ".join(broken)
                        + "\nIf that is meant, or a newer libtpu does the same in another way: python tools/refresh_golden.py collectives, and say why in the commit.")


@pytest.mark.parametrize("name", contracts.CONTRACTS)
def test_nothing_gathers_the_whole_model(name):
    """Of the agreed collectives none holds more than the largest single weight, and only weights' names, activations and nothing else occur."""
    golden, cfg = contracts.read(name), contracts.recipe(name)
    largest = max(contracts.largest_weight(cfg), 4 * 16 * 640 * cfg.model.width)
    for key, row in golden["collectives"].items():
        assert row["bytes"] // row["times"] <= largest * 4, key
        assert "?" not in key.split(":")[0], key


@pytest.fixture(scope="module")
def agreed():
    return contracts.compiled(contracts.small())


def test_a_plain_small_model_gathers_and_scatters(agreed):
    """That the comparison finds nothing in the same program compiled again is what the recipes' contracts show."""
    assert any(key.startswith("all-gather over fsdp: layers/mlp") for key in agreed) and any(
        key.startswith(("reduce-scatter over fsdp: layers/mlp", "ring permute over fsdp: layers/mlp")) for key in agreed)  # a reduce-scatter, whole or step by step


@pytest.mark.parametrize("rules", [dict(embed=None), dict(residual=("fsdp",), batch=("data",))],
                         ids=["weights whole everywhere", "activations split instead of the batch"])
def test_a_mistake_in_a_rule_breaks_the_contract(agreed, rules, monkeypatch):
    contracts.with_rules(monkeypatch, **rules)
    assert contracts.breaches({"collectives": agreed}, contracts.compiled(contracts.small()))


def test_the_verdict_agrees_with_the_compiler_on_a_grid():
    """Rows around the extrapolated limit: what it accepts is by our count within what a program may take, what it refuses is beyond."""
    cfg, topology = contracts.small(data=dict(sequence_length=640, batch_size=2048)), chips.topology("v5e:2x2")
    v = plan.largest_batch(plan.judge(cfg, topology, quick=True), quick=True)
    assert v.fits and v.largest_rows > v.rows
    for share in (1.0, 1.2):
        found = plan.judge(plan.with_rows(v, int(v.largest_rows * share)), topology, quick=True)
        assert found.fits == (found.error == "") == (found.total <= topology.chip.usable), (share, found.total / 2**30, found.error)
        assert found.fits or share > 1


@pytest.mark.parametrize("gib, fits", [(2, True), (12, False)])
def test_the_compiler_counts_arguments(gib, fits):
    """4 GiB of temporaries fit beside 2 GiB of arguments in 15.75 GiB, and not beside 12."""
    place = jax.sharding.SingleDeviceSharding(compiler.devices("v5e:2x2", 1)[0])
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in ((gib * 2**18, 1024), (1024, 1024))]

    def f(w, x):
        _, states = jax.lax.scan(lambda c, _: (jnp.sin(c @ c), c), x, length=2048)  # 2,048 of 2 MiB, kept as the bfloat16 that is multiplied; the last is needed first
        return w + 1, jax.lax.scan(lambda c, state: (jnp.sin(c @ state), None), x, states, reverse=True)[0]

    lowered = jax.jit(f, donate_argnums=0).lower(*given)
    with compiler._no_cache():
        if fits:
            assert lowered.compile().memory_analysis().peak_memory_in_bytes == pytest.approx((gib + 4) * 2**30, rel=0.05)
        else:
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"RESOURCE_EXHAUSTED.*\(16\.0.G\) exceeds available HBM \(15.75G\)"):
                lowered.compile()


def test_the_formula_is_near_the_compiler():
    for parts in ({}, {"model": dict(vocab_size=2048, context=640, layers=2, width=512, heads=4, feedforward=1024, dtype="bfloat16", remat="none", tied=False)}):
        cfg = contracts.small(**({"data": dict(sequence_length=640, batch_size=512)} | parts))
        compiled, formula = plan.judge(cfg, contracts.TOPOLOGY, quick=True), plan.by_formula(cfg, contracts.TOPOLOGY)
        assert 0.5 < formula.total / compiled.total < 2, (formula.memory, compiled.memory)
        assert formula.flops == pytest.approx(compiled.flops, rel=0.25)


def test_two_slices_exchange_gradients_alone():
    """Once a step each part of the gradients, and nothing that is as large as a gathered weight."""
    v = plan.judge(contracts.small(), chips.topology("v5e:2x2", 2), quick=True)
    across = [c for c in v.collectives if c.axes == "slice"]
    assert v.mesh["slice"] == 2 and v.time.dcn > 0 and {c.kind for c in across} == {"all-reduce"}
    sent = sum(c.bytes * c.times for c in across)
    assert 0.4 * v.memory["parameters"] <= sent <= 2 * v.memory["parameters"]  # bfloat16 parts of float32 parameters, some not split


def test_the_verb_end_to_end(tmp_path, capsys):
    recipe = tmp_path / "small.py"
    recipe.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict(dict(model=dict(vocab_size=512, context=128, layers=2, width=128,"
                      " heads=2, dtype='bfloat16'), data=dict(sequence_length=128, batch_size=16), tokenizer=dict(kind='bytes')))\n")
    flags = [f"--config={recipe}", "--topology=v5e:2x2,v6e:2x2", "--quick", f"--json={tmp_path / 'f.json'}", f"--plot={tmp_path / 'f.png'}"]
    assert cli.run("fit", flags) == 0
    text = capsys.readouterr().out
    assert "compiled by libtpu" in text and "FITS" in text and "extrapolated" in text
    found = json.loads((tmp_path / "f.json").read_text())
    assert [v["topology"] for v in found] == ["v5e:2x2", "v6e:2x2"] and all(v["compile_seconds"] > 0 and v["collectives"] for v in found)
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_what_does_not_divide_is_refused_before_compiling():
    with pytest.raises(ValueError, match="batch_size=6 must be a multiple of"):
        plan.judge(contracts.small(data=dict(sequence_length=640, batch_size=6)), contracts.TOPOLOGY)
    with pytest.raises(ValueError, match="must multiply to 8"):
        compiler.abstract_mesh(contracts.small(mesh=dict(fsdp=3)).mesh, 8)
