import json
import random

import pytest

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import prepare

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one".split()
MARKS = ("", "", "", ",", ".\n\n", " é", "\t", " 語", " 😀")


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to a few thousand characters, with line ends, spaces and characters of 1 to 4 bytes."""
    rng = random.Random(seed)
    lengths = [rng.choice((1, 2, 10, 40, 400)) for _ in range(count)]
    return [" ".join(rng.choice(WORDS) + rng.choice(MARKS) for _ in range(length)) + f" {i}" for i, length in enumerate(lengths)]


@pytest.fixture(scope="session")
def write_jsonl():
    """A function that writes texts, one a line, and returns the path as text."""
    def write(path, texts):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


@pytest.fixture(scope="session")
def texts():
    return make_texts(150)


@pytest.fixture(scope="session")
def source(tmp_path_factory, texts, write_jsonl):
    return write_jsonl(tmp_path_factory.mktemp("source") / "texts.jsonl", texts)


@pytest.fixture(scope="session")
def data_config(source):
    return DataConfig(source=(source,), validation=0.1, test=0.1, shard_bytes=20_000)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, data_config):
    """Bytes as tokens, several shards; never written to."""
    return prepare.prepare(data_config, TokenizerConfig(kind="bytes"), tmp_path_factory.mktemp("corpus") / "data", log=lambda line: None)
