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
    report = chaos(tmp_path, "kill", "--trials=6", "--seed=3")
    assert report["all"]["survived"] == report["all"]["trials"] == 6 and len(report["kinds"]) > 2


@pytest.mark.slow
def test_asked_to_end_it_saves_and_ends_in_time(tmp_path):
    assert chaos(tmp_path, "term", "--trials=3", "--seed=4")["all"]["survived"] == 3


@pytest.mark.slow
def test_one_of_two_is_lost_and_the_other_says_so(tmp_path):
    """Killed, stopped, stuck and raising, once each."""
    report = chaos(tmp_path, "lost", "--processes=2", "--trials=4", "--seed=2")
    assert report["all"]["survived"] == 4 and len(report["kinds"]) == 4


@pytest.mark.chaos
@pytest.mark.parametrize("arguments", [
    ("kill", "--trials=1000", "--seed=5"), ("kill", "--trials=40", "--processes=2"), ("term", "--trials=100"), ("lost", "--trials=50", "--processes=2"),
    ("lost", "--trials=20", "--processes=4"), ("lock", "--trials=20"), ("orphans", "--trials=20"), ("mesh", "--trials=5"), ("power", "--trials=20")],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[2:]))
def test_the_long_set(tmp_path, arguments):
    report = chaos(tmp_path, *arguments, timeout=6 * 3600)
    assert report["all"]["survived"] == report["all"]["trials"] == int(arguments[1].partition("=")[2])
