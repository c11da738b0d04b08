"""A study without training: who takes which trial, what is pruned, told, refused and written. Runs are made up; test_search.py has real ones."""

import json
import signal
import subprocess
import sys

import pytest

from jaxlm import cli, config
from jaxlm.config import Config
from jaxlm.search import jobs, show, space, study, trials
from jaxlm.train import health, loop
from tests.train import runs

LINE = "optim.lr=log(1e-4,1e-1,5);model.layers=1,2"
CONFIG = config.override(Config(), [("checkpoint.keep_last", "1"), ("train.steps", "90")])


def pretend(monkeypatch, figure=lambda cfg, evaluation: (abs(cfg.optim.lr - 0.01) + 1 / evaluation), evaluations=9):
    """Runs that have 9 evaluations at steps 10, 20 ... and cost nothing. Returns the configs that were run."""
    begun = []

    def run(cfg, workdir, judge):
        begun.append(cfg)
        with open(workdir / "metrics.jsonl", "a") as log:
            for evaluation in range(1, evaluations + 1):
                value = figure(cfg, evaluation)
                log.write(json.dumps({"step": 10 * evaluation, "eval/loss": value}) + "\n")
                log.flush()
                if judge(10 * evaluation, value if value == value else None) and evaluation < evaluations:
                    return 0
        loop._mark(workdir, 10 * evaluations, False)
        return 0

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(trials, "prepare", lambda *_: None)
    return begun


def open_study(folder, line=LINE, cfg=CONFIG, storage=""):
    return study.open_study(folder, cfg, space.read(line, cfg), storage)


@pytest.mark.parametrize("storage, sampler, pruner, count", [("journal", "tpe", "asha", 12), ("sqlite", "random", "median", 7),
                                                             ("journal", "cmaes", "hyperband", 8), ("journal", "grid", "none", 99)])
def test_a_study_is_done_once_and_goes_on(tmp_path, monkeypatch, storage, sampler, pruner, count):
    begun, said = pretend(monkeypatch), []
    opened = open_study(tmp_path / "study", storage=storage)
    assert trials.run(opened, sampler, pruner, count, 0, said.append) == 0
    done = study.rows(opened)
    assert len(done) == (10 if sampler == "grid" else count) and {row.state for row in done} <= {"complete", "pruned"}
    assert {cfg.optim.lr for cfg in begun} == {row.values["optim.lr"] for row in done}
    assert all(row.figure == row.curve[-1] == pytest.approx(abs(row.values["optim.lr"] - 0.01) + 1 / len(row.curve)) for row in done)
    assert (pruner == "none") == all(row.state == "complete" for row in done)
    if sampler == "grid":
        assert len({tuple(row.values.values()) for row in done}) == 10
        assert trials.run(open_study(tmp_path / "study"), sampler, pruner, count, 0, said.append) == 0 and len(begun) == 10
    else:  # more of them, also by another sampler
        assert trials.run(open_study(tmp_path / "study"), "random", "none", count + 2, 0, said.append) == 0
        assert len(study.rows(opened)) == count + 2 and begun[-1].optim.lr == study.rows(opened)[-1].values["optim.lr"]
    assert study.best_row(opened, study.rows(opened)).figure == min(row.figure for row in study.rows(opened) if row.state == "complete")


@pytest.mark.parametrize("worst_first", [True, False])
def test_asha_goes_on_with_the_best_third(tmp_path, monkeypatch, worst_first):
    """In whatever order trials come, each third that is best at 1 and 3 evaluations goes on, and the best of all comes to the end."""
    begun = pretend(monkeypatch, figure=lambda cfg, evaluation: cfg.optim.lr + 1 / evaluation)
    opened = open_study(tmp_path, line="optim.lr=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0")
    combinations = [{"optim.lr": f"{lr / 10}"} for lr in range(1, 11)]
    for number, values in enumerate(combinations[::-1] if worst_first else combinations):
        study._queue(opened, number, values)
    trials.run(opened, "tpe", "asha", 10, 0, lambda line: None)
    came = {float(row.values["optim.lr"]): len(row.curve) for row in study.rows(opened)}
    assert came == {0.1: 9, 0.2: 3, 0.3: 3} | {lr / 10: 1 for lr in range(4, 11)} and len(begun) <= 10 + 3 + 1
    assert study.best_row(opened, study.rows(opened)).values == {"optim.lr": "0.1"} and study.rows(opened)[0].state != "running"


def test_asha_promotes_while_it_goes(tmp_path, monkeypatch):
    """Trials that are added one by one: as soon as a third of those that came to a rung is one more, it goes on; at last one comes to the end anyway."""
    pretend(monkeypatch)
    opened, order = open_study(tmp_path), []
    trials.run(opened, "random", "asha", 4, 0, order.append)
    assert [line.split()[1] + " goes on" * ("goes on" in line) for line in order if "optim.lr=" in line][:3] == ["0", "1", "2"]
    assert sum("goes on" in line for line in order[:8]) == 1 and [row.state for row in study.rows(opened)].count("complete") == 1


def test_what_cannot_be_trained_is_told_and_left_behind(tmp_path, monkeypatch):
    begun, said = pretend(monkeypatch, figure=lambda cfg, evaluation: float("nan") if cfg.optim.lr > 0.02 else cfg.optim.lr), []
    opened = open_study(tmp_path, line="optim.lr=0.01,0.1;model.heads=4,3")  # 3 heads do not divide the width
    trials.run(opened, "grid", "none", 1, 0, said.append)
    by = {(row.values["optim.lr"], row.values["model.heads"]): row for row in study.rows(opened)}
    assert {key: row.state for key, row in by.items()} == {("0.01", "4"): "complete", ("0.1", "4"): "pruned", ("0.01", "3"): "failed", ("0.1", "3"): "failed"}
    assert "must divide model.width" in by["0.1", "3"].note and "not finite" in by["0.1", "4"].note and len(begun) == 2

    def diverge(cfg, workdir, judge):
        raise health.Diverged("the loss was not finite")
    monkeypatch.setattr(loop, "run", diverge)
    opened = open_study(tmp_path / "all")
    trials.run(opened, "random", "none", 2, 0, said.append)
    assert [row.state for row in study.rows(opened)] == ["pruned"] * 2
    show.summary(opened, said.append)
    assert "no trial is complete yet" in said[-1] and not (tmp_path / "all" / "best.py").exists()

    def fail(cfg, workdir, judge):
        raise ValueError("the disk is on fire")
    monkeypatch.setattr(loop, "run", fail)
    with pytest.raises(ValueError, match="3 trials in a row failed and none was complete; the last: the disk is on fire"):
        trials.run(open_study(tmp_path / "fire"), "random", "none", 9, 0, said.append)


def test_a_trial_of_a_dead_process_goes_on_and_none_is_done_twice(tmp_path, monkeypatch):
    """While a process has a trial nobody else has; when it is killed the next one has, with the same values, but not for ever."""
    monkeypatch.setattr(study, "ATTEMPTS", 2)
    code = f"""
import pathlib, sys
from tests.search.test_study import *
taken = study.take(open_study(pathlib.Path({str(tmp_path)!r})), "random", "none", 2)
print(taken.number, taken.values, taken.attempt, flush=True)
sys.stdin.read()
"""
    opened, start = open_study(tmp_path), lambda: subprocess.Popen([sys.executable, "-c", code], env=runs.environment(), stdin=subprocess.PIPE,
                                                                    stdout=subprocess.PIPE, text=True)
    said = []
    for attempt in range(study.ATTEMPTS):
        process = start()
        said.append(process.stdout.readline())
        if not attempt:
            mine = study.take(opened, "random", "none", 2)
            assert mine.number == 1 and study.others(opened) == [0, 1]
            assert study.take(opened, "random", "none", 2) is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert study.others(opened) == [1]
    values = study.rows(opened)[0].values
    assert said == [f"0 {values} {attempt}\n" for attempt in (1, 2)]
    assert study.take(opened, "random", "none", 2) is None
    assert [row.state for row in study.rows(opened)] == ["failed", "running"] and study.rows(opened)[0].note == "2 processes ended over it"
    study.finish(opened, mine, figure=1.0)
    assert study.take(opened, "random", "none", 2) is None and not study.others(opened)


def test_a_trial_that_is_asked_to_stop_is_left_and_goes_on(tmp_path, monkeypatch):
    """However often: only processes that die over a trial are counted."""
    said, opened = [], open_study(tmp_path)
    monkeypatch.setattr(trials, "prepare", lambda *_: None)
    monkeypatch.setattr(loop, "run", lambda cfg, workdir, judge: 130)  # Ctrl-C: saved, not finished
    for _ in range(study.ATTEMPTS + 1):
        assert trials.run(opened, "random", "none", 1, 0, said.append) == 130 and study.others(opened) == []

    def interrupted(cfg, workdir, judge):
        raise KeyboardInterrupt
    monkeypatch.setattr(loop, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trials.run(opened, "random", "none", 1, 0, said.append)
    pretend(monkeypatch)
    assert trials.run(opened, "random", "none", 1, 0, said.append) == 0
    [row] = study.rows(opened)
    assert row.state == "complete" and said[1] == "trial 0  stopped with a checkpoint; the same command goes on with it"


def test_the_best_config_is_a_file(tmp_path, monkeypatch):
    pretend(monkeypatch)
    opened, said = open_study(tmp_path / "study"), []
    trials.run(opened, "tpe", "none", 6, 0, said.append)
    show.summary(opened, said.append)
    found = study.best_row(opened, study.rows(opened))
    assert config.load(str(tmp_path / "study" / "best.py")) == study.trial_config(*opened[:3], found.values)
    assert config.load(str(study.workdir(opened, 2) / "config.py")) == study.trial_config(*opened[:3], study.rows(opened)[2].values)
    assert config.load(str(tmp_path / "study" / "best.py")).data.dir == str(tmp_path / "study" / "data")
    assert (tmp_path / "study" / "search.png").read_bytes().startswith(b"\x89PNG")
    index, shares = study.importances(opened, study.rows(opened))
    assert index == 9 and set(shares) == set(opened.space) and shares["optim.lr"] > 0.5  # the figure depends on nothing else
    lines = "\n".join(said)
    assert f"best: trial {found.number}, loss {found.figure:.4f}" in lines and "6 complete; 540 steps in all" in lines
    assert f"--config={tmp_path / 'study' / 'best.py'}" in lines and "'--config.train.steps=900 steps'" in lines


def test_a_study_refuses_what_is_not_its_own(tmp_path):
    open_study(tmp_path / "study")
    open_study(tmp_path / "study", cfg=config.override(CONFIG, [("checkpoint.keep_last", "3")]))  # what does not change the training
    for changed, said in (({"line": "optim.lr=log(1e-4,1e-2)"}, "optim.lr: log(0.0001, 0.1, 5) -> log(0.0001, 0.01); space of model.layers: 1, 2 -> none"),
                          ({"cfg": config.override(CONFIG, [("optim.b2", "0.9")])}, "optim.b2: 0.95 -> 0.9"),
                          ({"storage": "sqlite"}, "storage: journal -> sqlite")):
        with pytest.raises(ValueError) as error:
            open_study(tmp_path / "study", **changed)
        assert said in str(error.value) and "choose another --workdir" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty and holds no study"):
        open_study(tmp_path / "full")
    with pytest.raises(OSError, match="cannot be written"):
        open_study(tmp_path / "full" / "file" / "study")


@pytest.mark.parametrize("tail, said", [("", None), ('{"op_code":', None), ('{"op_code":\n{}\n', "is damaged")])
def test_a_torn_journal_is_mended_and_a_broken_one_refused(tmp_path, monkeypatch, tail, said):
    pretend(monkeypatch)
    trials.run(open_study(tmp_path), "random", "none", 1, 0, lambda line: None)
    with open(tmp_path / "journal.log", "a") as file:
        file.write(tail)
    if said:
        with pytest.raises(ValueError, match=said):
            open_study(tmp_path)
    else:
        trials.run(open_study(tmp_path), "random", "none", 2, 0, lambda line: None)
        assert [row.state for row in study.rows(open_study(tmp_path))] == ["complete"] * 2


def test_one_line_for_a_user(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from ml_collections import ConfigDict\nget_config = ConfigDict\n")
    search = lambda *more: cli.main(["search", f"--config={recipe}", f"--workdir={tmp_path / 's'}", *more])
    for more, said in ((["--space=optim.lrr=1,2"], "did you mean config.optim.lr?"), (["--space=optim.lr=log(1e-3,1)", "--sampler=grid"], "number of points"),
                       (["--space=optim.lr=1,2", "--sampler=tpee"], "tpe"),
                       (["--space=optim.lr=1,2", "--config.checkpoint.metric=f1"], "checkpoint.metric='f1'")):
        with pytest.raises(SystemExit) as error:
            search(*more)
        line = capsys.readouterr().err
        assert error.value.code == 2 and said in line and line.count("\n") == 1, line
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit):
        search("--space=optim.lr=1,2")
    assert "pip install 'jaxlm[search]'" in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_jobs_share_the_gpus():
    assert jobs.share(0, 4, []) == {}
    assert [jobs.share(i, 2, ["0", "1", "2", "3"]) for i in range(2)] == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert jobs.share(2, 3, ["5"]) == {"CUDA_VISIBLE_DEVICES": "5", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.30"}


def test_the_best_trial_is_in_sight_and_a_hopeless_one_is_not(tmp_path):
    class Axes:
        def set_ylim(self, *limits):
            self.limits = limits

    axes, opened = Axes(), open_study(tmp_path / "study")
    show._focus(opened, axes, [5.9, 7.9, 8.0, 8.2, 8.3, 8.3, 900.0])
    assert axes.limits[0] < 5.9 and 8.3 < axes.limits[1] < 20
