"""Faults in processes: what tools/chaos.py does to the lives of a run, trial after trial, and what must then hold."""

import os
import pathlib
import random
import signal
import time

from tools.chaos_lab import PATIENCE, Broken, Lab, Life, Tally, inspect

# Points at which lives are killed, and how often each may have been passed before: (least, most).
KILLS = {"config": (1, 1), "prepare": (1, 1), "compile": (1, 1), "restore": (1, 1), "data_wait": (1, 30), "step": (1, 30), "metrics": (1, 30), "eval": (1, 1),
         "sample": (1, 1), "save.before": (1, 4), "save.inside": (1, 4), "save.sums": (1, 50), "save.manifest": (1, 4), "save.after": (1, 4),
         "save.delete": (1, 3), "finish": (1, 1), "exit": (1, 1)}

ONLY_FIRST = ("config", "prepare", "metrics", "save.sums", "save.manifest", "save.after", "save.delete")  # points that process 0 alone comes to
PEER, WATCHDOG = 4.0, 12.0  # train.peer_seconds and train.watchdog_seconds of runs that lose a process

GRACE = 30.0  # seconds that clouds give between the notice of a preemption and its end


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


def terms(lab: Lab, trials: int, draw: random.Random, tally: Tally) -> None:
    """Lives that are asked to end by SIGTERM: code 0 within the grace time, everything saved at most a step later."""
    from jaxlm.train import checkpoint
    number, workdir, points = 0, lab.folder / "term0", []
    while tally.trials < trials and len(tally.broken) < 4:
        points = points or draw.sample(list(KILLS), len(KILLS))
        saved, victim = max(checkpoint.steps(workdir), default=0), draw.randrange(lab.processes)
        fits = lambda name: (saved or name != "restore") and (not workdir.exists() or name != "prepare") and (victim == 0 or name not in ONLY_FIRST)
        point = next((name for name in points if fits(name)), points[0])
        points.remove(point)
        plans: list[dict] = [{} for _ in range(lab.processes)]
        plans[victim] = {"point": point, "hit": draw.randint(*KILLS[point]), "delay": draw.random() * 0.1, "do": "SIGTERM", "stall": 2 * GRACE}
        life = Life(lab, workdir, plans)
        life.wait(2 * PATIENCE, until=lambda: life.rows("fault"))
        fault = life.rows("fault")
        if not life.wait(PATIENCE if fault else 0) or set(life.codes.values()) != {0}:
            life.kill()
            tally.fail(point, f"{workdir}: after SIGTERM ended with {life.codes}: {life.printed(victim)[-1500:]}")
        elif fault:
            try:
                seconds, newest = max(life.ended.values()) - fault[0]["time"], inspect(lab, workdir)
                steps = newest - max(saved, fault[0]["steps"])
                if not 0 <= steps <= 2 + 2 * (lab.processes > 1) or seconds > GRACE:  # a step may be in flight that is not yet logged
                    raise Broken(f"{seconds:.1f} s, {fault[0]['steps']} steps logged when it was asked, {newest} saved at the end, {saved} before")
                tally.add(point, **{"seconds to the end": seconds, "steps later": steps})
            except Broken as error:
                tally.fail(point, f"{workdir}: {error}")
        if not fault or (workdir / "FINISHED").exists() or tally.broken:
            number += 1
            workdir = lab.folder / f"term{number}"


def losses_of_a_process(lab: Lab, trials: int, draw: random.Random, tally: Tally) -> None:
    """One of several processes is killed, stopped, stuck or raises; the others must say so and end. Each next life shows that the run goes on."""
    number, workdir, kinds = 0, lab.folder / "lost0", {"killed": "SIGKILL", "stopped": "SIGSTOP", "stuck": "hang", "raising": "raise"}
    while tally.trials < trials and len(tally.broken) < 4:
        kind, victim = list(kinds)[tally.trials % len(kinds)], draw.randrange(lab.processes)
        # An error inside the acknowledgement makes the save fail, rightly; the witness has seen it acknowledged.
        never = ("prepare", "restore", "finish", "exit", *["save.after"] * (kind == "raising"))
        point = draw.choice([name for name in KILLS if name not in never and (victim == 0 or name not in ONLY_FIRST)])
        plans: list[dict] = [{} for _ in range(lab.processes)]
        plans[victim] = {"point": point, "hit": draw.randint(*KILLS[point]), "do": kinds[kind]}
        life = Life(lab, workdir, plans, f"--config.train.peer_seconds={PEER}", f"--config.train.watchdog_seconds={WATCHDOG}")
        life.wait(PATIENCE, until=lambda: life.rows("fault"))
        others = set(range(lab.processes)) - {victim}
        name = f"{kind}, process {'0' if victim == 0 else 'other than 0'}"
        done = life.wait(PATIENCE, until=lambda: others <= life.codes.keys())
        if fault := life.rows("fault"):
            bound = (WATCHDOG if kind == "stuck" else PEER) + 6
            seconds = max((life.ended[index] for index in others & life.codes.keys()), default=time.time()) - fault[0]["time"]
            try:
                _said(life, victim, others, kind)
                if not done or seconds > bound:
                    raise Broken(f"the others took {seconds:.1f} s to end, the bound is {bound:g} s")
                life.kill()
                inspect(lab, workdir)
                tally.add(name, **{"seconds to the end of the others": seconds})
            except Broken as error:
                life.kill()
                tally.fail(name, f"{workdir} at {point}: {error}")
        else:
            life.kill()
        if not fault or (workdir / "FINISHED").exists() or tally.broken:
            if not fault and set(life.codes.values()) != {0}:
                tally.fail(name, f"{workdir} at {point}: ended by itself with {life.codes}: {life.printed()[-800:]}")
            number += 1
            workdir = lab.folder / f"lost{number}"


def _said(life: Life, victim: int, others: set[int], kind: str) -> None:
    """Whether each of the others ended with code 75 and one line that names the one that is missing; of a stuck one also its stacks."""
    for index in others:
        text = life.printed(index)
        lines = [line for line in text.splitlines() if line.startswith("jaxlm: ")]
        if kind == "raising" and life.codes.get(index) == 2 and lines == [f"jaxlm: process {victim} failed; the line it printed says why"]:
            continue  # what all do together failed in one: all know at once, and none is to be started again
        if life.codes.get(index) != 75 or len(lines) != 1 or f"process {victim} of {len(life.pids)}" not in lines[0]:
            raise Broken(f"process {index} ended with {life.codes.get(index)} and said {lines}: {text[-1500:]}")
    if kind == "stuck":
        life.wait(5)
        if life.codes.get(victim) != 75 or "tools/chaos_child.py" not in life.printed(victim):
            raise Broken(f"the stuck process {victim} ended with {life.codes.get(victim)} and showed no stacks: {life.printed(victim)[-1500:]}")
    if kind == "raising":
        life.wait(5)
        if life.codes.get(victim) not in (1, 2) or "planted by tools/chaos.py" not in life.printed(victim):
            raise Broken(f"the raising process {victim} ended with {life.codes.get(victim)}: {life.printed(victim)[-1500:]}")


def locks(lab: Lab, trials: int, draw: random.Random, tally: Tally) -> None:
    """A second trainer on a workdir is refused in one line that names the first; when that one is killed, the lock that it leaves is taken over."""
    workdir = lab.folder / "locked"
    first = Life(lab, workdir, [{}], "--config.train.steps=1000000")
    while tally.trials < trials and not tally.broken:
        first.wait(PATIENCE, until=lambda: first.rows("stepped"))
        second = Life(lab, workdir, [{}], "--config.train.steps=1000000", name="second")
        second.wait(PATIENCE)
        said = second.printed().strip()
        if second.codes != {0: 2} or f"process {first.pids[0]} on " not in said or "since" not in said or len(said.splitlines()) != 1 or first.poll():
            tally.fail("a second trainer", f"{second.codes} {said}")
        else:
            tally.add("a second trainer", **{"seconds to the refusal": second.ended[0] - second.begun})
        first.kill()
        first = Life(lab, workdir, [{}], "--config.train.steps=1000000")
        if first.wait(PATIENCE, until=lambda: first.rows("stepped")) and not first.poll():
            tally.add("a stale lock", **{"seconds to recover": first.rows("stepped")[0]["time"] - first.begun})
        else:
            tally.fail("a stale lock", first.printed()[-1500:])
    first.kill()


def orphans(lab: Lab, trials: int, draw: random.Random, tally: Tally) -> None:
    """A trainer that is killed while three workers prepare its text, or while it trains, leaves no process behind after 5 seconds."""
    with open(lab.folder / "corpus.jsonl") as small, open(lab.folder / "large.jsonl", "w") as large:
        lines = small.read()
        for copy in range(1500):
            large.write(lines.replace('{"text": "', f'{{"text": "{copy}/'))
    while tally.trials < trials and len(tally.broken) < 4:
        preparing = bool(tally.trials % 2)
        workdir = lab.folder / f"orphans{tally.trials}"
        more = ["--config.data.workers=3", f"--config.data.source=({str(lab.folder / 'large.jsonl')!r},)"] * preparing
        life = Life(lab, workdir, [{}], *more)
        if preparing:
            life.wait(PATIENCE, until=lambda: len(descendants(life.pids[0])) >= 3)
            time.sleep(draw.random() * 3)
        else:
            life.wait(PATIENCE, until=lambda: life.rows("stepped"))
        family, name = descendants(life.pids[0]), "killed while it prepares" if preparing else "killed while it trains"
        if life.poll():
            tally.fail(name, f"ended by itself with {life.codes}: {life.printed()[-500:]}")
            continue
        life.kill()
        begun = time.time()
        while (left := [pid for pid in family if alive(pid)]) and time.time() < begun + 5:
            time.sleep(0.05)
        if left:
            tally.fail(name, f"{len(left)} of {len(family)} processes live on")
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        else:
            tally.add(name, **{"workers": len(family), "seconds to their end": time.time() - begun})


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    parents = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = [], [pid]
    while new := [child for child, parent in parents.items() if parent in new]:
        found += new
    return found


# What a run that began on one device goes on with: emulated devices of a process, flags.
MESHES = ((2, ("fsdp=2",)), (2, ("data=2", "fsdp=1")), (4, ("data=2", "fsdp=2")), (4, ("tensor=2", "fsdp=2")), (4, ("sequence=2", "fsdp=2")))


def meshes(lab: Lab, trials: int, draw: random.Random, tally: Tally) -> None:
    """A run that is killed goes on with other devices: losses within 1e-5 of the undisturbed run's, and equal up to there. Without dropout, whose draws for a
    token depend on where it lies."""
    from jaxlm.train import checkpoint
    from tests.train import runs
    without = "--config.model.dropout=0.0"
    Life(lab, lab.folder / "without", [{}], without).wait(2 * PATIENCE)
    lab.losses = runs.losses(lab.folder / "without")
    for number in range(trials):
        devices, flags = MESHES[number % len(MESHES)]
        name, workdir = " x ".join(flags), lab.folder / f"mesh{number}"
        begun = Life(lab, workdir, [{"point": "save.after", "hit": draw.randint(1, 8)}], without)
        begun.wait(PATIENCE)
        inspect(lab, workdir)
        saved = checkpoint.steps(workdir)[-1]
        life = Life(lab, workdir, [{}], without, *(f"--config.mesh.{flag}" for flag in flags), devices=devices)
        life.wait(PATIENCE)
        found = runs.losses(workdir)
        worst = max(abs(found.get(step, 0) / loss - 1) for step, loss in lab.losses.items())
        equal = all(found[step] == lab.losses[step] for step in range(1, saved + 1))
        if life.codes != {0: 0} or worst > 1e-5 or not equal or f"resumed after step {saved}" not in life.printed():
            tally.fail(name, f"{life.codes}, losses differ by {worst:.1e}: {life.printed()[-1000:]}")
        else:
            tally.add(name, **{"largest difference x 1e6": worst * 1e6, "seconds to recover": life.rows("stepped")[0]["time"] - life.begun})
