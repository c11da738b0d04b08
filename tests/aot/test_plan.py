"""Verdicts by formula, the search, the largest batch, what is printed and written, bad input: all without a compiler for TPUs."""

import dataclasses
import json
import math
import pathlib
import shutil

import pytest

from jaxlm import cli, config
from jaxlm.aot import chips, compiler, formula, plan, show

TINY = {"model": dict(vocab_size=512, context=64, layers=4, width=64, heads=4, dtype="bfloat16", remat="full"), "data": dict(sequence_length=64, batch_size=64),
        "tokenizer": dict(kind="bytes")}
H100 = chips.topology("gpu:h100x8")


def tiny(**parts):
    return config.build({name: TINY.get(name, {}) | parts.get(name, {}) for name in {*TINY, *parts}})


def test_state_is_exact():
    """Float32 parameters and AdamW's two moments, split eight ways."""
    parts = compiler.build(tiny(), compiler.abstract_mesh(tiny().mesh, 8), "gpu")
    count = 512 * 64 + 4 * (2 * 64 + 4 * 64 * 64 + 3 * 64 * 256) + 64
    state = compiler.state_bytes(parts)
    assert state["parameters"] == pytest.approx(4 * count / 8, rel=0.001)
    assert state["optimiser"] == pytest.approx(8 * count / 8, rel=0.001)
    assert state["batch"] == 5 * 4 * 64 * 64 // 8


def test_a_formula_verdict():
    v = plan.judge(tiny(), H100)
    assert v.method == "formula" and v.fits and v.mesh["fsdp"] == 8 and v.rows == 8
    assert v.flops * 8 == pytest.approx(v.useful * 4 / 3, rel=0.2)  # full recomputation
    assert v.time.mfu <= 1 and v.time.step_seconds >= v.time.least_seconds == max(v.time.compute, v.time.hbm, v.time.ici, v.time.dcn)


def test_the_formula_knows_what_each_axis_sends():
    found = lambda **mesh: {(c.kind, c.axes) for c in plan.judge(tiny(mesh=mesh), H100).collectives}
    assert found(fsdp=8) == {("all-gather", "fsdp"), ("reduce-scatter", "fsdp")}
    assert found(data=8, fsdp=1) == {("all-reduce", "data")}
    assert found(tensor=4, fsdp=2) == {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "tensor")}


def test_microbatches_and_remat_save_memory():
    big = dict(data=dict(sequence_length=64, batch_size=4096))
    size = lambda **parts: plan.judge(tiny(**(big | parts)), H100).memory["activations and temporaries"]
    assert size(train=dict(microbatches=8)) < 0.4 * size()
    assert size() < size(model=TINY["model"] | dict(remat="dots")) < size(model=TINY["model"] | dict(remat="none"))


def test_the_largest_batch_lies_on_the_edge():
    v = plan.largest_batch(plan.judge(tiny(), H100))
    at = lambda rows: plan.judge(plan.with_rows(v, rows), H100).fits
    assert v.largest_how == "by formula" and at(int(v.largest_rows * 0.999)) and not at(int(v.largest_rows * 1.01))


@pytest.mark.parametrize("bend", [0, 2])
@pytest.mark.parametrize("first, edge, step", [(8, 100, 1), (400, 100, 1), (8, 100, 8), (8, 6, 1), (1, 0, 1)])
def test_the_largest_batch_with_a_compiler(monkeypatch, first, edge, step, bend):
    """A pretended compiler that accepts up to `edge` rows: the line finds it, confirmation corrects a bend, the answer is a multiple of the microbatches."""
    topology = chips.topology("v5e:2x4")
    per_row = (topology.chip.usable - 10**9) / (edge + 0.5)
    base = plan.judge(tiny(data=dict(sequence_length=64, batch_size=8 * first), train=dict(microbatches=step)), H100)
    compiled = []
    bent = range(edge // step * step - bend * step + 1, 10 * edge) if bend and first < edge // 2 else ()  # refused though they lie below the line

    def judge(cfg, _, quick=False):
        rows = cfg.data.batch_size // 8
        compiled.append(rows)
        memory = {"parameters": 10**9, "activations and temporaries": int(per_row * rows)}
        return dataclasses.replace(base, topology=topology, config=cfg, method="compiled", memory=memory,
                                   fits=sum(memory.values()) <= topology.chip.usable and rows not in bent)

    monkeypatch.setattr(plan, "judge", judge)
    v = plan.largest_batch(judge(base.config, topology), confirm=True)
    assert v.largest_rows == max(0, edge // step * step - (bend * step if bent else 0)) and v.largest_rows % step == 0
    assert len(compiled) <= 4 + bend
    assert v.largest_rows == 0 or v.largest_rows in compiled


def test_the_search_ranks_all_axes():
    found = plan.search(tiny(data=dict(sequence_length=64, batch_size=64)), H100)
    assert {v.mesh["tensor"] for v in found} == {1, 2, 4} and {v.config.model.remat for v in found} == {"none", "dots", "full"}
    assert {v.config.data.batch_size for v in found} == {32, 64, 128} and all(math.prod(v.mesh.values()) == 8 for v in found)
    speeds = [v.time.tokens_per_second for v in found if v.fits]
    assert all(a >= b * 0.999 - 100 for a, b in zip(speeds, speeds[1:]))
    assert all(v.config.data.batch_size % (v.config.train.microbatches * math.prod(v.mesh[a] for a in ("slice", "data", "fsdp", "expert"))) == 0 for v in found)


def test_the_search_compiles_the_best_that_should_fit(monkeypatch):
    seen = []

    def judge(cfg, topology, quick=False):
        seen.append(cfg)
        if len(seen) == 1:
            raise ValueError("something does not divide")
        return dataclasses.replace(plan.by_formula(cfg, topology), method="compiled")

    monkeypatch.setattr(plan, "judge", judge)
    found = plan.search(tiny(), chips.topology("v5e:2x4"), top=2)
    assert [v.method for v in found[:3]] == ["compiled", "compiled", "formula"] and len(seen) == 3
    assert all(v.config not in seen for v in found if v.method == "formula")


def test_what_does_not_fit_when_compiled_is_last_and_others_are_tried(monkeypatch):
    tried = []

    def judge(cfg, topology, quick=False):
        tried.append(cfg)
        return dataclasses.replace(plan.by_formula(cfg, topology), method="compiled", fits=len(tried) > refused)

    monkeypatch.setattr(plan, "judge", judge)
    for refused, compiles in ((2, 3), (9, 3)):  # at most 3 times as many as were asked for
        tried.clear()
        found = plan.search(tiny(), chips.topology("v5e:2x4"), top=1)
        assert len(tried) == compiles and found[0].method == ("compiled" if refused < 3 else "formula") and found[0].fits
        assert not any(v.fits for v in found[-min(refused, 3):]) and {v.method for v in found[-min(refused, 3):]} == {"compiled"}


def test_experts_and_stages_are_searched():
    cfg = tiny(model=TINY["model"] | dict(experts=4, experts_per_token=2))
    axes = {axis for mesh in plan.meshes(cfg, H100) for axis in ("expert", "stage") if getattr(mesh, axis) > 1}
    assert axes == {"expert", "stage"}


def test_report_json_and_chart(tmp_path):
    verdicts = [plan.largest_batch(plan.judge(tiny(), chips.topology(name))) for name in ("gpu:h100x8", "gpu:a100x8")]
    text = show.report(verdicts[0])
    assert "predicted" in text and "by formula only" in text and "FITS" in text and "all-gather" in text and "dollars" in text
    values = json.loads(plan.dump(verdicts))
    assert values[0]["predicted"] is True and values[0]["method"] == "formula" and values[0]["memory_total_bytes"] == verdicts[0].total
    assert "predicted" in show.table(verdicts)
    show.chart(verdicts, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_the_verb_end_to_end_by_formula(tmp_path, capsys):
    flags = ["--config=llama_1b", "--topology=gpu:h100x8,gpu:a100x8", f"--json={tmp_path / 'f.json'}", "--config.train.microbatches=16"]
    assert cli.run("fit", flags) == 0
    out = capsys.readouterr().out
    assert "gpu:h100x8  8 chips (by formula only" in out and "rank" in out
    assert [v["topology"] for v in json.loads((tmp_path / "f.json").read_text())] == ["gpu:h100x8", "gpu:a100x8"]


@pytest.mark.parametrize("flags, words", [
    (["--topology=v5e:5x5"], "known: v5e, v6e as 2x2"),
    (["--topology=gpu:h100x8", "--config.data.batch_size=3"], "batch_size=3 must be a multiple of .* try 8"),
    (["--topology=gpu:h100x8", "--config.mesh.fsdp=3"], "must multiply to 8"),
    (["--topology=gpu:h100x8", "--config.mesh.tensor=8", "--config.model.heads=4"], "cannot be split over mesh.tensor=8"),
    (["--topology=gpu:h100x8", "--prices=nowhere.json"], "nowhere.json"),
    (["--topology=gpu:h100x8", "--top=0", "--search"], "--top=0 must be at least 1"),
    (["--topology=gpu:h100x8", "--num_slices=2"], None),
])
def test_bad_input_is_one_line(flags, words, capsys):
    arguments = ["--config=quickstart", "--config.model.vocab_size=4096", *flags]
    if words is None:
        assert cli.run("fit", arguments) == 0
        return
    with pytest.raises(SystemExit) as stopped:
        cli.run("fit", arguments)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("jaxlm: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and "Traceback" not in error
    import re
    assert re.search(words, lines[0]), lines[0]


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[tpu\]'"):
        compiler.require_libtpu()


def test_a_held_libtpu_is_waited_for(monkeypatch):
    import jax
    from jax.experimental import topologies
    monkeypatch.setattr(compiler, "require_libtpu", lambda: None)
    monkeypatch.setattr(compiler.time, "sleep", lambda seconds: None)
    answers = iter([True, True, False, True])

    def describe(**_):
        if next(answers):
            raise jax.errors.JaxRuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")
        return type("Topology", (), {"devices": ["a", "b"]})

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    said = []
    assert compiler.devices.__wrapped__("v5e:2x2", 1, said.append) == ("a", "b")
    assert len(said) == 1 and "waiting" in said[0]
    with pytest.raises(ValueError, match="libtpu_lockfile"):
        compiler.devices.__wrapped__("v5e:2x2", 1, said.append, patience=-1.0)


@pytest.mark.parametrize("message, temporaries", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.50G) exceeds available HBM (15.75G).", 16.5 * 2**30),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 18.5 * 2**30),
    ("RESOURCE_EXHAUSTED: no figures", 0)])
def test_the_compilers_figures_are_read(message, temporaries):
    assert compiler._exceeded(message, 2 * 2**30) == temporaries


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore",
                                     "INTERNAL: Error dispatching computation: Out of memory allocating 123 bytes.", ""])
def test_a_run_that_dies_of_it_is_told_the_command(monkeypatch, tmp_path, capsys, message):
    """On TPUs and GPUs, on CPUs (as XLA says it there), and of the machine's own memory."""
    import jax

    from jaxlm.train import loop

    def die(*_):
        raise jax.errors.JaxRuntimeError(message) if message else MemoryError

    monkeypatch.setattr(loop, "run", die)
    with pytest.raises(SystemExit) as stopped:
        cli.run("train", ["--config=quickstart", f"--workdir={tmp_path}", "--config.data.batch_size=64"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    assert "jaxlm fit --config=quickstart --topology=v5e:2x4 --search --config.data.batch_size=64" in lines[0]
    assert ("Out of memory allocating 123 bytes." if message else "this machine's own memory") in lines[0]


def test_other_errors_of_the_runtime_stay_what_they_are(monkeypatch, tmp_path):
    import jax

    from jaxlm.train import loop
    monkeypatch.setattr(loop, "run", lambda *_: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: boom")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="boom"):
        cli.run("train", ["--config=quickstart", f"--workdir={tmp_path}"])


def test_sizes_by_counting():
    parts = compiler.build(tiny(), compiler.abstract_mesh(tiny().mesh, 8), "gpu")
    size = plan._sizes(parts)
    assert isinstance(size, formula.Sizes) and size.outside == 512 * 64 + 64 and size.layer == 2 * 64 + 4 * 64 * 64 + 3 * 64 * 256
    assert size.optimiser == pytest.approx(2, rel=0.01)


def test_operations_of_splash_are_added():
    """Per layer and row of T tokens: 11 products of T x T / 2 x heads x size, with recomputation, else 9, against 6 in the model's own count."""
    wide = TINY["model"] | dict(width=512, heads=4, context=128)
    cfg = tiny(model=wide | dict(remat="full"), data=dict(sequence_length=128, batch_size=8))
    assert formula.kernel_flops(cfg, "tpu") == 11 * 4 * 8 * 128 * 128 * 512 and formula.kernel_flops(cfg, "gpu") == 0
    plain = tiny(model=wide | dict(remat="none"), data=dict(sequence_length=128, batch_size=8))
    assert formula.kernel_flops(plain, "tpu") == 9 * 4 * 8 * 128 * 128 * 512
    assert formula.kernel_flops(tiny(), "tpu") == 0  # heads of 16


def test_adapters_quantised_bases_and_frozen_layers_need_less():
    judged = lambda **parts: plan.judge(tiny(model=TINY["model"] | dict(width=256), **parts), H100)
    full, lora = judged(), judged(lora=dict(rank=4))
    nf4, frozen = judged(lora=dict(rank=4), optim=dict(frozen_dtype="nf4")), judged(optim=dict(frozen_layers=2))
    assert lora.memory["optimiser"] < full.memory["optimiser"] / 8 and lora.memory["parameters"] == pytest.approx(full.memory["parameters"], rel=0.1)
    assert nf4.memory["parameters"] < full.memory["parameters"] / 4 and nf4.memory["optimiser"] == pytest.approx(lora.memory["optimiser"], rel=0.01)
    assert 0.6 < lora.useful / full.useful < 0.75 and 0.6 < frozen.useful / full.useful < 0.8 and frozen.memory["optimiser"] < 0.6 * full.memory["optimiser"]
    sent = lambda verdict: sum(c.bytes * c.times for c in verdict.collectives if c.kind == "reduce-scatter")
    assert sent(lora) < sent(full) / 8
    pairs = judged(objective=dict(name="preference"), data=TINY["data"] | dict(format="preference"))  # the reference lies beside it
    assert pairs.memory["parameters"] == pytest.approx(2 * full.memory["parameters"], rel=0.01) and pairs.useful == pytest.approx(4 / 3 * full.useful, rel=0.01)


@pytest.mark.parametrize("name", ["classify", "regress", "token_classify"])
def test_labels_have_a_verdict(name):
    model = TINY["model"] | dict(kind="encoder", causal=False)
    found = plan.judge(tiny(model=model, objective=dict(name=name), data=TINY["data"] | dict(label_key="label")), H100)
    assert found.fits and found.config.model.labels in (0, 1, 2)


def test_what_a_run_begins_from_is_read_for_its_sizes(tmp_path):
    fixtures = pathlib.Path(__file__).parents[1] / "interop" / "fixtures"
    folder = shutil.copytree(fixtures / "encoders" / "bert", tmp_path / "bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]) + "\n")
    with pytest.raises(ValueError, match="train.init_from=hf:nowhere, whose sizes are needed: .*; or say them: --config.train.init_from= ") as caught:
        plan.judge(config.load("sentiment", [("train.init_from", "hf:nowhere")]), H100)
    assert "\n" not in str(caught.value)
    asked = config.load("sentiment", [("train.init_from", f"hf:{folder}"), ("data.sequence_length", "16"), ("mesh.fsdp", "1")])
    found = plan.largest_batch(plan.judge(asked, chips.topology("gpu:h100x1")))
    assert found.fits and found.largest_rows > 16 and (found.config.model.width, found.config.model.output) == (16, "sequence_labels")
