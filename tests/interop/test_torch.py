"""transformers loads what is exported and computes the same. Needs torch; .ci/run has it."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cli, trees
from jaxlm.config import TransformerConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.interop import hf, hf_config
from jaxlm.models import decoder, kinds, presets
from tests.interop import test_encoder_parity, test_parity, test_parity_encdec
from tests.interop.parity import opened

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
    """With a tokenizer of its kind: our verbs say what `generate` of transformers says of the directory that was imported and of the one exported."""
    folder, workdir, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    ours, theirs = tokenizers.load(UNIGRAM), transformers.AutoTokenizer.from_pretrained(UNIGRAM)
    cfg = dataclasses.replace(opened(name)[0].cfg, vocab_size=ours.vocab_size, init_std=0.5)
    folder.mkdir()
    hf.save(folder, cfg, kinds.build(cfg).init(jax.random.key(2)))
    theirs.save_pretrained(folder)
    jaxlm("import", f"--from={folder}", f"--to={workdir}")
    capsys.readouterr()
    jaxlm("generate", f"--workdir={workdir}", "--prompt=the old house", "--max_tokens=8", "--temperature=0", "--json")
    said = json.loads(capsys.readouterr().out)["text"]
    jaxlm("export", f"--workdir={workdir}", f"--to={out}")
    for directory in (folder, out):
        ids = transformers.AutoTokenizer.from_pretrained(directory)("the old house", return_tensors="pt").input_ids
        assert ids[0].tolist() == [*ours.encode("the old house"), ours.eos]
        found = pretrained(directory, "AutoModelForSeq2SeqLM").generate(ids, max_new_tokens=8, do_sample=False, num_beams=1, use_cache=False)[0, 1:].tolist()
        # Without its cache, which transformers 5.23 makes as deep as the encoder.
        found = found[:found.index(ours.eos)] if ours.eos in found else found
        assert len(set(found)) > 1 and ours.decode(found) == said


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_as_large_as_in_transformers(name):
    """What transformers makes of a preset's config.json, without memory for it; matrices that are tied are one."""
    family, written = hf_config.write(presets.PRESETS[name])
    loaded = transformers.AutoConfig.for_model(**written)
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(loaded)
    if not presets.PRESETS[name].tied and hasattr(model, "shared"):  # transformers 5 ties every T5 that it makes, also those that are not
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    shapes = jax.eval_shape(kinds.build(presets.PRESETS[name]).init, jax.random.key(0))
    assert sum(parameter.numel() for parameter in model.parameters()) == trees.count(shapes)


def test_every_family_is_tried():
    tried = {opened(name)[0].family.architecture for name in (*test_parity.NAMES, *test_encoder_parity.NAMES, *test_parity_encdec.NAMES)}
    assert tried == set(hf_config.FAMILIES)
