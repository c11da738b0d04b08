"""Exported files in llama.cpp itself: the same greedy tokens and log-probabilities, and the same ids of a text. Needs `pip install xllamacpp`."""

import dataclasses
import json

import numpy as np
import pytest

xllamacpp = pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from jaxlm.data import tokenizer
from jaxlm.interop import gguf
from jaxlm.models import decoder
from tests.interop.test_gguf import FIXTURES, MODELS, TEXTS, TRAINING, random_params

pytestmark = pytest.mark.slow
PROMPT = [5, 77, 200, 9, 31, 120, 64, 18, 250, 3, 99, 140]  # longer than the small models' windows of 8
NEW = 12


def serve(path):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 512, 1, False
    params.cpuparams.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def complete(server, prompt, n, banned=()):
    found = server.handle_completions({"prompt": prompt, "n_predict": n, "max_tokens": n, "temperature": 0.0, "samplers": ["temperature"], "n_probs": 1,
                                       "logprobs": 1, "logit_bias": [[i, False] for i in sorted(banned)], "cache_prompt": False})
    found = json.loads(found) if isinstance(found, str) else found
    steps = found["choices"][0]["logprobs"]["content"]
    return [step["id"] for step in steps], [step["logprob"] for step in steps], found["usage"]["prompt_tokens"]


def greedy(model, params, prompt, n, banned):
    ids, logprobs = list(prompt), []
    for _ in range(n):
        tokens = np.array([ids])
        inputs = {"tokens": tokens, "positions": np.arange(len(ids))[None], "segments": np.ones_like(tokens)}
        logits = np.asarray(model.head(params, model.apply(params, inputs)[0]))[0, -1].astype(np.float64)
        best = int(np.where(np.isin(np.arange(len(logits)), list(banned)), -np.inf, logits).argmax())
        logprobs.append(logits[best] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        ids.append(best)
    return ids[len(prompt):], logprobs


def unprintable(tok, rows):
    """Ids that llama.cpp's server ends at or holds back: special tokens, parts of characters, rows without a token."""
    return {i for i in range(rows) if i >= tok.vocab_size or not (text := tok.decode([i])) or "\ufffd" in text}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_greedy_tokens(name, tmp_path):
    tok = tokenizer.load(FIXTURES / "byte_level")
    cfg = MODELS[name]
    params = random_params(cfg)
    source = gguf.write(tmp_path / "m.gguf", cfg, params, tok, "f32")
    banned = unprintable(tok, cfg.vocab_size)
    expected = greedy(decoder.build(cfg), params, PROMPT, NEW, banned)
    ids, logprobs, counted = complete(serve(source.path), PROMPT, NEW, banned)
    assert counted == len(PROMPT) + (0 if not tok.adds_bos else 1)
    assert ids == expected[0]
    np.testing.assert_allclose(logprobs, expected[1], atol=0.1 if cfg.activation == "gelu_tanh" else 5e-3)  # llama.cpp looks GELU up in a float16 table


@pytest.mark.parametrize("name", ["byte_level", "byte_level_legacy", "sentencepiece"])
def test_the_same_ids_of_a_text(name, tmp_path):
    """As many tokens, and the same next token after them, for texts of several kinds."""
    tok = tokenizer.load(FIXTURES / name)
    cfg = dataclasses.replace(MODELS["qwen2"], vocab_size=448, context=256)
    params = random_params(cfg)
    server = serve(gguf.write(tmp_path / "m.gguf", cfg, params, tok, "f32").path)
    model, banned = decoder.build(cfg), unprintable(tok, cfg.vocab_size)
    for text in [*filter(None, TEXTS), TRAINING[0][:90]]:
        ids = ([tok.bos] if tok.adds_bos else []) + tok.encode(text, special=True)
        found = complete(server, text, 1, banned)
        expected = greedy(model, params, ids, 1, banned)
        assert (found[2], found[0]) == (len(ids), expected[0]), text
        np.testing.assert_allclose(found[1], expected[1], atol=5e-3)
