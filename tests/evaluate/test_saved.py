"""Opening runs: the newest whole checkpoint, a given step, what is missing, on whatever devices there are."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.config import MeshConfig, TokenizerConfig
from jaxlm.data import prepare
from jaxlm.train import checkpoint, origin, saved
from tests.evaluate.conftest import save


def first(params):
    return np.asarray(params["embed"]["tokens"])


def damage(workdir, step):
    path = max((workdir / "checkpoints" / str(step) / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_checkpoint_is_opened_with_all_that_belongs_to_it(run_folder, cfg, params):
    run = saved.open_run(run_folder)
    assert run.step == 4 and run.config.data == cfg.data and run.config.model.vocab_size == 320 and run.tokenizer.vocab_size == 259
    np.testing.assert_array_equal(first(run.params), first(params) * np.float32(1.04))
    np.testing.assert_array_equal(first(saved.open_run(run_folder, 2).params), first(params) * np.float32(1.02))


@pytest.mark.parametrize("mesh, devices, sizes", [
    (MeshConfig(), 1, (1, 1, 1)), (MeshConfig(fsdp=4, tensor=2), 8, (1, 4, 2)), (MeshConfig(fsdp=4, tensor=2), 1, (1, 1, 1)),
    (MeshConfig(), 3, (3, 1, 1))], ids=str)
def test_the_mesh_is_the_runs_where_it_fits_and_copies_elsewhere(run_folder, cfg, monkeypatch, mesh, devices, sizes):
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda cfg: make(cfg, jax.devices()[:devices]))
    monkeypatch.setattr(origin.configs, "from_json", lambda text: dataclasses.replace(cfg, mesh=mesh))
    run = saved.open_run(run_folder)
    assert tuple(run.mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == sizes and len(first(run.params)) == 320


def test_the_moving_average_is_used_where_there_is_one(tmp_path, with_ema, corpus, params):
    run = saved.open_run(save(tmp_path / "run", with_ema, corpus, params, 1))
    np.testing.assert_array_equal(first(run.params), first(params) * np.float32(-1.01))


def test_a_damaged_checkpoint_is_passed_over_and_said(run_copy):
    lines = []
    damage(run_copy, 4)
    assert saved.open_run(run_copy, log=lines.append).step == 2
    [line] = lines
    assert line.startswith("passed over: checkpoint of step 4") and "sha256" in line
    with pytest.raises(ValueError, match="step 4 .* is damaged"):
        saved.open_run(run_copy, 4)
    damage(run_copy, 2)
    with pytest.raises(ValueError, match="^no checkpoint in .* can be used: checkpoint of step 2 [^\n]*$"):
        saved.open_run(run_copy, log=lines.append)


def test_a_checkpoint_that_goes_while_it_is_read_is_no_fault(run_copy, monkeypatch):
    real, lines = checkpoint.restore_params, []

    def restore(workdir, step, *rest, **options):
        if step == 4:  # the run saves a newer one and deletes this one
            shutil.copytree(run_copy / "checkpoints" / "2", run_copy / "checkpoints" / "6")
            shutil.rmtree(run_copy / "checkpoints" / "4")
            raise RuntimeError("file not found somewhere in TensorStore")
        return real(workdir, 2 if step == 6 else step, *rest, **options)

    monkeypatch.setattr(checkpoint, "restore_params", restore)
    assert saved.open_run(run_copy, log=lines.append).step == 6 and not lines


def test_what_is_missing_is_one_line(tmp_path, run_folder):
    with pytest.raises(ValueError, match="nowhere does not exist: give the folder of a run, or make one with jaxlm train [^\n]*$"):
        saved.open_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no checkpoint yet[^\n]*$"):
        saved.open_run(tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint of step 3; it holds 2, 4$"):
        saved.open_run(run_folder, 3)


def test_the_corpus_must_be_the_runs_or_be_asked_for(run_folder, cfg, corpus, tmp_path, monkeypatch):
    run = saved.open_run(run_folder)
    assert saved.open_data(run).fingerprint == corpus.fingerprint
    gone = run._replace(data={**run.data, "dir": str(tmp_path / "gone")})
    with pytest.raises(ValueError, match="gone is not here: give --data=FOLDER"):
        saved.open_data(gone)
    shutil.copytree(corpus.folder, tmp_path / "moved" / "data")
    assert saved.open_data(gone._replace(workdir=tmp_path / "moved")).fingerprint == corpus.fingerprint

    source = tmp_path / "other.jsonl"
    source.write_text("".join(json.dumps({"text": f"other text {i}"}) + "\n" for i in range(400)))
    data = dataclasses.replace(cfg.data, source=(str(source),))
    other = prepare.prepare(data, cfg.tokenizer, tmp_path / "other", log=lambda line: None)
    assert saved.open_data(run, str(other.folder)).fingerprint == other.fingerprint
    with pytest.raises(ValueError, match="holds another corpus than .* give --data="):
        saved.open_data(run._replace(data={**run.data, "dir": str(other.folder)}))
    pieces = prepare.prepare(data, TokenizerConfig(vocab_size=300), tmp_path / "pieces", log=lambda line: None)
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        saved.open_data(run, str(pieces.folder))
