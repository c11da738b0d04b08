"""Faults for real training runs, and a report: python tools/chaos.py PLAN [--trials=N] [--processes=N] [--seed=N] [--json=FILE]

  kill     SIGKILL at random moments and at named points (tools/chaos_child.py has the list): what was acknowledged is whole, what is restored is what
           was saved, and the losses of the resumed run are to the last bit those of one that was never interrupted
  soak     --minutes=120 --json=FILE: a run with saves, evaluations and restarts; memory, descriptors, threads, CPU seconds per step
  plot     --json=FILE --plot=FILE.svg: draws what a soak wrote, and judges it

Trials are lives of a tiny run (1 layer, width 16), driven through jaxlm's own command line. Exit code 1 when a promise was broken; the folder is then kept.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
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

# Points at which lives are killed, and how often each may have been passed before: (least, most).
KILLS = {"config": (1, 1), "prepare": (1, 1), "compile": (1, 1), "restore": (1, 1), "data_wait": (1, 30), "step": (1, 30), "metrics": (1, 30), "eval": (1, 1),
         "sample": (1, 1), "save.before": (1, 4), "save.inside": (1, 4), "save.sums": (1, 50), "save.manifest": (1, 4), "save.after": (1, 4),
         "save.delete": (1, 3), "finish": (1, 1), "exit": (1, 1)}


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
    """One start of `jaxlm train` on a workdir, in one process or several, each with a plan of its own."""

    def __init__(self, lab: Lab, workdir: pathlib.Path, plans: list[dict], *arguments: str):
        self._lab, self.workdir, self.witness = lab, workdir, workdir.with_suffix(".jsonl")
        self.outputs = [workdir.with_suffix(f".{index}.out") for index in range(len(plans))]
        argv = ["train", f"--config={lab.recipe}", f"--workdir={workdir}", *arguments]
        if len(plans) > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                argv += [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", f"--processes={len(plans)}"]
        self.witness.touch()
        self._read = self.witness.stat().st_size
        self.begun, self.codes, self.ended = time.time(), {}, {}
        self.pids = [lab.ask({"argv": argv + [f"--process={index}"] * (len(plans) > 1), "out": str(self.outputs[index]),
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


def kills(lab: Lab, trials: int, draw: random.Random, tally: Tally) -> None:
    """Lives that end by SIGKILL, one of the processes at a time, on one workdir after the other, each of which is let run to its end when it can no longer
    be killed at what is left of it."""
    number, points = 0, []
    workdir, lost_at = lab.folder / "run0", None
    while tally.trials < trials:
        if not points:
            points = [*KILLS, *["random"] * len(KILLS)]
            draw.shuffle(points)
        saved = (workdir / "checkpoints").exists()
        possible = [point for point in points if saved or point != "restore"]  # "prepare" needs a new workdir
        point = "prepare" if "prepare" in points and not workdir.exists() else possible[-1] if possible else points[-1]
        points.remove(point)
        victim = draw.randrange(lab.processes)
        plans: list[dict] = [{} for _ in range(lab.processes)]
        if point != "random":
            plans[victim] = {"point": point, "hit": draw.randint(*KILLS[point]), "delay": draw.choice([0, draw.random() * 0.05]), "stall": 0.2}
        life = Life(lab, workdir, plans)
        if point == "random":  # somewhere in start-up, or while it steps, saves and evaluates
            if draw.random() < 0.75:
                life.wait(PATIENCE, until=lambda: life.rows("stepped"))
                time.sleep(draw.random())
            else:
                time.sleep(draw.random() * 3)
            life.send(victim, signal.SIGKILL)
        lost_at = _after_a_kill(lab, life, point, victim, lost_at, tally)
        if set(life.codes.values()) == {0} or (workdir / "FINISHED").exists() or tally.broken:
            number += 1
            workdir, lost_at = lab.folder / f"run{number}", None
        if len(tally.broken) > 3:
            break


def _after_a_kill(lab: Lab, life: Life, point: str, victim: int, lost_at: int | None, tally: Tally) -> int | None:
    """Waits for the end, inspects, counts; returns the last step that was done before the kill, None where there was none."""
    from tests.train import runs
    if not life.wait(PATIENCE):
        hanging = sorted(set(range(len(life.pids))) - set(life.codes))
        life.kill()
        tally.fail(point, f"{life.workdir}: processes {hanging} hang")
        return None
    try:
        inspect(lab, life.workdir)
    except Broken as error:
        tally.fail(point, f"{life.workdir}: {error}")
        return None
    figures = {}
    restored, stepped = life.rows("restored"), life.rows("stepped")
    if lost_at is not None and stepped:  # this life went on where one before was killed
        figures = {"steps lost": lost_at - (restored[0]["step"] if restored else 0), "seconds to recover": stepped[0]["time"] - life.begun}
    if life.codes[victim] == -signal.SIGKILL:
        tally.add(point, **figures)
    elif set(life.codes.values()) != {0}:
        tally.fail(point, f"{life.workdir}: ended by itself with {life.codes}: {life.printed()[-500:]}")
    return max(runs.losses(life.workdir), default=None) if stepped or lost_at is None else lost_at


PLANS = {"kill": kills}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=[*PLANS, "soak", "plot"])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="where the report goes; of soak the samples")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--plot", type=pathlib.Path)
    given = parser.parse_args()
    environment()
    from tools import chaos_soak
    if given.plan == "plot":
        return chaos_soak.show(given.json, given.plot)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    if given.plan == "soak":
        chaos_soak.run(write_recipe(folder, 10_000_000), folder / "run", given.json, given.minutes)
        return 0
    lab, tally = Lab(folder, given.processes), Tally(f"{given.plan}, {given.processes} process{'es' * (given.processes > 1)}")
    try:
        PLANS[given.plan](lab, given.trials, random.Random(given.seed), tally)
    finally:
        lab.close()
        report = tally.report()
        print(table(report))
        if given.json:
            given.json.write_text(json.dumps(report, indent=1) + "\n")
    if tally.broken:
        print(f"{len(tally.broken)} broken promises; see {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
