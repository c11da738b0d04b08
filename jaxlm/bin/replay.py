"""jaxlm replay: does one step of a run again, alone, and says which document and which layer made it what it was

  jaxlm replay --workdir=runs/mine --step=1234                 a step that was skipped, or whose loss jumped
  jaxlm replay --workdir=runs/mine --step=1234 --rows=50 --json=step1234.json
  jaxlm replay --workdir=runs/mine --step=1234 --data=/mnt/corpus          the corpus has moved

A run that skips a step (its loss or gradient is not finite, or is a spike: train.spike) writes the step and the documents of its batch to
WORKDIR/bad_steps.jsonl; one that ends because of too many prints this command. It takes the newest whole checkpoint before the step, or the beginning, and
does the steps from there again on one CPU device, with the rows that the ledger says. It writes nothing into the run's folder. It prints

  compared     which of the steps were logged, and whether each came out with the same loss and gradient norm, bit by bit. They do where the run had one
               device of this kind and this version of jax; otherwise they are near, and it says how near.
  the step     loss, gradient norm, whether its update was skipped and why; parameters that were not finite before it.
  the first value that is not finite: operation, line of the source, layer, forward or backward, and what it was made from. Followed back from the gradient.
  layers       norms of the gradient by parameter and layer, against the parameters' and against the step before.
  rows         each row by itself: mean loss, share of the batch's loss, gradient norm, and its documents with their share and the beginning of their text.
               The worst first. Rows are computed without dropout.

A document that is at fault can be looked up (jaxlm data audit WORKDIR --doc=ID says at which steps it was seen) and left out of the next corpus; a layer that
is at fault wants a lower optim.lr, a longer optim.warmup, optim.clip, objective.z_loss, model.qk_norm or model.dtype=float32. To go on past it: the same
command as before, with --config.train.spike=6 --config.train.on_spike=skip, skips updates that stand out.

It needs the memory of a training step of the model on this machine, and the time of the steps since the checkpoint: keep more of them with
checkpoint.keep_last.
"""

import os

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "The step, counted from 1 as training prints them.", required=True, lower_bound=1, flag_values=values)
    flags.DEFINE_string("data", "", "Prepared shards; without it those of the run.", flag_values=values)
    flags.DEFINE_integer("rows", 8, "How many rows, documents of a row and layers to show.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("json", "", "Write everything here: all rows, layers and steps.", flag_values=values)


def main(values: flags.FlagValues) -> int:
    import json
    import pathlib

    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts
    from jaxlm.train import replay

    found = replay.run(pathlib.Path(values.workdir), values.step, values.data)
    print(replay.text(found, values.rows))
    if values.json:
        pathlib.Path(values.json).write_text(json.dumps(replay.as_json(found), indent=1) + "\n", encoding="utf-8")
    return 0
