"""Real processes: interrupted ones, and several that train one model over loopback. Minutes; .ci/run runs them with -m slow."""

import signal
import socket
import time

import pytest

from jaxlm.train import checkpoint
from tests.train import runs

pytestmark = pytest.mark.slow


def test_an_interrupt_saves_and_exits(tmp_path):
    process = runs.start("train", f"--config={runs.recipe(tmp_path, steps=4000)}", f"--workdir={tmp_path / 'run'}")
    end = time.monotonic() + 120
    while len(runs.losses(tmp_path / "run")) < 4:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    last = checkpoint.steps(tmp_path / "run")[-1]
    assert process.returncode == 130 and last == max(runs.losses(tmp_path / "run")) and f"the checkpoint of step {last} is safe" in output, output


def start_several(recipe, workdir, count, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [runs.start("train", f"--config={recipe}", f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}", f"--processes={count}",
                       f"--process={index}", "--config.model.dropout=0.0", *arguments) for index in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    code, output = runs.finish("train", f"--config={runs.recipe(folder)}", f"--workdir={folder / 'one'}", "--config.model.dropout=0.0")
    assert code == 0, output
    return folder


@pytest.mark.parametrize("count, mesh", [(4, ("--config.mesh.data=2", "--config.mesh.fsdp=2")), (2, ("--config.mesh.fsdp=1", "--config.mesh.tensor=2")),
                                         (2, ("--config.mesh.slice=2", "--config.mesh.fsdp=1")),
                                         (4, ("--config.mesh.fsdp=1", "--config.mesh.stage=2", "--config.mesh.sequence=2"))])
def test_several_processes_compute_what_one_does(alone, tmp_path, count, mesh):
    recipe = alone / "recipe.py"
    several = start_several(recipe, tmp_path / "several", count, *mesh)
    outputs = [process.communicate(timeout=240)[0] for process in several]
    assert [process.returncode for process in several] == [0] * count, outputs
    one, found = runs.losses(alone / "one"), runs.losses(tmp_path / "several")
    assert found.keys() == one.keys()
    assert all(abs(found[step] - one[step]) <= 1e-5 * one[step] for step in one), (one, found)
    rows = [{k: v for k, v in row.items() if k in ("eval/loss", "test/loss")} for folder in (alone / "one", tmp_path / "several")
            for row in runs.read_metrics(folder) if "eval/loss" in row or "test/loss" in row]
    half = len(rows) // 2
    assert half >= 2 and all(abs(a[k] - b[k]) < 1e-5 * a[k] for a, b in zip(rows[:half], rows[half:]) for k in a)


def test_preempting_one_process_stops_both_and_one_alone_goes_on(tmp_path):
    recipe = runs.recipe(tmp_path, steps=3000, every=1000)
    both = start_several(recipe, tmp_path / "run", 2)
    end = time.monotonic() + 120
    while len(runs.losses(tmp_path / "run")) < 4:
        assert all(p.poll() is None for p in both) and time.monotonic() < end, [p.communicate()[0] for p in both if p.poll() is not None]
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    last = checkpoint.steps(tmp_path / "run")[-1]
    assert last == max(runs.losses(tmp_path / "run"))
    alone = runs.start("train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--config.model.dropout=0.0")
    while max(runs.losses(tmp_path / "run")) <= last + 2:
        assert alone.poll() is None and time.monotonic() < end + 120, alone.communicate()[0]
        time.sleep(0.05)
    alone.terminate()
    output, _ = alone.communicate(timeout=60)
    assert alone.returncode == 0 and f"resumed after step {last}" in output
