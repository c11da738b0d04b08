"""Faults for real training runs, and a report: python tools/chaos.py PLAN [--trials=N] [--processes=N] [--seed=N] [--json=FILE]

  kill     SIGKILL at random moments and at named points (tools/chaos_child.py has the list): what was acknowledged is whole, what is restored is what
           was saved, and the losses of the resumed run are to the last bit those of one that was never interrupted
  term     SIGTERM at all these points: code 0 within 30 seconds, everything saved at most a step later than the one in flight
  lost     one of --processes=2 or 4 is killed, stopped, stuck or raises: the others end with code 75 and one line that names it, within train.peer_seconds
           (a stuck one: train.watchdog_seconds, with the stacks of all in their logs) and 6 seconds; the next life goes on
  lock     two trainers on one workdir, and a lock whose owner was killed
  orphans  a killed trainer leaves no process behind after 5 seconds
  mesh     a run that was killed goes on with other devices
  power    a power cut right after an acknowledgement: the device is copied at that moment and mounted again (needs root)
  soak     --minutes=120 --json=FILE: a run with saves, evaluations and restarts; memory, descriptors, threads, CPU seconds per step
  plot     --json=FILE --plot=FILE.svg: draws what a soak wrote, and judges it

Trials are lives of a tiny run (1 layer, width 16), driven through jaxlm's own command line. Exit code 1 when a promise was broken; the folder is then kept.
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tools import chaos_lab, chaos_plans, chaos_power, chaos_soak  # noqa: E402

PLANS = {"kill": chaos_plans.kills, "term": chaos_plans.terms, "lost": chaos_plans.losses_of_a_process, "lock": chaos_plans.locks,
         "orphans": chaos_plans.orphans, "mesh": chaos_plans.meshes, "power": chaos_power.power}


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
    chaos_lab.environment()
    if given.plan == "plot":
        return chaos_soak.show(given.json, given.plot)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    if given.plan == "soak":
        chaos_soak.run(chaos_lab.write_recipe(folder, 10_000_000), folder / "run", given.json, given.minutes)
        return 0
    lab, tally = chaos_lab.Lab(folder, given.processes), chaos_lab.Tally(f"{given.plan}, {given.processes} process{'es' * (given.processes > 1)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the report is of what was done until then"))
    try:
        PLANS[given.plan](lab, given.trials, random.Random(given.seed), tally)
    finally:
        lab.close()
        report = tally.report()
        print(chaos_lab.table(report))
        if given.json:
            given.json.write_text(json.dumps(report, indent=1) + "\n")
    if tally.broken:
        print(f"{len(tally.broken)} broken promises; see {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
