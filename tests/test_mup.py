"""muP: at the base width nothing changes; wider, each weight has the size and the rate of its role; exports compute the same without it."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, mup, optim, trees
from jaxlm.config import Config, OptimConfig, TransformerConfig
from jaxlm.interop import hf
from jaxlm.models import decoder
from jaxlm.train import evaluation, loop, saved
from tests.train import runs

CFG = TransformerConfig(vocab_size=64, context=16, layers=1, width=64, heads=4, kv_heads=2, feedforward=64)
WIDE = dataclasses.replace(CFG, mup_width=16)
FULL = dataclasses.replace(WIDE, tied=False, bias=True, norm="layer", positions="learned", mup_head_size=4)
SPARSE = dataclasses.replace(WIDE, experts=4, shared_feedforward=32, shared_gate=True)
INPUTS = {key: jnp.arange(16, dtype=jnp.int32)[None] for key in ("tokens", "positions")} | {"segments": jnp.ones((1, 16), jnp.int32)}


@functools.cache
def init(cfg):
    return trees.flatten(jax.jit(decoder.build(cfg).init)(jax.random.key(0)))


def table(cfg):
    return trees.match(decoder.build(cfg).axes, init(cfg), "axes")


@pytest.mark.parametrize("cfg", [FULL, SPARSE], ids=["full", "sparse"])
def test_first_weights_and_rates_by_role(cfg):
    plain, wide, axes = init(dataclasses.replace(cfg, mup_width=0, mup_head_size=0)), init(cfg), table(cfg)
    roles = {path: mup.role(path, names) for path, names in axes.items()}
    hidden = {path for path in wide if path.split("/")[-1] in ("q", "k", "v", "o", "up", "gate", "down")}
    output = {path for path in wide if path in ("head/kernel", "layers/moe/router", "layers/moe/shared_gate")}
    assert {path for path, name in roles.items() if name == "hidden"} == hidden and {path for path, name in roles.items() if name == "output"} == output
    for path, w in wide.items():
        np.testing.assert_allclose(w, plain[path] * (0.5 if path in hidden else 0.25 if path in output else 1), rtol=1e-6, err_msg=path)
    # One step of AdamW with equal gradients: lr / 4 where the width comes in, and everywhere the same weight decay.
    grown = lambda decay: optim.build(OptimConfig(lr=1.0, weight_decay=decay, clip=0), lambda step: 1.0, axes, cfg)
    params, gradients = trees.unflatten(wide), trees.unflatten({path: jnp.ones_like(w) for path, w in wide.items()})
    step = lambda tx: trees.flatten(tx.update(gradients, tx.init(params), params)[0])
    bare, decayed = step(grown(0.0)), step(grown(0.5))
    for path, u in bare.items():
        np.testing.assert_allclose(u, -0.25 if path in hidden | output else -1, rtol=1e-5, err_msg=path)
        decays = optim.decays(OptimConfig(), axes)[path]
        np.testing.assert_allclose(decayed[path] - u, -0.5 * wide[path] * decays, atol=1e-6, err_msg=path)


def test_at_its_own_width_nothing_changes():
    same = dataclasses.replace(CFG, mup_width=CFG.width)
    assert all(np.array_equal(a, b) for a, b in zip(init(CFG).values(), init(same).values())) and (same.hidden_scale, same.score_scale) == (1, CFG.score_scale)
    state = lambda cfg: jax.tree.structure(optim.build(OptimConfig(), lambda step: 1.0, table(cfg), cfg).init(trees.unflatten(init(CFG))))
    assert state(same) == state(CFG)


@pytest.mark.parametrize("more", [dict(), dict(mup_head_size=4, qk_norm="head", norm_offset=True), dict(mup_head_size=4, qkv_bias=True)],
                         ids=["tied", "query norm", "query bias"])
def test_an_export_computes_the_same_without_it(tmp_path, more):
    cfg = dataclasses.replace(WIDE, **more)
    draw = np.random.default_rng(0)
    params = trees.unflatten({path: w + 0.02 * draw.standard_normal(w.shape, np.float32) for path, w in init(cfg).items()})
    plain, moved = mup.folded(cfg, params)
    assert not plain.mup_width and not plain.mup_head_size

    def logits(cfg, params):
        model = decoder.build(cfg)
        return model.head(params, model.apply(params, INPUTS)[0])

    ours, theirs = (jax.jit(logits, static_argnums=0)(c, p) for c, p in ((cfg, params), (plain, moved)))
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(ours).max()))
    assert more != {} or not np.allclose(ours, jax.jit(logits, static_argnums=0)(plain, params))
    if not more:
        source = hf.save(tmp_path, plain, moved)
        hf.verify(source, moved)


def test_post_norm_and_tied_cannot_be_folded():
    with pytest.raises(ValueError, match="has a factor that no other weight takes in"):
        mup.folded(dataclasses.replace(WIDE, norm_position="post"), {})


@pytest.mark.parametrize("keys, said", [
    ({"model.mup_width": "16", "optim.name": "muon"}, "has rules for optim.name=adamw, not muon"),
    ({"model.mup_width": "16", "model.init": "xavier"}, "set model.init=normal"),
    ({"model.mup_head_size": "16"}, "goes with model.mup_width"),
    ({"model.mup_width": "16", "model.kind": "encoder", "model.causal": "false"}, "model.mup_width is for decoders"),
    ({"model.mup_width": "-1"}, "must not be negative"),
])
def test_refused(keys, said):
    with pytest.raises(ValueError, match=said) as error:
        config.override(Config(), keys.items())
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_is_resumed_evaluated_and_exported(tmp_path, capsys):
    cfg = runs.load(tmp_path, [("model.width", "32"), ("model.layers", "1"), ("model.mup_width", "8"), ("model.dropout", "0.0")], steps=6, every=3)
    with runs.devices(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "sample", lambda *_: "")
        assert loop.run(cfg, tmp_path / "run") == 0
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
        (tmp_path / "run" / "FINISHED").unlink()
        before = runs.losses(tmp_path / "run")
        assert loop.run(cfg, tmp_path / "run") == 0 and runs.losses(tmp_path / "run") == before
        run = saved.open_run(tmp_path / "run")
        plain, moved = mup.folded(run.config.model, run.params)
        (tmp_path / "export").mkdir()
        theirs = hf.load(hf.save(tmp_path / "export", plain, moved))
        ours, back = (jax.jit(lambda p, c=c: decoder.build(c).head(p, decoder.build(c).apply(p, INPUTS)[0]))(p) for c, p in ((run.config.model, run.params), (
            plain, theirs)))
        np.testing.assert_allclose(ours, back, atol=1e-5)
        assert run.config.model.wider == 4
