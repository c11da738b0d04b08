"""Files of every kind that a run reads, damaged one at a time: who notices, and what is used instead."""

import pathlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxlm import cli, config, trees
from jaxlm.data import shards
from jaxlm.data import tokenizer as tokenizers
from jaxlm.interop import hf, peft
from jaxlm.train import checkpoint, loop, origin, resume, saved
from tests.train import runs

SMALL = [("model.layers", "1"), ("model.width", "16"), ("model.dropout", "0"), ("train.eval_every", "0"), ("train.spike", "6"), ("checkpoint.keep_last", "9")]
KINDS = ("checkpoint", "corpus", "tokenizer", "adapter", "model", "config")


class World(NamedTuple):
    """Everything whole, and what reading it gives."""
    folder: pathlib.Path
    config: config.Config
    files: dict[str, list[pathlib.Path]]  # kind -> those that are read
    truth: dict[str, Any]  # kind -> what is read from it

    def read(self, kind: str) -> Any:
        """What a kind's own reader makes of the files now."""
        return READERS[kind](self)


def world(folder: pathlib.Path) -> World:
    """A run of 8 steps with checkpoints of 4 and 8, one with adapters on it, and what is exported of both."""
    cfg = runs.load(folder, [*SMALL, ("tokenizer.kind", "unigram"), ("tokenizer.vocab_size", "300"), ("data.dir", str(folder / "data"))], steps=8, every=4)
    assert loop.run(cfg, folder / "run") == 0
    tuned = runs.load(folder, [*SMALL, ("train.init_from", str(folder / "run")), ("lora.rank", "2"), ("data.source", "()"), ("data.dir", str(folder / "data"))], steps=2, every=2)
    assert loop.run(tuned, folder / "tuned") == 0
    overrides = ["--config.tokenizer.kind=unigram", "--config.tokenizer.vocab_size=300"]
    for arguments in (["export", f"--workdir={folder / 'run'}", f"--to={folder / 'model'}"],
                      ["export", f"--workdir={folder / 'tuned'}", f"--to={folder / 'adapter'}", "--adapter"],
                      ["tokenizer", f"--config={folder / 'recipe.py'}", f"--out={folder / 'tokenizer'}", *overrides]):
        assert cli.run(arguments[0], arguments[1:]) == 0
    every = lambda path, but=(): sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size and p.name not in but and p.suffix not in (".md", ".html"))
    files = {"checkpoint": every(folder / "run" / "checkpoints" / "8"), "corpus": every(folder / "data", ("report.json", "timings.json")),
             "tokenizer": every(folder / "tokenizer"), "adapter": every(folder / "adapter"), "model": every(folder / "model"),
             "config": [folder / "run" / "config.json"]}
    found = World(folder, cfg, files, {})
    for kind in KINDS:
        found.truth[kind] = found.read(kind)
    return found


def _checkpoint(of: World) -> Any:
    """As training and as evaluation read it: the newest step that is whole, its state and files; the messages of what was passed over."""
    said: list[str] = []
    step = checkpoint.newest(of.folder / "run", log=said.append)
    run = saved.open_run(of.folder / "run", log=said.append)
    values = {path: np.asarray(leaf).tobytes() for path, leaf in trees.flatten(run.params).items()}
    # Evaluation does not read the optimiser's state: a checkpoint of which only that is damaged is as good to it.
    return step, run.step, values, said, checkpoint.steps(of.folder / "run")


def _corpus(of: World) -> Any:
    corpus = shards.open_corpus(of.folder / "data")
    tokenizer = tokenizers.load(corpus.tokenizer_path)
    return tokenizer.fingerprint, [(split, corpus.document_ids(split), [corpus.read(split, i).tobytes() for i in range(len(index.tokens))],
                                    index.sources.tobytes(), index.licences.tobytes()) for split, index in corpus.splits.items()]


def _adapter(of: World) -> Any:
    tuned, _, _ = origin.read_files(of.folder / "tuned", 2)
    told, found = peft.load(of.folder / "adapter", tuned.model, tuned.lora)
    return told, {path: value.tobytes() for path, value in found.items()}


def _model(of: World) -> Any:
    source = hf.open_directory(of.folder / "model")
    return source.cfg, {name: source.files.read(name).tobytes() for name in source.files.tensors}, tokenizers.load(of.folder / "model").fingerprint


def _config(of: World) -> Any:
    found = config.read(of.folder / "run" / "config.json")
    if differs := resume.changed(found, of.config):
        raise ValueError(f"config.json: {differs}")
    return None  # what may differ does not decide what is trained


READERS: dict[str, Callable[[World], Any]] = {"checkpoint": _checkpoint, "corpus": _corpus, "adapter": _adapter, "model": _model, "config": _config,
                                              "tokenizer": lambda of: tokenizers.load(of.folder / "tokenizer").fingerprint}


def damage(content: bytes, how: str, dice: random.Random) -> bytes:
    """Other bytes: one bit flipped, some bytes zeroed, or the end cut off."""
    while True:
        changed = bytearray(content)
        at = dice.randrange(len(content))
        if how == "flip":
            changed[at] ^= 1 << dice.randrange(8)
        elif how == "zero":
            size = min(dice.choice([1, 16, 512, 4096]), len(content) - at)
            changed[at:at + size] = bytes(size)
        else:
            del changed[at:]
        if changed != content:
            return bytes(changed)


def trial(of: World, kind: str, path: pathlib.Path, how: str, dice: random.Random) -> str:
    """Damages one file, reads its kind, and mends it: "named", "harmless" (nothing else was read than before), or what is wrong."""
    content = path.read_bytes()
    path.write_bytes(damage(content, how, dice))
    try:
        found = of.read(kind)
    except (ValueError, OSError) as error:
        return "named" if path.name in str(error) and "\n" not in str(error) else f"not named: {error}"
    except Exception as error:
        return f"a fault of ours: {type(error).__name__}: {error}"
    finally:
        path.write_bytes(content)
    if kind != "checkpoint":
        return "harmless" if found == of.truth[kind] else "SILENT"
    (step, used, values, said, steps), (_, _, whole, _, _) = found, of.truth[kind]
    name = str(path.relative_to(of.folder / "run" / "checkpoints" / "8"))
    if step != 4 or steps != [4, 8] or not any(name in line and "step 8" in line for line in said):
        return f"SILENT: step {step} was used ({said})"
    return "named" if used == 4 or values == whole else "SILENT in evaluation"


def files_of(of: World, kind: str, count: int, dice: random.Random) -> list[pathlib.Path]:
    """Each file in turn, then the larger the more often."""
    files = of.files[kind]
    return [*files, *dice.choices(files, [p.stat().st_size for p in files], k=max(count - len(files), 0))][:count]
