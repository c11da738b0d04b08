"""A corpus and a run with two checkpoints, made without training."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxlm import config
from jaxlm.config import Config, DataConfig, EvalConfig, MeshConfig, TokenizerConfig, TransformerConfig
from jaxlm.data import prepare, shards
from jaxlm.data import tokenizer as tokenizers
from jaxlm.models import decoder
from jaxlm.train import checkpoint
from jaxlm.train.lock import Lock
from jaxlm.train.state import State
from tests.train.runs import write_corpus


def configuration(source: pathlib.Path) -> Config:
    return Config(
        tokenizer=TokenizerConfig(kind="bytes"), data=DataConfig(source=(str(source),), validation=0.15, test=0.1, sequence_length=64, batch_size=8),
        model=TransformerConfig(context=64, layers=2, width=16, heads=2), mesh=MeshConfig(), eval=EvalConfig(bootstrap=50))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    cfg = configuration(write_corpus(folder / "corpus.jsonl"))
    return prepare.prepare(cfg.data, cfg.tokenizer, folder / "data", log=lambda line: None)


@pytest.fixture(scope="session")
def cfg(corpus):
    return configuration(corpus.folder.parent / "corpus.jsonl")


@pytest.fixture(scope="session")
def model(cfg):
    return decoder.build(decoder.vocabulary(cfg.model, 259))


@pytest.fixture(scope="session")
def params(model):
    """Larger than at the start of training, so that documents differ in likelihood."""
    return jax.jit(lambda key: jax.tree.map(lambda w: w * 5 if w.ndim > 1 else w, model.init(key)))(jax.random.key(3))


def files(cfg: Config, corpus: shards.Corpus) -> dict[str, bytes]:
    """What a training run puts beside the arrays."""
    tokenizer = tokenizers.load(corpus.tokenizer_path)
    data = {"dir": str(corpus.folder), "manifest": corpus.fingerprint}
    return {"config.json": config.to_json(cfg).encode(), tokenizer.filename: tokenizer.model, "data.json": json.dumps(data).encode()}


def save(workdir: pathlib.Path, cfg: Config, corpus: shards.Corpus, params, *steps: int, keep_last: int = 100) -> pathlib.Path:
    """Checkpoints whose parameters grow with the step."""
    with Lock(workdir) as lock, checkpoint.Checkpoints(lock, keep_last=keep_last, keep_best=0, keep_every=0) as checkpoints:
        for step in steps:
            scaled = jax.tree.map(lambda w: w * (1 + step / 100), params)
            ema = jax.tree.map(lambda w: -w, scaled) if cfg.optim.ema else None
            checkpoints.save(step, State(jnp.int32(step), scaled, {"m": jnp.zeros(3)}, ema, jnp.zeros(2, jnp.uint32)), files(cfg, corpus))
    return workdir


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, cfg, corpus, params):
    """Never written to; see `run_copy`."""
    return save(tmp_path_factory.mktemp("run") / "run", cfg, corpus, params, 2, 4)


@pytest.fixture
def run_copy(tmp_path, run_folder):
    import shutil
    return shutil.copytree(run_folder, tmp_path / "run")


@pytest.fixture
def with_ema(cfg):
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, ema=0.9))
