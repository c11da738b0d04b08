"""GGUF files: written and read back, against the reader of the gguf package, and bad input."""

import dataclasses
import pathlib
import random
import struct

import jax
import numpy as np
import pytest

gguf_package = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from jaxlm import cli, sharding, trees
from jaxlm.config import MeshConfig, TokenizerConfig, TransformerConfig
from jaxlm.data import tokenizer
from jaxlm.interop import gguf, gguf_config
from jaxlm.models import decoder
from jaxlm.train import saved

FIXTURES = pathlib.Path(__file__).parents[1] / "data" / "fixtures" / "tokenizers"
_SMALL = dict(vocab_size=384, context=64, layers=2, width=32, heads=4, feedforward=64)
_ROTARY = dict(**_SMALL, kv_heads=2, head_size=16, norm_eps=1e-6)
_GEMMA = dict(**_ROTARY, activation="gelu_tanh", norm_offset=True, embedding_scale=32**0.5)
MODELS = {
    "llama": TransformerConfig(**_ROTARY, tied=False),
    "llama_tied_linear": TransformerConfig(**_ROTARY, rope_scaling="linear", rope_factor=4.0),
    "llama3": TransformerConfig(**_ROTARY, rope_scaling="llama3", rope_factor=8.0, rope_theta=500_000.0),
    "qwen2": TransformerConfig(**(_ROTARY | dict(head_size=8)), qkv_bias=True), "qwen3": TransformerConfig(**_ROTARY, qk_norm="head", tied=False),
    "gemma": TransformerConfig(**_GEMMA),
    "gemma2": TransformerConfig(**_GEMMA, norm_position="sandwich", attention_softcap=50.0, final_softcap=30.0, query_scale=16.0, windows=(8, 0)),
    "gemma3": TransformerConfig(**(_GEMMA | dict(layers=7)), norm_position="sandwich", qk_norm="head", windows=(8,) * 5 + (0,), rope_theta=1e6,
                                rope_local_theta=1e4, rope_scaling="linear", rope_factor=8.0),
    "gpt2": TransformerConfig(**_SMALL, norm="layer", positions="learned", activation="gelu_tanh", gated=False, bias=True),
}
TRAINING = [" ".join(random.Random(i).choices("the quick brown fox jumps over lazy dogs and émigrés".split(), k=30)) + "\n\tdone  now\n" for i in range(200)]
TEXTS = ["Hello world", "it's 12345\n\n  x", "", " leading", "naïve café 🙂", "<|im_end|>", "the the quick"]


@pytest.fixture(scope="module", params=MODELS)
def cfg(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def tok():
    return tokenizer.load(FIXTURES / "byte_level")


def random_params(cfg, seed=0):
    params = jax.eval_shape(decoder.build(cfg).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return trees.map_paths(lambda path, leaf: jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape).astype(np.float32)), params)


def same(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_f32_keeps_every_bit_and_the_model(cfg, tok, tmp_path):
    params = random_params(cfg)
    source = gguf.write(tmp_path / "m.gguf", cfg, params, tok, "f32")
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]
    again = gguf.open_file(tmp_path / "m.gguf")
    assert (again.cfg, again.places, again.shapes) == (source.cfg, source.places, source.shapes) and gguf_config._plain(again.cfg) == gguf_config._plain(cfg)
    loaded = gguf.load(again)
    for path, leaf in trees.flatten(params).items():
        if cfg.norm_offset and "norm" in path:  # stored as 1 + w
            np.testing.assert_allclose(trees.flatten(loaded)[path], leaf, atol=1.2e-7, rtol=0)
        else:
            assert np.array_equal(trees.flatten(loaded)[path], leaf), path
    gguf.write(tmp_path / "n.gguf", again.cfg, loaded, tok, "f32")
    assert same(gguf.load(gguf.open_file(tmp_path / "n.gguf")), loaded)  # a second round changes nothing, norms included
    model, batch = decoder.build(cfg), np.arange(24)[None] % 300
    inputs = {"tokens": batch, "positions": np.arange(24)[None], "segments": np.ones_like(batch)}
    logits = [np.asarray(m.head(p, m.apply(p, inputs)[0])) for m, p in ((model, params), (decoder.build(again.cfg), loaded))]
    np.testing.assert_allclose(*logits, atol=2e-4 if cfg.norm_offset else 2e-6)
    assert gguf.mapping(again).count("\n") >= 9


def test_the_package_reads_the_same_tensors(cfg, tok, tmp_path):
    params = random_params(cfg)
    gguf.write(tmp_path / "m.gguf", cfg, params, tok, "f32")
    reader = gguf_package.GGUFReader(tmp_path / "m.gguf")
    theirs = {tensor.name: tensor.data for tensor in reader.tensors}
    ours = dict(gguf.tensors(cfg, params))
    assert theirs.keys() == ours.keys()
    for name, data in theirs.items():
        assert data.shape == ours[name].shape and np.array_equal(data, ours[name]), name
    flat = trees.flatten(params)
    assert np.array_equal(theirs["token_embd.weight"], flat["embed/tokens"])
    q = np.asarray(flat["layers/attn/q"][1])  # [D, N, H]
    if "rms" == cfg.norm and cfg.activation == "silu" and not cfg.qkv_bias and cfg.qk_norm == "none":  # Llama: pairs (i, i + H/2) side by side
        expected = q.transpose(1, 2, 0).reshape(4, 2, 8, 32).transpose(0, 2, 1, 3).reshape(64, 32)
        assert np.array_equal(theirs["blk.1.attn_q.weight"], expected)
    elif cfg.norm == "rms":
        assert np.array_equal(theirs["blk.1.attn_q.weight"], q.reshape(32, -1).T)
    else:
        assert np.array_equal(theirs["blk.1.attn_qkv.weight"][32:64], np.asarray(flat["layers/attn/k"][1]).reshape(32, -1).T)
    assert cfg.norm != "rms" or np.array_equal(theirs["output_norm.weight"], np.asarray(flat["final_norm/scale"]) + cfg.norm_offset)
    assert reader.get_field("general.file_type").contents() == 0


@pytest.mark.parametrize("dtype, largest", [("f16", 2.0**-11), ("q8_0", 1 / 254 + 2.0**-11)])
def test_rounded_types_stay_within_their_error(cfg, tok, tmp_path, dtype, largest):
    params = random_params(cfg)
    source = gguf.write(tmp_path / "m.gguf", cfg, params, tok, dtype)
    loaded = dict(gguf.tensors(source.cfg, gguf.load(source)))
    for name, before in gguf.tensors(cfg, params):
        bound = 0.0 if before.ndim == 1 or name.startswith("position") else largest
        scale = np.abs(before) if dtype == "f16" or before.ndim == 1 else np.abs(before).reshape(-1, 32).max(1).repeat(32).reshape(before.shape)
        assert (np.abs(loaded[name] - before) <= bound * scale + 2.0**-25 * (bound > 0)).all(), name
    kinds = {gguf_package.GGMLQuantizationType(tensor.type).name for tensor in source.header.tensors.values()}
    assert kinds == {"F32", dtype.upper()}


def test_rows_that_blocks_do_not_divide_keep_f16(tok, tmp_path):
    cfg = dataclasses.replace(MODELS["llama"], feedforward=40)
    source = gguf.write(tmp_path / "m.gguf", cfg, random_params(cfg), tok, "q8_0")
    kind = lambda name: gguf_package.GGMLQuantizationType(source.header.tensors[name].type).name
    assert (kind("blk.0.ffn_down.weight"), kind("blk.0.ffn_up.weight")) == ("F16", "Q8_0")


def test_parameters_land_on_their_shardings(tok, tmp_path):
    cfg = MODELS["qwen2"]
    params = random_params(cfg)
    source = gguf.write(tmp_path / "m.gguf", cfg, params, tok, "f32")
    model = decoder.build(source.cfg)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    places = sharding.params_shardings(mesh, model.axes, jax.eval_shape(model.init, jax.random.key(0)))
    loaded = gguf.load(source, places)
    assert same(loaded, params)
    assert all(leaf.sharding == place for leaf, place in zip(jax.tree.leaves(loaded), jax.tree.leaves(places), strict=True))
    assert len({shard.device for shard in loaded["layers"]["attn"]["q"].addressable_shards}) == 8


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16"])
def test_quantised_weights_are_those_of_the_package(tok, tmp_path, kind):
    """A file with other types, as llama-quantize writes them."""
    cfg = MODELS["qwen3"]
    gguf.write(tmp_path / "m.gguf", cfg, random_params(cfg), tok, "f32")
    kind, reader = gguf_package.GGMLQuantizationType[kind], gguf_package.GGUFReader(tmp_path / "m.gguf")
    writer = gguf_package.GGUFWriter(tmp_path / "q.gguf", "qwen3")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if len(tensor.shape) == 2:
            writer.add_tensor(tensor.name, gguf_package.quants.quantize(tensor.data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = gguf.open_file(tmp_path / "q.gguf")
    ours = dict(gguf.tensors(source.cfg, gguf.load(source)))
    for tensor in gguf_package.GGUFReader(tmp_path / "q.gguf").tensors:
        assert np.array_equal(ours[tensor.name], gguf_package.quants.dequantize(tensor.data, tensor.tensor_type)), tensor.name
    assert gguf.tokenizer(source).encode("Hello") == tok.encode("Hello") and kind.name in gguf.mapping(source)


@pytest.mark.parametrize("change, reason", [
    (dict(norm="layer"), "another norm"), (dict(activation="relu"), "another activation"), (dict(norm_position="branch"), "another"),
    (dict(final_softcap=30.0), "another final_softcap"), (dict(rotary_fraction=0.5), "another rotary_fraction"),
    (dict(rope_scaling="llama3", rope_factor=8.0, rope_original_context=4096), "does not hold the rotary scaling of Llama 3"),
    (dict(qkv_bias=True), "another qkv_bias"), (dict(experts=4), "nearest"), (dict(parallel_residual=True), "another parallel_residual"), (dict(query_scale=7.0), "another query_scale"),
])
def test_a_model_that_no_family_computes_is_refused(tok, tmp_path, change, reason):
    cfg = dataclasses.replace(MODELS["llama"], **change)
    with pytest.raises(ValueError, match=f"no family of GGUF .* computes this model; .*{reason}") as caught:
        gguf.write(tmp_path / "m.gguf", cfg, {}, tok)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# Tokenizers

def through(tok, folder, rows=384):
    cfg = dataclasses.replace(MODELS["llama"], vocab_size=rows)
    return gguf.tokenizer(gguf.write(folder / "t.gguf", cfg, random_params(cfg), tok, "f32"))


@pytest.mark.parametrize("name", ["byte_level", "byte_level_legacy"])
def test_byte_level_tokenizers(name, tmp_path):
    before = tokenizer.load(FIXTURES / name)
    after = through(before, tmp_path)
    assert (after.bos, after.eos, after.pad, after.vocab_size, after.adds_bos) == (before.bos, before.eos, before.pad, before.vocab_size, before.adds_bos)
    for text in [*TEXTS, *TRAINING[:3]]:
        assert after.encode(text) == before.encode(text) and after.encode(text, special=True) == before.encode(text, special=True), text
    assert after.special_tokens == before.special_tokens and after.chat_template == before.chat_template
    assert tokenizer.from_bytes(after.model) == after


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_own_tokenizers(kind, tmp_path):
    before = tokenizer.train(TRAINING, TokenizerConfig(kind=kind, vocab_size=310, special_tokens=("<|user|>",)))
    after = through(before, tmp_path)
    assert (after.bos, after.eos, after.pad, after.vocab_size, after.adds_bos) == (before.bos, before.eos, before.pad, 310, True)
    for text in [*TEXTS, *TRAINING[:20], "a<|user|>b"]:
        assert after.encode(text) == before.encode(text) and after.decode(before.encode(text)) == text, text


def test_a_folder_with_sentencepiece_and_its_conversion_to_tokenizer_json(tmp_path):
    before = tokenizer.load(FIXTURES / "sentencepiece")
    after = through(before, tmp_path, rows=448)
    before.write_huggingface(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    ranked = through(tokenizer.load(tmp_path), tmp_path, rows=448)
    for text in [*TEXTS, *TRAINING[:20]]:
        assert after.encode(text) == before.encode(text) == ranked.encode(text), text
    assert after.special_tokens == before.special_tokens == ranked.special_tokens and after.chat_template == before.chat_template


def test_tokenizers_without_a_form_are_refused(tmp_path):
    with pytest.raises(ValueError, match="GGUF has no form for a tokenizer of plain bytes"):
        through(tokenizer.train((), TokenizerConfig(kind="bytes")), tmp_path)
    with pytest.raises(ValueError, match="GGUF has no form known here for this tokenizer .WordPiece"):
        through(tokenizer.load(FIXTURES / "word_piece"), tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 331 tokens, but the model's embedding has 330 rows"):
        through(tokenizer.load(FIXTURES / "byte_level"), tmp_path, rows=330)
    assert not list(tmp_path.iterdir())


# Bad input

@pytest.fixture(scope="module")
def good(tok, tmp_path_factory):
    cfg = MODELS["llama"]
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    gguf.write(path, cfg, random_params(cfg), tok, "f32")
    return path.read_bytes()


def refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        source = gguf.open_file(path)
        gguf.tokenizer(source)
        gguf.load(source)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_truncated_anywhere(good, tmp_path):
    for size in [*range(0, 200, 7), *range(200, len(good), len(good) // 60), len(good) - 64]:
        refused(tmp_path / "m.gguf", good[:size], "truncated|damaged|not a GGUF|more than its")


def entry(key, kind, payload):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + payload


def head(*entries, tensors=0, count=None):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries) if count is None else count) + b"".join(entries)


HUGE = (1 << 63) + 5


@pytest.mark.parametrize("data, message", [
    (b"PK\3\4" + bytes(60), "is not a GGUF file: it begins with"), (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1; known: 2 and 3"),
    (head(count=HUGE), "it claims .* entries of metadata, more than"), (head(tensors=HUGE), "it claims .* tensors, more than"),
    (head(entry("a", 8, struct.pack("<Q", HUGE)), entry("b", 4, bytes(4))), "the value of a of .* bytes at .* goes beyond"),
    (head(struct.pack("<Q", HUGE) + bytes(30)), "a key of .* goes beyond"),
    (head(entry("a", 9, struct.pack("<IQ", 0, HUGE))), "a claims .* items, more than"), (head(entry("a", 9, struct.pack("<IQ", 6, 1 << 23))), "goes beyond"),
    (head(entry("a", 9, struct.pack("<IQ", 8, 1 << 23))), "goes beyond"), (head(entry("a", 9, struct.pack("<IQ", 9, 1))), "an array of type 9"),
    (head(entry("a", 99, bytes(8))), "of type 99, which does not exist"), (head(entry("a", 4, bytes(4)), entry("a", 4, bytes(4))), "a is there twice"),
    (head(entry("a", 8, struct.pack("<Q", 1) + b"\xff")), "is not UTF-8"),
    (head(entry("general.alignment", 4, struct.pack("<I", 0))), "general.alignment=0 must be a multiple"),
    (head(entry("general.architecture", 8, struct.pack("<Q", 5) + b"mamba")), "general.architecture='mamba' is not known here; known: llama, qwen2"),
    (head(entry("general.architecture", 4, bytes(4))), "general.architecture=0 is not known"),
    (head(entry("general.architecture", 8, struct.pack("<Q", 5) + b"llama")), "no token_embd.weight: a file with a vocabulary only"),
])
def test_absurd_headers(tmp_path, data, message):
    refused(tmp_path / "m.gguf", data, message)


def changed(good, name, offset, packed):
    """The header with some bytes after a name replaced."""
    at = good.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + offset
    return good[:at] + packed + good[at + len(packed):]


@pytest.mark.parametrize("name, offset, packed, message", [
    ("output_norm.weight", 0, struct.pack("<I", 9), "has 9 dimensions"), ("output_norm.weight", 4, struct.pack("<Q", 1 << 62), "not aligned or goes beyond"),
    ("output_norm.weight", 4, struct.pack("<Q", 0), "whose rows are not blocks"), ("output_norm.weight", 4, struct.pack("<Q", 16), "has the shape"),
    ("output_norm.weight", 12, struct.pack("<I", 77), "of the ggml type 77"), ("output_norm.weight", 16, struct.pack("<Q", 1 << 62), "goes beyond"),
    ("output_norm.weight", 16, struct.pack("<Q", 1), "is not aligned"),
    ("llama.block_count", 4, struct.pack("<I", 4_000_000_000), "it claims 4000000000 layers"), ("llama.block_count", 4, struct.pack("<I", 3), "lacks the tensor blk.2"),
    ("llama.block_count", 4, struct.pack("<I", 1), "has a tensor that this model has no place for: blk.1"),
    ("llama.attention.head_count", 4, struct.pack("<I", 0), "it claims 2 layers of 0 heads"), ("llama.attention.head_count", 4, struct.pack("<I", 3), "must divide"),
    ("llama.feed_forward_length", 4, struct.pack("<I", 63), "has the shape"), ("llama.embedding_length", 4, struct.pack("<I", 1 << 31), "width is 2,147,483,648, more than"),
    ("llama.context_length", 0, struct.pack("<I", 6), "llama.context_length is .* not one whole number"),
    ("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 5000), "eos_token_id=5000 is not one of its"),
    ("tokenizer.ggml.pre", 4, struct.pack("<Q", 6) + b"nobody", "called 'nobody', which is not known here"),
])
def test_absurd_values(good, tmp_path, name, offset, packed, message):
    refused(tmp_path / "m.gguf", changed(good, name, offset, packed), message)


def test_bit_flips_are_refused_or_harmless(good, tmp_path):
    """Never anything but a ValueError of one line, and never much memory."""
    rng, header = random.Random(0), good.index(b"output_norm.weight") + 400
    for _ in range(150):
        data = bytearray(good)
        data[rng.randrange(header)] ^= 1 << rng.randrange(8)
        (tmp_path / "m.gguf").write_bytes(data)
        try:
            gguf.tokenizer(gguf.open_file(tmp_path / "m.gguf"))
        except ValueError as error:
            assert "\n" not in str(error)


def test_no_such_file_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="x.gguf: there is no such file"):
        gguf.open_file(tmp_path / "x.gguf")
    import sys
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"need the package gguf: pip install 'jaxlm\[hf\]'"):
        gguf.open_file(tmp_path / "x.gguf")


def test_the_verbs_take_and_make_gguf(tok, tmp_path, capsys):
    cfg = MODELS["gemma2"]
    params = random_params(cfg)
    first, again, workdir = tmp_path / "first.gguf", tmp_path / "again.gguf", tmp_path / "run"
    gguf.write(first, cfg, params, tok, "f32")
    assert cli.run("import", [f"--from={first}", f"--to={workdir}"]) == 0
    assert cli.run("export", [f"--workdir={workdir}", f"--to={again}"]) == 0
    assert "token_embd.weight" in capsys.readouterr().out
    assert same(gguf.load(gguf.open_file(again)), saved.open_run(workdir).params)
    with pytest.raises(SystemExit):
        cli.run("export", [f"--workdir={workdir}", f"--to={tmp_path / 'x.gguf'}", "--dtype=bfloat16"])
    assert "allowed here are float32, float16, q8_0" in capsys.readouterr().err


@pytest.mark.parametrize("dtype, value, words", [
    ("f16", 70_000.0, "blk.1.ffn_up.weight holds 70000, more than F16 can, 65504: take --dtype=float32 or q8_0"),
    ("f16", np.nan, "blk.1.ffn_up.weight holds nan: weights must be finite"),
    ("q8_0", 1e7, "blk.1.ffn_up.weight holds 1e+07, more than Q8_0 can, 8.31901e+06: take --dtype=float32"),
    ("f32", -np.inf, "blk.1.ffn_up.weight holds -inf: weights must be finite"),
])
def test_weights_that_a_type_cannot_hold(dtype, value, words, tmp_path):
    cfg = MODELS["llama"]
    params = random_params(cfg)
    params["layers"]["mlp"]["up"] = jax.numpy.asarray(params["layers"]["mlp"]["up"]).at[1, 2, 3].set(value)
    with pytest.raises(ValueError) as caught:
        gguf.write(tmp_path / "m.gguf", cfg, params, tokenizer.load(FIXTURES / "byte_level"), dtype)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())
