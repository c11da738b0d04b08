"""The server under thousands of hostile requests, and as a process that is told to end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.serve import live
from tests.serve.test_server import attack, check
from tests.train import runs

pytestmark = pytest.mark.slow


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_2000_hostile_requests_leave_nothing_behind():
    with live.serving(max_body=2**20, max_tokens=32) as (server, address):
        check(server, address, attack(address, 1000))  # all shapes are compiled, buffers have their size
        before = resident()
        check(server, address, attack(address, 1000))
        assert resident() - before < 40 * 2**20, f"{(resident() - before) / 2**20:.0f} MiB more"


def test_sigterm_finishes_what_was_accepted(tmp_path):
    code, output = runs.finish("train", f"--config={runs.recipe(tmp_path)}", f"--workdir={tmp_path}/run", "--config.train.steps=2",
                               "--config.model.context=256")
    assert code == 0, output
    process = subprocess.Popen([sys.executable, "-m", "jaxlm", "serve", f"--workdir={tmp_path}/run", "--port=0", "--name=me"], stdout=subprocess.PIPE,
                               env=runs.environment(), text=True)
    try:
        address = process.stdout.readline().split(" at ")[1].strip().removesuffix("/v1")
        ask = lambda **body: httpx.post(f"{address}/v1/completions", json={"prompt": "x", "max_tokens": 200, "ignore_eos": True, **body}, timeout=120)
        assert ask(max_tokens=2).status_code == 200
        found = []
        threads = [threading.Thread(target=lambda i=i: found.append(ask(stream=bool(i % 2)))) for i in range(40)]
        for thread in threads:
            thread.start()
        metric = lambda: {line.split()[0]: line.split()[1] for line in httpx.get(f"{address}/metrics").text.splitlines() if line[0] != "#"}
        while int(metric()["jaxlm_running"]) + int(metric()["jaxlm_waiting"]) < 40:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(120)
        assert [answer.status_code for answer in found] == [200] * 40
        ends = [json.loads(answer.text) if answer.text[0] == "{" else json.loads(answer.text.split("data: ")[-2]) for answer in found]
        assert [end["choices"][0]["finish_reason"] for end in ends] == ["length"] * 40
        assert process.wait(60) == 0
    finally:
        process.kill()
