"""A checkpoint that was acknowledged is there, whole, whatever happened since; one that is not whole is never used."""

import errno
import fcntl
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlm.train import checkpoint, durable
from jaxlm.train.checkpoint import Checkpoints, kept
from jaxlm.train.lock import Lock, Locked
from jaxlm.train.state import State
from tests.train.checkpoint_worker import make_state, same, target

WORKER = pathlib.Path(__file__).with_name("checkpoint_worker.py")
KEEP_ALL = {"keep_last": 100, "keep_best": 0, "keep_every": 0}


def save(workdir, *numbers, losses=None, state=make_state, **keep):
    with Lock(workdir) as lock, Checkpoints(lock, **{**KEEP_ALL, **keep}) as checkpoints:
        for step in numbers:
            checkpoints.save(step, state(step), {"data.json": b"%d" % step}, losses and losses[step])
        return checkpoints.wait()


def files_of(workdir, step):
    return sorted(p for p in (pathlib.Path(workdir) / f"checkpoints/{step}").rglob("*") if p.is_file())


def mesh_of(*sizes):
    names = ("fsdp", "tensor")[:len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=jax.devices()[:int(np.prod(sizes))])


# --- what goes in comes out ---


class Moments(NamedTuple):
    count: jax.Array
    mu: dict
    nothing: None
    empty: tuple


def test_round_trip_is_bitwise_for_every_type(tmp_path, capfd):
    odd = np.array([0x7fc00001, 0x80000000, 0xff800000, 1], np.uint32).view(np.float32)  # a NaN with payload, -0, -inf, a subnormal
    params = {"f32": jnp.array(odd), "bf16": jnp.arange(7, dtype=jnp.bfloat16) / 3, "f16": jnp.ones((2, 3), jnp.float16),
              "i32": jnp.array([-2**31, 2**31 - 1], jnp.int32), "i8": jnp.int8(-5), "u8": jnp.arange(3, dtype=jnp.uint8),
              "bool": jnp.array([True, False]), "deep": {"er": jnp.zeros(1)}}
    opt = (Moments(jnp.int32(3), {"a": [jnp.float32(1.5), (jnp.bfloat16(2),)]}, None, ()), (), None)
    for step, ema in ((1, None), (2, jax.tree.map(lambda x: x[..., None], params))):
        state = State(jnp.int32(step), params, opt, ema, jax.random.key_data(jax.random.key(7)))
        save(tmp_path, step, state=lambda _: state)
        back = checkpoint.restore(tmp_path, step, target(state))
        assert same(back, state) and isinstance(back.opt[0], Moments)
    assert capfd.readouterr() == ("", "")
    assert same(checkpoint.restore_params(tmp_path, 2, target(params)), params)
    assert same(checkpoint.restore_params(tmp_path, 2, target(ema), ema=True), ema)
    with pytest.raises(ValueError, match="no moving average"):
        checkpoint.restore_params(tmp_path, 1, target(ema), ema=True)


def test_restores_onto_other_meshes(tmp_path):
    whole = make_state(1)
    for step, sizes in enumerate([(8,), (2, 4), (1,)], 1):
        save(tmp_path, step, state=lambda _: make_state(1, mesh_of(*sizes)))
        for onto in [(1,), (2,), (4,), (8,), (2, 4), (4, 2)] if step == 1 else [(1,), (8,), (4, 2)]:
            mesh = mesh_of(*onto)
            place = lambda x: NamedSharding(mesh, PartitionSpec(*((None,) * (x.ndim - 2) + mesh.axis_names)[:x.ndim] if x.ndim > 1 else ()))
            wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), make_state(1, mesh))
            got = checkpoint.restore(tmp_path, step, wanted)
            assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)))
            assert same(got.params, whole.params) and int(got.step) == 1


def test_the_copy_is_taken_before_save_returns(tmp_path):
    """The train step donates the state: its memory is overwritten while the checkpoint is being written."""
    step_once = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = jax.tree.map(lambda x: x * 0, make_state(1)._replace(params={"w": jnp.zeros((512, 1024))}))
    with Lock(tmp_path) as lock, Checkpoints(lock, **KEEP_ALL) as checkpoints:
        for step in range(1, 6):
            state = step_once(state)
            checkpoints.save(step, state, {})
            state = step_once(step_once(state))
    for step in range(1, 6):
        got = checkpoint.restore(tmp_path, step, target(state))
        assert all((np.asarray(x, np.float32) == 3 * step - 2).all() for x in jax.tree.leaves(got)), step


def test_what_does_not_fit_is_named(tmp_path):
    save(tmp_path, 1)
    good = target(make_state(1))
    tokens = good.params["embed"]["tokens"]
    place = SingleDeviceSharding(jax.devices()[0])
    with_tokens = lambda *spec: good._replace(params={**good.params, "embed": {"tokens": jax.ShapeDtypeStruct(*spec, sharding=place)}})
    was = r"params/embed/tokens is float32\[64,16\] in it and "
    for wanted, message in [
            (with_tokens((64, 32), jnp.float32), was + r"float32\[64,32\] here"),
            (with_tokens((64, 16), jnp.bfloat16), was + r"bfloat16\[64,16\] here"),
            (good._replace(params={**good.params, "new": tokens}), r"params/new is missing in it and float32\[64,16\] here"),
            (good._replace(params={"embed": good.params["embed"]}), r"params/layers/q is float32\[2,16,8\] in it and missing here"),
            (good._replace(ema=good.params), r"ema/embed/tokens is missing in it .* \(and 1 more\)"),
            (good._replace(opt=()), r"rest/opt/0/mu is bfloat16\[64,16\] in it and missing here")]:
        with pytest.raises(ValueError, match=message) as error:
            checkpoint.restore(tmp_path, 1, wanted)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="float32.* in it and bfloat16"):
        checkpoint.restore_params(tmp_path, 1, with_tokens((64, 16), jnp.bfloat16).params)


def test_parameters_alone_need_nothing_of_the_optimiser(tmp_path):
    save(tmp_path, 1)
    for path in files_of(tmp_path, 1):
        if "rest" in path.parts:
            path.unlink()
    assert same(checkpoint.restore_params(tmp_path, 1, target(make_state(1).params)), make_state(1).params)
    with pytest.raises(ValueError, match="rest/.* is missing"):
        checkpoint.restore(tmp_path, 1, target(make_state(1)))


def test_files_lie_beside_the_state(tmp_path):
    save(tmp_path, 4)
    assert checkpoint.read_file(tmp_path, 4, "data.json") == b"4"
    with pytest.raises(ValueError, match="holds no config.json; it holds data.json"):
        checkpoint.read_file(tmp_path, 4, "config.json")
    with pytest.raises(ValueError, match="no checkpoint of step 5 .*; saved steps: 4"):
        checkpoint.read_file(tmp_path, 5, "data.json")
    (tmp_path / "checkpoints/4/files/data.json").write_bytes(b"5")
    with pytest.raises(ValueError, match="files/data.json does not match"):
        checkpoint.read_file(tmp_path, 4, "data.json")


def test_a_saved_step_is_left_alone_and_a_damaged_one_replaced(tmp_path):
    save(tmp_path, 1, 2)
    before = (tmp_path / "checkpoints/2/MANIFEST.json").stat()
    assert save(tmp_path, 2) == 2
    assert (tmp_path / "checkpoints/2/MANIFEST.json").stat() == before
    files_of(tmp_path, 2)[-1].write_bytes(b"")
    assert checkpoint.newest(tmp_path, log=lambda _: None) == 1
    assert save(tmp_path, 2) == 2 == checkpoint.newest(tmp_path)


# --- which checkpoints stay ---


@pytest.mark.parametrize("losses, keep, expected", [
    ({1: None, 2: None, 3: None}, (2, 0, 0), {2, 3}),
    ({1: 1.0, 2: 3.0, 3: 2.0, 4: 4.0}, (1, 1, 0), {1, 4}),
    ({1: 1.0, 2: 3.0, 3: 2.0, 4: 4.0}, (1, 2, 0), {1, 3, 4}),
    ({1: 1.0, 2: 1.0, 3: 2.0}, (1, 1, 0), {2, 3}),  # of equals the newer
    ({1: float("nan"), 2: 5.0, 3: None, 4: None}, (1, 1, 0), {2, 4}),  # no loss is not a good loss
    ({10: None, 15: None, 20: None, 25: None}, (1, 0, 10), {10, 20, 25}),
    ({10: 1.0, 20: 2.0}, (5, 5, 7), {10, 20}),
    ({10: 1.0, 20: 2.0}, (0, 0, 0), set()),
    ({}, (2, 2, 2), set())])
def test_which_steps_stay(losses, keep, expected):
    assert kept(losses, keep_last=keep[0], keep_best=keep[1], keep_every=keep[2]) == expected


def test_the_others_are_deleted(tmp_path):
    losses = {1: 2.0, 2: 1.0, 3: 3.0, 4: float("nan"), 5: 4.0, 6: None}
    assert save(tmp_path, *losses, losses=losses, keep_last=1, keep_best=1, keep_every=4) == 6
    assert checkpoint.steps(tmp_path) == [2, 4, 6] and checkpoint.newest(tmp_path) == 6
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_a_damaged_later_step_does_not_push_out_good_ones(tmp_path):
    save(tmp_path, 10, 20)
    files_of(tmp_path, 20)[-1].write_bytes(b"")
    lines = []
    with Lock(tmp_path) as lock, Checkpoints(lock, keep_last=1, keep_best=0, keep_every=0, log=lines.append) as checkpoints:
        assert checkpoint.steps(tmp_path) == [10, 20]  # nothing is deleted before something better exists
        checkpoints.save(12, make_state(12), {})
        assert checkpoints.wait() == 12
    assert checkpoint.steps(tmp_path) == [12] and len(lines) == 1 and "step 20" in lines[0] and "damaged" in lines[0]


# --- damage ---


def damage_and_look(workdir, path, content):
    """What `newest` says, finds and does not touch while `path` has this content (None: is missing)."""
    original = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    lines = []
    try:
        return checkpoint.newest(workdir, log=lines.append), lines
    finally:
        path.write_bytes(original)


def test_a_flipped_bit_anywhere_is_found_and_named(tmp_path):
    save(tmp_path, 1, 2)
    dice = random.Random(0)
    files = files_of(tmp_path, 2)
    for path in [*files, *dice.choices(files, [p.stat().st_size for p in files], k=60)]:
        content = bytearray(path.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        found, lines = damage_and_look(tmp_path, path, bytes(content))
        name = str(path.relative_to(tmp_path / "checkpoints/2"))
        assert found == 1 and len(lines) == 1 and "step 2 " in lines[0] and name in lines[0], name
    assert checkpoint.newest(tmp_path, log=pytest.fail) == 2


def test_a_short_or_missing_file_is_found_and_named(tmp_path):
    save(tmp_path, 1, 2)
    for path in files_of(tmp_path, 2):
        content = path.read_bytes()
        for changed in (content[:-1], b"", content + b"\0", None):
            found, lines = damage_and_look(tmp_path, path, changed)
            assert found == 1
            if path.name != "MANIFEST.json" or changed is not None:  # without its manifest the step was never saved
                assert len(lines) == 1 and path.name in lines[0]


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"checkpoints/{step}/params/_METADATA").unlink()
    with pytest.raises(ValueError, match="2 checkpoints in .* none is whole .*step 1 .*params/_METADATA is missing"):
        checkpoint.newest(tmp_path, log=lambda _: None)


def test_newest_follows_a_writer_that_deletes_meanwhile(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    check = checkpoint._check

    def writer_goes_on(workdir, step, files):
        monkeypatch.setattr(checkpoint, "_check", check)
        save(tmp_path, 3, keep_last=1)
        check(workdir, step, files)

    monkeypatch.setattr(checkpoint, "_check", writer_goes_on)
    assert checkpoint.newest(tmp_path, log=pytest.fail) == 3


# --- leftovers, kills, order ---


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for name in ("7", "8.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-1700000000", "notes"):
        (folder / name / "params").mkdir(parents=True)
        (folder / name / "params" / "MANIFEST.json.tmp").write_text("{}")
    assert checkpoint.steps(tmp_path) == [1]
    with Lock(tmp_path) as lock, Checkpoints(lock, **KEEP_ALL) as checkpoints:
        assert sorted(p.name for p in folder.iterdir()) == ["1", "notes"]
        (folder / "5").mkdir()  # not acknowledged, so not there
        checkpoints.save(5, make_state(5), {})
        assert checkpoints.wait() == 5
    checkpoint.verify(tmp_path, 5)


def test_the_manifest_is_written_after_everything_is_synced(tmp_path, monkeypatch):
    workdir = tmp_path / "new" / "run"
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append((str(a), str(b))), replace(a, b))[1])
    save(workdir, 1)
    folder = workdir / "checkpoints/1"
    rename = events.index((f"{folder}/MANIFEST.json.tmp", f"{folder}/MANIFEST.json"))
    before = set(events[:rename])
    contents = {str(p) for p in folder.rglob("*")} - {f"{folder}/MANIFEST.json"}
    missing = {*contents, str(folder), str(folder.parent), str(workdir), f"{folder}/MANIFEST.json.tmp"} - before
    assert len(contents) > 10 and not missing
    assert {str(tmp_path), str(tmp_path / "new")} <= before  # the new folders themselves
    assert events[rename - 1] == f"{folder}/MANIFEST.json.tmp" and events[rename + 1:] == [str(folder)]
    changed = max(p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    assert changed <= (folder / "MANIFEST.json").stat().st_mtime_ns


def test_a_deletion_takes_the_manifest_first(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    monkeypatch.setattr(type(durable.path_of(tmp_path)), "rmtree", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "stopped here")))
    lines = []
    with Lock(tmp_path) as lock, Checkpoints(lock, keep_last=1, keep_best=0, keep_every=0, log=lines.append) as checkpoints:
        checkpoints.save(3, make_state(3), {})
        assert checkpoints.wait() == 3  # what is saved is saved
    assert len(lines) == 1 and "could not be deleted" in lines[0]
    assert (tmp_path / "checkpoints/1/params").exists() and checkpoint.steps(tmp_path) == [2, 3]


def run_kills(workdir, times, seed):
    worker = subprocess.run([sys.executable, WORKER, "kill", workdir, workdir / "acknowledged", str(times), str(seed)],
                            env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, timeout=600)
    assert worker.returncode == 0, worker.stdout + worker.stderr
    last = max(map(int, (workdir / "acknowledged").read_text().split()), default=0)
    print(f"{last} steps acknowledged over {times} kills")
    found = checkpoint.newest(workdir, log=pytest.fail)
    assert (found or 0) >= last
    for step in checkpoint.steps(workdir):
        assert same(checkpoint.restore(workdir, step, target(make_state(step))), make_state(step))
        assert checkpoint.read_file(workdir, step, "data.json") == b"%d" % step


def test_kills_lose_nothing_acknowledged(tmp_path):
    run_kills(tmp_path, 6, 0)


# --- a disk that refuses ---


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_one_checkpoint(small_disk, capfd, caplog, monkeypatch):
    workdir, noise = small_disk / "run", []
    monkeypatch.setattr(checkpoint._show_unraisable, "__defaults__", (noise.append,))
    big = lambda step: make_state(step)._replace(params={name: jax.random.normal(jax.random.key(step), (128, 1024)) for name in "abcd"})
    with Lock(workdir) as lock, Checkpoints(lock, **KEEP_ALL) as checkpoints:
        checkpoints.save(1, big(1), {})
        assert checkpoints.wait() == 1
        (small_disk / "filler").write_bytes(os.urandom(5 * 2**20))
        with pytest.raises(OSError) as error:
            checkpoints.save(2, big(2), {})
            checkpoints.wait()
        assert str(error.value) == (f"checkpoint of step 2 could not be written to {workdir}: No space left on device; "
                                    "the newest whole one is step 1")
        assert checkpoint.newest(workdir) == 1
        assert same(checkpoint.restore(workdir, 1, target(big(1))), big(1))
        (small_disk / "filler").unlink()
        checkpoints.save(3, big(3), {})
        assert checkpoints.wait() == 3
        assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "3"]
    assert capfd.readouterr() == ("", "") and not caplog.records and not noise  # Orbax keeps its thoughts to itself


def test_a_read_only_disk_costs_one_checkpoint(small_disk, capfd):
    workdir = small_disk / "run"
    save(workdir, 1)
    threads = set(threading.enumerate())
    with Lock(workdir) as lock, Checkpoints(lock, **KEEP_ALL) as checkpoints:
        # The lock is open for writing, which forbids to remount: the folder is bound over itself instead.
        subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", small_disk], check=True)
        try:
            with pytest.raises(OSError, match="step 2 could not be written .*: Read-only file system; the newest whole one is step 1"):
                checkpoints.save(2, make_state(2), {})
                checkpoints.wait()
            assert checkpoint.newest(workdir) == 1
            assert same(checkpoint.restore(workdir, 1, target(make_state(1))), make_state(1))
        finally:
            subprocess.run(["umount", small_disk], check=True)
    assert capfd.readouterr() == ("", "")
    time.sleep(0.2)
    assert not [t for t in set(threading.enumerate()) - threads if not t.daemon]  # none that keeps the process from ending


def test_a_workdir_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error, Lock(tmp_path / "file/run"):
        pass
    assert str(error.value) == f"{tmp_path}/file/run cannot be written: Not a directory; choose another workdir"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_disk_is_not_an_acknowledgement(tmp_path, monkeypatch, call):
    """Fails the n-th fsync (or rename) of a save, for each n in turn until a save needs no more."""
    original, failing = getattr(os, call), []

    def fail_once(*args):
        if failing:
            failing[0] -= 1
            if failing[0] < 0:
                failing.clear()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*args)

    monkeypatch.setattr(os, call, fail_once)
    refused = 0
    with Lock(tmp_path) as lock, Checkpoints(lock, **KEEP_ALL) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        for n in (*range(0, 30, 6), *range(30, 100)) if call == "fsync" else range(100):  # the last ones matter most
            failing[:] = [n]
            try:
                checkpoints.save(2, make_state(2), {})
                assert checkpoints.wait() == 2
                break
            except OSError as error:
                refused += 1
                assert str(error).endswith("Input/output error; the newest whole one is step 1")
                assert checkpoint.steps(tmp_path) == [1]
    assert refused >= (5 if call == "fsync" else 1) and checkpoint.newest(tmp_path) == 2


def test_an_error_in_the_background_reaches_the_next_save_and_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_seal", lambda *_: (_ for _ in ()).throw(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))))
    message = "step 1 could not be written .*: Disk quota exceeded; no earlier one exists"
    with Lock(tmp_path) as lock:
        with Checkpoints(lock, **KEEP_ALL) as checkpoints:
            checkpoints.save(1, make_state(1), {})
            with pytest.raises(OSError, match=message):
                checkpoints.save(2, make_state(2), {})
            assert checkpoints.wait() is None
        with pytest.raises(OSError, match=message):
            with Checkpoints(lock, **KEEP_ALL) as checkpoints:
                checkpoints.save(1, make_state(1), {})
        with pytest.raises(KeyError):  # the error that ends the block is the one to show
            with Checkpoints(lock, **KEEP_ALL) as checkpoints:
                checkpoints.save(1, make_state(1), {})
                raise KeyError


def test_leaving_by_an_error_still_finishes_the_save(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with Lock(tmp_path) as lock, Checkpoints(lock, **KEEP_ALL) as checkpoints:
            checkpoints.save(1, make_state(1), {})
            raise KeyboardInterrupt
    assert checkpoint.newest(tmp_path) == 1


# --- one writer ---


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    holder = subprocess.Popen([sys.executable, WORKER, "hold", tmp_path], stdout=subprocess.PIPE, text=True)
    pid, child = map(int, holder.stdout.readline().split())
    try:
        assert pid == holder.pid
        owner = json.loads((tmp_path / "LOCK").read_text())
        with pytest.raises(Locked) as error, Lock(tmp_path):
            pass
        assert str(error.value) == (f"{tmp_path} is in use: process {pid} on {socket.gethostname()} has been writing it since "
                                    f"{owner['since']}; wait for it to end, stop it, or choose another workdir")
        assert json.loads((tmp_path / "LOCK").read_text()) == owner
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # a forked child lives on, and does not hold the lock
        save(tmp_path, 1)
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
    with Lock(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
        with pytest.raises(Locked, match=f"process {os.getpid()} on "), Lock(tmp_path):
            pass
    assert (tmp_path / "LOCK").read_text() == ""


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
    lines = []
    with Lock(tmp_path, log=lines.append) as lock, Checkpoints(lock, **KEEP_ALL):
        assert len(lines) == 1 and "LOCK cannot be locked (No locks available)" in lines[0]


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    workers = [subprocess.Popen([sys.executable, WORKER, "together", tmp_path, str(port), str(i)], env=flags, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for i in range(2)]
    outputs = [w.communicate(timeout=300)[0] for w in workers]
    for worker, output in zip(workers, outputs):
        assert worker.returncode == 0 and output.strip().endswith("done"), output
        assert "refused: " in output and "damaged: " in output, output
    mesh = mesh_of(8)
    assert same(checkpoint.restore(tmp_path, 2, target(make_state(2, mesh))), make_state(2, mesh))  # by one process
