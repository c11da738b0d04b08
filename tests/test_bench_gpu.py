"""tools/bench_gpu.py as plumbing: on the CPU, at toy sizes, with nothing installed but JAX, Flax and Optax; and the model in torch is ours."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from jaxlm.models import kinds
from tests.train import runs

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "bench_gpu.py"
ABSENT = ("ml_collections", "clu", "tensorboardX", "tensorboard", "grain", "array_record", "sentencepiece", "tokenizers", "tensorflow_datasets", "safetensors",
          "pyarrow", "zstandard", "matplotlib", "jinja2", "scipy.stats", "torch", "tensorflow")

RUN = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in {absent}):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {absent} else real(name, package)
sys.argv = {argv}
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*flags):
    code = RUN.format(absent=ABSENT, argv=[str(TOOL), *flags])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=runs.environment())


def test_one_command_with_little_installed(tmp_path):
    done = run("--tiny", "--model=gpt2_124m", "--rounds=2", "--steps=1", f"--json={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr
    assert "torch is not installed: no comparison" in done.stdout and "toy sizes" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["results"]) == {"gpt2_124m"} and found["date"] and found["device"] == "cpu"
    for (row,) in found["results"].values():
        assert row["side"].startswith("jaxlm") and row["tokens_per_second"] > 0 and 2 < row["loss"] < 8


def test_a_gpu_is_needed_for_figures():
    done = run("--rounds=1")
    assert done.returncode == 1 and "jax finds no GPU here" in done.stderr and "Traceback" not in done.stderr


def tool():
    spec = importlib.util.spec_from_file_location("bench_gpu", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.torch
@pytest.mark.parametrize("name", ["gpt2_124m", "llama_1b"])
def test_torchs_model_has_our_parameters_and_learns(name):
    torch = pytest.importorskip("torch")
    bench = tool()
    cfg = bench.recipe(name, 0, tiny=False)
    shapes = jax.eval_shape(kinds.build(cfg.model).init, jax.random.key(0))
    with torch.device("meta"):
        model = bench.torch_model(cfg.model.filled())
    assert sum(p.numel() for p in model.parameters()) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    small = bench.recipe(name, 0, tiny=True)
    torch.manual_seed(0)
    tiny, ids = bench.torch_model(small.model.filled()), torch.randint(0, small.model.vocab_size, (2, 33))
    logits = tiny(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(small.model.vocab_size)) < 0.3
    changed = ids.clone()
    changed[:, 20:] = 0
    assert torch.equal(tiny(changed[:, :-1])[:, :19], logits[:, :19]) or torch.allclose(tiny(changed[:, :-1])[:, :19], logits[:, :19], atol=1e-5)
