"""What the plans of tools/chaos.py have in common: a tiny run that lives many lives, a witness of what it saved, and the report."""

import collections
import contextlib
import json
import os
import pathlib
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 200
PATIENCE = 120.0  # seconds after which a life that should have ended is a hang

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

class Broken(Exception):
    """A promise was not kept."""


def environment() -> None:
    """One CPU device; machine code that compiles in a quarter of the time, once for all lives."""
    for name in ("XLA_FLAGS", "PJRT_NPROC"):
        os.environ.pop(name, None)
    from jaxlm import cli
    from tests.conftest import QUICK
    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "XLA_FLAGS": " ".join(QUICK), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                   "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/jaxlm/xla-chaos")}
    cli.set_environment(False)


def write_recipe(folder: pathlib.Path, steps: int) -> pathlib.Path:
    """A recipe and a corpus of 120 made-up documents."""
    from tests.train import runs
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(source=str(runs.write_corpus(folder / "corpus.jsonl")), steps=steps))
    return path


class Lab:
    """A folder for runs of one recipe, the process that starts them, and the losses of a run that nothing disturbs."""

    def __init__(self, folder: pathlib.Path, processes: int = 1, steps: int = STEPS):
        self.folder, self.processes, self.recipe = folder, processes, write_recipe(folder, steps)
        self._starter = subprocess.Popen([sys.executable, str(ROOT / "tools" / "chaos_child.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env={**os.environ, "PYTHONPATH": str(ROOT)})
        life = Life(self, folder / "whole", [{}] * processes)
        life.wait(2 * PATIENCE)
        if set(life.codes.values()) != {0}:
            raise Broken(f"the undisturbed run ended with {life.codes}: {life.printed()[-2000:]}")
        from tests.train import runs
        self.losses = runs.losses(folder / "whole")

    def ask(self, request: dict) -> int | None:
        """One request to the starter, see tools/chaos_child.py."""
        self._starter.stdin.write(json.dumps(request) + "\n")
        self._starter.stdin.flush()
        return json.loads(self._starter.stdout.readline())

    def close(self) -> None:
        """Ends the starter and, with it, what it started."""
        self._starter.stdin.close()
        self._starter.wait()


class Life:
    """One start of `jaxlm train` on a workdir, in one process or several, each with a plan of its own.

    Args:
      plans: what tools/chaos_child.py is to do, for each process.
      arguments: more of the command line.
      name: of the witness's file; empty: that of the workdir.
      devices: emulated ones, of each process.
    """

    def __init__(self, lab: Lab, workdir: pathlib.Path, plans: list[dict], *arguments: str, name: str = "", devices: int = 1):
        self._lab, self.workdir, self.witness = lab, workdir, lab.folder / f"{name or workdir.name}.jsonl"
        self.outputs = [self.witness.with_suffix(f".{index}.out") for index in range(len(plans))]
        flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}" * (devices > 1)
        argv = ["train", f"--config={lab.recipe}", f"--workdir={workdir}", *arguments]
        if len(plans) > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                argv += [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", f"--processes={len(plans)}"]
        self.witness.touch()
        self._read = self.witness.stat().st_size
        self.begun, self.codes, self.ended = time.time(), {}, {}
        more = {"XLA_FLAGS": flags, **({"PJRT_NPROC": "64"} if devices > 1 else {})}
        self.pids = [lab.ask({"argv": argv + [f"--process={index}"] * (len(plans) > 1), "out": str(self.outputs[index]), "environment": more,
                              "plan": {"log": str(self.witness), "index": index, **plan}}) for index, plan in enumerate(plans)]

    def poll(self) -> bool:
        """Takes note of processes that have ended; whether all have."""
        for index, pid in enumerate(self.pids):
            if index not in self.codes and (code := self._lab.ask({"poll": pid})) is not None:
                self.codes[index], self.ended[index] = code, time.time()
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float, until=lambda: False) -> bool:
        """Until all processes have ended or `until` holds; False where neither came in time."""
        end = time.time() + seconds
        while not (done := self.poll() or until()) and time.time() < end:
            time.sleep(0.02)
        return done

    def send(self, index: int, number: int) -> float | None:
        """A signal to one of the processes; when, or None where it had ended."""
        if self.poll() or index in self.codes:
            return None
        os.kill(self.pids[index], number)
        return time.time()

    def kill(self) -> None:
        """Ends what still runs."""
        for index in range(len(self.pids)):
            self.send(index, signal.SIGKILL)
        self.wait(PATIENCE)

    def rows(self, event: str = "") -> list[dict]:
        """What the witness wrote in this life."""
        with open(self.witness, "rb") as file:
            file.seek(self._read)
            return [row for row in _whole_lines(file.read()) if event in ("", row["event"])]

    def printed(self, index: int = 0) -> str:
        """What a process printed."""
        return self.outputs[index].read_text(errors="replace")


def _whole_lines(text: bytes) -> list[dict]:
    """JSON lines; those that a kill tore are left out."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def inspect(lab: Lab, workdir: pathlib.Path) -> int:
    """Holds a workdir, whose processes are gone, against its witness: returns the newest saved step, 0 for none.

    Raises:
      Broken: an acknowledged step that is gone or damaged, a restored state that is not the one that was saved, a loss that is not that of the
        undisturbed run.
    """
    from jaxlm.train import checkpoint
    from tests.train import runs
    rows = _whole_lines(workdir.with_suffix(".jsonl").read_bytes())
    saving: dict[tuple[int, int], str] = {}
    acknowledged = 0
    for row in rows:
        if row["event"] == "saving":
            saving[row["process"], row["step"]] = row["sum"]
        elif row["event"] == "acknowledged":
            acknowledged = max(acknowledged, row["step"])
        elif row["event"] == "restored" and row["sum"] != saving[row["process"], row["step"]]:
            raise Broken(f"the state restored from step {row['step']} is not the one that was saved")
    saved = checkpoint.steps(workdir)
    if max(saved, default=0) < acknowledged:
        raise Broken(f"step {acknowledged} was acknowledged, the newest is {saved[-1:]}")
    for step in saved:
        try:
            checkpoint.verify(workdir, step)
        except ValueError as error:
            raise Broken(str(error)) from error
    wrong = {step: (loss, lab.losses[step]) for step, loss in runs.losses(workdir).items() if loss != lab.losses[step]}
    if wrong:
        raise Broken(f"losses differ from the undisturbed run's: {wrong}")
    return max(saved, default=0)


class Tally:
    """What came of the trials, by kind of fault."""

    def __init__(self, plan: str):
        self.plan, self._begun, self._kinds, self.broken = plan, time.time(), collections.defaultdict(list), []

    def add(self, kind: str, **figures: float) -> None:
        """A trial that kept the promise."""
        self._kinds[kind].append(figures)

    def fail(self, kind: str, why: str) -> None:
        """One that did not."""
        self.broken.append(f"{kind}: {why}")
        print(f"BROKEN {kind}: {why}", flush=True)

    @property
    def trials(self) -> int:
        return sum(map(len, self._kinds.values())) + len(self.broken)

    def report(self) -> dict:
        """By kind and in all: trials, survived, and of each figure median and maximum."""
        def row(trials: list[dict], broken: int) -> dict:
            names = sorted({name for trial in trials for name in trial})
            figures = {name: [trial[name] for trial in trials if name in trial] for name in names}
            return {"trials": len(trials) + broken, "survived": len(trials),
                    **{name: {"median": round(statistics.median(found), 2), "most": round(max(found), 2)} for name, found in figures.items()}}

        of = lambda kind: sum(line.startswith(f"{kind}: ") for line in self.broken)
        kinds = {kind: row(self._kinds[kind], of(kind)) for kind in sorted({*self._kinds, *(line.partition(": ")[0] for line in self.broken)})}
        return {"plan": self.plan, "date": time.strftime("%Y-%m-%d", time.gmtime(self._begun)), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "seconds": round(time.time() - self._begun), "kinds": kinds, "all": row([t for ts in self._kinds.values() for t in ts], len(self.broken)),
                "broken": self.broken}


def table(report: dict) -> str:
    """A report as lines of Markdown."""
    names = sorted({name for row in report["kinds"].values() for name in row} - {"trials", "survived"})
    lines = [f"| {report['plan']} | trials | survived | " + " | ".join(f"{name} (median, most)" for name in names) + " |", "|---" * (3 + len(names)) + "|"]
    for kind, row in {**report["kinds"], "all": report["all"]}.items():
        cells = [f"{row[name]['median']:g}, {row[name]['most']:g}" if name in row else "" for name in names]
        lines.append(f"| {kind} | {row['trials']} | {row['survived']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
