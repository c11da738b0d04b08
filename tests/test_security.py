"""What files and people from outside must not be able to do: run code, leave a folder, fetch something. What is allowed is named, with its reason."""

import ast
import io
import json
import pathlib
import pickle
import shutil
import socket
import struct

import numpy as np
import pytest

from jaxlm import config
from jaxlm.data import hub, tokenizer
from jaxlm.interop import gguf, hf, hf_files, peft
from tests.fuzz import targets

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ROOT / "tests" / "interop" / "fixtures" / "llama"

# Nothing of these is used by jaxlm: modules that unpickle, unpack, run or fetch.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "tarfile", "runpy", "code", "ctypes", "requests", "http.client",
           "ftplib", "telnetlib", "xmlrpc", "imp", "pty", "subprocess", "urllib.request", "zipfile"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "importlib.import_module", "yaml.load", "torch.load", "pickle.load",
         "pickle.loads", "shutil.unpack_archive", "urllib.request.urlopen", "sys.setrecursionlimit"}
METHODS = {"extractall", "exec_module", "load_module"}
ALLOWED = {
    "cli.py": {"importlib.import_module",  # a verb out of VERBS
               "os.execv"},  # this very command again, with huge pages
    "config.py": {"exec_module"},  # recipes are code, from the disk only
    "interop/stablehlo.py": {"subprocess"},  # runs what it has just written, with a list of arguments
    "train/webhook.py": {"urllib.request"},  # tells the URL of train.webhook that the run has ended
    "train/writers.py": {"__import__"},  # a package out of a table, which train.writers names
    "search/jobs.py": {"subprocess"},  # jaxlm itself, several times, with its own arguments as a list
    "search/ray_tune.py": {"subprocess"},  # jaxlm itself, on a trial's workdir, with a list of arguments
    "peers.py": {"ctypes"},  # hears SIGABRT, by which jax ends a process that has lost its coordinator
    "train/setup.py": {"ctypes"},  # calls malloc_trim of the C library that runs us
    "sharding.py": {"urllib.request", "urllib.request.urlopen"},  # asks the metadata server of a Cloud TPU VM for this machine's neighbours
    "data/manifest.py": {"zipfile"},  # looks at the sizes in an .npz before numpy reads it; nothing is extracted
}


def dangerous(tree: ast.AST) -> set[str]:
    """What of the above a module uses, and keyword arguments that should not be."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & (MODULES | CALLS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {name} & CALLS
            found |= {name.rpartition(".")[2]} & METHODS if "." in name else set()
            for word in node.keywords:
                if word.arg in ("shell", "allow_pickle", "trust_remote_code") and not (isinstance(word.value, ast.Constant) and word.value.value is False):
                    found.add(f"{word.arg}=")
            if name in ("jinja2.Environment", "jinja2.Template", "Environment"):
                found.add(name)
    return found


def test_nothing_runs_what_it_reads():
    used = {}
    for path in sorted((ROOT / "jaxlm").rglob("*.py")):
        if found := dangerous(ast.parse(path.read_text())):
            used[path.relative_to(ROOT / "jaxlm").as_posix()] = found
    assert used == ALLOWED, "what is allowed is named above, with its reason"


def test_tools_and_recipes_do_not_either():
    processes = {"subprocess", "importlib.import_module", "urllib.request", "urllib.request.urlopen", "ctypes"}
    for path in [*(ROOT / "tools").rglob("*.py"), *(ROOT / "configs").rglob("*.py"), *(ROOT / "colab").rglob("*.py")]:
        assert not dangerous(ast.parse(path.read_text())) - processes, path
        assert "trust_remote_code=True" not in path.read_text(), path


@pytest.mark.parametrize("line", ["import pickle", "from pickle import loads", "from os import system", "eval('1')", "import os; os.system('x')", "import yaml",
                                  "subprocess.run('x', shell=True)", "np.load(x, allow_pickle=True)", "f(trust_remote_code=flag)", "from urllib.request import urlopen",
                                  "archive.extractall()", "torch.load(x)", "jinja2.Template(x)"])
def test_the_scan_finds(line):
    assert dangerous(ast.parse(line))


# --- what is given to be read does not run ---


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """Bytes of such a pickle; at the end the file must not be there."""
    path = tmp_path / "ran"
    yield pickle.dumps(Bomb(path))
    assert not path.exists(), "code of a file was run"


def test_pickles_are_refused_unread(bomb, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (folder / name).write_bytes(bomb)
        with pytest.raises(ValueError, match="pickle runs any code"):
            hf.open_directory(folder)
        (folder / name).unlink()
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="truncated or damaged"):
        hf.open_directory(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6.0}))
    (folder / "adapter_model.bin").write_bytes(bomb)
    with pytest.raises(ValueError, match="a pickle .* is refused"):
        peft.load(folder, *targets._adapter_base())
    (folder / "m.gguf").write_bytes(bomb)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        gguf.open_file(folder / "m.gguf")
    for name in ("tokenizer.model", "tokenizer.json", "vocab.txt"):
        (folder / name).write_bytes(bomb)
        with pytest.raises(ValueError):
            tokenizer.load(folder)
        (folder / name).unlink()


def test_a_pickle_within_a_corpus_is_refused(bomb, tmp_path):
    from jaxlm.data import shards
    held = io.BytesIO()
    np.savez(held, tokens=np.array([Bomb(tmp_path / "ran")], object))
    for name, data in {**targets._corpora()[0], "lengths-train.npz": held.getvalue()}.items():
        (tmp_path / name).write_bytes(data)
    targets._sign(tmp_path)
    with pytest.raises(ValueError, match="allow_pickle"):
        shards.open_corpus(tmp_path)


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path):
    for path in MODEL.iterdir():
        shutil.copy(path, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "modeling.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    (tmp_path / "config.json").write_text(json.dumps(content | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "trust_remote_code": True}))
    assert hf.open_directory(tmp_path).cfg.layers and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("address", ["https://example.org/recipe.py", "http://127.0.0.1:1/recipe.py", "file:///etc/hosts.py", "gs://bucket/recipe.py"])
def test_recipes_are_not_fetched(address, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ValueError) as caught:
        config.load(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["__import__('os').system('true')", "open('/etc/passwd').read()", "(1).__class__", "[" * 9999, "9" * 99_999, "-" * 99_999 + "1"])
def test_overrides_are_values_not_code(text):
    with pytest.raises(ValueError) as caught:
        config.load("quickstart", [("model.layers", text)])
    assert "\n" not in str(caught.value)


# --- what is given does not leave its folder ---

OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "..", "", "a\\..\\b", "a/b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_lists_of_files_stay_in_their_folder(name, tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match="not a plain name inside the folder"):
        hub.files(str(tmp_path))
    (tmp_path / hf_files.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="not a plain name inside the directory"):
        hf_files.open_files(tmp_path)
    held = json.dumps({"kind": "huggingface", "vocab_size": 0, "files": {name: "{}"}}).encode()
    with pytest.raises(ValueError, match="do not trust it"):
        tokenizer.from_bytes(held)


def test_a_tensors_name_is_no_path(tmp_path):
    """Names of tensors become names of parameters, never files."""
    text = json.dumps({"../../x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(ValueError, match="has a tensor that this model has no place for"):
        hf.open_directory(tmp_path)
