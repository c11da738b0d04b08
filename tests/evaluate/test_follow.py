"""Following a run: each checkpoint once, whatever happens to it; a log that survives kills."""

import json
import multiprocessing
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlm.evaluate import follow


class Fake:
    """A run whose saved steps change with each look, as `script` says: the steps that are there, then whether it has ended."""

    def __init__(self, *script, broken=()):
        self.marks = {}
        self.script, self.broken, self.steps, self.lines, self.seen, self.slept = list(script), dict(broken), [], [], [], 0

    def look(self, done):
        if self.script:
            self.steps, self.ended = self.script.pop(0)
        return min((s for s in self.steps if s not in done), default=None), self.ended

    def open(self, step):
        if step in self.broken:
            raise self.broken[step]
        return step

    def mark(self, step):
        return self.marks.get(step, "first") if step in self.steps else None

    def sleep(self, seconds):
        self.slept += 1
        assert self.slept < 100, "it waits for ever"

    def follow(self, done=()):
        return follow.follow(self.look, self.open, self.seen.append, done=set(done), mark=self.mark, interval=1, sleep=self.sleep,
                             log=self.lines.append)


def test_each_checkpoint_is_evaluated_once_until_the_run_ends():
    run = Fake(([], False), ([1], False), ([1], False), ([1, 2], False), ([2, 3], False), ([2, 3], False), ([3, 4], True))
    assert run.follow() == 0 and run.seen == [1, 2, 3, 4] and run.slept == 3


def test_what_was_saved_last_is_evaluated_after_the_end():
    run = Fake(([1, 2, 3], True))
    assert run.follow() == 0 and run.seen == [1, 2, 3] and not run.slept


def test_a_restart_repeats_nothing():
    run = Fake(([1, 2, 3], True))
    assert run.follow(done=[1, 3]) == 0 and run.seen == [2]
    done = {1, 2, 3}
    assert Fake(([1, 2, 3], True)).follow(done) == 0 and done == {1, 2, 3}


def test_a_checkpoint_deleted_while_it_is_read_is_said_and_passed():
    run = Fake(([1, 2], False), ([2], True), broken={1: RuntimeError("no such file, many\nlines")})
    real = run.open
    run.open = lambda step: (run.steps.remove(step) if step == 1 else None, real(step))[1]
    assert run.follow() == 0 and run.seen == [2]
    assert run.lines == ["step 1 was deleted before it could be read; going on"]


def test_a_damaged_checkpoint_is_said_and_counted():
    run = Fake(([1, 2], True), broken={1: ValueError("checkpoint of step 1 is damaged:\nparams/x")})
    assert run.follow() == 1 and run.seen == [2] and run.lines == ["step 1 is passed over: checkpoint of step 1 is damaged: params/x"]


def test_a_damaged_checkpoint_that_the_run_saves_again_is_evaluated():
    run = Fake(([1, 2], False), ([1, 2], False), ([1, 2], False), ([1, 2], True), broken={1: ValueError("damaged")})

    def sleep(seconds):
        run.marks[1] = "second"
        run.broken.clear()

    run.sleep = sleep
    assert run.follow() == 0 and run.seen == [2, 1]


def test_faults_of_our_own_and_of_the_evaluation_end_it():
    with pytest.raises(KeyError):
        Fake(([1], True), broken={1: KeyError("ours")}).follow()
    run = Fake(([1], True))
    with pytest.raises(ValueError, match="corpus"):
        follow.follow(run.look, run.open, lambda step: (_ for _ in ()).throw(ValueError("another corpus")), done=set(), mark=str, interval=1)


# --- the log ---


def test_rows_come_back_in_full_precision(tmp_path):
    path = tmp_path / "eval.jsonl"
    follow.append(path, {"step": 1, "loss": 1 / 3, "bad": float("nan"), "worse": float("inf")})
    follow.append(path, {"step": 2, "loss": 2.0})
    assert follow.read(path) == [{"step": 1, "loss": 1 / 3, "bad": None, "worse": None}, {"step": 2, "loss": 2.0}]
    assert path.read_bytes().count(b"\n") == 2
    assert follow.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("torn", [b"{", b'{"step": 3, "loss": 0.1234', b'{"step": 3}', b'{"step": "' + b"x" * 9000, b"\xff\xfe"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_torn_last_line_is_ignored_and_mended(tmp_path, torn, before):
    path = tmp_path / "eval.jsonl"
    for step in range(before):
        follow.append(path, {"step": step})
    with open(path, "ab") as file:
        file.write(torn)
    assert [row["step"] for row in follow.read(path)][:before] == list(range(before))
    follow.append(path, {"step": 9})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(before), 9]


def test_a_full_disk_leaves_whole_lines_and_one_line_of_explanation(tmp_path):
    path = tmp_path / "eval.jsonl"
    follow.append(path, {"step": 1})
    size = os.path.getsize(path)
    child = multiprocessing.get_context("spawn").Process(target=_append_with_limit, args=(path, size + 4))
    child.start()
    child.join()
    assert child.exitcode == 0 and os.path.getsize(path) == size


def _append_with_limit(path, size):
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(OSError, match="cannot be written: 4 of 12 bytes were written: is the disk full?"):
        follow.append(path, {"step": 2})


def test_a_read_only_folder_is_one_line(tmp_path):
    with pytest.raises(OSError, match="eval.jsonl cannot be written: No such file or directory"):
        follow.append(tmp_path / "absent" / "eval.jsonl", {"step": 1})


def test_several_writers_lose_nothing(tmp_path):
    path = tmp_path / "eval.jsonl"
    with ThreadPoolExecutor(3) as pool:  # a lock belongs to an open file, so threads exclude each other as processes do
        list(pool.map(lambda k: [follow.append(path, {"step": 100 * k + i}) for i in range(20)], range(3)))
    assert sorted(row["step"] for row in follow.read(path)) == sorted(100 * k + i for k in range(3) for i in range(20))
