"""The mesh-parity certificate passes what is right and catches what is wrong: a dropped sum, a wrong axis, a mask off by one, an unscaled microbatch."""

import functools

import jax
import pytest

from jaxlm import config, verify
from jaxlm.models import layers, presets
from jaxlm.ops import ring
from jaxlm.train import step

DENSE = config.build({"data": {"batch_size": 8}, "train": {"microbatches": 2}})
SPARSE = config.build({"model": {"experts": 4, "windows": (0, 64), "attention_softcap": 20.0}})


PAIRS = config.build({"model": {"encoder_layers": 2, "positions": "relative"}, "objective": {"name": "seq2seq"}})


@pytest.fixture(scope="module", autouse=True)
def one_device_is_compiled_and_trained_once():
    """The other meshes are built anew: they are what the tests spoil."""
    alone, reference = functools.cache(verify.build), functools.cache(verify.reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "build", lambda cfg, name, exact=verify.build: (alone if name == "fsdp=1" else exact)(cfg, name))
        patch.setattr(verify, "reference", reference)
        yield


def certificate(cfg, mesh):
    [row] = verify.verify(cfg, [mesh], steps=2)
    return row


def test_a_right_mesh_passes():
    row = certificate(SPARSE, "sequence=2+tensor=2+expert=2")
    assert row.ok and row.loss < 1e-5 and row.grads < 1e-5 and verify.line(row).endswith("ok")


def test_an_encoder_decoder_passes():
    row = certificate(PAIRS, "stage=2+sequence=2")
    assert row.ok and row.grads < 1e-5, row


@pytest.mark.slow
@pytest.mark.parametrize("recipe, mesh", [("distill", "fsdp=2+tensor=2"), ("dpo:full", "sequence=2+fsdp=2"), ("sft_lora:qlora", "tensor=2+stage=2")])
def test_frozen_models_beside_pass(recipe, mesh):
    """A teacher, a reference, a base in four bits: each on a mesh that splits it."""
    row = certificate(config.load(recipe), mesh)
    assert row.ok, row


def test_a_dropped_sum_is_caught(monkeypatch):
    monkeypatch.setattr(layers.jax.lax, "psum", lambda x, axis: x)
    row = certificate(SPARSE, "tensor=2")
    assert not row.ok and row.grads > 1e-2 and verify.line(row).endswith("DIFFERS")


def test_a_wrong_axis_is_caught(monkeypatch):
    psum = jax.lax.psum
    monkeypatch.setattr(layers.jax.lax, "psum", lambda x, axis: psum(x, "fsdp"))
    assert not certificate(SPARSE, "tensor=2+fsdp=2").ok


def test_a_mask_off_by_one_is_caught(monkeypatch):
    mask = ring.mask
    monkeypatch.setattr(ring, "mask", lambda queries, keys, window, causal: mask(queries, keys._replace(positions=keys.positions + 1), window, causal)
                        | mask(keys, queries, window, False) & (queries.positions[:, :, None] == keys.positions[:, None]))
    row = certificate(DENSE, "sequence=2")
    assert not row.ok and row.loss > 1e-4


def test_an_unscaled_microbatch_is_caught(monkeypatch):
    exact = step.mean_gradient

    def unscaled(train, frozen, batch, key, objective, microbatches):
        grads, sums = exact(train, frozen, batch, key, objective, microbatches)
        return jax.tree.map(lambda g: g * microbatches, grads), sums

    monkeypatch.setattr("jaxlm.train.setup.mean_gradient", unscaled)
    row = certificate(DENSE, "data=2")
    assert not row.ok and row.grads > 0.1


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_shrinks(name):
    """To a config that is valid and keeps the knobs on."""
    model = presets.PRESETS[name]
    if model.kind != "decoder" or model.encoder_layers:
        return
    big = config.Config(model=model, data=config.DataConfig(sequence_length=min(model.context, 512)))
    small = verify.shrink(big, 3).model
    assert small.width == 32 and (small.heads > small.kv_heads) == (model.filled().heads > model.filled().kv_heads)
    assert (small.experts > 0, len(set(small.windows)), bool(small.dense_layers)) == (model.experts > 0, len(set(model.windows)), bool(model.dense_layers))
    for key in ("norm", "norm_position", "positions", "activation", "gated", "tied", "bias", "qk_norm", "attention_softcap", "final_softcap", "remat"):
        assert getattr(small, key) == getattr(model, key)


def test_meshes_are_read():
    assert verify.parse("fsdp=4+tensor=2, sequence=4") == ["fsdp=4+tensor=2", "sequence=4"] and verify.devices("fsdp=4+tensor=2") == 8
    assert verify.parse("") == list(verify.MESHES) and all(verify.devices(name) <= 8 for name in verify.MESHES)
    for text in ("fsdp", "fsdp=0", "fspd=2", "fsdp=2xtensor=2"):
        with pytest.raises(ValueError, match="is no axis with a size: write AXIS=SIZE"):
            verify.parse(text)
    with pytest.raises(ValueError, match="fsdp=16 needs 16 devices, and there are 8"):
        verify.verify(DENSE, ["fsdp=16"], 1)
    with pytest.raises(ValueError, match="expert=2: mesh.expert=2 splits the experts"):
        verify.verify(DENSE, ["expert=2"], 1)


@pytest.mark.slow
def test_the_verb_says_yes_and_exits_0(tmp_path):
    from tests.train import runs
    meshes = "fsdp=4+tensor=2,sequence=2"  # the whole list takes minutes; tests/train/test_meshes.py goes through more than that
    code, output = runs.finish("verify", "--config=quickstart", f"--meshes={meshes}", "--steps=2", timeout=900)
    assert code == 0 and "2 of 2 meshes agree with one device over 2 steps" in output, output
