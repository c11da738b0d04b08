"""Opens what a run has saved: everything that evaluation and generation need comes from the checkpoint, so they cannot misdescribe the model."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlm import lora, sharding, trees
from jaxlm.config import Config, MeshConfig
from jaxlm.data import shards
from jaxlm.data import tokenizer as tokenizers
from jaxlm.models import decoder, kinds
from jaxlm.train import best, checkpoint, origin
from jaxlm.train.form import form


class Run(NamedTuple):
    """A checkpoint with all that is needed to use it."""

    workdir: pathlib.Path
    step: int
    config: Config  # with the vocabulary filled in
    tokenizer: tokenizers.Tokenizer
    data: dict[str, Any]  # the ledger; "dir": the prepared corpus, "manifest": its fingerprint
    model: decoder.Model
    params: Any  # on `mesh`; the moving average where the run keeps one; adapters are merged
    mesh: Mesh
    chat_template: str  # Jinja, of a run that was trained on chats; "": its tokenizer may have one
    fingerprint: str  # of the checkpoint's manifest


def open_run(workdir: os.PathLike | str, step: int | None = None, *, mesh: MeshConfig | None = None, log: Callable[[str], None] = print) -> Run:
    """Reads the model of a run, its parameters verified; the optimiser's state is not read. In several processes all call this together.

    Args:
      step: the checkpoint; None for the newest whole one, or where the run says what is best (`best.chooses`) for the best.
      mesh: where the parameters go; None for the mesh of the run's config.
      log: receives a line for each newer checkpoint that is damaged.

    Raises:
      ValueError: one line, when there is no run, no such step, or nothing whole.
    """
    workdir = pathlib.Path(workdir)
    if step is not None and step in checkpoint.steps(workdir):
        try:
            return _open(workdir, step, mesh)
        except Exception:
            if step in checkpoint.steps(workdir):
                raise
            raise ValueError(f"the checkpoint of step {step} in {workdir} was deleted while it was read: leave --step out for the newest one") from None
    if not checkpoint.steps(workdir):
        what = "has no checkpoint yet: wait for the first one" if workdir.is_dir() else "does not exist: give the folder of a run"
        raise ValueError(f"{workdir} {what}, or make one with jaxlm train --config=quickstart --workdir={workdir}")
    if step is not None:
        raise ValueError(f"{workdir} holds no checkpoint of step {step}; it holds {', '.join(map(str, checkpoint.steps(workdir)))}")
    newest = _newest_below(workdir, np.iinfo(np.int32).max)
    with contextlib.suppress(ValueError):  # a damaged newest checkpoint is looked at below
        if best.chooses(origin.read_files(workdir, newest)[0]) and (found := sharding.first(lambda: best.step(workdir))) is not None:
            return _open(workdir, found, mesh)
    bound, last = np.iinfo(np.int32).max, None
    while (bound := _newest_below(workdir, bound)) >= 0:
        try:
            return _open(workdir, bound, mesh)
        except Exception as error:
            if bound not in checkpoint.steps(workdir):  # deleted meanwhile by the run, which then has newer ones
                bound = np.iinfo(np.int32).max
                continue
            if not isinstance(error, ValueError):
                raise
            log(f"passed over: {error}")
            last = error
    raise ValueError(f"no checkpoint in {workdir} can be used: {last}")


def adapters(workdir: os.PathLike | str, step: int | None = None, *, log: Callable[[str], None] = print) -> tuple[Config, int, Any, dict[str, Any]]:
    """The adapters of a run alone (their average where it keeps one): its config, the step, the leaves, and what the checkpoint says of their base. The base
    is not read, so that several adapters can be put on one base: `origin.same_base` says whether it is theirs.

    Raises:
      ValueError: one line: no such checkpoint, or a run without adapters.
    """
    workdir = pathlib.Path(workdir)
    step = origin.step_of(str(workdir), log) if step is None else step
    config, _, _ = origin.read_files(workdir, step)
    if not config.lora.rank:
        raise ValueError(f"{workdir} was trained without adapters (lora.rank=0): leave --adapter out")
    kept, shapes = form(config, config.model, sharding.make_mesh(MeshConfig(data=-1, fsdp=1)))
    mesh = jax.tree.leaves(shapes)[0].sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    dressed = jax.eval_shape(kept.dress, shapes, jax.random.key(0))
    target = trees.map_paths(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), trees.split(dressed, kept.trainable)[0])
    if more := [path for path in trees.flatten(target) if not lora.is_adapter(path)]:
        raise ValueError(f"{workdir} also trained {more[0]}, which an adapter cannot hold: leave --adapter out")
    found = checkpoint.restore_params(workdir, step, target, ema=config.optim.ema > 0)
    return config, step, found, json.loads(checkpoint.read_file(workdir, step, origin.BASE))["base"]


def _newest_below(workdir: pathlib.Path, bound: int) -> int:
    """-1 for none; the same answer in every process, though the run may be saving and deleting."""
    found = max((step for step in checkpoint.steps(workdir) if step < bound), default=-1)
    return int(multihost_utils.broadcast_one_to_all(np.int32(found))) if jax.process_count() > 1 else found


def _open(workdir: pathlib.Path, step: int, mesh: MeshConfig | None) -> Run:
    config, tokenizer, data = origin.read_files(workdir, step)
    fingerprint = checkpoint.fingerprint(workdir, step)
    model = kinds.build(config.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    devices, places = place(mesh or config.mesh, model, shapes)
    target = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places)
    params = origin.saved(workdir, step, target)
    return Run(workdir, step, config, tokenizer, data, model, params, devices, origin.read_template(workdir, step), fingerprint)


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
