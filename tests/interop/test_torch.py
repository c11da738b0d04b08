"""transformers loads what is exported and computes the same. Needs torch; .ci/run has it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cli
from jaxlm.config import TransformerConfig
from jaxlm.interop import hf, hf_config
from jaxlm.models import decoder, kinds
from tests.interop import test_encoder_parity, test_parity, test_parity_encdec
from tests.interop.parity import FIXTURES, opened

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TRAINED = TransformerConfig(vocab_size=64, context=32, layers=2, width=16, heads=4, kv_heads=2, init_std=0.3)
UNIGRAM = pathlib.Path(__file__).parents[1] / "data" / "fixtures" / "tokenizers" / "unigram"


def pretrained(folder, auto="AutoModelForCausalLM"):
    """The exported model in transformers, with nothing missing and nothing left over."""
    model, report = getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model.eval()


def theirs(folder, tokens):
    with torch.no_grad():
        return pretrained(folder)(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def ours(cfg, params, tokens):
    model = kinds.build(cfg)
    batch = {"tokens": jnp.array(tokens), "positions": jnp.arange(tokens.shape[1])[None], "segments": jnp.ones(tokens.shape, jnp.int32)}
    return np.asarray(model.head(params, model.apply(params, batch)[0]))


def exported(name, folder):
    """A fixture's parameters, changed so that they are what no file holds, written to `folder`."""
    source, model, params, reference = opened(name)
    params = jax.tree.map(lambda leaf: leaf * 1.01, params)
    hf.save(folder, source.cfg, params, architecture=source.family.architecture)
    return source, model, params, reference


@pytest.mark.parametrize("name", test_parity.NAMES)
def test_transformers_reads_an_export(name, tmp_path):
    source, _, params, _ = exported(name, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 20))
    np.testing.assert_allclose(theirs(tmp_path, tokens), ours(source.cfg, params, tokens), atol=1e-4)


@pytest.mark.parametrize("change", [{}, dict(norm="layer", positions="learned", activation="gelu_tanh", gated=False, bias=True, kv_heads=0)])
def test_transformers_reads_a_model_made_here(change, tmp_path):
    cfg = TransformerConfig(**(vars(TRAINED) | change)).filled()
    params = decoder.build(cfg).init(jax.random.key(0))
    hf.save(tmp_path, cfg, params, extra={"eos_token_id": 3})
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 3
    tokens = np.random.default_rng(0).integers(0, 64, (1, 20))
    np.testing.assert_allclose(theirs(tmp_path, tokens), ours(cfg, params, tokens), atol=1e-4)


@pytest.mark.parametrize("name", test_encoder_parity.NAMES)
def test_transformers_reads_an_encoder(name, tmp_path):
    """Through the class that each head's AutoModel chooses, with padding and token types."""
    source, model, params, reference = exported(name, tmp_path)
    auto = next(f"AutoModel{head}" for head in ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "")
                if source.family.architecture.endswith(head or "Model"))
    hidden = model.apply(params, test_encoder_parity.inputs(reference))[0]
    found, mask = np.asarray(model.head(params, hidden)), reference["mask"] > 0
    batch = {"input_ids": torch.tensor(reference["tokens"]).long(), "attention_mask": torch.tensor(reference["mask"]).long()}
    batch |= {"token_type_ids": torch.tensor(reference["types"]).long()} if source.cfg.token_types else {}
    with torch.no_grad():
        result = pretrained(tmp_path, auto)(**batch)
    if auto == "AutoModel":
        np.testing.assert_allclose(result.last_hidden_state.numpy()[mask], np.asarray(hidden)[mask], atol=1e-4)
    if source.cfg.output != "hidden":
        expected = result.pooler_output.numpy() if source.cfg.output == "pooled" else result.logits.numpy()
        counts = mask if found.ndim == 3 else slice(None)
        np.testing.assert_allclose(expected[counts], found[counts], atol=1e-4)


@pytest.mark.parametrize("name", test_parity_encdec.NAMES)
def test_transformers_reads_an_encoder_decoder(name, tmp_path):
    _, model, params, reference = exported(name, tmp_path)
    batch, spans = test_parity_encdec.pair_batch(reference)
    logits = np.asarray(model.head(params, model.apply(params, batch)[0]))
    loaded = pretrained(tmp_path, "AutoModelForSeq2SeqLM")
    for i, (row, span) in enumerate(spans):
        with torch.no_grad():
            expected = loaded(input_ids=torch.tensor(reference[f"inputs_{i}"])[None].long(), decoder_input_ids=torch.tensor(reference[f"tokens_{i}"])[None].long())
        np.testing.assert_allclose(expected.logits[0].numpy(), logits[row, span], atol=1e-4)


def jaxlm(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code == 0


@pytest.mark.parametrize("name", test_parity_encdec.NAMES)
def test_t5_through_import_generate_and_export(name, tmp_path, capsys):
    """With a tokenizer of its kind: what `generate` of transformers says is what our verbs say, and the export tokenises and says it too."""
    folder, workdir, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    tokenizer = transformers.AutoTokenizer.from_pretrained(UNIGRAM)
    cfg = transformers.T5Config(**json.loads((FIXTURES / name / "config.json").read_text()) | dict(vocab_size=len(tokenizer)))
    torch.manual_seed(3)
    model = transformers.T5ForConditionalGeneration(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (1.0 if parameter.ndim == 1 else 0.5))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    jaxlm("import", f"--from={folder}", f"--to={workdir}")
    capsys.readouterr()
    prompt = "the old house"
    jaxlm("generate", f"--workdir={workdir}", f"--prompt={prompt}", "--max_tokens=6", "--temperature=0")
    said = capsys.readouterr().out
    jaxlm("export", f"--workdir={workdir}", f"--to={out}")
    again, read = pretrained(out, "AutoModelForSeq2SeqLM"), transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert read(prompt).input_ids == ids[0].tolist()
    results = [each.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1)[0, 1:].tolist() for each in (model, again)]
    assert results[0] == results[1] and tokenizer.decode(results[0], skip_special_tokens=True).strip() in said


def test_every_family_is_tried():
    tried = {opened(name)[0].family.architecture for name in (*test_parity.NAMES, *test_encoder_parity.NAMES, *test_parity_encdec.NAMES)}
    assert tried == set(hf_config.FAMILIES)
