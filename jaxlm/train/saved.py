"""Opens what a run has saved: everything that evaluation and generation need comes from the checkpoint, so they cannot misdescribe the model."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlm import config as configs
from jaxlm import sharding
from jaxlm.config import Config, MeshConfig
from jaxlm.data import ledger, shards
from jaxlm.data import tokenizer as tokenizers
from jaxlm.models import decoder, kinds
from jaxlm.train import best, checkpoint


class Run(NamedTuple):
    workdir: pathlib.Path
    step: int
    config: Config  # with the vocabulary filled in
    tokenizer: tokenizers.Tokenizer
    data: dict[str, Any]  # the ledger; "dir": the prepared corpus, "manifest": its fingerprint
    model: decoder.Model
    params: Any  # on `mesh`; the moving average where the run keeps one
    mesh: Mesh


def open_run(workdir: os.PathLike | str, step: int | None = None, *, log: Callable[[str], None] = print) -> Run:
    """Reads the model of a run, its parameters verified; the optimiser's state is not read. In several processes all call this together.

    Args:
      step: the checkpoint; None for the newest whole one, or where the run says what is best (`best.chooses`) for the best.
      log: receives a line for each newer checkpoint that is damaged.

    Raises:
      ValueError: one line, when there is no run, no such step, or nothing whole.
    """
    workdir = pathlib.Path(workdir)
    if step is not None and step in checkpoint.steps(workdir):
        return _open(workdir, step)
    if not checkpoint.steps(workdir):
        what = "has no checkpoint yet: wait for the first one" if workdir.is_dir() else "does not exist: give the folder of a run"
        raise ValueError(f"{workdir} {what}, or make one with jaxlm train --config=quickstart --workdir={workdir}")
    if step is not None:
        raise ValueError(f"{workdir} holds no checkpoint of step {step}; it holds {', '.join(map(str, checkpoint.steps(workdir)))}")
    newest = _newest_below(workdir, np.iinfo(np.int32).max)
    with contextlib.suppress(ValueError):  # a damaged newest checkpoint is looked at below
        if best.chooses(read_files(workdir, newest)[0]) and (found := sharding.first(lambda: best.step(workdir))) is not None:
            return _open(workdir, found)
    bound, last = np.iinfo(np.int32).max, None
    while (bound := _newest_below(workdir, bound)) >= 0:
        try:
            return _open(workdir, bound)
        except Exception as error:
            if bound not in checkpoint.steps(workdir):  # deleted meanwhile by the run, which then has newer ones
                bound = np.iinfo(np.int32).max
                continue
            if not isinstance(error, ValueError):
                raise
            log(f"passed over: {error}")
            last = error
    raise ValueError(f"no checkpoint in {workdir} can be used: {last}")


def _newest_below(workdir: pathlib.Path, bound: int) -> int:
    """-1 for none; the same answer in every process, though the run may be saving and deleting."""
    found = max((step for step in checkpoint.steps(workdir) if step < bound), default=-1)
    return int(multihost_utils.broadcast_one_to_all(np.int32(found))) if jax.process_count() > 1 else found


def read_files(workdir: pathlib.Path, step: int) -> tuple[Config, tokenizers.Tokenizer, dict[str, Any]]:
    """Config with the vocabulary filled in, tokenizer, and position in the data of a checkpoint, each verified."""
    config = configs.from_json(checkpoint.read_file(workdir, step, "config.json").decode())
    names = sorted(path.name for path in (workdir / "checkpoints" / str(step) / "files").glob("tokenizer.*"))
    tokenizer = tokenizers.from_bytes(checkpoint.read_file(workdir, step, names[0] if names else "tokenizer.model"))
    data = json.loads(checkpoint.read_file(workdir, step, ledger.FILE))
    return dataclasses.replace(config, model=decoder.vocabulary(config.model, tokenizer.vocab_size)), tokenizer, data


def _open(workdir: pathlib.Path, step: int) -> Run:
    config, tokenizer, data = read_files(workdir, step)
    model = kinds.build(config.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    mesh, places = place(config.mesh, model, shapes)
    target = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places)
    params = checkpoint.restore_params(workdir, step, target, ema=config.optim.ema > 0)
    return Run(workdir, step, config, tokenizer, data, model, params, mesh)


def place(cfg: MeshConfig, model: decoder.Model, shapes: Any) -> tuple[Mesh, Any]:
    """The mesh of a config, where it fits the devices here, else a copy of the model on each device; and where each parameter lies."""
    try:
        mesh = sharding.make_mesh(cfg)
        return mesh, sharding.params_shardings(mesh, model.axes, shapes)
    except ValueError:
        mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
        return mesh, sharding.params_shardings(mesh, model.axes, shapes)


def data_folder(workdir: pathlib.Path, ledger: dict[str, Any], folder: str = "") -> pathlib.Path:
    """Where the corpus of a run lies: `folder` if given, where it lay, or `<workdir>/data` if the run has moved."""
    moved = workdir / "data"
    path = pathlib.Path(folder or ledger["dir"])
    if not folder and not path.is_dir() and moved.is_dir():
        path = moved
    if not path.is_dir():
        raise ValueError(f"the corpus {path} is not here: give --data=FOLDER, prepared with the tokenizer of this run")
    return path


def open_data(run: Run, folder: str = "") -> shards.Corpus:
    """The corpus that the run was trained on, or another one with the same tokenizer.

    Args:
      folder: prepared shards; empty: those of the run, where they lay, or in `<workdir>/data` if the run has moved.

    Raises:
      ValueError: one line, when it is missing, not the run's own though no other was asked for, or made with another tokenizer.
    """
    path = data_folder(run.workdir, run.data, folder)
    corpus = shards.open_corpus(path)
    if corpus.manifest["tokenizer"]["sha256"] != run.tokenizer.fingerprint:
        raise ValueError(f"{path} was prepared with another tokenizer than {run.workdir} was trained with: prepare it again with "
                         "--config.tokenizer.path set to the tokenizer.model in the run's data folder")
    if not folder and run.data["manifest"] and corpus.fingerprint != run.data["manifest"]:
        raise ValueError(f"{path} holds another corpus than {run.workdir} was trained on: its held-out documents may have been training text; "
                         f"give --data={path} to evaluate on it all the same")
    return corpus
