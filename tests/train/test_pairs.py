"""Encoder-decoders trained on hidden spans and on pairs, from recipe to outputs."""

import dataclasses
import json
import pathlib
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cli, config, sharding, trees
from jaxlm.data import loader, prepare, rows, tokenizer_json
from jaxlm.data import tokenizer as tokenizers
from jaxlm.evaluate import follow
from jaxlm.models import encdec, kinds
from jaxlm.train import loop, saved, setup
from tests.train import runs

FIXTURES = pathlib.Path(__file__).parents[1] / "interop" / "fixtures"
SPANS = [("objective.name", "span_corruption"), ("objective.span_rate", "0.3"), ("model.encoder_layers", "1"), ("model.layers", "1"),
         ("model.positions", "relative"), ("model.context", "64"),
         ("data.sequence_length", "48"), ("tokenizer.kind", "unigram"), ("tokenizer.vocab_size", "320"), ("tokenizer.sentinels", "20"), ("model.init", "t5"),
         ("optim.lr", "3e-3"), ("mesh.data", "-1"), ("mesh.fsdp", "1")]
PAIRS = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.data = ConfigDict(dict(source=("{source}",), input_key="in", text_key="out", validation=0.1, test=0.1, sequence_length=32, target_length=24, batch_size=16))
    c.tokenizer = ConfigDict(dict(kind="bytes"))
    c.model = ConfigDict(dict(context=32, layers=1, encoder_layers=1, width=64, heads=4, positions="relative", init="lecun"))
    c.objective = ConfigDict(dict(name="seq2seq"))
    c.optim = ConfigDict(dict(lr=1e-2, warmup="10%", weight_decay=0.0))
    c.train = ConfigDict(dict(steps="{steps}", log_every=1, eval_every="50%"))
    c.checkpoint = ConfigDict(dict(every="50%"))
    c.eval = ConfigDict(dict(bootstrap=20, batch_size=32))
    c.mesh = ConfigDict(dict(data=-1, fsdp=1))
    return c
"""


def recipe(folder, steps=160):
    """Words and the same words backwards."""
    draw = random.Random(0)
    words = sorted({"".join(draw.choice("abcdef") for _ in range(draw.randint(2, 3))) for _ in range(1500)})
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"in": word, "out": word[::-1]}) + "\n" for word in words))
    (folder / "recipe.py").write_text(PAIRS.format(source=folder / "pairs.jsonl", steps=steps))
    return folder / "recipe.py"


def jaxlm(*arguments):
    with pytest.raises(SystemExit) as ended, runs.devices(1):
        cli.main(list(arguments))
    return ended.value.code


def run(cfg, workdir):
    with runs.devices(1):
        assert loop.run(cfg, workdir) == 0


# --- from the command line ---


def test_a_model_learns_to_say_words_backwards(tmp_path, capsys):
    assert jaxlm("train", f"--config={recipe(tmp_path)}", f"--workdir={tmp_path / 'run'}") == 0
    out = capsys.readouterr().out
    assert "1 encoder and 1 layers" in out and "32 tokens for the encoder, 24 for the decoder" in out and re.search(r"padding \d+ tokens each, \d+\.\d\d%", out)
    metrics = runs.read_metrics(tmp_path / "run")
    assert metrics[-1]["test/exact_match"] > 0.7 and {"test/loss", "test/perplexity", "test/accuracy", "test/outputs", "test/loss_low"} <= metrics[-1].keys()
    assert "test/bits_per_byte" not in metrics[-1] and 0 < metrics[0]["perf/padding"] < 0.2
    for size in (5, 64):
        assert jaxlm("eval", f"--workdir={tmp_path / 'run'}", f"--batch_size={size}") == 0
    out = capsys.readouterr().out
    assert "nats per target token, given the input" in out and re.search(r"exact match +[01]\.\d{4} .* of whole greedy outputs \(\d+ pairs\)", out)
    one, two = follow.read(tmp_path / "run" / "eval.jsonl")
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5) and one["exact_match"] == two["exact_match"] and one["tokens"] == two["tokens"]
    (tmp_path / "prompts").write_text("abc\nfad\ncab\n")
    assert jaxlm("generate", f"--workdir={tmp_path / 'run'}", f"--prompts_file={tmp_path / 'prompts'}", "--temperature=0", "--json") == 0
    answers = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert sum(answer == prompt for answer, prompt in zip(answers, ("cba", "daf", "bac"))) >= 2
    # A prompt as long as the encoder's row still gets an answer.
    assert jaxlm("generate", f"--workdir={tmp_path / 'run'}", f"--prompt={'ab' * 15}", "--temperature=0", "--nostream") == 0
    assert capsys.readouterr().out.startswith(f"{'ab' * 15}\n")


def test_spans_are_learned_and_a_resumed_run_goes_on_the_same(tmp_path, capsys):
    cfg = runs.load(tmp_path, SPANS, steps=70, every=35)
    run(cfg, tmp_path / "run")
    out = capsys.readouterr().out
    losses = runs.losses(tmp_path / "run")
    assert sum(losses[i] for i in range(61, 71)) / 10 < losses[1] - 2 and "of the hidden spans' tokens right" in out
    assert "nats per token of the hidden spans" in out and "bits per byte" not in out.lower()
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "70")
    run(cfg, tmp_path / "cut")
    assert "resumed after step 35" in capsys.readouterr().out and runs.losses(tmp_path / "cut") == losses
    opened = saved.open_run(tmp_path / "run")
    assert opened.config.data.target_length > 0
    assert "<extra_id_19>" in opened.tokenizer.special_tokens and "<extra_id_20>" not in opened.tokenizer.special_tokens
    assert jaxlm("eval", f"--workdir={tmp_path / 'run'}") == 0
    [row] = follow.read(tmp_path / "run" / "eval.jsonl")
    assert row["accuracy"] > 0.1 and "perplexity" not in row
    capsys.readouterr()
    assert jaxlm("generate", f"--workdir={tmp_path / 'run'}", "--prompt=the cat <extra_id_0> a tree.", "--max_tokens=8") == 0
    assert capsys.readouterr().out.startswith("the cat <extra_id_0> a tree.\n")


def write_tokenizer(folder):
    """A word tokenizer with sentinels for the 64 rows of the fixtures' embeddings, as T5's is framed: </s> after a text, nothing before it."""
    words = "the cat a dog my aunt old clock sees wants hides paints tree sea bread time . : 0 1 2 3 4 5 6 7 8 9".split()
    pieces = ["<pad>", "</s>", "<unk>", *words, *(f"##{digit}" for digit in range(10)), *(f"<extra_id_{i}>" for i in range(6))]
    vocab = {text: i for i, text in enumerate(pieces)}
    names = {"unk_token": "<unk>", "cls_token": "-", "sep_token": "--", "pad_token": "<pad>", "mask_token": "---"}
    tree = tokenizer_json.word_piece(vocab, lower=True, strip_accents=None, chinese=False, names=names)
    tree["added_tokens"] += [dict(tree["added_tokens"][0], id=i, content=text) for text, i in vocab.items() if text == "</s>" or text.startswith("<extra")]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}))


@pytest.mark.parametrize("name, objective", [("t5", "seq2seq"), ("t5_v1_1", "span_corruption")])
def test_training_goes_on_from_t5(tmp_path, name, objective):
    origin = shutil.copytree(FIXTURES / "encdec" / name, tmp_path / "t5")
    write_tokenizer(origin)
    texts = [json.loads(line)["text"] for line in runs.write_corpus(tmp_path / "corpus.jsonl").read_text().splitlines()]
    overrides = [("train.init_from", f"hf:{origin}"), ("objective.name", objective), ("tokenizer.kind", "unigram"), ("mesh.data", "-1"), ("mesh.fsdp", "1"),
                 ("optim.lr", "3e-3")]
    if objective == "seq2seq":
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"in": text, "text": text[:20]}) + "\n" for text in texts))
        overrides += [("data.source", str(tmp_path / "pairs.jsonl")), ("data.input_key", "in"), ("data.target_length", "16"), ("eval.outputs", "0")]
    path = tmp_path / "recipe.py"
    path.write_text(re.sub(r"    c.model = .*\n", "", runs.RECIPE).format(source=tmp_path / "corpus.jsonl", steps=12, every=6))
    run(config.load(str(path), overrides), tmp_path / "run")
    losses = runs.losses(tmp_path / "run")
    assert losses[12] < losses[1]
    opened = saved.open_run(tmp_path / "run")
    assert opened.config.model.encoder_layers == 2 and opened.tokenizer.special_tokens["<extra_id_5>"] == 46


# --- how a step is cut ---


def parts_of(mesh=(1, 1, 1), **changes):
    tree = {"model": {"layers": 1, "encoder_layers": 1, "positions": "relative", "width": 32, "heads": 4, "context": 32, "vocab_size": 320, "init_std": 0.05},
            "data": {"sequence_length": 32, "target_length": 24, "batch_size": 8}, "objective": {"name": "span_corruption"},
            "train": {"steps": 20}, "optim": {"name": "sgd", "lr": 0.3, "warmup": 2}, "mesh": dict(zip(("data", "fsdp", "tensor"), mesh))}
    for key, value in changes.items():
        tree[key.partition("__")[0]][key.partition("__")[2]] = value
    cfg = config.build(tree)
    return setup.build(cfg, sharding.make_mesh(cfg.mesh, jax.devices()[:int(np.prod(mesh))]), 320)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans")
    source = runs.write_corpus(folder / "corpus.jsonl")
    corpus = prepare.prepare(config.DataConfig(source=(str(source),)), config.TokenizerConfig(kind="bytes"), folder / "data", log=lambda line: None)
    task = rows.Task(32, config.ObjectiveConfig(name="span_corruption"), eos=258, sentinels=np.arange(300, 304, dtype=np.int32), target_length=24)
    return [batch for _, batch in loader.batches(corpus, "train", task, batch_size=8, seed=0, start_step=0, stop_step=3)]


def train(parts, batches):
    losses = []
    with jax.set_mesh(parts.mesh):
        state = parts.init()
        for batch in batches:
            assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {key: (value.shape, value.dtype) for key, value in parts.batch.items()}
            state, metrics = parts.step(state, sharding.to_device(parts.mesh, batch, 8))
            losses.append(float(metrics["sums"]["loss"][0] / metrics["sums"]["loss"][1]))
    return losses, {path: np.asarray(leaf) for path, leaf in trees.flatten(state.params).items()}


def test_devices_and_microbatches_compute_the_same(batches):
    losses, params = train(parts_of(), batches)
    other_losses, other = train(parts_of((2, 2, 2), train__microbatches=2), batches)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    for path, leaf in params.items():
        np.testing.assert_allclose(other[path], leaf, atol=2e-5, err_msg=path)


def test_packed_pairs_never_see_each_other(batches):
    """The gradient of each pair's loss with respect to every token of the row, on both sides, is zero outside the pair."""
    cfg = dataclasses.replace(parts_of().config.model, init_std=0.3)
    model = kinds.build(cfg)
    params = jax.jit(model.init)(jax.random.key(0))
    row = next(i for i in range(8) if batches[0]["segments"][i].max() >= 2)
    batch = {key: jnp.asarray(value[row:row + 1]) for key, value in batches[0].items()}
    read, said = batch["encoder_tokens"].shape[1], batch["tokens"].shape[1]
    table = jnp.tile(params["embed"]["tokens"], (read + said, 1))  # each place has an embedding table of its own, so its gradient is its influence
    own = batch | {"encoder_tokens": batch["encoder_tokens"] + 320 * jnp.arange(read), "tokens": batch["tokens"] + 320 * (read + jnp.arange(said))}

    def loss(table, segment):
        weights = jnp.where(batch["segments"] == segment, 1.0, 0.0)
        hidden = model.apply(params | {"embed": {"tokens": table}}, {key: own[key] for key in ("tokens", "positions", "segments", *encdec.ENCODER_INPUTS)})[0]
        return (jax.nn.log_softmax(hidden @ params["embed"]["tokens"].T)[0, jnp.arange(said), batch["targets"][0]] * weights[0]).sum()

    influence = jax.jit(jax.grad(loss))
    for segment in range(1, int(batch["segments"].max()) + 1):
        gradient = np.abs(np.asarray(influence(table, segment))).reshape(read + said, -1).sum(1)
        inside = np.concatenate([batch["encoder_segments"][0] == segment, batch["segments"][0] == segment])
        assert (gradient[~inside] == 0).all() and (gradient[inside] > 0).all()


def test_a_batch_of_padding_has_no_loss(batches):
    parts = parts_of()
    empty = {key: np.zeros_like(value) for key, value in batches[0].items()}
    with jax.set_mesh(parts.mesh):
        _, metrics = parts.step(parts.init(), sharding.to_device(parts.mesh, empty, 8))
    assert [float(x) for x in metrics["sums"]["loss"]] == [0, 0] and float(metrics["grad_norm"]) == 0 and not metrics["skipped"]


# --- the start of T5's weights ---


def test_t5_init_has_the_published_deviations():
    """Raffel et al.'s factors, as Mesh TensorFlow and transformers' T5 have them (but for the untied head, see `initialiser`)."""
    cfg = config.TransformerConfig(vocab_size=640, context=64, layers=3, encoder_layers=3, width=128, heads=4, head_size=16, feedforward=384,
                                   positions="relative", tied=False, init="t5")
    made = jax.jit(kinds.build(cfg).init)(jax.random.key(0))
    params = {path: float(np.std(np.asarray(leaf))) for path, leaf in trees.flatten(made).items()}
    expected = {"attn/q": (128 * 16) ** -0.5, "attn/k": 128 ** -0.5, "attn/v": 128 ** -0.5, "attn/o": (4 * 16) ** -0.5, "mlp/up": 128 ** -0.5,
                "mlp/gate": 128 ** -0.5, "mlp/down": 384 ** -0.5}
    expected |= {f"cross/{name}": expected[f"attn/{name}"] for name in "qkvo"}
    for path, std in params.items():
        name = path.rpartition("layers/")[2]
        if name in expected:
            assert std == pytest.approx(expected[name], rel=0.03), path
    assert params["embed/tokens"] == pytest.approx(1, rel=0.03) and params["head/kernel"] == pytest.approx(128 ** -0.5, rel=0.03)
    assert params["decoder/relative_bias"] == pytest.approx(128 ** -0.5, rel=0.25)


# --- bad input ---


@pytest.mark.parametrize("changes, words", [
    ([("tokenizer.sentinels", "0"), ("tokenizer.vocab_size", "300")], "needs a tokenizer with the special tokens <extra_id_0>, .* set tokenizer.sentinels=100"),
    ([("tokenizer.sentinels", "0"), ("tokenizer.kind", "bytes")], "needs a tokenizer with the special tokens <extra_id_0>"),
    ([("objective.name", "next_token")], r"objective.name=next_token does not train model.encoder_layers=1 \(an encoder-decoder\): set "
     "objective.name=span_corruption or seq2seq"),
    ([("model.encoder_layers", "0"), ("model.positions", "rotary")], "objective.name=span_corruption does not train model.kind=decoder: set "
     "objective.name=next_token"),
    ([("data.target_length", "2")], "data.sequence_length=48 and data.target_length=2 have no room for a hidden span"),
    ([("data.target_length", "65")], "data.target_length=65 is longer than model.context=64"),
])
def test_impossible_runs(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        loop.run(runs.load(tmp_path, [*SPANS, *changes]), tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tree, words", [
    ({"objective": {"name": "seq2seq"}, "data": {"source": ("a",)}}, "objective.name=seq2seq needs data.input_key"),
    ({"data": {"input_key": "q"}}, "data.input_key='q' goes with objective.name=seq2seq or with labels, not next_token"),
    ({"objective": {"span_rate": 1.0}}, r"objective.span_rate=1.0 must be in \(0, 1\)"),
    ({"objective": {"span_length": 0.5}}, "objective.span_length=0.5 must be at least 1"),
    ({"tokenizer": {"kind": "bytes", "sentinels": 3}}, "tokenizer.kind=bytes has no room for tokenizer.sentinels"),
])
def test_impossible_configs(tree, words):
    with pytest.raises(ValueError, match=words):
        config.build(tree)


def test_pairs_and_texts_are_not_mixed_up(tmp_path):
    cfg = config.load(str(recipe(tmp_path)))
    corpus = prepare.prepare(cfg.data, cfg.tokenizer, tmp_path / "data", log=lambda line: None)
    tokenizer = tokenizers.load(corpus.tokenizer_path)
    plain = dataclasses.replace(cfg, objective=config.ObjectiveConfig(), data=config.DataConfig(sequence_length=32))
    with pytest.raises(ValueError, match=r"holds pairs \(data.input_key\): they are for objective.name=seq2seq, not next_token"):
        rows.build(plain, tokenizer, corpus)
    runs.write_corpus(tmp_path / "corpus.jsonl")
    texts = prepare.prepare(config.DataConfig(source=(str(tmp_path / "corpus.jsonl"),)), cfg.tokenizer, tmp_path / "texts", log=lambda line: None)
    with pytest.raises(ValueError, match="was prepared without data.input_key and holds no pairs"):
        rows.build(cfg, tokenizer, texts)
