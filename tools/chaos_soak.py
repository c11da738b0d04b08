"""A long run with saves, evaluations and restarts, watched from outside: memory, descriptors, threads, CPU seconds per step. tools/chaos.py soak starts it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

EVERY = 10.0  # seconds between two samples
WARM = 600.0  # seconds of a life before its memory counts: compile, first evaluations and saves, allocators
# The lives of the run: share of the time, and how each ends. The last one is long enough to see a slow leak.
LIVES = ((1 / 8, "SIGTERM"), (1 / 8, "SIGKILL"), (3 / 4, "SIGTERM"))
TICK = os.sysconf("SC_CLK_TCK")


def sample(pid: int) -> dict:
    """Resident MiB, open descriptors, threads and CPU seconds of a process."""
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return {"rss_mib": int(stat[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20, "descriptors": len(os.listdir(f"/proc/{pid}/fd")), "threads": int(stat[17]),
            "cpu": (int(stat[11]) + int(stat[12])) / TICK}


def last_step(workdir: pathlib.Path) -> int:
    """The newest step in metrics.jsonl, from its last whole line."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 4096))
            for line in reversed(file.read().splitlines()):
                try:
                    return int(json.loads(line)["step"])
                except ValueError:
                    continue
    except OSError:
        pass
    return 0


def watch(command: list[str], environment: dict[str, str], workdir: pathlib.Path, out: pathlib.Path, minutes: float) -> None:
    """Runs `command` for so long, life after life, and appends a JSON line per sample to `out`."""
    begin = time.time()
    with open(out, "a", buffering=1) as log, open(out.with_suffix(".log"), "a") as printed:
        for life, (share, ends) in enumerate(LIVES):
            process = subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
            started = time.time()
            while time.time() - started < share * minutes * 60:
                time.sleep(EVERY)
                if process.poll() is not None:
                    log.write(json.dumps({"life": life, "seconds": time.time() - begin, "ended": process.returncode}) + "\n")
                    sys.exit(f"the run ended by itself with code {process.returncode}; see {printed.name}")
                log.write(json.dumps({"life": life, "seconds": time.time() - begin, "age": time.time() - started, "step": last_step(workdir),
                                      **sample(process.pid)}) + "\n")
            process.send_signal(getattr(signal, ends))
            code = process.wait(120)
            log.write(json.dumps({"life": life, "seconds": time.time() - begin, "signal": ends, "ended": code}) + "\n")


def verdict(rows: list[dict]) -> dict:
    """Of the last life, after its warm-up: growth of memory from the median of the first tenth to that of the last, and what else must not grow."""
    ends = [row for row in rows if "ended" in row]
    life = max(row["life"] for row in rows)
    samples = [row for row in rows if row["life"] == life and "rss_mib" in row]
    seen = [row for row in samples if row["age"] >= WARM]
    if len(seen) < 30:
        raise SystemExit("too few samples after the warm-up: let it run longer")
    tenth = max(3, len(seen) // 10)
    middle = lambda part, key: sorted(row[key] for row in part)[len(part) // 2]
    first, last = seen[:tenth], seen[-tenth:]
    growth = middle(last, "rss_mib") / middle(first, "rss_mib") - 1
    rate = lambda part: (part[-1]["cpu"] - part[0]["cpu"]) / max(1, part[-1]["step"] - part[0]["step"])
    return {"minutes": round((seen[-1]["age"] - seen[0]["age"]) / 60, 1), "lives": life + 1, "ends": [row["ended"] for row in ends], "steps": seen[-1]["step"],
            "rss_mib": [round(middle(first, "rss_mib"), 1), round(middle(last, "rss_mib"), 1)], "memory_growth": round(growth, 5),
            "descriptors": [middle(first, "descriptors"), middle(last, "descriptors")], "threads": [middle(first, "threads"), middle(last, "threads")],
            "cpu_seconds_per_step": [round(rate(seen[:len(seen) // 3]), 6), round(rate(seen[-(len(seen) // 3):]), 6)],
            "passed": growth < 0.02 and all(middle(last, key) <= middle(first, key) + 1 for key in ("descriptors", "threads"))}


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Four curves over the whole time, restarts as gaps."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(4, 1, sharex=True, figsize=(8, 7))
    seen = [row for row in rows if "rss_mib" in row]
    for life in sorted({row["life"] for row in seen}):
        part = [row for row in seen if row["life"] == life]
        minutes = [row["seconds"] / 60 for row in part]
        for axis, key in zip(axes, ("rss_mib", "descriptors", "threads")):
            axis.plot(minutes, [row[key] for row in part], color="tab:blue", linewidth=1)
        wide = 30  # samples: the log has a line every so many steps only; and not from the start, which compiles
        rates = [(b["cpu"] - a["cpu"]) / (b["step"] - a["step"]) * 1e3 if b["step"] > a["step"] > part[0]["step"] else None for a, b in zip(part, part[wide:])]
        axes[3].plot(minutes[wide:], rates, color="tab:blue", linewidth=1)
    for axis, label in zip(axes, ("resident MiB", "open descriptors", "threads", "CPU ms per step")):
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[3].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def read(path: pathlib.Path) -> list[dict]:
    """The samples so far."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def show(samples: pathlib.Path, picture: pathlib.Path | None) -> int:
    """Judges what `watch` wrote, prints the figures, draws them; 1 where something grew."""
    rows = read(samples)
    found = verdict(rows)
    print(json.dumps(found, indent=1))
    if picture:
        plot(rows, picture)
    return 0 if found["passed"] else 1


def run(recipe: pathlib.Path, workdir: pathlib.Path, out: pathlib.Path, minutes: float) -> None:
    """A soak of the recipe, which has no end of its own: about one save and one evaluation a minute."""
    command = [sys.executable, "-m", "jaxlm", "train", f"--config={recipe}", f"--workdir={workdir}", "--config.train.log_every=500",
               "--config.train.eval_every=10000", "--config.checkpoint.every=10000", "--config.checkpoint.keep_best=1"]
    watch(command, dict(os.environ), workdir, out, minutes)
