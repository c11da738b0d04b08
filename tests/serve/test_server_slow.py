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

from jaxlm.serve import connections
from tests.serve import attacks, live
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


def test_attacks_keep_nobody_else_out(caplog, monkeypatch):
    """The table of tools/attack_server.py with small numbers: connections beyond what the server takes, and everything that no client should send."""
    monkeypatch.setattr(connections, "WAIT", 3.0)
    caplog.set_level("INFO")
    attacks.raise_descriptors()
    with live.serving(api_key=attacks.KEY, max_tokens=32) as (server, address):
        place = attacks.place_of(address)
        attacks.warm(place)
        tried = {"heads": ("200", lambda p: attacks.slow_heads(p, 200, 2)), "bodies": ("250", lambda p: attacks.slow_bodies(p, 250, 2)),
                 "connections": ("400, and 262 are kept", lambda p: attacks.connections(p, 400, 1)), "large": ("3 x 3 MB", lambda p: attacks.large_bodies(p, 3, 3 << 20)),
                 "headers": ("10", lambda p: attacks.header_floods(p, 10)), "paths": ("40", lambda p: attacks.paths(p, 40)), "hosts": ("8", lambda p: attacks.hosts(p, 8)),
                 "malformed": ("90", lambda p: attacks.malformed(p, 90)), "gone": ("30", lambda p: attacks.disconnects(p, 30))}
        for name, (sent, attack) in tried.items():
            row = attacks.run(place, name, sent, attack)
            assert row.during < 20 and row.after < 20 and row.descriptors <= 4 and row.memory < 64 * 2**20, row
            assert "500" not in row.came and (name not in ("hosts", "paths") or "x 200" not in row.came.replace("1 x 200", "")), row
        live.settled(server, 60)
    told = caplog.text
    assert attacks.SECRET[:8] not in told and attacks.KEY not in told and "Traceback" not in told


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
