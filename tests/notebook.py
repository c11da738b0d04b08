"""Runs a notebook's code cells in this process, as Colab would: `!` lines with {expressions} filled in, jaxlm commands through its own command line."""

import contextlib
import io
import json
import pathlib
import re
import shlex
import subprocess

import pytest

from jaxlm import cli
from tests.train import runs


def code_cells(path: pathlib.Path) -> list[str]:
    """Sources of the code cells, in order."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def jaxlm(arguments: list[str], said: str = "") -> str:
    """What a jaxlm command prints, with `said` on its standard input, on one device. A command that fails fails the test."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended, runs.devices(1):
        patch.setattr("sys.stdin", io.StringIO(said))
        cli.main(arguments)
    assert not ended.value.code, (arguments, ended.value.code, out.getvalue()[-2000:])
    return out.getvalue()


def shell(line: str) -> str:
    """Runs one line of a shell. `[COMMAND |] jaxlm VERB ...` stays in this process; pip installs nothing here."""
    left, _, right = line.rpartition(" | ")
    if (right or line).startswith("jaxlm "):
        said = subprocess.run(["bash", "-c", left], capture_output=True, text=True, check=True).stdout if left else ""
        return jaxlm(shlex.split(right)[1:], said)
    if line.startswith("pip install "):
        return ""
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout


def run(path: pathlib.Path, settings: dict[str, object]) -> str:
    """Executes all code cells in the working directory; the first cell's settings are replaced by `settings`. Returns all that was printed."""
    names, printed = {}, io.StringIO()
    for number, cell in enumerate(code_cells(path)):
        python = []
        for line in [*cell.splitlines(), "!"]:
            if not line.startswith("!"):
                python.append(line)
                continue
            with contextlib.redirect_stdout(printed):
                exec(compile("\n".join(python), f"{path.name}, code cell {number + 1}", "exec"), names)
            python = []
            printed.write(shell(re.sub(r"\{([^{}]+)\}", lambda found: str(eval(found[1], names)), line[1:])) if line != "!" else "")
        if number == 0:
            assert settings.keys() <= names.keys(), settings.keys() - names.keys()
            names |= settings
    return printed.getvalue()
