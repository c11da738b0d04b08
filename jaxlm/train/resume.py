"""The parts of a run, and where it goes on: its newest whole checkpoint, or the beginning."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm import config as configs
from jaxlm import lora, trees
from jaxlm.config import Config
from jaxlm.data import ledger, loader, mixture, pack, rows, shards
from jaxlm.data import tokenizer as tokenizers
from jaxlm.train import checkpoint, health, initial, origin, setup
from jaxlm.train.state import State


# What may differ when a run goes on in its workdir: how it is computed and reported, not what is computed.
FREE = ("mesh.", "checkpoint.", "eval.", "audit.", "energy.", "train.microbatches", "train.log_every", "train.eval_every", "train.eval_documents",
        "train.bad_steps", "train.spike", "train.on_spike", "train.watchdog_seconds", "train.peer_seconds", "train.sample_prompt", "train.layer_norms",
        "train.profile", "train.webhook", "train.writers", "data.dir", "data.source",
        "data.threads", "data.prefetch", "model.remat", "model.attention", "model.sequence_attention", "model.pipeline_", "objective.chunk_rows")


def changed(old: Config, new: Config) -> str:
    """What differs of what may not; "" for nothing."""
    return "; ".join(line for line in configs.difference(old, new) if not line.startswith(FREE))


def build(config: Config, mesh: Mesh, corpus: shards.Corpus) -> tuple[setup.Setup, rows.Task, tokenizers.Tokenizer, pack.EpochSize]:
    """The parts of a run on a corpus, what it asks of it, its tokenizer, and the size of an epoch.

    Raises:
      ValueError: one line: what does not fit.
    """
    tokenizer = tokenizers.load(corpus.tokenizer_path)
    task = rows.build(config, tokenizer, corpus)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, target_length=task.target_length))
    config = rows.for_labels(config, task)
    epoch = loader.epoch_size(corpus, "train", task, config.data.batch_size)
    if config.objective.teacher:
        initial.same_tokens(config.objective.teacher, tokenizer)
    return setup.build(config, mesh, corpus.vocab_size, epoch.positions), task, tokenizer, epoch


def start(parts: setup.Setup, corpus: shards.Corpus, task: rows.Task, workdir: pathlib.Path, note: Callable[[str], None],
          before: int | None = None) -> tuple[int, State, list[dict[str, Any]], dict[str, bytes]]:
    """The step to go on from and its state: the newest whole checkpoint, or step 0 with new or given parameters; what those had been trained on; and the file
    that says where the parameters come from that checkpoints do not hold. `before`: only checkpoints of earlier steps count."""
    start = checkpoint.newest(workdir, before=before, log=note) or 0
    if not start:
        if not parts.config.train.init_from and parts.companion is None:
            return 0, parts.init(), [], {}
        params, mate, notes, history = initial.start(parts.config, parts.plain, parts.companion, log=note)
        params = parts.dress(params) if mate is None else parts.dress(params, mate)
        if parts.config.lora.init_from:
            ours = {path: lora.is_adapter(path) for path in parts.kept}
            params = trees.merge(initial.adapter(parts.config, notes["base"], trees.split(parts.target.params, ours)[0]), trees.split(params, ours)[1])
        return 0, parts.begin(params), history, {origin.BASE: json.dumps(notes).encode()} if notes else {}
    if differs := changed(configs.from_json(checkpoint.read_file(workdir, start, "config.json").decode()), parts.config):
        raise ValueError(f"the checkpoint of step {start} in {workdir} was trained with another config than this one ({differs}): choose another --workdir, or "
                         f"undo the change, in {workdir / 'config.json'} too")
    saved = json.loads(checkpoint.read_file(workdir, start, ledger.FILE))
    regrouped = task.mixture != mixture.Mixture() and saved["sources"] != ledger.sources_sha256(corpus)
    if saved["manifest"] != corpus.fingerprint or regrouped:
        raise ValueError(f"{corpus.folder} holds another corpus than the run in {workdir} was trained on until step {start}" + " (other sources)" * regrouped +
                         ": bring that one back, or choose another --workdir")
    own, others = trees.split(parts.target.params, parts.kept)
    state = checkpoint.restore(workdir, start, parts.target._replace(params=own))
    if not others:
        return start, state, saved.get("history", []), {}
    base, mate = initial.borrowed(workdir, start, parts.config, parts.plain, parts.companion, log=note)
    if base is None:  # only the companion is missing: the other half of what `dress` makes is thrown away
        base = jax.tree.map(lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), parts.plain)
    dressed = parts.dress(base) if mate is None else parts.dress(base, mate)
    state = state._replace(params=trees.merge(state.params, trees.split(dressed, parts.kept)[1]))
    return start, state, saved.get("history", []), {origin.BASE: checkpoint.read_file(workdir, start, origin.BASE)}


def compiled(parts: setup.Setup, corpus: shards.Corpus, task: rows.Task, state: State, recent: health.Recent) -> tuple[Callable[..., Any], float]:
    """The compiled step, `(number of the step from 1, state, batch) -> (state, metrics)`, which donates the state, and the mean length of a row.

    A program for each length that batches have: all have one, but for labelled texts.
    """
    config = parts.config
    lengths, mean = rows.padded(task, corpus.splits["train"]) if task.labelled else ([config.data.sequence_length], config.data.sequence_length)
    shapes = {length: setup.shortened(parts.batch, length) if task.labelled else parts.batch for length in {*lengths, lengths[-1]}}
    limits = (lambda step: (health.on_devices(parts.mesh, recent.limits(step)),)) if health.skips(config.train) else lambda step: ()
    programs = {length: setup.compiled(parts.step, state, shape, *limits(0)) for length, shape in shapes.items()}

    def run(step: int, state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, Any]]:
        length = batch["tokens"].shape[1] if task.labelled else lengths[0]
        return programs.get(length, parts.step)(state, batch, *limits(step))

    return run, mean
