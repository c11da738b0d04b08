"""jaxlm search: which learning rate, batch size, warm-up, width ...? Trains many short runs and stops the worse ones early.

  jaxlm search --config=quickstart --workdir=runs/study --space='optim.lr=log(1e-3,3e-2); data.batch_size=4,8,16' --trials=30
  jaxlm search --config=quickstart --workdir=runs/grid --space='optim.lr=log(1e-3,3e-2,6); optim.warmup=1%,5%' --sampler=grid
  jaxlm search --config=my.py --workdir=runs/study --space=space.toml --sampler=cmaes --pruner=median --jobs=4

The space names config keys. Values stand between commas, each as after --config.KEY=; log(LOW,HIGH) and uniform(LOW,HIGH) are ranges, of durations with
their unit, uniform(1%,10%); a third number is how many points of a range a grid has. A .toml file says the same: "optim.lr" = "log(1e-3,3e-2)" or lists of
values. Nothing in a space is run as a program.

Every trial is a run in a workdir of its own, WORKDIR/trials/N, which jaxlm eval, generate, report and export read like any other; all learn from one corpus,
WORKDIR/data. Trials are compared by checkpoint.metric on the validation split, at each of their evaluations (train.eval_every); none looks at the test split.
--pruner=asha stops each trial after 1, 3, 9 ... evaluations and goes on with the best third, from their checkpoints. A trial that ended early is saved:
jaxlm train --config=WORKDIR/trials/N/config.py --workdir=WORKDIR/trials/N goes on with it.

Several processes, on one machine or on many that see the same folder, share a study: start the same command on each. --jobs=4 starts four here and divides
the NVIDIA GPUs among them. A process may be killed at any time: the next one that looks for work goes on with its trial from the checkpoint. Ctrl-C saves; the
same command goes on. More --trials, another sampler or pruner continue the same study; another config or space is refused.

At the end: a table, WORKDIR/search.png, and WORKDIR/best.py, the best trial's config, for --config of any verb. docs/search.md has more, and muP, with which a
learning rate found for a narrow model is right for a wide one. Needs pip install 'jaxlm[search]'.
"""

import pathlib
import sys

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "Recipe of all trials: a packaged name (quickstart, gpt2_124m, ...) or a file, with an optional :argument.",
                        required=True, flag_values=values)
    flags.DEFINE_string("space", None, "What is chosen: 'KEY=VALUES; KEY=VALUES', or a .toml file.", required=True, flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the study; made if absent, joined if not.", required=True, flag_values=values)
    flags.DEFINE_integer("trials", 20, "Trials of the study in the end, all processes together; a grid has its own number.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("sampler", "tpe", ["tpe", "random", "grid", "cmaes"], "How values are chosen.", flag_values=values)
    flags.DEFINE_enum("pruner", "asha", ["asha", "hyperband", "median", "none"], "Which trials end early.", flag_values=values)
    flags.DEFINE_enum("storage", None, ["journal", "sqlite"], "Optuna's storage in WORKDIR, of a new study: journal (the default) also works on NFS.",
                      flag_values=values)
    flags.DEFINE_integer("jobs", 1, "Processes to start on this machine.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the draws of the sampler.", flag_values=values)


def main(values: flags.FlagValues, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import config
    from jaxlm.search import jobs, space

    cfg = config.load(values.config, overrides)  # before jax starts: a typo should cost no time
    found = space.read(values.space, cfg)
    if values.sampler == "grid":
        space.grid(found)
    if values.jobs > 1:
        return jobs.run(values.jobs, ["search", *sys.argv[2:], "--jobs=1"])

    from jaxlm.search import show, study, trials

    opened = study.open_study(pathlib.Path(values.workdir), cfg, found, values.storage or "")
    say = lambda line: print(line, flush=True)
    code = trials.run(opened, values.sampler, values.pruner, values.trials, values.seed, say)
    if others := study.others(opened):
        say(f"trial {', '.join(map(str, others))} still runs in another process; the last process to end tells what was found")
    else:
        show.summary(opened, say)
    return code
