"""The notebooks in colab/: what is in them, and each of their cells run on the CPU, with the sizes that their first cell lets a reader set."""

import importlib
import json
import pathlib
import re
import shlex

import pytest
from absl import flags

from jaxlm import cli, config
from tests import notebook, test_docs
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
TINY = ("--config.train.steps=3 --config.train.log_every=1 --config.data.sequence_length=64 --config.data.batch_size=4 --config.eval.bootstrap=10 "
        "--config.data.workers=1 ")


def test_there_are_two():
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb", "sentiment.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_they_hold_no_outputs_and_one_address(path):
    book = json.loads(path.read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert book["nbformat"] == 4 and not any(cell["outputs"] or cell["execution_count"] for cell in cells) and len(cells) <= 12
    text = "\n".join(notebook.code_cells(path))
    assert text.count("github.com") == 1 and "OWNER" in notebook.code_cells(path)[0]
    installs = re.findall(r"^!pip install .*", text, re.M)
    assert len(installs) == 2 and "-c keep.txt" in installs[0] and "--no-deps" in installs[1]
    extras = re.search(r"jaxlm\[([\w,]+)\] @ git\+\{REPOSITORY\}", installs[0])[1].split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", project, re.M) for extra in extras)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_their_commands_parse(path):
    """Flags, recipes and overrides; what is in braces is left out."""
    for line in re.findall(r"^!(?:.* \| )?jaxlm (\w+ .*)", "\n".join(notebook.code_cells(path)), re.M):
        verb, *rest = shlex.split(re.sub(r" \{\w+\}|\S*=\{\w+\}\S*", "", line.replace("{RUNS}", "runs").replace("{recipe}", "quickstart:long")))
        values = flags.FlagValues()
        importlib.import_module(f"jaxlm.bin.{verb}").define(values)
        assert values([verb, *(a for a in rest if not a.startswith("--config."))]) == [verb]
        if "config" in values and values.config:
            config.load(values.config, cli.take_overrides(rest))


@pytest.mark.slow
def test_quickstart_from_nothing_to_a_chat(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.write_corpus(tmp_path / "corpus.jsonl")
    model = "--config.tokenizer.kind=bytes --config.model.layers=1 --config.model.width=16 --config.model.heads=2 --config.eval.batch_size=64 "
    text = notebook.run(ROOT / "colab/quickstart.ipynb", {
        "TRAIN_OPTIONS": f"{TINY}{model}--config.data.source=corpus.jsonl", "CHAT_MODEL": "runs/mine",
        "CHAT_OPTIONS": TINY.replace("=64", "=256") + "--config.data.chat_template=chatml --config.lora.rank=2"})
    assert "There is NO ACCELERATOR here" in text and re.search(r"Running on \d x cpu \(cpu\)", text)
    for seen in ("the model never saw", "bits per byte", "gzip -9", "A sample", "--- prompt 2 ---", "step 3/3", "you> ", "not saved: the folder runs goes"):
        assert seen in text, (seen, text)
    assert (tmp_path / "runs/chat/checkpoints/3").is_dir() and len((tmp_path / "chats.jsonl").read_text().splitlines()) == 10


@pytest.mark.slow
def test_sentiment_from_a_table_to_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test_docs.reviews(tmp_path)
    text = notebook.run(ROOT / "colab/sentiment.ipynb", {
        "TABLE": "reviews.csv", "ENCODER": "hf:minilm", "OPTIONS": TINY.replace("=64", "=24") + "--config.data.validation=0.2 --config.data.test=0.3"})
    for seen in ("There is NO ACCELERATOR here", "TF-IDF + logistic regression", "mcc", "report-test.html", "not in Colab: open", "I would buy it again."):
        assert seen in text, (seen, text)
    assert re.search(r"(positive|negative) \d\.\d{3} .*Not bad at all", text)
