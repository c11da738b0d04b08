"""Damaged files are named and not used; where nothing can be written a run says so and loses nothing; storage that is slow or gone for a moment and clocks that
jump do no harm."""

import dataclasses
import errno
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter

import jax
import numpy as np
import pytest

from jaxlm import cli, config
from jaxlm.data import patience, records, shards, sums
from jaxlm.train import checkpoint, clock, durable, loop, report
from jaxlm.train.lock import Lock
from tests.faults import damaged
from tests.train import runs
from tests.train.checkpoint_worker import make_state

pytestmark = pytest.mark.usefixtures("one_device")


# --- damaged files ---


def test_sums_name_what_is_damaged_missing_or_unknown(tmp_path):
    dice = random.Random(0)
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(dice.randbytes(50))
    sums.check(tmp_path, lambda name: True)  # nothing is known
    sums.write(tmp_path)
    sums.check(tmp_path, lambda name: not name.endswith(".md"))
    names = [line.split("  ")[1] for line in (tmp_path / sums.FILE).read_text().splitlines()]
    assert names == ["config.json", "model.safetensors"]  # people edit the others
    for path, words in ((tmp_path / "model.safetensors", ("is damaged", "is missing")), (tmp_path / sums.FILE, ("is not named in", "is damaged", "SHA256SUMS"))):
        content = path.read_bytes()
        for how in ("flip", "zero", "cut") * 4:
            path.write_bytes(damaged.damage(content, how, dice))
            with pytest.raises(ValueError) as error:
                sums.check(tmp_path, lambda name: not name.endswith(".md"))
            assert any(word in str(error.value) for word in words) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(content)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        sums.check(tmp_path, lambda name: not name.endswith(".md"))


def test_a_damaged_config_is_named(tmp_path):
    path = tmp_path / "config.json"
    for text in ("", "{", "[]", "\x00\x00", config.to_json(config.Config()).replace('"lr"', '"lq"'), config.to_json(config.Config())[:-40]):
        path.write_text(text)
        with pytest.raises(ValueError, match="config.json is damaged .*: bring back the config.json in the files/ of a checkpoint") as error:
            config.read(path)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps(json.loads(config.to_json(config.Config()))))
    assert config.read(path) == config.Config()


@pytest.mark.slow
def test_no_damage_is_silent(tmp_path):
    """30 of the 500 of `python tools/chaos_storage.py flips`."""
    world, dice, found = damaged.world(tmp_path), random.Random(2), Counter()
    for kind in damaged.KINDS:
        for path in damaged.files_of(world, kind, 5, dice):
            said = damaged.trial(world, kind, path, dice.choice(["flip", "zero", "cut"]), dice)
            assert said in ("named", "harmless"), (path, said)
            found[said] += 1
    assert found["named"] >= 25


# --- a disk that refuses ---


QUIET = [("model.layers", "1"), ("model.width", "16"), ("model.dropout", "0"), ("train.eval_every", "0"), ("data.validation", "0"), ("data.test", "0"),
         ("checkpoint.keep_last", "9")]


class Disk:
    """Lets the functions that write fail, from one moment to another."""

    def __init__(self, monkeypatch):
        self.error, self._fsync, self._open = None, os.fsync, open
        monkeypatch.setattr(os, "fsync", lambda descriptor: self._fail() or self._fsync(descriptor))
        monkeypatch.setattr(durable, "open", self._opened, raising=False)

    def _fail(self):
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))

    def _opened(self, path, mode="r", **options):
        if "a" in mode:
            self._fail()
        return self._open(path, mode, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = runs.load(folder, [*QUIET, ("data.dir", str(folder / "data"))], steps=8, every=2)
    assert loop.run(cfg, folder / "run") == 0
    return cfg, folder / "run"


@pytest.mark.parametrize("number", [errno.ENOSPC, *(pytest.param(number, marks=pytest.mark.slow) for number in (errno.EDQUOT, errno.EROFS, errno.EACCES))])
def test_a_run_goes_on_over_a_disk_that_refuses_for_a_while_or_ends(whole, tmp_path, monkeypatch, capsys, number):
    """Nothing can be written in steps 3 to 5: the checkpoint of step 4 and three lines of the log are lost, and nothing else."""
    cfg, reference = whole
    disk, finished, save = Disk(monkeypatch), loop.Clock.finished, checkpoint.Checkpoints.save
    steps = []

    def save_now(self, *arguments):  # what is written meanwhile would hang on chance
        save(self, *arguments)
        self.wait()

    def count(clock):
        steps.append(None)
        disk.error = number if 3 <= len(steps) <= 5 else None
        finished(clock)

    monkeypatch.setattr(loop.Clock, "finished", count)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_now)
    tolerant = dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, on_error="go_on"))
    assert loop.run(tolerant, tmp_path / "on") == 0
    out = capsys.readouterr().out
    said, losses = os.strerror(number), runs.losses(reference)
    assert f"warning: checkpoint of step 4 could not be written to {tmp_path / 'on'}: {said}; the newest whole one is step 2; going on" in out
    assert out.count(f"metrics.jsonl cannot be written: {said}; going on (checkpoint.on_error=go_on)") == 1
    assert checkpoint.steps(tmp_path / "on") == [2, 6, 8] and (tmp_path / "on" / "FINISHED").exists()
    assert runs.losses(tmp_path / "on") == {step: loss for step, loss in losses.items() if step not in (3, 4, 5)}
    steps.clear()
    with pytest.raises(OSError, match=f"metrics.jsonl cannot be written: {said}$"):
        loop.run(cfg, tmp_path / "stop")
    disk.error = None
    assert checkpoint.newest(tmp_path / "stop") == 2
    monkeypatch.setattr(loop.Clock, "finished", finished)
    assert loop.run(cfg, tmp_path / "stop") == 0 and runs.losses(tmp_path / "stop") == losses


def test_the_last_checkpoint_of_a_run_must_succeed(whole, tmp_path, monkeypatch):
    cfg, _ = whole
    seal, failing = checkpoint._seal, []

    def fail(folder, facts):
        if facts["step"] in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return seal(folder, facts)

    monkeypatch.setattr(checkpoint, "_seal", fail)
    tolerant = dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, on_error="go_on"))
    failing[:] = [4, 8]
    with pytest.raises(OSError, match="checkpoint of step 8 could not be written .*: No space left on device; the newest whole one is step 6"):
        loop.run(tolerant, tmp_path / "run")
    assert not (tmp_path / "run" / "FINISHED").exists() and checkpoint.steps(tmp_path / "run") == [2, 6]
    failing.clear()
    assert loop.run(tolerant, tmp_path / "run") == 0 and checkpoint.steps(tmp_path / "run") == [2, 6, 8]


def test_a_line_that_does_not_fit_is_cut_off_again(tmp_path):
    path = tmp_path / "log.jsonl"
    durable.append(path, "a" * 1000 + "\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))  # a real limit of the system: the write is done in part
    try:
        with pytest.raises(OSError, match="log.jsonl cannot be written: File too large$"):
            durable.append(path, "b" * 1000 + "\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    durable.append(path, "c\n")
    assert path.read_text() == "a" * 1000 + "\nc\n"
    with pytest.raises(OSError, match="log.jsonl/x cannot be written: Not a directory$"):
        durable.rewrite(path / "x", "")


def test_a_limit_of_file_sizes_and_a_lost_permission_cost_one_checkpoint(tmp_path):
    """Limits and permissions of the system itself, through Orbax and TensorStore."""
    big = lambda step: make_state(step)._replace(params={"w": jax.random.normal(jax.random.key(step), (256, 1024))})
    os.chmod(tmp_path, 0o755)
    with Lock(tmp_path / "run") as lock, checkpoint.Checkpoints(lock, keep_last=9, keep_best=0, keep_every=0) as checkpoints:
        checkpoints.save(1, big(1), {})
        assert checkpoints.wait() == 1
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, before[1]))
        try:
            with pytest.raises(OSError, match="step 2 could not be written .*: File too large; the newest whole one is step 1"):
                checkpoints.save(2, big(2), {})
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if os.geteuid() == 0:  # root may write everywhere: someone else for a moment
            os.seteuid(65534)
        else:
            os.chmod(tmp_path / "run" / "checkpoints", 0o555)
        try:
            with pytest.raises(OSError, match="step 3 could not be written .*: Permission denied; the newest whole one is step 1"):
                checkpoints.save(3, big(3), {})
                checkpoints.wait()
        finally:
            os.seteuid(os.getuid())
            os.chmod(tmp_path / "run" / "checkpoints", 0o755)
        checkpoints.save(4, big(4), {})
        assert checkpoints.wait() == 4
    assert checkpoint.steps(tmp_path / "run") == [1, 4] and checkpoint.newest(tmp_path / "run", log=pytest.fail) == 4


# --- out of memory ---


def test_another_verb_that_runs_out_of_memory_says_so_in_one_line(monkeypatch, tmp_path, capsys):
    from jaxlm.train import replay
    for error in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore"), MemoryError()):
        monkeypatch.setattr(replay, "run", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(SystemExit) as ended:
            cli.run("replay", [f"--workdir={tmp_path}", "--step=1"])
        said = capsys.readouterr().err.strip()
        assert ended.value.code == 2 and said.startswith("jaxlm: out of memory (") and "jaxlm fit --config=" in said and "\n" not in said
    monkeypatch.setattr(replay, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        cli.run("replay", [f"--workdir={tmp_path}", "--step=1"])


@pytest.mark.slow
def test_memory_that_really_ends_is_one_line_with_the_command(tmp_path):
    """Under a limit of the system on this process's memory: parameters that do not fit, on a CPU."""
    recipe = runs.recipe(tmp_path)
    limited = ["prlimit", f"--as={9 * 10**9}", sys.executable, "-m", "jaxlm"]
    arguments = ["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--config.model.width=16384", "--config.model.heads=8"]
    done = subprocess.run([*limited, *arguments], env=runs.environment(), capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr and last.startswith("jaxlm: out of memory on 1 x cpu (INTERNAL")
    assert f"jaxlm fit --config={recipe} --topology=v5e:2x2 --search --config.model.width=16384 --config.model.heads=8" in last


# --- storage that is slow, stalls, vanishes and comes back; clocks that jump ---


def failing(numbers):
    """A function that raises these errors one after the other, then works."""
    left = list(numbers)

    def work():
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number))
        return "done"
    return work


def test_what_may_pass_is_tried_again_a_bounded_time(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    assert patience.patiently(failing([errno.EIO, errno.ESTALE]), "/mnt/a cannot be read") == "done"
    assert slept == [1, 2] and capsys.readouterr().err.splitlines() == [
        "jaxlm: warning: /mnt/a cannot be read (Input/output error); trying again in 1 s (1 of 5)",
        "jaxlm: warning: /mnt/a cannot be read (Stale file handle); trying again in 2 s (2 of 5)"]
    with pytest.raises(OSError, match="No space left"):
        patience.patiently(failing([errno.ENOSPC]), "x")
    assert len(slept) == 2
    with pytest.raises(OSError, match="Input/output"):
        patience.patiently(failing([errno.EIO] * 9), "x")
    assert len(slept) == 2 + len(patience.WAITS) and sum(patience.WAITS) < 60


def test_a_corpus_that_vanishes_and_comes_back_is_read_on(whole, tmp_path, monkeypatch):
    """As a mount that is lost and made again: open handles are stale, the folder is empty, then everything is there."""
    folder = whole[1].parent / "data"
    corpus, gone, naps = shards.open_corpus(folder), folder.with_name("gone"), itertools.count(1)
    expected = [corpus.read("train", i) for i in range(5)]
    corpus._shard.cache_clear()
    folder.rename(gone)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: gone.rename(folder) if next(naps) == 3 else None)
    assert all(np.array_equal(corpus.read("train", i), expected[i]) for i in range(5)) and next(naps) == 4
    stale = iter([errno.ESTALE, errno.ENOTCONN])
    read = records.read

    def once(file, begin, size):
        if (number := next(stale, None)) is not None:
            raise OSError(number, os.strerror(number))
        return read(file, begin, size)

    monkeypatch.setattr(records, "read", once)
    assert np.array_equal(corpus.read("train", 1), expected[1])
    monkeypatch.setattr(records, "read", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(ValueError, match=r"train-00000.array_record, record 0 is damaged \(.*Input/output error"):
        corpus.read("train", 0)


def test_a_checkpoint_is_not_passed_over_for_one_failed_read(whole, monkeypatch, capsys):
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    original, left = type(durable.path_of(whole[1])).open, [errno.EIO]

    def flaky(path, *arguments, **options):
        if left and "params" in str(path):
            number = left.pop()
            raise OSError(number, os.strerror(number))
        return original(path, *arguments, **options)

    monkeypatch.setattr(type(durable.path_of(whole[1])), "open", flaky)
    assert checkpoint.newest(whole[1], log=pytest.fail) == 8 and not left
    assert "cannot be read (Input/output error); trying again" in capsys.readouterr().err


def test_a_stalled_read_is_said_and_changes_nothing(whole, tmp_path, monkeypatch, capsys):
    cfg, reference = whole
    read, calls = records.read, itertools.count(1)

    def stalls(file, begin, size):
        if next(calls) == 40:
            time.sleep(1.0)
        return read(file, begin, size)

    monkeypatch.setattr(records, "read", stalls)
    monkeypatch.setattr(clock, "_SLOW_SECONDS", 0.2)
    assert loop.run(cfg, tmp_path / "run") == 0
    assert f"warning: no batch for 0.2 s: does {whole[1].parent / 'data'} answer? train.watchdog_seconds says" in capsys.readouterr().out
    assert runs.losses(tmp_path / "run") == runs.losses(reference)


def test_a_slow_reader_is_said_once(monkeypatch):
    notes, now = [], itertools.count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(now)))
    ticks = clock.Clock(notes.append)
    ticks.begin("/mnt/corpus")
    for _ in range(60):  # waits 2 of each 4 ticks
        with ticks.spent("data"):
            next(now)
        ticks.finished()
        if ticks._count % 10 == 0:
            assert ticks.wait_share() == pytest.approx(0.5, abs=0.05)
    assert len(notes) == 1 and "of the time for data from /mnt/corpus (perf/data_wait): try a larger data.threads" in notes[0]


def test_clocks_that_jump_change_no_state_and_no_figure(whole, tmp_path, monkeypatch):
    """The clock on the wall goes an hour back and a day on from one look to the next: what is measured uses another one."""
    cfg, reference = whole
    looks, real = itertools.count(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + (86400, -3600)[next(looks) % 2])
    assert loop.run(cfg, tmp_path / "run") == 0 and next(looks) > 8
    assert runs.losses(tmp_path / "run") == runs.losses(reference) and checkpoint.newest(tmp_path / "run", log=pytest.fail) == 8
    rows = [row for row in report.read_metrics(tmp_path / "run") if "train/loss" in row]
    assert all(0 < row["perf/step_seconds"] < 60 and row["perf/tokens_per_second"] > 0 and 0 <= row["perf/data_wait"] <= 1 for row in rows)
    assert loop.run(cfg, tmp_path / "run") == 0  # the lock, too, knows no time
