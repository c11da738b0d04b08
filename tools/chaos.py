"""Faults for real training runs, and a report: python tools/chaos.py PLAN [--trials=N] [--processes=N] [--seed=N] [--json=FILE] [--folder=DIR]

  kill        SIGKILL at random moments and at named points (tools/chaos_child.py has the list): what was acknowledged is whole, what is restored is what
              was saved, and the losses of the resumed run are to the last bit those of one that was never interrupted
  soak        --minutes=120: a run with saves, evaluations and restarts; memory, descriptors, threads, CPU seconds per step; --plot=FILE.svg draws what
              an earlier one wrote to --json and judges it

Trials are lives of a tiny run (1 layer, width 16) that is driven through jaxlm's own command line. A life is a fork of this process, which has imported
everything and started nothing: a trial costs 2 to 4 seconds. Exit code 1 when a promise was broken; the folder is then kept.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
STEPS = 120

RECIPE = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.data = ConfigDict(dict(source=({source!r},), validation=0.1, test=0.1, sequence_length=32, batch_size=8))
    c.tokenizer = ConfigDict(dict(kind="bytes"))
    c.model = ConfigDict(dict(context=32, layers=1, width=16, heads=2, dropout=0.1))
    c.train = ConfigDict(dict(steps={steps}, log_every=1, eval_every=25, eval_documents=4))
    c.checkpoint = ConfigDict(dict(every=5, keep_best=0))
    c.eval = ConfigDict(dict(bootstrap=20))
    return c
"""


def environment() -> None:
    """One CPU device, compiled quickly and once: every life takes its programs from one cache."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                   "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/jaxlm/xla-chaos")}
    os.environ.pop("XLA_FLAGS", None)
    os.environ.pop("PJRT_NPROC", None)
    from jaxlm import cli
    from tests.conftest import QUICK
    os.environ["XLA_FLAGS"] = " ".join(QUICK)
    cli.set_environment(False)


def write_recipe(folder: pathlib.Path, steps: int) -> pathlib.Path:
    """A recipe and a corpus of 120 made-up documents."""
    from tests.train import runs
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(source=str(runs.write_corpus(folder / "corpus.jsonl")), steps=steps))
    return path


class Life:
    """One start of the command, in one process or several, each with its own fault or none."""

    def __init__(self, lab: "Lab", workdir: pathlib.Path, plans: list[dict], arguments: tuple[str, ...] = ()):
        self.workdir, self.begun = workdir, time.time()
        self.outputs = [workdir.with_suffix(f".{index}.out") for index in range(len(plans))]
        self.witness = workdir.with_suffix(".jsonl")
        common = ["train", f"--config={lab.recipe}", f"--workdir={workdir}", *arguments]
        if len(plans) > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            common += [f"--coordinator={address}", f"--processes={len(plans)}"]
        several = lambda index: [f"--process={index}"] if len(plans) > 1 else []
        self.pids = [self._fork(index, {"log": str(self.witness), "index": index, **plan}, common + several(index)) for index, plan in enumerate(plans)]
        self.codes: dict[int, int] = {}
        self.ended: dict[int, float] = {}

    def _fork(self, index: int, plan: dict, argv: list[str]) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        try:
            descriptor = os.open(self.outputs[index], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            from tools import chaos_child
            chaos_child.run(plan, argv)  # ends the process as the command line would
        finally:
            os._exit(70)

    def rows(self) -> list[dict]:
        """What the witness wrote in this life."""
        found = []
        for line in self.witness.read_text().splitlines() if self.witness.exists() else ():
            if (row := json.loads(line))["time"] >= self.begun:
                found.append(row)
        return found

    def poll(self) -> None:
        """Takes note of processes that have ended."""
        for index, pid in enumerate(self.pids):
            if index not in self.codes and os.waitpid(pid, os.WNOHANG)[0]:
                raise AssertionError("unreachable")
