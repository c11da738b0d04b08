"""Import and export as a user meets them: the binaries, what a run begins from, bad directories."""

import json
import pathlib
import shutil
import string

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxlm import cli, config, sharding
from jaxlm.config import MeshConfig
from jaxlm.interop import hf, hf_files
from jaxlm.models import kinds
from jaxlm.train import initial, saved
from tests.train import runs

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def directory(folder: pathlib.Path, name: str = "llama") -> pathlib.Path:
    """A copy of a fixture, with a tokenizer of single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / name / file, folder)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder


def jaxlm(*arguments):
    """The exit code of a verb run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return ended.value.code


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_import_generate_export(tmp_path, capsys):
    folder, workdir = directory(tmp_path / "hf", "qwen3_moe"), tmp_path / "run"
    assert jaxlm("import", f"--from={folder}", f"--to={workdir}") == 0
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.experts.*.gate_proj.weight" in out and "equal to the files bit by bit" in out
    assert jaxlm("generate", f"--workdir={workdir}", "--prompt=hello", "--max_tokens=3", "--temperature=0") == 0
    for dtype, kind in (("float32", "F32"), ("bfloat16", "BF16")):
        assert jaxlm("export", f"--workdir={workdir}", f"--to={tmp_path / dtype}", f"--dtype={dtype}") == 0
        written, source = hf_files.open_files(tmp_path / dtype), hf_files.open_files(folder)
        assert {tensor.dtype for tensor in written.tensors.values()} == {kind}
        for name in source.tensors:
            expected = source.read(name) if kind == "F32" else source.read(name).astype(ml_dtypes.bfloat16)
            assert written.read(name).tobytes() == expected.tobytes()
        assert (tmp_path / dtype / "tokenizer.json").is_file() and json.loads((tmp_path / dtype / "config.json").read_text())["eos_token_id"] == 3
    capsys.readouterr()
    assert jaxlm("import", f"--from={folder}", f"--to={workdir}") == 2 and "holds a run already" in capsys.readouterr().err
    assert jaxlm("export", f"--workdir={workdir}", f"--to={folder}") == 2 and "not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["out", "out.gguf"])
def test_a_decoder_with_labels_is_refused(tmp_path, monkeypatch, capsys, to):
    model = config.TransformerConfig(vocab_size=64, output="sequence_labels", labels=2, label_names=("a", "b"))
    run = saved.Run(tmp_path, 1, config.Config(model=model), None, {}, None, {}, None, "", "")
    monkeypatch.setattr(saved, "open_run", lambda *_: run)
    assert jaxlm("export", f"--workdir={tmp_path}", f"--to={tmp_path / to}") == 2 and not (tmp_path / to).exists()
    assert "holds a decoder with a head for labels, for which neither format has a place here" in capsys.readouterr().err


RECIPE = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.data = ConfigDict(dict(source=("{source}",), validation=0.1, test=0.1, sequence_length=32, batch_size=8))
    c.train = ConfigDict(dict(steps=4, eval_documents=2))
    c.checkpoint = ConfigDict(dict(every=2, keep_last=1, keep_best=0))
    c.optim = ConfigDict(dict(lr=1e-9, warmup=0))
    c.eval = ConfigDict(dict(bootstrap=5))
    return c
"""


def recipe(tmp_path, *overrides):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(source=runs.write_corpus(tmp_path / "corpus.jsonl", 40)))
    return config.load(str(path), overrides)


def test_a_run_begins_where_it_is_told_and_resumes(tmp_path):
    from jaxlm.train import loop

    folder = directory(tmp_path / "hf")
    begun = hf.load(hf.open_directory(folder))
    initial.import_model(folder, tmp_path / "imported", log=lambda line: None)
    close = lambda run: jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.params, begun)
    for workdir, origin in (("one", f"hf:{folder}"), ("two", str(tmp_path / "imported")), ("imported", "")):
        cfg = recipe(tmp_path, *([("train.init_from", origin)] if origin else []))
        assert loop.run(cfg, tmp_path / workdir) == 0
        run = saved.open_run(tmp_path / workdir)
        assert run.step == 4 and run.config.model.width == 16 and run.tokenizer.eos == 3
        close(run)  # the learning rate is next to nothing
        assert loop.run(cfg, tmp_path / workdir) == 0  # finished; the checkpoint of step 0 has gone
    (tmp_path / "one" / "FINISHED").unlink()
    shutil.rmtree(folder)  # where it came from is not needed again
    assert loop.run(recipe(tmp_path, ("train.init_from", f"hf:{folder}")), tmp_path / "one") == 0


@pytest.mark.parametrize("overrides, words", [
    ([("model.width", "64")], "model.width=64, but the model in hf:.* has 16: leave the key out"),
    ([("data.sequence_length", "64")], "longer than the context of hf:.*, 48"),
    ([("train.init_from", "nowhere")], "nowhere holds no checkpoint"),
    ([("train.init_from", "hf:nowhere")], "nowhere is not a directory"),
])
def test_impossible_beginnings(tmp_path, overrides, words):
    folder = directory(tmp_path / "hf")
    with pytest.raises(ValueError, match=words):
        initial.resolve(recipe(tmp_path, ("train.init_from", f"hf:{folder}"), *overrides), tmp_path / "run")


def test_computing_keys_may_differ(tmp_path):
    folder = directory(tmp_path / "hf")
    found = initial.resolve(recipe(tmp_path, ("train.init_from", f"hf:{folder}"), ("model.dtype", "bfloat16"), ("model.remat", "full")), tmp_path / "run")
    assert (found.model.dtype, found.model.remat, found.model.layers, found.model.vocab_size) == ("bfloat16", "full", 2, 64)


# --- bad directories: one line that says what is wrong ---


def header(folder: pathlib.Path, change) -> None:
    """Rewrites the header of model.safetensors."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    content = json.loads(data[8:8 + size])
    change(content)
    text = json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size:])


def first(content):
    return content["model.norm.weight"]


def rewrite(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def nested(path, text):
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def cut(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def index(folder, file):
    tensors = hf_files.open_files(folder).tensors
    (folder / hf_files.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD = {
    "pickle only": (pickled, "a pickle runs any code it likes"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, not list"),
    "missing shard": (lambda f: index(f, "model-00001-of-00002.safetensors"), "lacks model-00001-of-00002.safetensors, which"),
    "shard outside": (lambda f: index(f, "../model.safetensors"), "not a plain name inside the directory"),
    "shard absolute": (lambda f: index(f, "/etc/passwd"), "not a plain name inside the directory"),
    "index without a map": (lambda f: (f / hf_files.INDEX).write_text("{}"), "has no weight_map"),
    "truncated data": (lambda f: cut(f, -100), "truncated or damaged"),
    "truncated header": (lambda f: cut(f, 300), "truncated or damaged"),
    "empty file": (lambda f: cut(f, 0), "truncated or damaged"),
    "absurd header": (lambda f: (f / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}"), "truncated or damaged"),
    "offsets outside": (lambda f: header(f, lambda c: first(c).update(data_offsets=[10**9, 10**9 + 64])), "truncated or damaged"),
    "offsets backwards": (lambda f: header(f, lambda c: first(c).update(data_offsets=first(c)["data_offsets"][::-1])), "truncated or damaged"),
    "offsets overlapping": (lambda f: header(f, lambda c: first(c).update(data_offsets=c["model.layers.0.input_layernorm.weight"]["data_offsets"])),
                            "truncated or damaged"),
    "header of nested lists": (lambda f: nested(f / "model.safetensors", b"[" * 100_000), "truncated or damaged"),
    "config of nested lists": (lambda f: (f / "config.json").write_text('{"a":' + "[" * 100_000), "config.json is not JSON"),
    "config too large": (lambda f: (f / "config.json").write_bytes(b" " * (64 * 2**20 + 1)), "more than the 67,108,864 that are believable"),
    "a billion layers": (lambda f: configure(f, num_hidden_layers=10**9), "num_hidden_layers is 1,000,000,000, more than the 4,096 that are believable"),
    "absurd width": (lambda f: configure(f, hidden_size=10**8), "width is 100,000,000, more than"),
    "absurd vocabulary": (lambda f: configure(f, vocab_size=10**10), "vocab_size is 10,000,000,000, more than"),
    "absurd heads": (lambda f: configure(f, num_attention_heads=10**7, head_dim=10**7), "a matrix of 16 x 100,000,000,000,000"),
    "infinite base": (lambda f: configure(f, rope_theta=float("inf"), rope_parameters=None), "rope_theta is inf, not a finite number"),
    "architecture not a name": (lambda f: configure(f, architectures=[["LlamaForCausalLM"]]), "must be a list of names"),
    "weight not a number": (lambda f: rewrite(f, lambda t: t["model.norm.weight"].fill(np.nan)), "model.norm.weight holds nan: weights must be finite"),
    "size against shape": (lambda f: header(f, lambda c: first(c).update(shape=[17])), "truncated or damaged"),
    "unknown type": (lambda f: header(f, lambda c: [e.update(dtype="F8_E4M3", shape=[*e["shape"][:-1], 4 * e["shape"][-1]]) for k, e in c.items()
                                                    if k != "__metadata__"]), "is of type F8_E4M3"),
    "shape mismatch": (lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": np.zeros(17, np.float32)})), r"has shape \[17\].* it must have \[16\]"),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "lacks the tensor model.norm.weight"),
    "tensor left over": (lambda f: rewrite(f, lambda t: t.update(surprise=np.zeros(1, np.float32))), "no place for: surprise"),
    "unknown architecture": (lambda f: configure(f, architectures=["MambaForCausalLM"]), "'MambaForCausalLM', which is not known here; known: LlamaForCausalLM"),
    "missing key": (lambda f: f.joinpath("config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]})), "lacks num_attention_heads"),
    "wrong type": (lambda f: configure(f, hidden_size="16"), "wrong type"),
    "rope not an object": (lambda f: configure(f, rope_parameters="linear"), "wrong type"),
    "unknown scaling": (lambda f: configure(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "rope scaling 'yarn'"),
    "unknown activation": (lambda f: configure(f, hidden_act="xielu"), "activation 'xielu'"),
    "not computed": (lambda f: configure(f, attention_bias=True), "attention_bias=True and mlp_bias=False, which is not computed here"),
    "no tokenizer": (lambda f: (f / "vocab.txt").unlink(), "holds no tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_directories(name, tmp_path):
    spoil, words = BAD[name]
    folder = directory(tmp_path / "hf")
    spoil(folder)
    with pytest.raises(ValueError, match=words) as caught:
        initial.import_model(folder, tmp_path / "run", log=lambda line: None)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "checkpoints").exists()


def test_shards_are_written_and_read(tmp_path):
    source = hf.open_directory(FIXTURES / "mixtral")
    params = hf.load(source)
    written = hf.save(tmp_path, source.cfg, params, shard_bytes=10_000)
    assert len({tensor.path for tensor in written.files.tensors.values()}) > 4 and (tmp_path / hf_files.INDEX).is_file()
    assert all(path.stat().st_size < 12_000 for path in tmp_path.glob("*.safetensors"))
    equal(hf.load(written), params)
    for path in tmp_path.glob("*.safetensors"):  # readable by the package itself
        safetensors.numpy.load_file(path)
    (tmp_path / "model-00002-of-00006.safetensors").unlink(missing_ok=True)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=f"lacks {first.name}"):
        hf.open_directory(tmp_path)


@pytest.mark.parametrize("name", ["llama", "mixtral", "encoders/bert_masked", "encdec/t5_v1_1"])
def test_load_lands_on_its_sharding(name):
    """Split over eight devices it is what one device holds."""
    source = hf.open_directory(FIXTURES / name)
    model = kinds.build(source.cfg)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    places = sharding.params_shardings(mesh, model.axes, jax.eval_shape(model.init, jax.random.key(0)))
    found = hf.load(source, places)
    jax.tree.map(lambda a, place: np.testing.assert_equal(a.sharding.is_equivalent_to(place, a.ndim), True), found, places)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))
    equal(found, hf.load(source))


def test_older_files_with_buffers_no_prefix_and_a_tied_head(tmp_path):
    folder = directory(tmp_path, "gpt2")

    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.zeros((1, 1, 48, 48), np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    rewrite(folder, older)
    source = hf.open_directory(folder)
    assert source.ignored == ("h.0.attn.bias", "lm_head.weight")
    equal(hf.load(source), hf.load(hf.open_directory(FIXTURES / "gpt2")))
