"""Judging checkpoints by paired tests, and a watcher that neither misses nor repeats one, whatever happens to the files, itself and the clocks."""

import os
import shutil

import numpy as np
import pytest

from jaxlm.bin import eval as binary
from jaxlm.evaluate import answers, follow, verdict
from jaxlm.train import checkpoint
from tests.evaluate.conftest import save


def table(generator, mean, documents=60):
    """Nats and tokens of each document; documents differ, the same ones in each checkpoint."""
    return np.stack([mean * 20 + np.linspace(-20, 20, documents) + generator.normal(0, 0.5, documents), np.full(documents, 20.0)], axis=1)


def judge(tables, keep_best=2, metric="validation/loss"):
    found = None
    for step in tables:
        row = answers.figures(tables[step], "loss", 20)
        found = verdict.after(found, metric, step, row, tables.__getitem__, keep_best=keep_best)
    return found


def test_the_best_are_kept_and_a_regression_is_marked():
    generator = np.random.default_rng(0)
    tables = {step: table(generator, mean) for step, mean in ((1, 4.0), (2, 3.5), (3, 3.2), (4, 3.2), (5, 3.4), (6, 3.0), (7, 3.0))}
    found = judge(tables)
    assert found.best == 6 and found.regressed == (5,) and set(found.keep) == {6, 7} and found.without_gain == 1
    assert [one["step"] for one in found.ranking][-1] == 1 and {one["step"]: one["verdict"] for one in found.ranking}[4] == "cannot tell"
    assert judge({step: tables[step] for step in (3, 4)}).without_gain == 1 and judge(tables, keep_best=0).keep == ()
    again = verdict.after(found, "validation/loss", 5, {"value": 0.0}, tables.__getitem__, keep_best=2)
    assert again == found, "a checkpoint is judged once"
    assert "a regression" in verdict.show(found, 5) and "best: step 6" in verdict.show(found, 7)
    assert verdict.after(found, "other/acc", 9, {"value": 0.5}, tables.__getitem__, keep_best=2).best == 9


def test_noise_alone_moves_nothing_in_95_of_100_runs():
    generator, moved = np.random.default_rng(1), 0
    for _ in range(40):
        found = judge({step: table(generator, 3.0, 30) for step in (1, 2)}, keep_best=1)
        moved += found.best != 1 or bool(found.regressed)
    assert moved / 40 <= 0.13  # 5 % and chance


def test_it_is_read_as_written_and_half_a_file_is_none(tmp_path):
    found = judge({1: table(np.random.default_rng(0), 3.0), 2: table(np.random.default_rng(1), 2.0)})
    assert verdict.read(tmp_path) is None
    verdict.write(tmp_path, found)
    assert verdict.read(tmp_path) == found and os.listdir(tmp_path) == [verdict.FILE]
    text = (tmp_path / verdict.FILE).read_text()
    for broken in (text[:len(text) // 2], "[]", "{}", ""):
        (tmp_path / verdict.FILE).write_text(broken)
        assert verdict.read(tmp_path) is None


def test_a_run_keeps_what_the_watcher_found_best_and_knows_when_to_give_up(tmp_path, cfg, corpus, params):
    generator = np.random.default_rng(0)
    found = judge({1: table(generator, 2.0), 2: table(generator, 3.0), 3: table(generator, 3.0)}, keep_best=1)
    assert found.keep == (1,) and found.without_gain == 2
    workdir = save(tmp_path / "run", cfg, corpus, params, 1)
    verdict.write(workdir, found)
    save(workdir, cfg, corpus, params, 2, 3, keep_last=1)
    assert checkpoint.steps(workdir) == [1, 3]
    assert [verdict.exhausted(workdir, patience) for patience in (0, 1, 2, 3)] == [False, True, True, False] and not verdict.exhausted(tmp_path, 1)


# --- a run and a watcher that share nothing but a folder ---


class Killed(BaseException):
    pass


class World:
    """A run that saves, damages and deletes checkpoints, and a watcher beside it that is killed at any point and started again. Each look at the folder, each
    read and each write of the watcher is a moment at which the run moves on or the watcher dies. Files get times from clocks that disagree by years."""

    def __init__(self, folder, generator):
        self.folder, self.generator, self.saved, self.whole_since, self.moments = folder, generator, 0, {}, 0
        self.last, self.evaluated, self.must, self.calm = int(generator.integers(3, 9)), [], set(), False

    def file(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        when = float(self.generator.uniform(0, 4e9))
        os.utime(path, (when, when))

    def manifest(self, step, text):
        self.file(self.folder / "checkpoints" / str(step) / checkpoint.MANIFEST, text)

    def moment(self):
        """Something may happen: half of the time nothing does."""
        self.moments += 1
        assert self.moments < 5000, "it never ends"
        chance = self.generator.random()
        if chance < 0.06 and not self.calm:
            raise Killed
        if chance > 0.5:
            return
        if self.saved < self.last:
            self.act(chance)
        elif not (self.folder / "FINISHED").exists():
            for step in self.broken():  # a run that resumes deletes what is damaged
                shutil.rmtree(self.folder / "checkpoints" / str(step))
            self.file(self.folder / "FINISHED", "{}")
            self.must = set(checkpoint.steps(self.folder))  # what is there now stays

    def broken(self):
        return [step for step in checkpoint.steps(self.folder) if "damaged" in (self.folder / "checkpoints" / str(step) / checkpoint.MANIFEST).read_text()]

    def act(self, chance):
        step = self.saved + 1
        there = checkpoint.steps(self.folder)
        if chance < 0.15:  # half of a checkpoint, and Orbax's temporary folder
            self.file(self.folder / "checkpoints" / str(step) / "params" / "half", "x")
            self.file(self.folder / "checkpoints" / f"{step}.orbax-checkpoint-tmp-9" / "x", "x")
        elif chance < 0.2 and there:  # deleted as the run deletes: the manifest first
            path = self.folder / "checkpoints" / str(there[0])
            (path / checkpoint.MANIFEST).unlink()
            shutil.rmtree(path)
        elif chance < 0.24 and there:
            self.manifest(there[-1], "damaged")
        elif chance < 0.28 and self.broken():  # the run comes back to a damaged step and saves it again
            self.manifest(self.broken()[0], f"whole again {self.moments}")
        else:
            self.manifest(step, f"whole {self.moments}")
            self.saved = step

    # what the watcher does with it

    def look(self, done):
        self.moment()
        return binary._look(self.folder, done)

    def open(self, step):
        self.moment()
        path = self.folder / "checkpoints" / str(step) / checkpoint.MANIFEST
        if not path.exists():
            raise RuntimeError("no such file, somewhere in TensorStore")
        if "damaged" in path.read_text():
            raise ValueError("is damaged")
        self.moment()
        return step

    def evaluate(self, step):
        log = self.folder / "eval.jsonl"
        self.moment()
        before = verdict.read(self.folder)
        columns = lambda one: table(np.random.default_rng(one), 5.0 - 0.2 * one, 8)
        verdict.write(self.folder, verdict.after(before, "validation/loss", step, answers.figures(columns(step), "loss", 5), columns, keep_best=2))
        self.moment()
        self.evaluated.append(step)
        follow.append(log, {"step": step})
        if self.generator.random() < 0.1 and not self.calm:  # killed while it wrote the next line
            with open(log, "ab") as file:
                file.write(b'{"step": 9')
            raise Killed

    def watch(self):
        done = {row["step"] for row in follow.read(self.folder / "eval.jsonl")}
        return follow.follow(self.look, self.open, self.evaluate, done=done, mark=lambda step: checkpoint.mark(self.folder, step), interval=0,
                             sleep=lambda seconds: self.moment(), log=lambda line: None)


def trial(folder, seed):
    world = World(folder, np.random.default_rng(seed))
    for attempt in range(400):
        world.calm = attempt > 300
        try:
            world.watch()
            break
        except Killed:
            continue
    steps = [row["step"] for row in follow.read(folder / "eval.jsonl")]  # a line that was torn by the last kill is none
    judged = verdict.read(folder)
    missed = world.must - set(steps)
    # The verdict is written first: it may know one that was deleted before a killed watcher came back to note it.
    return len(missed), len(steps) - len(set(steps)), set(steps) <= {one["step"] for one in judged.ranking} if judged else not steps, attempt


def trials(folder, seeds):
    found = [trial(folder / str(seed), seed) for seed in seeds]
    assert sum(one[0] for one in found) == 0, "a checkpoint was missed"
    assert sum(one[1] for one in found) == 0, "a checkpoint was evaluated twice"
    assert all(one[2] for one in found), "the verdict left one out"
    assert sum(one[3] for one in found) > len(found) / 2, "too few kills to mean anything"


def test_a_watcher_misses_and_repeats_nothing(tmp_path):
    trials(tmp_path, range(8))


@pytest.mark.slow
def test_a_watcher_misses_and_repeats_nothing_in_200_trials(tmp_path):
    trials(tmp_path, range(200))
