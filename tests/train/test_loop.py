"""Whole runs: what they write, how they stop, how they go on."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm import cli
from jaxlm.data import prepare
from jaxlm.train import checkpoint, health, loop, report, saved
from jaxlm.train.lock import Lock
from jaxlm.train.stop import StopRequest
from tests.train import runs


@pytest.fixture(autouse=True)
def signals():
    """A run takes the signal handlers; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps, with everything in its state: Adam's moments, an average of the parameters, dropout."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = runs.load(folder, [("optim.ema", "0.99"), ("data.dir", str(folder / "data"))])
    assert loop.run(cfg, folder / "run") == 0
    return folder, cfg


def stop_after(monkeypatch, last):
    monkeypatch.setattr(StopRequest, "at", lambda self, step: step >= last)


def test_what_a_run_leaves(whole):
    folder, _ = whole
    rows = runs.read_metrics(folder / "run")
    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 13))
    assert trained[-1]["train/loss"] < trained[0]["train/loss"]
    assert {"train/lr", "train/grad_norm", "train/param_norm", "train/accuracy", "perf/tokens_per_second", "perf/mfu", "perf/step_seconds",
            "perf/data_wait", "memory/peak_gib"} <= trained[-1].keys()
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [row["step"] for row in rows if "eval/loss" in row] == [6, 12] and "test/bits_per_byte" in rows[-1]
    assert checkpoint.steps(folder / "run") == [8, 12]
    assert json.loads((folder / "run" / "FINISHED").read_text()) == {"step": 12}


def test_tensorboard_shows_it(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(whole[0] / "run"))
    board.Reload()
    curve = board.Scalars("train/loss")
    assert [event.step for event in curve] == list(range(1, 13))
    assert [event.value for event in curve] == pytest.approx(list(runs.losses(whole[0] / "run").values()))
    assert {"train/lr", "perf/mfu", "perf/data_wait", "eval/bits_per_byte", "memory/peak_gib"} <= set(board.Tags()["scalars"])
    texts = {name: board.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode() for name in ("config", "parameters", "sample")}
    assert '"lr": 0.001' in texts["config"] and "layers/attn/q" in texts["parameters"] and texts["sample"].startswith("[")


def test_what_was_logged_past_the_checkpoint_is_taken_back(tmp_path):
    rows = [{"step": step, "train/loss": 1 / step} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "tra')
    report.Reporter(tmp_path, 2, {}).close()
    assert runs.read_metrics(tmp_path) == rows[:2]


def test_resumed_losses_are_bitwise_equal(whole, tmp_path, monkeypatch):
    """One run stopped four times: after its first step, at a save, at an evaluation, before its last step."""
    folder, cfg = whole
    for last in (1, 4, 6, 11):
        with monkeypatch.context() as patch:
            stop_after(patch, last)
            loop.run(cfg, tmp_path / "run")
        assert checkpoint.steps(tmp_path / "run")[-1] == last and not (tmp_path / "run" / "FINISHED").exists()
    assert loop.run(cfg, tmp_path / "run") == 0
    assert runs.losses(tmp_path / "run") == runs.losses(folder / "run")


def test_a_lost_checkpoint_costs_steps_not_truth(whole, tmp_path, capsys):
    folder, cfg = whole
    shutil.copytree(folder / "run", tmp_path / "run")
    victim = max((tmp_path / "run" / "checkpoints" / "12" / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert loop.run(cfg, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "damaged" in out and "resumed after step 8" in out
    assert runs.losses(tmp_path / "run") == runs.losses(folder / "run")


def test_another_mesh_goes_on_within_rounding(whole, tmp_path, capsys):
    folder, cfg = whole
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    mesh = dataclasses.replace(cfg.mesh, data=2, fsdp=2, tensor=2)
    assert loop.run(dataclasses.replace(cfg, mesh=mesh, train=dataclasses.replace(cfg.train, microbatches=2)), tmp_path / "run") == 0
    assert "resumed after step 8" in capsys.readouterr().out
    expected = runs.losses(folder / "run")
    found = runs.losses(tmp_path / "run")
    assert found.keys() == expected.keys() and all(found[step] == expected[step] for step in range(1, 9))
    # Dropout draws per microbatch, so the later losses differ by noise, not by a jump.
    assert all(abs(found[step] - expected[step]) < 0.3 for step in range(9, 13))


def test_a_finished_run_has_nothing_to_do(whole, capsys):
    before = runs.read_metrics(whole[0] / "run")
    assert loop.run(whole[1], whole[0] / "run") == 0
    assert "this run is finished (step 12)" in capsys.readouterr().out and runs.read_metrics(whole[0] / "run") == before
    assert (whole[0] / "run" / "FINISHED").exists()


def test_another_config_is_refused_with_its_difference(whole):
    other = runs.load(whole[0], [("optim.lr", "0.5"), ("optim.ema", "0.99"), ("train.log_every", "3")])
    with pytest.raises(ValueError, match=r"another config \(optim.lr: 0.001 -> 0.5\)"):
        loop.run(other, whole[0] / "run")


def test_another_corpus_is_refused(whole, tmp_path):
    folder, cfg = whole
    runs.write_corpus(tmp_path / "corpus.jsonl", documents=90)
    data = dataclasses.replace(cfg.data, source=(str(tmp_path / "corpus.jsonl"),), dir=str(tmp_path / "shards"))
    prepare.prepare(data, cfg.tokenizer, tmp_path / "shards")
    with pytest.raises(ValueError, match="holds another corpus than the run"):
        loop.run(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=(), dir=str(tmp_path / "shards"))), folder / "run")


def test_divergence_ends_the_run_and_names_the_place(tmp_path):
    cfg = runs.load(tmp_path, [("optim.name", "sgd"), ("optim.lr", "1e25"), ("optim.clip", "0"), ("train.bad_steps", "3"), ("optim.warmup", "0"),
                               ("model.layers", "1")])
    with pytest.raises(ValueError, match=r"not finite in 3 steps in a row .* the last at step \d+, rows \d+ to \d+ of the token stream") as ended:
        loop.run(cfg, tmp_path / "run")
    rows = report.read_metrics(tmp_path / "run", health.FILE)
    first, last = rows[0], rows[-1]
    assert [row["step"] for row in rows] == [*range(first["step"], first["step"] + 3)] and last["rows"] == [8 * last["step"] - 8, 8 * last["step"] - 1]
    assert last["documents"][0]["id"] in str(ended.value) and f"--step={first['step']} says" in str(ended.value) and "\n" not in str(ended.value)


def test_ema_is_what_is_evaluated(whole):
    folder = whole[0] / "run"
    run = saved.open_run(folder)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.params)
    for ema in (True, False):
        saved_params = checkpoint.restore_params(folder, 12, target, ema=ema)
        assert np.array_equal(run.params["embed"]["tokens"], saved_params["embed"]["tokens"]) == ema


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(whole, tmp_path, monkeypatch, capfd, number, code):
    """In this process; test_processes.py sends it from outside."""
    at = StopRequest.at

    def signalled(request, step):
        if step == 3:
            os.kill(os.getpid(), number)
        return at(request, step)

    monkeypatch.setattr(StopRequest, "at", signalled)
    assert loop.run(whole[1], tmp_path / "run") == code
    last = checkpoint.steps(tmp_path / "run")[-1]
    assert 3 <= last < 12 and f"the checkpoint of step {last} is safe" in capfd.readouterr().out
    losses = runs.losses(whole[0] / "run")
    assert runs.losses(tmp_path / "run") == {step: losses[step] for step in range(1, last + 1)}


def test_watchdog_ends_what_hangs():
    code = "import time\nfrom jaxlm.train.stop import Watchdog\nwith Watchdog(0.5) as w:\n  w.beat()\n  time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=runs.environment())
    assert done.returncode == 75 and "nothing finished for 0.5 s" in done.stderr and "File" in done.stderr


def test_second_interrupt_leaves_at_once():
    code = "import time, os, signal\nfrom jaxlm.train.stop import StopRequest\ns = StopRequest(); s.arm()\nos.kill(os.getpid(), signal.SIGINT)\n" \
           "assert s.at(1) and s.now()\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=runs.environment())
    assert done.returncode == 130 and "stopping after this step" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_two_trainers_never_share_a_workdir(whole, capsys):
    """tests/train/test_checkpoint.py has the lock between processes."""
    with Lock(whole[0] / "run"), pytest.raises(SystemExit) as ended:
        cli.main(["train", f"--config={whole[0] / 'recipe.py'}", f"--workdir={whole[0] / 'run'}"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"process {os.getpid()}" in error and len(error.strip().splitlines()) == 1
