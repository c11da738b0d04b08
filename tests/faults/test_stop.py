"""A request to end is heard where Python itself cannot hear it, and where the loop waits for what may never come."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxlm.train import stop
from tests.train import runs


@pytest.fixture(autouse=True)
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("before", [True, False])
def test_a_wait_for_data_is_ended(before):
    with stop.StopRequest() as request:
        request.arm()
        if before:
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(stop.Stopped):
            with request.waiting():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
        assert request.now() and request.exit_code == 0


def test_a_wait_that_is_over_changes_nothing():
    with stop.StopRequest() as request:
        request.arm()
        with request.waiting():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.at(1)


def test_sigterm_is_heard_inside_a_compile():
    """A computation in C that lasts for minutes stands for it; nothing is there to be saved yet."""
    code = "import hashlib\nfrom jaxlm.train import stop\nstop._LEAVE = 0.3\nstop.StopRequest()\nprint('now', flush=True)\n" \
           "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    assert ended(code, signal.SIGTERM) == 0


def test_a_thread_that_hangs_does_not_keep_a_finished_run():
    code = ("import concurrent.futures, time\nfrom jaxlm.train import stop\nstop._LEAVE = 0.3\n"
            "concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 600)\n"
            "stop.depart(7)\nprint('now', flush=True)")
    assert ended(code, None) == 7


def ended(code: str, number: int | None) -> int:
    process = subprocess.Popen([sys.executable, "-c", code], env=runs.environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    if number:
        time.sleep(0.3)
        process.send_signal(number)
    return process.wait(60)
