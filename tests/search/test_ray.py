"""Ray Tune on this machine: its ASHA over runs of ours, one that is killed, one that fails. Left out without ray; .ci/run installs it."""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from jaxlm import config
from jaxlm.search import ray_tune, space
from jaxlm.train import best, checkpoint, report
from tests.train import runs

TINY = [("model.layers", "1"), ("model.width", "16"), ("model.dropout", "0.0"), ("train.eval_every", "20"), ("checkpoint.keep_last", "1")]


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one node."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[2]))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def tuner(cluster, tmp_path):
    """What makes a tuner of a space."""
    from ray import tune

    def make(line, failures=0, **chosen):
        cfg = runs.load(tmp_path, TINY, steps=60, every=20)
        found = space.read(line, cfg)
        trial = ray_tune.trainable(cfg, found, tmp_path / "search")
        return tune.Tuner(tune.with_resources(trial, {"CPU": 1}), param_space=ray_tune.param_space(found, grid=True),
                          tune_config=tune.TuneConfig(metric="loss", mode="min", **chosen), run_config=tune.RunConfig(
                              storage_path=str(tmp_path / "ray"), verbose=0, failure_config=tune.FailureConfig(max_failures=failures)))

    return make


@pytest.mark.slow
def test_ray_stops_what_is_worse_and_each_trial_is_a_run_like_any_other(tuner, tmp_path):
    from ray.tune.schedulers import ASHAScheduler

    results = tuner("optim.lr=1e-5,0.03,1e-6,1e-7", scheduler=ASHAScheduler(max_t=100, grace_period=1, reduction_factor=2)).fit()
    rows = {result.config["optim.lr"]: result.metrics for result in results}
    assert results.num_errors == 0 and len(rows) == 4
    chosen = results.get_best_result()
    assert chosen.config == {"optim.lr": "0.03"} and chosen.metrics["step"] == 60
    assert min(row["step"] for row in rows.values()) < 60  # somebody was stopped
    for row in rows.values():
        cfg = config.load(f"{row['workdir']}/config.py")
        figures = best.figures(cfg, pathlib.Path(row["workdir"]))
        assert figures[row["step"]] == row["loss"] and cfg.data.dir == str(tmp_path / "search" / "data")
        assert checkpoint.steps(pathlib.Path(row["workdir"]))  # the stopped ones are saved
        assert not any("test/loss" in line for line in report.read_metrics(pathlib.Path(row["workdir"])))
    code, output = runs.finish("eval", f"--workdir={chosen.metrics['workdir']}", "--split=test")
    assert code == 0, output


@pytest.mark.slow
def test_a_trial_that_is_killed_goes_on_from_its_checkpoint_and_one_that_fails_says_why(tuner, tmp_path):
    made, killed = tuner("optim.lr=0.01; model.heads=2,3", failures=1), []

    def kill():
        while not killed:
            time.sleep(0.02)
            for lock in (tmp_path / "search").glob("trials/*/LOCK"):
                if checkpoint.steps(lock.parent) and lock.read_text():
                    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
                    killed.append(lock.parent)

    thread = threading.Thread(target=kill)
    thread.start()
    results = made.fit()
    thread.join()
    good, = (result for result in results if not result.error)
    bad, = results.errors
    assert "heads" in str(bad)
    assert good.metrics["step"] == 60 and good.metrics["workdir"] == str(killed[0])
    assert "resumed after step" in (killed[0] / "log.txt").read_text()
    assert [row["step"] for row in report.read_metrics(killed[0]) if "eval/loss" in row] == [20, 40, 60]


def test_a_space_becomes_rays():
    pytest.importorskip("ray")
    cfg = config.Config()
    found = ray_tune.param_space(space.read("optim.lr=log(1e-4,1e-2,3); data.batch_size=uniform(2,4,2); optim.b2=0.95,0.99", cfg))
    draws = [{key: values.sample() for key, values in found.items()} for _ in range(200)]
    assert all(1e-4 <= draw["optim.lr"] <= 1e-2 for draw in draws) and sum(draw["optim.lr"] < 1e-3 for draw in draws) in range(60, 140)
    assert {draw["data.batch_size"] for draw in draws} == {2, 3, 4} and {draw["optim.b2"] for draw in draws} == {"0.95", "0.99"}
    assert ray_tune.param_space(space.read("optim.lr=log(1e-4,1e-2,3)", cfg), grid=True) == {"optim.lr": {"grid_search": [1e-4, 1e-3, 1e-2]}}


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[ray\]'"):
        ray_tune.param_space({})
