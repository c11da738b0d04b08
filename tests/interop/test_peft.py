"""PEFT loads an exported adapter and computes the same. Needs torch and peft; .ci/run has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import lora, trees
from jaxlm.config import LoraConfig, TransformerConfig
from jaxlm.interop import hf, peft
from jaxlm.models import decoder

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("peft")

LLAMA = TransformerConfig(vocab_size=64, context=32, layers=2, width=16, heads=4, kv_heads=2, feedforward=24, init_std=0.3)
GPT2 = TransformerConfig(vocab_size=64, context=32, layers=2, width=16, heads=4, init_std=0.3, norm="layer", positions="learned", activation="gelu_tanh",
                         gated=False, bias=True)
TOKENS = np.random.default_rng(0).integers(0, 64, (1, 20))


def tuned(cfg, adapters):
    """A base and adapters that change it, and our logits."""
    model = decoder.build(cfg)
    axes = trees.match(model.axes, trees.flatten(jax.eval_shape(model.init, jax.random.key(0))), "axes")
    form = lora.form(model, adapters, "float32", axes, dict.fromkeys(axes, False), "float32")

    @jax.jit
    def make(key):
        base = model.init(key)
        whole = trees.flatten(form.dress(base, key))
        moved = lambda i, leaf: leaf + 0.2 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        own = {path: moved(i, leaf) for i, (path, leaf) in enumerate(whole.items()) if lora.is_adapter(path)}
        batch = {"tokens": jnp.asarray(TOKENS), "positions": jnp.arange(20)[None], "segments": jnp.ones(TOKENS.shape, jnp.int32)}
        params = trees.unflatten(whole | own)
        return base, trees.unflatten(own), model.head(params, form.model.apply(params, batch)[0])

    return make(jax.random.key(0))


@pytest.mark.parametrize("cfg, adapters", [
    (LLAMA, LoraConfig(rank=3, alpha=6)), (LLAMA, LoraConfig(rank=4, dora=True, rslora=True, targets=("layers/attn/[qvo]", "layers/mlp/down"))),
    (GPT2, LoraConfig(rank=3, targets=("layers/attn/o", "layers/mlp/.*")))], ids=["llama", "dora", "gpt2"])
def test_peft_computes_the_same(cfg, adapters, tmp_path):
    base, own, logits = tuned(cfg, adapters)
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    hf.save(tmp_path / "base", cfg, base)
    peft.save(tmp_path / "adapter", cfg, adapters, own, base=str(tmp_path / "base"), fingerprint="abc")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        plain = model(torch.tensor(TOKENS)).logits.numpy()
        found = theirs.PeftModel.from_pretrained(model, tmp_path / "adapter")
        report = found.load_adapter(tmp_path / "adapter", "again")
        assert not report.unexpected_keys and not [key for key in report.missing_keys if "again" in key]
        np.testing.assert_allclose(found(torch.tensor(TOKENS)).logits.numpy(), logits, atol=2e-4)
    assert np.abs(plain - logits).max() > 0.1
    fingerprint, again = peft.load(tmp_path / "adapter", cfg, adapters)
    assert fingerprint == "abc" and again.keys() == trees.flatten(own).keys()
    for words, other, settings in (("an adapter for another base", TransformerConfig(**(vars(cfg) | {"feedforward": 32})), adapters),
                                   ("lora.rank=9, and the adapter in", cfg, LoraConfig(**(vars(adapters) | {"rank": 9})))):
        with pytest.raises(ValueError, match=words) as caught:
            peft.load(tmp_path / "adapter", other, settings)
        assert "\n" not in str(caught.value)


def test_what_peft_saves_is_read(tmp_path):
    base, own, _ = tuned(LLAMA, LoraConfig(rank=3, alpha=6))
    (tmp_path / "base").mkdir()
    hf.save(tmp_path / "base", LLAMA, base)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = theirs.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    fingerprint, found = peft.load(tmp_path / "adapter", LLAMA, LoraConfig(rank=3, alpha=6))
    assert not fingerprint and set(found) == {f"layers/{name}/lora/{part}/{leaf}" for name, part in (("attn", "q"), ("mlp", "down")) for leaf in "ab"}
    peft.check(tmp_path, {path: leaf.shape for path, leaf in found.items()}, {path: leaf.shape for path, leaf in trees.flatten(own).items() if path in found})
    with pytest.raises(ValueError, match="does not fit: layers/attn/lora/k/a"):
        peft.check(tmp_path, {path: leaf.shape for path, leaf in found.items()}, {path: leaf.shape for path, leaf in trees.flatten(own).items()})


def test_families_that_peft_cannot_say(tmp_path):
    _, own, _ = tuned(GPT2, LoraConfig(rank=3))
    with pytest.raises(ValueError, match="layers/attn/lora/k/a has no form in PEFT"):
        peft.save(tmp_path, GPT2, LoraConfig(rank=3), own, base="", fingerprint="")
