"""A process of a run that falls silent or fails is named, and all others end: the threads of jaxlm/peers.py against a store in memory. test_chaos.py has
real processes; docs/faults.md the figures."""

import signal
import threading
import time

import jax
import pytest
from jax._src import distributed

from jaxlm import peers


class Store:
    """What jax's coordinator keeps, for one process; `silent`: what it writes arrives no more, `gone`: nothing answers."""

    def __init__(self, content):
        self._content, self.silent, self.gone = content, False, False

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.gone:
            raise RuntimeError("UNAVAILABLE")
        if not self.silent:
            assert allow_overwrite or key not in self._content
            self._content[key] = value

    def key_value_dir_get(self, prefix):
        if self.gone:
            raise RuntimeError("UNAVAILABLE")
        return [(key, value) for key, value in dict(self._content).items() if key.startswith(prefix)]


@pytest.fixture
def three(monkeypatch):
    """The three processes of a run, in threads of this one: their eyes, their stores, and what each said when it ended."""
    content, made, said = {}, [], {}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed.global_state, "coordinator_address", "127.0.0.1:1")

    def finish(self, why, stacks=False):
        said.setdefault(self._index, why)
        self._ended.set()
        raise SystemExit

    monkeypatch.setattr(peers.Peers, "_finish", finish)
    monkeypatch.setattr(peers.Peers, "_turn_aborts", lambda self: setattr(self, "_libc", type("", (), {"signal": lambda *_: None})))
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(distributed.global_state, "client", Store(content))
        made.append(peers.Peers(3.0, lambda error: isinstance(error, ValueError)))
    yield made, said
    for peer in made:
        peer._ended.set()
    for thread in threading.enumerate():
        if thread.name.startswith("peers"):
            thread.join(30)


def until(holds, seconds=30.0):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def test_a_silent_process_is_named_by_all_others(three):
    made, said = three
    assert until(lambda: all(peer._beats > 3 for peer in made)) and not said
    made[2]._client.silent = True
    assert until(lambda: {0, 1} <= said.keys())
    assert all(said[index].startswith("process 2 of 3 (host ") and "not heard of for 3 s (train.peer_seconds)" in said[index] for index in (0, 1)), said


def test_process_0_is_missed_too(three):
    made, said = three
    assert until(lambda: all(peer._first for peer in made))
    for peer in made[1:]:
        peer._client.gone = True
    assert until(lambda: {1, 2} <= said.keys())
    assert all(said[index].startswith("process 0 of 3 (host ") and said[index].endswith("has ended") for index in (1, 2)), said


def test_an_error_of_one_ends_all_and_says_why(three, monkeypatch):
    made, said = three
    codes = []
    monkeypatch.setattr(peers.atexit, "register", lambda _, code: codes.append(code))
    made[1].failed(ValueError("data.batch_size=0\nis wrong"))
    assert until(lambda: {0, 2} <= said.keys()) and codes == [2]
    assert all("process 1 of 3 (host " in said[index] and said[index].endswith("failed: ValueError: data.batch_size=0 is wrong") for index in (0, 2)), said
    assert 1 not in said  # it ends by itself, with its own words


def test_an_error_that_a_lost_peer_caused_waits_for_its_name(three, monkeypatch):
    made, said = three
    codes = []
    monkeypatch.setattr(peers.atexit, "register", lambda _, code: codes.append(code))
    made[2]._client.silent = True
    made[1].failed(RuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
    assert said[1].startswith("process 2 of 3")


def test_the_one_that_is_behind_is_named(three):
    made, said = three
    made[0]._seconds = 600.0  # those that have ended are silent
    made[0].steps, made[1].steps, made[2].steps = 7, 6, 7
    assert until(lambda: [row["steps"] for _, row in sorted(made[0]._rows().items())] == [7, 6, 7])
    with pytest.raises(SystemExit):
        made[0].end("nothing finished for 9 s (train.watchdog_seconds)")
    assert until(lambda: {0, 1, 2} <= said.keys())
    assert all("nothing finished for 9 s (train.watchdog_seconds); behind: process 1 of 3" in text for text in said.values()), said


def test_all_leave_together(three):
    made, said = three
    left = [threading.Thread(target=peer.leave) for peer in made]
    for thread in left[1:]:
        thread.start()
    time.sleep(0.5)
    assert all(thread.is_alive() for thread in left[1:])  # process 0 is still at work
    left[0].start()
    for thread in left:
        thread.join(30)
    assert not said and not any(thread.is_alive() for thread in left)


def test_one_process_has_no_peers():
    before = signal.getsignal(signal.SIGABRT)
    with peers.joined(1.0, lambda error: True):
        peers.worked()
    assert signal.getsignal(signal.SIGABRT) == before and peers._current is None
