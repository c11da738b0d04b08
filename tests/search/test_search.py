"""Real searches: several processes on one study, one of them killed; ASHA beside the whole grid. .ci/run runs them with -m slow."""

import json
import re
import signal
import time

import pytest

from jaxlm import config
from jaxlm.search import show, space, study, trials
from jaxlm.train import checkpoint, loop, report
from tests.train import runs

pytestmark = pytest.mark.slow
TINY = ("--config.model.layers=1", "--config.model.width=16", "--config.model.dropout=0.0", "--config.train.eval_every=50", "--config.checkpoint.keep_last=1")


def test_four_processes_share_a_study_and_one_is_killed(tmp_path):
    """Each trial is done once, also the one whose process is killed: another goes on with it from its checkpoint."""
    recipe, folder = runs.recipe(tmp_path, steps=150, every=10), tmp_path / "study"
    command = ("search", f"--config={recipe}", f"--workdir={folder}", "--space=optim.lr=log(1e-3,1e-1);optim.b2=0.95,0.99", "--trials=7", *TINY)
    processes = [runs.start(*command) for _ in range(4)]
    victim = None
    end = time.monotonic() + 600
    while victim is None and time.monotonic() < end:  # whoever has a trial that saved something and is far from its end
        time.sleep(0.02)
        for lock in folder.glob("running/*/LOCK"):
            saved, holder = checkpoint.steps(folder / "trials" / lock.parent.name), re.search(r'"pid": (\d+)', lock.read_text())
            if saved and saved[-1] < 100 and holder:
                number, victim = int(lock.parent.name), next(p for p in processes if p.pid == int(holder[1]))
                victim.send_signal(signal.SIGKILL)
                break
    assert victim is not None
    outputs = {p: p.communicate(timeout=600)[0] for p in processes}
    assert [p.returncode for p in processes if p is not victim] == [0] * 3, outputs
    if "ended over it" not in "".join(outputs.values()):  # the others had ended before
        outputs["last"] = runs.finish(*command)[1]
    said = "\n".join(outputs.values())
    opened = study.open_study(folder, config.load(str(recipe), [tuple(a.removeprefix("--config.").split("=")) for a in TINY]),
                              space.read("optim.lr=log(1e-3,1e-1);optim.b2=0.95,0.99", config.Config()))
    rows = study.rows(opened)
    assert [row.number for row in rows] == list(range(7)) and {row.state for row in rows} <= {"complete", "pruned"}
    for row in rows:  # begun as often as it ended, the killed one once more; as many figures as evaluations, none of them twice
        log = (study.workdir(opened, row.number) / "log.txt").read_text()
        ended = len(re.findall(rf"^trial {row.number}  (?:loss|ends early)", said, re.M))
        assert said.count(f"trial {row.number}  optim") == log.count("\nplan ") == ended + (row.number == number), said
        assert len(row.curve) == show.last_step(opened, row.number) // 50 and checkpoint.steps(study.workdir(opened, row.number))
        evaluated = [metrics["step"] for metrics in report.read_metrics(study.workdir(opened, row.number)) if "eval/loss" in metrics]
        assert evaluated == [50, 100, 150][:len(row.curve)]
    assert "resumed after step" in (study.workdir(opened, number) / "log.txt").read_text()
    assert said.count("s; see ") == 1 and f"trial {number}  optim" in said and "best: trial" in said  # the corpus was prepared once
    best = study.best_row(opened, rows)
    code, output = runs.finish("eval", f"--workdir={study.workdir(opened, best.number)}", "--split=test")
    assert code == 0, output


def test_asha_finds_the_grids_best_in_two_fifths_of_its_steps(tmp_path, monkeypatch):
    """The grid's runs are real; ASHA, in three orders, is given the same runs again up to where it ends them."""
    cfg = runs.load(tmp_path, [tuple(a.removeprefix("--config.").split("=")) for a in TINY[:-2]] + [("train.eval_every", "9"), ("data.validation", "0.3")],
                    steps=81, every="100%")
    line = "optim.lr=log(1e-4,3,10)"
    found = space.read(line, cfg)
    with runs.devices(1):
        grid = study.open_study(tmp_path / "grid", cfg, found)
        trials.run(grid, "grid", "none", 0, 0, lambda line: None)
    rows = study.rows(grid)
    whole = {row.values["optim.lr"]: row.curve for row in rows}
    assert len(whole) == 10 and show.steps(grid, rows) == 810

    def replay(config, workdir, judge):
        with open(workdir / "metrics.jsonl", "a") as log:
            for number, value in enumerate(whole[config.optim.lr], 1):
                log.write(json.dumps({"step": 9 * number, "eval/loss": value}) + "\n")
                log.flush()
                if judge(9 * number, value) and number < 9:
                    return 0
        loop._mark(workdir, 81, False)
        return 0

    monkeypatch.setattr(loop, "run", replay)
    monkeypatch.setattr(trials, "prepare", lambda *_: None)
    best = study.best_row(grid, rows).figure
    for seed in range(3):
        asha = study.open_study(tmp_path / f"asha{seed}", cfg, found)
        trials.run(asha, "grid", "asha", 0, seed, lambda line: None)
        rows = study.rows(asha)
        assert len(rows) == 10 and study.best_row(asha, rows).figure <= 1.02 * best
        assert show.steps(asha, rows) <= 0.4 * 810, (seed, show.steps(asha, rows))
