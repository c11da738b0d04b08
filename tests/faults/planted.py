"""A trained run with faults of number planted in it, and whether a run and `jaxlm replay` find and name them."""

import dataclasses
import json
import math
import pathlib
import random
import shutil
from typing import NamedTuple

import jax
import numpy as np

from jaxlm import config, sharding, trees
from jaxlm.data import audit, rows, shards
from jaxlm.data import tokenizer as tokenizers
from jaxlm.train import checkpoint, health, loop, replay, resume
from jaxlm.train.lock import Lock
from tests.train import runs

LETTERS = "ABCDEFGHIJKLMNOPQRST"  # each in one document only
POISONED = 5  # documents of noise
OVERRIDES = [("model.layers", "3"), ("model.tied", "False"), ("model.width", "16"), ("model.heads", "2"), ("model.dropout", "0"), ("train.eval_every", "0"),
             ("optim.lr", "0.01"), ("data.validation", "0"), ("data.test", "0"), ("checkpoint.keep_last", "99"), ("train.bad_steps", "3"), ("train.spike", "6"),
             ("optim.schedule", "constant")]


class Base(NamedTuple):
    """A run to plant faults in."""
    config: config.Config
    workdir: pathlib.Path
    corpus: shards.Corpus
    task: rows.Task

    def occupants(self, step: int) -> set[str]:
        found = audit.occupants(self.corpus, self.task, self.config.data.seed, self.config.data.batch_size, step)
        return {one.id for one in found}


def write_corpus(path: pathlib.Path) -> None:
    """Sentences; in twenty documents a letter that no other has, and five documents of noise."""
    runs.write_corpus(path, 400)
    lines, draw = [json.loads(line)["text"] for line in path.read_text().splitlines()], random.Random(3)
    for number, letter in enumerate(LETTERS):
        lines[5 * number] = f"{letter} " + lines[5 * number][:40]
    for number in range(POISONED):
        lines[71 * number + 7] = "".join(chr(draw.randrange(0x10000, 0x10ffff)) for _ in range(10))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def base(folder: pathlib.Path, steps: int, every: int = 10) -> Base:
    """Trains a run of three tiny layers on one device; it is not finished afterwards, so that it goes on."""
    cfg = runs.load(folder, [*OVERRIDES, ("data.dir", str(folder / "data"))], steps=steps, every=every)
    write_corpus(folder / "corpus.jsonl")
    assert loop.run(cfg, folder / "run") == 0
    corpus = shards.open_corpus(folder / "data")
    return Base(cfg, folder / "run", corpus, rows.build(cfg, tokenizers.load(corpus.tokenizer_path), corpus))


def document(of: Base, letter: str) -> str:
    """Id of the document that holds a letter."""
    every = range(len(of.corpus.splits["train"].tokens))
    return next(of.corpus.document_id("train", i) for i in every if ord(letter) in of.corpus.read("train", i))


def visited(of: Base, letter: str, step: int) -> set[int]:
    """The 50 steps after `step` that see the letter: its place is the first in its document, and a row may hold another part."""
    name, data = document(of, letter), of.config.data
    return {number for number in range(step + 1, step + 51) for one in audit.occupants(of.corpus, of.task, data.seed, data.batch_size, number)
            if one.id == name and one.piece.start <= 1 < one.piece.stop}


def plant(of: Base, step: int, path: str, place: tuple[int, ...], value: float, workdir: pathlib.Path,
          **train: object) -> config.Config:
    """A copy of the run that ends with the checkpoint of `step`, in which one parameter has another value; and its config, with other keys of `train`."""
    later = lambda folder, names: [name for name in names if name == "FINISHED" or folder.endswith("checkpoints") and int(name) >= step]
    shutil.copytree(of.workdir, workdir, ignore=later)
    parts = resume.build(of.config, sharding.make_mesh(of.config.mesh, jax.devices()[:1]), of.corpus)[0]
    state = checkpoint.restore(of.workdir, step, parts.target)
    flat = trees.flatten(state.params)
    leaf = np.array(flat[path])
    leaf[place + (0,) * (leaf.ndim - len(place))] = value
    flat[path] = jax.device_put(leaf, flat[path].sharding)
    files = {p.name: p.read_bytes() for p in (of.workdir / "checkpoints" / str(step) / "files").iterdir()}
    other = lambda cfg: dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **train))
    files["config.json"] = config.to_json(other(config.from_json(files["config.json"].decode()))).encode()
    (workdir / "config.json").write_text(config.to_json(other(of.config)))
    with Lock(workdir) as lock, checkpoint.Checkpoints(lock, keep_last=99, keep_best=0, keep_every=0) as checkpoints:
        checkpoints.save(step, state._replace(params=trees.unflatten(flat)), files)
    return other(of.config)


def bad_steps(workdir: pathlib.Path) -> list[dict]:
    return replay.report.read_metrics(workdir, health.FILE)


def parameter(of: Base, step: int, path: str, layer: int, value: float, workdir: pathlib.Path) -> str:
    """A value that is not finite in one parameter of one layer: the run must end and name the step and its documents; replay must name parameter and layer.
    Returns what is not right, "" for nothing."""
    plant(of, step, path, (layer,), value, workdir)
    try:
        loop.run(of.config, workdir)
        return "the run did not end"
    except ValueError as error:
        message = str(error)
    if f"the first at step {step + 1}, the last at step {step + 3}" not in message or not any(name in message for name in of.occupants(step + 3)):
        return f"the message names other steps, or no document: {message}"
    found = replay.run(workdir, step + 1, log=lambda line: None)
    said = replay.text(found)
    if not found.origin or found.origin.operation != path or found.origin.first[0] != layer or f"{path}, layers {layer}:" not in said:
        return f"replay does not name {path}, layer {layer}: {said}"
    return "" if found.steps[-1].skipped and found.steps[-1].equal else f"step {step + 1} is not what was logged: {said}"


def activation(of: Base, step: int, letter: str, workdir: pathlib.Path) -> str:
    """A letter's embedding infinite: of the steps that go on just those are skipped that hold its document, which both name. (3e38 overflows in some steps
    only: in others the norm makes it 0, and its gradient too.)"""
    name = document(of, letter)
    loop.run(plant(of, step, "embed/tokens", (ord(letter),), math.inf, workdir, steps=f"{step + 50} steps", spike=0.0, bad_steps=4), workdir)
    skipped = {row["step"]: row for row in bad_steps(workdir) if row["step"] > step}
    expected = visited(of, letter, step)
    assert expected, "a letter that is not seen plants nothing"
    if set(skipped) != expected or not all(name in [one["id"] for one in row["documents"]] for row in skipped.values()):
        return f"skipped {sorted(skipped)}, the document {name} lies in {sorted(expected)}"
    found = replay.run(workdir, min(expected), log=lambda line: None)
    first = found.rows[0]
    if name not in [one.id for one in first.documents] or not found.origin or not found.steps[-1].skipped:
        return f"replay does not name {name}: {replay.text(found)}"
    return ""


def noise(of: Base) -> list[tuple[int, str]]:
    """Step and id of each visit of 24 tokens or more of a document of noise, when the loss no longer falls so fast that its own spread hides them."""
    last, found = checkpoint.steps(of.workdir)[-1], []
    ids = {of.corpus.document_id("train", i) for i in range(len(of.corpus.splits["train"].tokens)) if 0xf3 in of.corpus.read("train", i)}
    for step in range(200, last + 1):
        inside = audit.occupants(of.corpus, of.task, of.config.data.seed, of.config.data.batch_size, step)
        found += [(step, name) for name in sorted(ids) if sum(one.piece.stop - one.piece.start for one in inside if one.id == name) >= 24]
    return found


def poisoned(of: Base, step: int, name: str) -> str:
    """A document of noise: its step is a spike, named with its documents, and replay puts its row first and the document first in the row."""
    rows_ = {row["step"]: row for row in bad_steps(of.workdir)}
    if step not in rows_ or name not in [one["id"] for one in rows_[step]["documents"]]:
        return f"step {step} with {name} is not among the spikes {sorted(rows_)}"
    found = replay.run(of.workdir, step, log=lambda line: None)
    worst = {one.id for row in found.rows[:3] for one in row.documents}
    return "" if name in worst and found.steps[-1].why == "spike" and found.steps[-1].equal else f"replay does not name {name}: {replay.text(found)}"
