"""tools/chaos.py, the short set that CI runs (-m slow) and the long one by command (-m chaos): faults in real training runs. docs/faults.md has the figures."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def chaos(folder, *arguments, timeout=1800):
    """Runs the tool; its report."""
    out = folder / "report.json"
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "chaos.py"), *arguments, f"--json={out}"], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "TMPDIR": str(folder)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_killed_anywhere_nothing_acknowledged_is_lost_and_losses_are_the_same(tmp_path):
    report = chaos(tmp_path, "kill", "--trials=8", "--seed=3")
    assert report["all"]["survived"] == report["all"]["trials"] == 8 and len(report["kinds"]) > 4


@pytest.mark.chaos
def test_killed_a_thousand_times(tmp_path):
    report = chaos(tmp_path, "kill", "--trials=1000", "--seed=5", timeout=6 * 3600)
    assert report["all"]["survived"] == report["all"]["trials"] == 1000
