"""The recipes' docstrings: each names slices of v5e, v5p and v6e, which by formula fits too (compiled once: the figures stand beside it)."""

import ast
import re
import shlex

import pytest

from jaxlm import chips, cli, config
from jaxlm.aot import plan

RECIPES = ("gpt2_124m", "llama_1b", "llama_7b", "llama3_8b", "mixtral_8x7b", "llama_70b")


def commands(name: str) -> list[list[str]]:
    text = ast.get_docstring(ast.parse((config.recipes_folder() / f"{name}.py").read_text()))
    return [shlex.split(line) for line in re.findall(r"jaxlm fit (--config=\S+.*)", text)]


@pytest.mark.parametrize("name", RECIPES)
def test_each_names_slices_that_fit(name):
    kinds = set()
    for flags in commands(name):
        values = dict(flag[2:].split("=", 1) for flag in flags if not flag.startswith("--config."))
        cfg = config.load(values["config"], cli.take_overrides(flags))
        for text in values["topology"].split(","):
            verdict = plan.by_formula(cfg, chips.topology(text))
            assert verdict.fits, (text, verdict.memory)
            kinds.add(verdict.topology.chip.name)
    assert kinds == {"v5e", "v5p", "v6e"}
