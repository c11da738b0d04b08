"""Tiny real runs for the tests: a recipe, a corpus, the binary in a process of its own."""

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys

import jax
import pytest

from jaxlm import config
from jaxlm.train.report import read_metrics
from tests.conftest import QUICK

RECIPE = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.data = ConfigDict(dict(source=("{source}",), validation=0.1, test=0.1, sequence_length=32, batch_size=8))
    c.tokenizer = ConfigDict(dict(kind="bytes"))
    c.model = ConfigDict(dict(context=32, layers=2, width=32, heads=2, dropout=0.1))
    c.train = ConfigDict(dict(steps="{steps}", log_every=1, eval_every="50%", eval_documents=4))
    c.checkpoint = ConfigDict(dict(every="{every}", keep_best=0))
    c.eval = ConfigDict(dict(bootstrap=20))
    return c
"""


def write_corpus(path: pathlib.Path, documents: int = 120) -> pathlib.Path:
    """A .jsonl of small made-up sentences, the same every time."""
    draw = random.Random(7)
    subjects, verbs, objects = ("the cat", "a dog", "my aunt", "the old clock"), ("sees", "wants", "hides", "paints"), ("a tree", "the sea", "bread", "time")
    lines = []
    for number in range(documents):
        text = " ".join(f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(objects)}." for _ in range(draw.randint(1, 9)))
        lines.append(json.dumps({"text": f"{number}: {text}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(folder: pathlib.Path, steps: str | int = 12, every: str | int = 4) -> pathlib.Path:
    """Writes corpus and recipe into `folder`; returns the recipe's path."""
    source = write_corpus(folder / "corpus.jsonl")
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(source=source, steps=steps, every=every))
    return path


def load(folder: pathlib.Path, overrides=(), **options) -> config.Config:
    return config.load(str(recipe(folder, **options)), overrides)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row}


@contextlib.contextmanager
def devices(count: int):
    """What runs in this process finds the first `count` devices only: programs for one compile and run in a fraction of the time."""
    some, real = jax.devices()[:count], jax.devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *kind: real(*kind) if kind else some)
        yield


def environment(optimised: bool = False) -> dict[str, str]:
    """One device, whatever the tests themselves have; machine code that compiles in a quarter of the time, as theirs, unless `optimised`."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    return env | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | ({} if optimised else {"XLA_FLAGS": " ".join(QUICK)})


def start(*arguments: str, optimised: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxlm", *arguments]
    return subprocess.Popen(command, env=environment(optimised), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*arguments: str, timeout: float = 300, optimised: bool = False) -> tuple[int, str]:
    """Exit code and everything printed."""
    process = start(*arguments, optimised=optimised)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output
