"""jaxlm data audit, from training to the table, on the command line."""

import json
import re
import shutil

import pytest

from jaxlm import cli
from tests.train import runs


SMALL = ("--config.model.layers=1", "--config.model.width=16", "--config.model.dropout=0", "--config.train.eval_documents=1")


def jaxlm(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on a mixture, and one that goes on from it with other data."""
    folder = tmp_path_factory.mktemp("audited")
    recipe = runs.recipe(folder, steps=12, every=5)
    for name, word in (("web", "seen"), ("books", "read")):
        lines = [json.dumps({"text": f"{word} {number} " * (number % 7 + 1), "licence": ("MIT", "")[number % 2]}) for number in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    common = [f"--config={recipe}", "--config.train.eval_every=0 steps", *SMALL]
    mixed = f"--config.data.source=web={folder / 'web.jsonl'},books={folder / 'books.jsonl'}"
    weights = '--config.data.weights=("web", 0.25), ("books", 0.75)'
    assert jaxlm("train", *common, mixed, weights, "--config.data.licence_key=licence", f"--workdir={folder / 'mixed'}") == 0
    assert jaxlm("train", *common, f"--config.train.init_from={folder / 'mixed'}", f"--workdir={folder / 'next'}") == 0
    return folder


def test_training_says_what_it_takes_of_each_source(folder, capsys):
    capsys.readouterr()
    assert jaxlm("train", f"--config={folder / 'recipe.py'}", "--config.train.eval_every=0 steps", *SMALL, "--config.data.licence_key=licence",
                 f"--config.data.source=web={folder / 'web.jsonl'},books={folder / 'books.jsonl'}",
                 '--config.data.weights=("web", 0.25), ("books", 0.75)', f"--workdir={folder / 'mixed'}") == 0
    out = capsys.readouterr().out
    assert re.search(r"source 'web': 25.00% of the rows, \d+ tokens, 0\.\d\d epochs", out)
    assert "source 'books': 75.00% of the rows, 2.26k tokens, 1.76 epochs" in out


def test_a_run_is_audited(folder, capsys):
    capsys.readouterr()
    assert jaxlm("data", "audit", str(folder / "mixed")) == 0
    out = capsys.readouterr().out
    assert "step 12: 96 rows, 8 a step with seed 0" in out and re.search(r"\n  +\d\.\d\d times  .*books.jsonl:\d+\n", out) and "before that" not in out
    table = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("web ", "books ", "all "))}
    # 96 rows of 32 tokens, less the padding of the epochs' last rows.
    assert int(table["all"][5].replace(",", "")) == sum(int(table[name][5].replace(",", "")) for name in ("web", "books")) > 96 * 32 - 3 * 32
    assert "MIT: " in out and "unknown: " in out and re.search(r"held out, never seen: \d+ of validation, \d+ of test", out)
    assert jaxlm("data", "audit", str(folder / "mixed" / "checkpoints" / "12"), "--most=0") == 0
    assert "seen most" not in capsys.readouterr().out
    assert jaxlm("data", "audit", str(folder / "mixed"), "--step=10") == 0
    assert "step 10: 80 rows" in capsys.readouterr().out


def test_documents_are_found(folder, capsys):
    documents = [f"{folder / 'books.jsonl'}:{number}" for number in range(1, 61)]
    seen, held_out = 0, 0
    for document in documents[:12]:
        assert jaxlm("data", "audit", str(folder / "mixed"), f"--doc={document}") == 0
        out = capsys.readouterr().out
        assert f"document  {document}\nsource    books\nlicence   " in out
        if "never: it is held out in the" in out:
            held_out += 1
        elif found := re.search(r"seen      (\d+\.\d\d) times: (\d+) tokens in (\d+) of 12 steps\n", out):
            steps = re.findall(r"  step (\d+): (\d+) tokens", out)
            assert len(steps) == int(found[3]) and sum(int(tokens) for _, tokens in steps) == int(found[2]) and all(1 <= int(step) <= 12 for step, _ in steps)
            seen += 1
    assert seen and held_out
    assert jaxlm("data", "audit", str(folder / "mixed"), "--doc=books.jsonl:61") == 2
    assert "has the id 'books.jsonl:61'; near it: " in capsys.readouterr().err


def test_history_is_listed(folder, capsys):
    assert jaxlm("data", "audit", str(folder / "next")) == 0
    out = capsys.readouterr().out
    [line] = re.findall("before that: .*", out)
    assert f"{folder / 'mixed'}, 12 steps, 96 rows of {folder / 'mixed' / 'data'} (fingerprint " in line
    ledger = json.loads((folder / "next" / "checkpoints" / "12" / "files" / "data.json").read_text())
    assert ledger["history"][0]["origin"] == str(folder / "mixed") and ledger["rows"] == 96
    shorter = json.loads((folder / "next" / "checkpoints" / "10" / "files" / "data.json").read_text())
    assert shorter | {"step": 12, "rows": 96} == ledger


@pytest.mark.parametrize("arguments, words", [
    (["audit", "{}/mixed", "--data={}/next/data"], "is not the corpus that this checkpoint was trained on"),
    (["audit", "{}/mixed", "--step=7"], "holds no checkpoint of step 7; it holds "),
    (["audit", "{}/nowhere"], "nowhere holds no checkpoint: give the workdir of a run"),
    (["audit", "{}/mixed/checkpoints/12", "--step=10"], "name two checkpoints"),
    (["adit", "{}/mixed"], "write jaxlm data audit WORKDIR, not jaxlm data adit"),
    ([], "write jaxlm data audit WORKDIR, not jaxlm data"),
])
def test_bad_questions(folder, capsys, arguments, words):
    capsys.readouterr()
    assert jaxlm("data", *(argument.format(folder) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_corpus_that_has_moved_is_found(folder, tmp_path, capsys):
    shutil.copytree(folder / "next", tmp_path / "moved")
    (tmp_path / "moved" / "data").rename(tmp_path / "corpus")
    shutil.move(folder / "next" / "data", tmp_path / "away")
    try:
        assert jaxlm("data", "audit", str(tmp_path / "moved")) == 2
        assert "is not here: give --data=FOLDER" in capsys.readouterr().err
        assert jaxlm("data", "audit", str(tmp_path / "moved"), f"--data={tmp_path / 'corpus'}") == 0
    finally:
        shutil.move(tmp_path / "away", folder / "next" / "data")
