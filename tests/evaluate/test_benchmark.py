"""Tasks on a model: the same scores on any devices and in any batches, each request once whatever kills it, and what the command prints and writes."""

import json
import shutil
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.config import MeshConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.evaluate import benchmark, definition, follow, likelihood, results, score, sources, verdict
from jaxlm.ops import losses
from jaxlm.train import benchmarks, checkpoint, saved
from tests.evaluate.test_binaries import call, fails
from tests.train.runs import environment

TASKS = """
[choice]
kind = "choice"
prompt = "Q: {q} "
metrics = ["acc", "acc_norm", "acc_pmi"]
licence = "CC0-1.0"
get = "here"
[[choice.from]]
file = "choice.jsonl"
[write]
kind = "generate"
prompt = "{q}:"
metrics = ["f1", "exact_match"]
max_tokens = 4
licence = "CC0-1.0"
get = "here"
[[write.from]]
file = "choice.jsonl"
fields = { q = "q", target = "choices" }
[cloze]
kind = "cloze"
prompt = "{q}"
metrics = ["acc", "perplexity"]
licence = "CC0-1.0"
get = "here"
[[cloze.from]]
file = "choice.jsonl"
fields = { q = "q", target = "choices.0" }
[texts]
kind = "loss"
metrics = ["bits_per_byte", "word_perplexity"]
licence = "CC0-1.0"
get = "here"
[[texts.from]]
file = "texts.jsonl"
"""


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tasks.toml").write_text(TASKS)
    rows = [{"q": f"what is {'very ' * (i % 2)}number {i}", "choices": [f"it {i}", "x" * (1 + i % 9), "nothing é"][:2 + i % 2], "target": i % 2}
            for i in range(7)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"some text {i} " * (1 + 4 * i)}) + "\n" for i in range(4)))
    return folder / "tasks.toml"


@pytest.fixture(scope="module")
def asks(task_file):
    return {task.name: benchmark.Ask(task, sources.read(task, []), 0, 0) for task in definition.find([str(task_file)])}


@pytest.fixture(scope="module")
def subjects(model, params, corpus):
    """The same model on one device with small batches, and split over eight with large ones."""
    found, tokenizer = {}, tokenizers.load(corpus.tokenizer_path)
    for name, devices, sizes, tokens in (("one", 1, {}, 256), ("eight", 8, {"data": 2, "fsdp": 2, "tensor": 2}, 2048)):
        mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
        places = sharding.params_shardings(mesh, model.axes, jax.eval_shape(model.init, jax.random.key(0)))
        placed = jax.device_put(params, places)
        answer, scorer = benchmarks.answerer(model, placed, tokenizer, 64), likelihood.scorer(model, mesh, 0)
        found[name] = benchmark.Subject(answer, placed, mesh, tokenizer, scorer, 64, tokens, {"fingerprint": "f", "step": 1})
    return found


def items(folder, name):
    return follow.read(folder / f"{name}.items.jsonl")


@pytest.fixture(scope="module")
def scored(subjects, asks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    for name in asks:
        benchmark.evaluate(subjects["one"], asks[name], folder, bootstrap=50)
    return folder


def test_devices_and_batches_do_not_matter(subjects, asks, scored, tmp_path):
    for name in ("choice", "texts"):
        benchmark.evaluate(subjects["eight"], asks[name], tmp_path, bootstrap=50)
        for one, other in zip(items(scored, name), items(tmp_path, name), strict=True):
            np.testing.assert_allclose(one["logprobs"] + one.get("alone", []), other["logprobs"] + other.get("alone", []), atol=1e-4)
            assert {k: v for k, v in one.items() if k not in ("logprobs", "alone", "columns")} == {
                k: v for k, v in other.items() if k not in ("logprobs", "alone", "columns")}


def test_a_score_is_the_sum_of_its_tokens(subjects, asks, scored, model, params):
    """Against the model's own logits of one continuation, without batches, padding or devices."""
    item, row = asks["choice"].read.items[3], items(scored, "choice")[3]
    tokenizer = subjects["one"].tokenizer
    text, begin = item.contexts[1] + item.continuations[1], len(item.contexts[1].rstrip().encode())
    tokens = np.array([tokenizer.bos, *text.encode()], np.int32)[None]
    inputs = {"tokens": tokens[:, :-1], "positions": np.arange(tokens.shape[1] - 1)[None], "segments": np.ones_like(tokens[:, :-1])}
    nll, _, _ = losses.cross_entropy(model.head(params, model.apply(params, inputs)[0]), tokens[:, 1:])
    assert row["logprobs"][1] == pytest.approx(-float(nll[0, begin:].sum()), abs=1e-3) and row["tokens"][1] == len(text.encode()) - begin


def test_windows_score_each_token_once_with_as_much_before_it_as_fits(subjects):
    tokenizer = subjects["one"].tokenizer
    found = score.windows(tokenizer, "abcdefghij", 4)
    text = lambda request: ["".join(chr(t) if t < 256 else "^" for t in part) for part in (request.tokens[:-1], request.tokens[-request.targets:])]
    assert [text(one) for one in found] == [["^abc", "abcd"], ["defg", "efgh"], ["fghi", "ij"]]
    assert score.windows(tokenizer, "", 4) == [] and [text(one) for one in score.windows(tokenizer, "abcd", 4)] == [["^abc", "abcd"]]


def test_contexts_longer_than_the_model_lose_their_beginning_and_this_is_said(subjects, asks, tmp_path):
    ask, of = asks["choice"], subjects["one"]
    long = ask.read.items[0]._replace(contexts=("z" * 200,) * 2, continuations=(" it", " no"), choices=("it", "no"), right=0)
    found = benchmark.evaluate(of, ask._replace(read=ask.read._replace(items=[long])), tmp_path, bootstrap=10)
    assert found["cut"] == 2 and "2 of 4 requests were longer than the model's context of 64" in found["notes"][0]
    [request], _ = score.pairs(of.tokenizer, ["z" * 200], [" it"], 64)
    assert len(request.tokens) == 65 and request.targets == 3
    with pytest.raises(ValueError, match="has 101 tokens, and the model's context holds 64"):
        score.pairs(of.tokenizer, ["z"], [" " + "x" * 100], 64)
    with pytest.raises(ValueError, match="leave no room for a question"):
        benchmark.cut_prompts(of, ["z"], 63)
    assert benchmark.cut_prompts(of, ["abc" * 50, "a"], 50) == ([("abc" * 50)[-13:], "a"], 1)


@pytest.mark.parametrize("name", ["choice", "write"])
def test_killed_anywhere_and_resumed_nothing_is_scored_twice(subjects, asks, scored, tmp_path, monkeypatch, name):
    asked, real = [], follow.append

    def append(path, *rows):
        """The power fails after each write, every other time in the middle of it."""
        if "logprob" in rows[0] or "text" in rows[0]:
            asked.extend((row["item"], row["part"]) for row in rows)
            real(path, *rows)
            if len(asked) % 2:
                with open(path, "ab") as file:
                    file.write(b'{"item": 3, "pa')
            raise KeyboardInterrupt
        real(path, *rows)

    monkeypatch.setattr(follow, "append", append)
    of = subjects["one"]._replace(batch_tokens=256)
    for _ in range(60):
        try:
            found = benchmark.evaluate(of, asks[name], tmp_path, bootstrap=50)
            break
        except KeyboardInterrupt:
            continue
    assert len(asked) == len(set(asked)) and not (tmp_path / f"{name}.part.jsonl").exists()
    assert found["metrics"][found["metric"]]["value"] == pytest.approx(results.read(scored / f"{name}.json")["metrics"][found["metric"]]["value"], abs=1e-5)
    lines = []
    assert benchmark.evaluate(of, asks[name], tmp_path, bootstrap=50, log=lines.append) == found and "before" in lines[0], "a complete one is not asked again"
    other = of._replace(about={"fingerprint": "another", "step": 1})
    with pytest.raises(KeyboardInterrupt):
        benchmark.evaluate(other, asks[name], tmp_path, bootstrap=50)


def test_figures_are_those_of_the_items(scored, asks):
    found, rows = results.read(scored / "choice.json"), items(scored, "choice")
    right = [int(np.argmax(row["logprobs"])) == row["right"] for row in rows]
    assert found["metrics"]["acc"]["value"] == pytest.approx(np.mean(right)) and found["items"] == 7 and found["licence"] == "CC0-1.0"
    pmi = [int(np.argmax(np.subtract(row["logprobs"], row["alone"]))) == row["right"] for row in rows]
    assert found["metrics"]["acc_pmi"]["value"] == pytest.approx(np.mean(pmi))
    cloze = results.read(scored / "cloze.json")["metrics"]["perplexity"]["value"]
    assert cloze == pytest.approx(np.exp(-np.mean([row["logprobs"][0] for row in items(scored, "cloze")])))


# --- the command ---


@pytest.fixture(scope="module")
def evaluated(task_file, run_folder, tmp_path_factory):
    workdir = shutil.copytree(run_folder, tmp_path_factory.mktemp("evaluated") / "run")
    assert call("eval", f"--workdir={workdir}", f"--tasks={task_file}:choice,{task_file}:write", "--limit=6") == 0
    assert call("eval", f"--workdir={workdir}", "--step=2", f"--tasks={task_file}:choice", "--limit=6") == 0
    return workdir


def test_eval_of_tasks_prints_a_table_and_leaves_results(evaluated, task_file, capsys):
    assert call("eval", f"--workdir={evaluated}", f"--tasks={task_file}:choice,{task_file}:write", "--limit=6") == 0
    out = capsys.readouterr().out
    assert "choice-first6: this model has answered these items before" in out and "95 % interval" in out and "acc_norm" in out
    found = results.read(evaluated / "results" / "step-4" / "choice-first6.json")
    assert found["model"]["step"] == 4 and found["items"] == 6 and len(items(evaluated / "results" / "step-4", "choice-first6")) == 6
    assert found["source"]["sha256"] and found["metrics"]["acc"]["interval"] == "exact"
    row = follow.read(evaluated / "eval.jsonl")[0]
    assert row["step"] == 4 and row["choice/acc"] == found["metrics"]["acc"]["value"]


def test_results_say_how_much_of_the_items_the_model_was_trained_on(evaluated, corpus):
    found = results.read(evaluated / "results" / "step-4" / "choice-first6.json")["contamination"]
    assert found["searched"] and found["words"] == 13 and found["hit"] == 0 and found["training"] == corpus.fingerprint


def test_compare_says_better_worse_or_cannot_tell(evaluated, capsys):
    steps = [str(evaluated / "results" / f"step-{step}") for step in (4, 2)]
    assert call("eval", "--compare", *steps) == 0
    out = capsys.readouterr().out
    assert "choice-first6" in out and "acc_pmi" in out and ("cannot tell" in out or "better" in out or "worse" in out) and "Holm" in out
    assert call("eval", "--compare", steps[0], steps[0]) == 0 and capsys.readouterr().out.count("cannot tell") == 5


def test_what_is_wrong_is_one_line(evaluated, task_file, tmp_path, capsys):
    flag = f"--workdir={evaluated}"
    assert "did you mean hellaswag" in fails(capsys, "eval", flag, "--tasks=helaswag")
    assert "its data are not here" in fails(capsys, "eval", flag, "--tasks=hellaswag")
    assert "--task_data=" in fails(capsys, "eval", flag, "--tasks=hellaswag", f"--task_data={tmp_path / 'none'}")
    assert "--workdir=FOLDER is missing" in fails(capsys, "eval", "--tasks=hellaswag")
    assert "needs two workdirs" in fails(capsys, "eval", "--compare", str(evaluated))
    assert "unexpected argument" in fails(capsys, "eval", flag, "extra")
    assert "holds no results" in fails(capsys, "eval", "--compare", str(evaluated), str(tmp_path))
    assert "--limit=-1 must be 0 or more" in fails(capsys, "eval", flag, "--limit=-1")
    assert "goes alone" in fails(capsys, "eval", flag, "--lm_eval=x", "--tasks=y")
    assert "has 0 examples and --shots=2" in fails(capsys, "eval", flag, f"--tasks={task_file}:choice", "--shots=2")


QUIZ = """
[quiz]
kind = "choice"
prompt = "{q}"
metrics = ["acc"]
licence = "CC0-1.0"
get = "here"
[[quiz.from]]
file = "quiz.jsonl"
"""


@pytest.mark.parametrize("definition_, lines, words", [
    (QUIZ.replace('licence = "CC0-1.0"\n', ""), ["{}"], "task quiz in {}/quiz.toml: no key 'licence', which a task of kind 'choice' needs"),
    (QUIZ, [], "quiz.jsonl holds no item of task quiz"),
    (QUIZ, [{"q": "a", "choices": ["b", "c"], "target": 2}], "quiz.jsonl, item 0: the target is choice 2, and there are 2 choices, numbered from 0"),
    (QUIZ, [{"q": "a", "choices": ["b", "c"]}], "item 0: no field 'target'; its fields: q, choices"),
    (QUIZ, [{"q": "a", "choices": ["b", "c" * 90], "target": 0}], "has 91 tokens, and the model's context holds 64: leave that item out, or use another model"),
    (QUIZ.replace("[quiz]", "[[quiz]]"), ["{}"], "a task is a table [NAME] of keys"), ("[quiz", ["{}"], "is not TOML")], ids=lambda x: str(x)[-30:])
def test_a_wrong_task_is_one_line_and_leaves_no_result(run_folder, tmp_path, capsys, definition_, lines, words):
    (tmp_path / "quiz.toml").write_text(definition_)
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert words.replace("{}", str(tmp_path)) in fails(capsys, "eval", f"--workdir={run_folder}", f"--tasks={tmp_path}/quiz.toml", "--contamination=false")
    assert not (run_folder / "results" / "step-4" / "quiz.json").exists()


def test_a_checkpoint_that_is_deleted_meanwhile(run_copy, task_file, monkeypatch, capsys):
    """While it is read: one line. Once it is read nothing more is needed of it."""
    real = checkpoint.restore_params

    def restore(workdir, step, *rest, **options):
        shutil.rmtree(run_copy / "checkpoints" / str(step))
        raise RuntimeError("file not found somewhere in TensorStore")

    monkeypatch.setattr(checkpoint, "restore_params", restore)
    flags = f"--workdir={run_copy}", f"--tasks={task_file}:choice", "--limit=6", "--contamination=false"
    assert "step 2 in" in (said := fails(capsys, "eval", *flags, "--step=2")) and "was deleted while it was read" in said
    monkeypatch.setattr(checkpoint, "restore_params", lambda *args, **options: (real(*args, **options), shutil.rmtree(run_copy / "checkpoints" / "4"))[0])
    assert call("eval", *flags) == 0 and results.read(run_copy / "results" / "step-4" / "choice-first6.json")["items"] == 6


def test_other_models_are_refused_in_one_line(run_folder, task_file, monkeypatch, capsys):
    real = saved.open_run
    for model, words in (({"encoder_layers": 2, "output": "tokens"}, "holds an encoder-decoder, and tasks are answered by one that continues text"),
                         ({"encoder_layers": 0, "output": "sequence_labels"}, "holds a model with model.output=sequence_labels")):
        other = types.SimpleNamespace(model=types.SimpleNamespace(**model))
        monkeypatch.setattr(saved, "open_run", lambda *args, other=other, **options: real(*args, **options)._replace(config=other))
        assert words in fails(capsys, "eval", f"--workdir={run_folder}", f"--tasks={task_file}:choice")


def test_a_real_data_set_of_tfds_is_asked(run_copy, tmp_path, capsys):
    from tests.reviews import Reviews
    Reviews(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    (tmp_path / "tfds.toml").write_text(QUIZ.replace('file = "quiz.jsonl"', 'tfds = "reviews:test"\nfields = { q = "number", target = "label" }').replace(
        'get = "here"', 'get = "here"\nchoices = ["negative", "positive"]'))
    flags = f"--workdir={run_copy}", f"--tasks={tmp_path}/tfds.toml", "--contamination=false"
    assert call("eval", *flags, f"--tfds_dir={tmp_path}") == 0
    found = results.read(run_copy / "results" / "step-4" / "quiz.json")
    assert found["items"] == 3 and found["source"]["tfds"] == "reviews:test"
    capsys.readouterr()  # TFDS shows its progress
    assert "its data are not here (tfds:reviews is not prepared in" in fails(capsys, "eval", *flags, f"--tfds_dir={tmp_path / 'none'}")


def test_watch_asks_tasks_and_judges(run_copy, task_file, capsys):
    (run_copy / "FINISHED").write_text("{}")
    flags = f"--workdir={run_copy}", f"--tasks={task_file}:texts", "--watch", "--interval=0.1", "--keep_best=1"
    assert call("eval", *flags) == 0
    rows = follow.read(run_copy / "eval.jsonl")
    assert [row["step"] for row in rows] == [2, 4] and rows[0]["verdict"] == "first" and "kept: step" not in capsys.readouterr().err
    found = verdict.read(run_copy)
    assert found.metric == "texts/bits_per_byte" and len(found.ranking) == 2 and found.best in (2, 4) and len(found.keep) == 1
    assert call("eval", *flags) == 0 and follow.read(run_copy / "eval.jsonl") == rows and verdict.read(run_copy) == found


@pytest.mark.slow
def test_two_processes_ask_each_item_once_and_find_what_one_finds(run_copy, task_file):
    names = ("choice", "write")
    flags = [f"--workdir={run_copy}", "--tasks=" + ",".join(f"{task_file}:{name}" for name in names)]
    assert call("eval", *flags) == 0
    step = run_copy / "results" / "step-4"
    alone = {name: (results.read(step / f"{name}.json"), items(step, name)) for name in names}
    shutil.rmtree(step)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jaxlm", "eval", *flags, f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    processes = [subprocess.Popen([*command, f"--process={i}"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                 for i in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "acc_norm" in outputs[0] and "acc_norm" not in outputs[1]
    for name, (figures, rows) in alone.items():
        together = results.read(step / f"{name}.json")
        assert together["items"] == figures["items"] and together["items_sha256"] == figures["items_sha256"]
        for one, other in zip(rows, items(step, name), strict=True):
            np.testing.assert_allclose(one.get("logprobs", []), other.get("logprobs", []), atol=1e-4)
            assert one.get("text") == other.get("text")
