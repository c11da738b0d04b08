"""The README's commands exist, parse, and are what CI runs; its promise of the first five minutes is kept."""

import importlib
import pathlib
import re
import shlex
import subprocess

import pytest
from absl import flags

from jaxlm import cli, config
from jaxlm.train.report import read_metrics
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]


def test_the_first_screen_has_the_two_commands():
    assert BLOCKS[0] == (
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/jaxlm train --config=configs/quickstart.py --workdir=runs/quickstart\n"
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest\n")
    assert README.index(BLOCKS[0]) < 800


def test_ci_runs_the_readme_itself():
    script = (ROOT / ".ci" / "run").read_text()
    picked = subprocess.run(["bash", "-c", "sed -n '/^```bash$/,/^```$/{/^```/d;p}' README.md | head -2"], cwd=ROOT, capture_output=True, text=True).stdout
    assert picked == BLOCKS[0] and "{/^```/d;p}' README.md | head -2)" in script and 'bash -c "${commands[1]}"' in script


def shown(text):
    """The jaxlm commands in lines of a text, as lists of arguments."""
    for line in text:
        if match := re.search(r"(?:^|bin/|\s)jaxlm (?!VERB)([a-z]+ --.*)", line):
            yield shlex.split(re.split(r"\s{2,}", match[1].split(" && ")[0])[0].split("     ")[0], comments=True)


@pytest.mark.parametrize("arguments", [pytest.param(a, id=" ".join(a)[:60]) for a in shown([
    *COMMANDS, *cli._HELP.splitlines(), *(line for p in config.recipes_folder().glob("*.py") for line in p.read_text().splitlines())])])
def test_every_command_shown_parses(arguments):
    verb, *rest = arguments
    values = flags.FlagValues()
    importlib.import_module(f"jaxlm.bin.{verb}").define(values)
    left = values([verb, *(a for a in rest if not a.startswith("--config."))])
    assert left == [verb]
    if "config" in values and values.config:
        config.load(values.config, cli.take_overrides(rest))


def test_tests_that_the_documents_name_exist():
    """What a document says a test shows, a test shows."""
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    named = {name: path.name for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"] for name in re.findall(r"`(test_\w+)`", path.read_text())}
    assert len(named) > 20 and not {name: file for name, file in named.items() if name not in there}


@pytest.mark.slow
def test_quickstart_keeps_its_promise(tmp_path):
    """The real thing, from Python's own text to the sample: better than 2.2 bits per byte and than gzip."""
    code, output = runs.finish("train", f"--config={ROOT / 'configs' / 'quickstart.py'}", f"--workdir={tmp_path / 'quickstart'}", timeout=900, optimised=True)
    assert code == 0, output
    bits = read_metrics(tmp_path / "quickstart")[-1]["test/bits_per_byte"]
    gzip = float(re.search(r"gzip -9\s+([\d.]+)", output)[1])
    assert bits < 2.2 and bits < gzip - 0.1, output
    assert re.search(r"xz -9e\s+[\d.]+", output) and "A sample" in output and "Next:" in output
    assert re.search(r"step 350/350  loss [\d.]+  [\d.]+k? tokens/s  MFU \d+%  left 0 s", output)
    code, output = runs.finish("generate", f"--workdir={tmp_path / 'quickstart'}", "--prompt=Return the", "--max_tokens=8")
    assert code == 0 and "Return the" in output
