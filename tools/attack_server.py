"""Attacks a real `jaxlm serve` process on this machine and prints what came of it.

  python tools/attack_server.py                                   # trains a tiny model first, then attacks for some minutes
  python tools/attack_server.py --workdir=runs/mine --scale=0.2 --attack='slow heads,connections'

Each row: what was sent, what came back, how long an honest client waited at most while it went on and just after it, and how much memory and how many descriptors the
server then had more than before. At the end: whether a prompt or the key is in the server's log. Exit code 1 if an honest client was not answered in --bound
seconds, memory grew by more than --memory_mib in one attack, descriptors did not come back, or the log told something.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="")
    parser.add_argument("--attack", default="", help="some of them, with commas; empty: all")
    parser.add_argument("--scale", type=float, default=1.0, help="of counts and seconds")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--bound", type=float, default=10.0)
    parser.add_argument("--memory_mib", type=float, default=100.0)
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from tests.serve import attacks
    from tests.train import runs
    files = attacks.raise_descriptors()
    with tempfile.TemporaryDirectory() as folder:
        workdir = given.workdir or f"{folder}/run"
        if not given.workdir:
            code, output = runs.finish("train", f"--config={runs.recipe(pathlib.Path(folder))}", f"--workdir={workdir}", "--config.train.steps=2",
                                       "--config.model.context=512")
            assert code == 0, output
        log = pathlib.Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen([sys.executable, "-m", "jaxlm", "serve", f"--workdir={workdir}", "--port=0"], stdout=subprocess.PIPE, stderr=file, text=True,
                                       env=runs.environment(optimised=True) | {"JAXLM_API_KEY": attacks.KEY})
        try:
            place = attacks.place_of(process.stdout.readline().split(" at ")[1].strip(), process.pid)
            attacks.warm(place)
            chosen = attacks.attacks(given.scale, min(given.connections, files - 100))
            print(f"{files:,} open files are allowed\n\n| attack | sent | came back | honest client, worst s: during / after | memory MiB | descriptors |\n|---|---|---|---|---|---|")
            bad = []
            for name, (sent, attack) in chosen.items():
                if given.attack and name not in given.attack.split(","):
                    continue
                row = attacks.run(place, name, sent, attack)
                print(f"| {row.attack} | {row.sent} | {row.came} | {row.during:.2f} / {row.after:.2f} | {row.memory / 2**20:+.0f} | {row.descriptors:+d} |", flush=True)
                bad += [name] * (max(row.during, row.after) > given.bound or row.memory > given.memory_mib * 2**20 or row.descriptors > 2)
            text = log.read_text(errors="replace")
            told = [word for word in (attacks.SECRET[:8], attacks.KEY[:8]) if word in text]
            traces = [trace.strip().split("\n\n")[0][-300:].replace("\n", " | ") for trace in re.findall(r"Traceback.*?\n(?=\S).*?\n", text, re.DOTALL)]
            print(f"\nlog: {len(text):,} characters, {'tells ' + ' and '.join(told) if told else 'neither prompt nor key in it'}; traces: {len(traces)}")
            print("".join(f"  {trace}\n" for trace in sorted(set(traces))), end="")
            print(f"failed: {', '.join(bad)}" if bad else "all bounds kept")
            return 1 if bad or told else 0
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
