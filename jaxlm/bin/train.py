"""jaxlm train: train a model from a config, or resumes the run in a workdir.

  jaxlm train --config=quickstart --workdir=runs/quickstart        no data needed: learns from the text inside Python
  jaxlm train --config=configs/gpt2_124m.py --workdir=runs/gpt2 --config.data.source=text/*.jsonl.gz
  jaxlm train --config=quickstart:long --workdir=runs/long --config.optim.lr=1e-3 --config.train.steps="2 epochs"

The first run prepares what is missing: it reads the sources, trains the tokenizer, writes token shards under WORKDIR/data (or
--config.data.dir), then trains, evaluates on held-out documents and prints a sample. The same command run again resumes from the newest
whole checkpoint, with losses equal to the last bit to those of a run that was never interrupted. Ctrl-C and SIGTERM save and exit.

The workdir holds metrics.jsonl, TensorBoard event files, eval.jsonl, config.json and checkpoints/. See it with
  tensorboard --logdir=runs

Several processes (CPU or GPU hosts; TPU pods and Slurm need no flags), the same command on each, with its own --process:
  jaxlm train ... --coordinator=10.0.0.1:8476 --processes=4 --process=0
"""

import pathlib
import shlex

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "Recipe: a packaged name (quickstart, gpt2_124m, ...) or a file, with an optional :argument.",
                        required=True, flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run; made if absent, resumed if not.", required=True, flag_values=values)
    flags.DEFINE_string("coordinator", "", "host:port of process 0, for several processes outside TPU pods and Slurm.", flag_values=values)
    flags.DEFINE_integer("processes", 0, "Number of processes, with --coordinator.", flag_values=values)
    flags.DEFINE_integer("process", -1, "Index of this process, with --coordinator.", flag_values=values)
    flags.DEFINE_bool("trial", False, "The run is one of many that are compared on the validation split: no samples, and it never looks at the test split.",
                      flag_values=values)


def main(values: flags.FlagValues, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import bin, config

    cfg = config.load(values.config, overrides)  # before jax starts: a typo should cost no time

    import jax

    from jaxlm import peers, sharding
    from jaxlm.data.run import is_mistake
    from jaxlm.train import loop, stop, webhook

    sharding.start_processes(values.coordinator, values.processes, values.process, heartbeat=10 + 3 * cfg.train.peer_seconds)
    workdir = pathlib.Path(values.workdir)
    try:
        with peers.joined(cfg.train.peer_seconds, is_mistake), webhook.telling(cfg.train.webhook, workdir):
            code = loop.run(cfg, workdir, (lambda step, figure: False) if values.trial else None)
        return stop.depart(code)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not bin.out_of_memory(error):
            raise
        raise ValueError(out_of_memory(str(error), values.config, overrides, jax.devices()[0].device_kind, jax.device_count())) from error


def out_of_memory(error: str, config: str, overrides: list[tuple[str, str]], kind: str, devices: int) -> str:
    """One line for a run that died of it: what the device said, and the command that tells what would fit."""
    from jaxlm import chips

    command = ["jaxlm", "fit", f"--config={config}", f"--topology={chips.like(kind, devices)}", "--search", *(f"--config.{key}={text}" for key, text in overrides)]
    what = error.splitlines()[0][:200] if error else "this machine's own memory"
    return (f"out of memory on {devices} x {kind} ({what}); try more train.microbatches, model.remat=full or more devices; "
            f"what fits, before the next try: {shlex.join(command)}")
