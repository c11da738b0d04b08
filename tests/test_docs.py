"""The documentation: its links lead somewhere, its page of keys is current, its commands parse, and the tutorials' commands run, all of them, in order."""

import importlib
import pathlib
import re
import string
import sys

import pytest
from absl import flags

from jaxlm import cli, config
from tests import notebook
from tests.test_readme import shown
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.S)
sys.path.insert(0, str(ROOT / "tools"))


def anchors(path: pathlib.Path) -> set[str]:
    """Of each heading the anchor that GitHub and MkDocs give it."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", CODE.sub(lambda code: "code", page.read_text()))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} has no such heading"


def test_the_page_of_keys_is_current():
    page = importlib.import_module("config_page")
    parts = page.parts()
    assert [f"{part}.{key.name}" for part, (_, rows) in parts.items() for key in rows] == list(config.keys())
    assert not [f"{part}.{key.name}" for part, (_, rows) in parts.items() for key in rows if len(key.meaning) < 8]
    assert page.PAGE.read_text() == page.page(), "run python tools/config_page.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    """Of blocks that say they are for a shell."""
    text = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.S)).replace("\\\n", " ")
    for verb, *rest in shown(text.splitlines()):
        values = flags.FlagValues()
        importlib.import_module(f"jaxlm.bin.{verb}").define(values)
        values([verb, *(a for a in rest if not a.startswith("--config."))])
        if "config" in values and values.config and not values.config.endswith(("my_recipe.py", "/best.py")):  # which the reader writes, and jaxlm search
            config.load(values.config, cli.take_overrides(rest))


# What makes the tutorials' runs small. It is added to the commands that take a config; nothing else about them is changed.
SMALL = ["--config.train.steps=3", "--config.train.log_every=1", "--config.eval.bootstrap=10", "--config.data.workers=1", "--config.data.batch_size=4"]
TINY = [*SMALL, "--config.data.sequence_length=64", "--config.model.layers=1", "--config.model.width=16", "--config.model.heads=2", "--config.tokenizer.kind=bytes"]
TUTORIALS = {"first_run": [*TINY, "--config.data.source=corpus.jsonl"], "your_data": TINY, "choosing": [],
             "sentiment": [*SMALL, "--config.data.sequence_length=24", "--config.data.validation=0.2", "--config.data.test=0.3"]}


def setting(folder: pathlib.Path, page: str) -> None:
    """What the reader has already: Python's documentation, a folder of texts, or a table and an encoder."""
    if page == "first_run":
        runs.write_corpus(folder / "corpus.jsonl")
    elif page == "your_data":
        (folder / "texts").mkdir()
        for i in range(40):
            (folder / "texts" / f"{i}.txt").write_text(f"Text {i}. " + " ".join(f"word{j % (i + 3)} of {i * j}" for j in range(60)) + ".\n")
        [recipe] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your_data.md").read_text(), re.S)
        (folder / "my_recipe.py").write_text(recipe)
    elif page == "sentiment":
        reviews(folder)


def reviews(folder: pathlib.Path) -> None:
    """reviews.csv, and a small encoder in the folder minilm."""
    fixture = ROOT / "tests" / "interop" / "fixtures" / "encoders" / "bert"
    (folder / "minilm").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "minilm" / name).write_bytes((fixture / name).read_bytes())
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *("##" + letter for letter in string.ascii_lowercase)]
    (folder / "minilm" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    words = [("good", "positive"), ("fine", "positive"), ("bad", "negative"), ("awful", "negative")]
    things = ("cup", "film", "book", "bed", "fork", "lamp", "door", "shoe")
    (folder / "reviews.csv").write_text("text,label\n" + "".join(f"{word} {thing},{label}\n" for thing in things for word, label in words))


def test_an_executed_block_is_one_that_says_bash():
    for name in TUTORIALS:
        assert len(re.findall(r"```bash\n", (ROOT / "docs" / f"{name}.md").read_text())) >= 2, name


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS)
def test_tutorials_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting(tmp_path, page)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
    lines = [line for line in "".join(blocks).replace("\\\n", " ").splitlines() if not re.match(r"(\. |pip |python3 -m venv )", line)]
    ran = ""
    for line in lines:
        small = " ".join(TUTORIALS[page]) if re.search(r"jaxlm (train|prepare) .*--config=", line) else ""
        ran += notebook.shell(f"{line} {small}")
    seen = {"first_run": ("bits per byte", "Return the", "sample 2", "wrote runs/quickstart/report.html"), "your_data": ("is whole", "held out, never seen", "bits per byte"),
            "choosing": ("predicted by", "extrapolated", "500.00"), "sentiment": ("TF-IDF + logistic regression", "mcc", "Not bad at all.", "exports/sentiment")}
    for words in seen[page]:
        assert words in ran, (words, ran)
