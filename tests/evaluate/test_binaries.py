"""`jaxlm eval` and `jaxlm generate` on a saved run, from their flags to what they print and write."""

import io
import json
import math
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlm import cli
from jaxlm.evaluate import follow
from tests.evaluate.conftest import save
from tests.train.runs import environment


def call(verb, *flags):
    """The exit code; a user's mistake ends in SystemExit(2), as on the command line."""
    try:
        return cli.run(verb, list(flags))
    except SystemExit as ending:
        return ending.code


def fails(capsys, verb, *flags) -> str:
    assert call(verb, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxlm: ") and error.count("\n") == 1, error
    return error


# --- eval ---


def test_eval_prints_a_table_and_writes_both_logs(run_copy, corpus, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert call("eval", f"--workdir={run_copy}") == 0
    out = capsys.readouterr().out
    [row] = follow.read(run_copy / "eval.jsonl")
    assert row["step"] == 4 and row["split"] == "validation" and row["documents"] == len(corpus.splits["validation"].tokens)
    assert row["bits_per_byte_low"] < row["bits_per_byte"] < row["bits_per_byte_high"] and row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert f"bits per byte  {row['bits_per_byte']:>10.4f}" in out and "95 % interval" in out and "step 4" in out
    board = EventAccumulator(str(run_copy / "eval" / "validation"))
    board.Reload()
    [event] = board.Scalars("eval/bits_per_byte")
    assert event.step == 4 and event.value == pytest.approx(row["bits_per_byte"])


def test_eval_of_a_step_a_split_a_part(run_copy):
    assert call("eval", f"--workdir={run_copy}", "--step=2", "--split=test", "--limit_documents=3", "--batch_size=5") == 0
    assert call("eval", f"--workdir={run_copy}", "--step=4", "--split=test", "--limit_documents=3") == 0
    first, second = follow.read(run_copy / "eval.jsonl")
    assert (first["step"], first["split"], first["documents"]) == (2, "test", 3) and first["loss"] != second["loss"]


def test_eval_says_what_is_wrong_in_one_line(run_copy, tmp_path, corpus, capsys, monkeypatch):
    assert "does not exist" in fails(capsys, "eval", f"--workdir={tmp_path / 'none'}")
    assert "holds no checkpoint of step 3; it holds 2, 4" in fails(capsys, "eval", f"--workdir={run_copy}", "--step=3")
    assert "--split" in fails(capsys, "eval", f"--workdir={run_copy}", "--split=dev")
    assert "--batch_size=-1 must be 0 or more" in fails(capsys, "eval", f"--workdir={run_copy}", "--batch_size=-1")
    assert "--interval=0.0 must be positive" in fails(capsys, "eval", f"--workdir={run_copy}", "--watch", "--interval=0")
    assert "leave out --step" in fails(capsys, "eval", f"--workdir={run_copy}", "--watch", "--step=2")
    assert "holds no prepared corpus" in fails(capsys, "eval", f"--workdir={run_copy}", f"--data={tmp_path}")
    assert not (run_copy / "eval.jsonl").exists()


def test_watch_evaluates_what_is_left_and_ends_with_the_run(run_copy, capsys):
    (run_copy / "FINISHED").write_text('{"step": 4}\n')
    flags = f"--workdir={run_copy}", "--watch", "--interval=0.1", "--limit_documents=3"
    follow.append(run_copy / "eval.jsonl", {"step": 2, "split": "test", "limit_documents": 3, "data": ""})  # another split is another matter
    assert call("eval", *flags) == 0
    rows = follow.read(run_copy / "eval.jsonl")[1:]
    assert [row["step"] for row in rows] == [2, 4] and "every checkpoint is evaluated" in capsys.readouterr().out
    with open(run_copy / "eval.jsonl", "ab") as file:  # killed while it was writing
        file.write(b'{"step": 4, "spl')
    assert call("eval", *flags) == 0
    assert follow.read(run_copy / "eval.jsonl")[1:] == rows, "a restart repeats nothing"


def test_watch_beside_a_run(tmp_path, cfg, corpus, params, capsys):
    """Checkpoints come, half-written ones lie about, old ones go, the run ends. (In processes of their own: the slow test below.)"""
    workdir = tmp_path / "run"
    save(workdir, cfg, corpus, params, 1)
    (workdir / "checkpoints" / "3" / "params").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(call, "eval", f"--workdir={workdir}", "--watch", "--interval=0.1", "--limit_documents=2")
        deadline = time.monotonic() + 120
        while not follow.read(workdir / "eval.jsonl"):
            assert time.monotonic() < deadline and not watcher.done()
            time.sleep(0.1)
        save(workdir, cfg, corpus, params, 5, 7, keep_last=2)
        (workdir / "FINISHED").write_text("{}")
        assert watcher.result(timeout=120) == 0
    assert [row["step"] for row in follow.read(workdir / "eval.jsonl")] == [1, 5, 7]
    assert "waiting for the next checkpoint" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_watch_together_and_find_what_one_finds(run_copy):
    (run_copy / "FINISHED").write_text("{}")
    assert call("eval", f"--workdir={run_copy}", "--step=2") == 0 and call("eval", f"--workdir={run_copy}", "--step=4") == 0
    alone = follow.read(run_copy / "eval.jsonl")
    (run_copy / "eval.jsonl").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [subprocess.Popen([sys.executable, "-m", "jaxlm", "eval", f"--workdir={run_copy}", "--watch", f"--coordinator=127.0.0.1:{port}",
                                   "--processes=2", f"--process={i}"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                 for i in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    together = follow.read(run_copy / "eval.jsonl")
    assert [row["step"] for row in together] == [2, 4]
    for one, two in zip(alone, together):
        numbers = [name for name, value in one.items() if not isinstance(value, str)]
        assert two.keys() - one.keys() == {"verdict", "best"} and one.keys() <= two.keys() and [one[name] for name in numbers] == pytest.approx([two[name] for name in numbers], rel=1e-5)
    assert "bits per byte" in outputs[0] and "bits per byte" not in outputs[1]


# --- generate ---


def test_generate_prints_prompt_and_continuation(run_folder, capsys):
    flags = f"--workdir={run_folder}", "--prompt=the cat", "--max_tokens=12"
    assert call("generate", *flags) == 0
    out = capsys.readouterr().out
    assert out.startswith("the cat") and out.endswith("\n") and len(out) > len("the cat\n") and "\x1b" not in out
    assert call("generate", *flags, "--nostream") == 0 and capsys.readouterr().out == out
    assert call("generate", *flags, "--seed=1") == 0 and capsys.readouterr().out != out
    assert call("generate", *flags, "--step=2") == 0 and capsys.readouterr().out.startswith("the cat")


def test_generate_several_in_order_with_headers(run_folder, capsys):
    assert call("generate", f"--workdir={run_folder}", "--prompt=a dog", "--prompt=", "--samples=2", "--max_tokens=5") == 0
    out = capsys.readouterr().out
    assert re.findall(r"--- (.*) ---", out) == ["prompt 1, sample 1", "prompt 1, sample 2", "prompt 2, sample 1", "prompt 2, sample 2"]
    assert out.count("a dog") >= 2


def test_generate_json_and_prompts_file(run_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the sea\n\ntime \u00e9\n")
    flags = f"--workdir={run_folder}", f"--prompts_file={tmp_path / 'prompts.txt'}", "--json", "--samples=2", "--max_tokens=6", "--temperature=0"
    assert call("generate", *flags) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["sample"], row["step"]) for row in rows] == [(p, i, 4) for p in ("the sea", "time \u00e9") for i in (0, 1)]
    assert rows[0]["text"] == rows[1]["text"] != rows[2]["text"]
    letter = rows[0]["text"][2]
    assert call("generate", *flags, f"--stop={letter}") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["text"] == rows[0]["text"].split(letter)[0]


def test_generate_takes_the_standard_input_as_a_prompt(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("bread and\n"))
    assert call("generate", f"--workdir={run_folder}", "--max_tokens=3") == 0
    assert capsys.readouterr().out.startswith("bread and")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "there is no prompt: give --prompt" in fails(capsys, "generate", f"--workdir={run_folder}")


def test_generate_asks_on_a_terminal_and_goes_on_after_a_mistake(run_folder, capsys, monkeypatch):
    answers = iter(["the cat", "x" * 100])

    def ask(text):
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert call("generate", f"--workdir={run_folder}", "--max_tokens=3") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("the cat") and "jaxlm: prompt 0 has 101 tokens" in captured.err


@pytest.mark.parametrize("flags, message", [
    (["--temperature=-1"], "temperature=-1.0 must be 0"), (["--top_p=0"], r"top_p=0.0 must be in \(0, 1\]"), (["--top_k=-3"], "top_k=-3 must be"),
    (["--min_p=2"], "min_p=2.0 must be"), (["--repetition_penalty=0"], "repetition_penalty=0.0 must be"), (["--seed=-1"], "seed=-1 must be"),
    (["--samples=0"], "--samples=0 must be at least 1"), (["--max_tokens=0"], "--max_tokens=0 must be at least 1"), (["--stop="], "a stop text is empty"),
    (["--max_tokens=100"], "prompt 0 has 2 tokens, with max_tokens=100 that makes 102, and the model's context holds 64: ask for at most 62"),
    (["--prompt=" + "x" * 64], "prompt 1 has 65 tokens and the model's context holds 64: shorten it to 63 or fewer"),
    (["--prompts_file=/absent"], "/absent"), (["--temperature=warm"], "temperature"),
], ids=lambda x: str(x)[:30])
def test_generate_says_what_is_wrong_in_one_line(run_folder, capsys, flags, message):
    assert re.search(message, fails(capsys, "generate", f"--workdir={run_folder}", "--prompt=a", *flags))


def test_generate_without_a_run_or_with_a_strange_file(tmp_path, capsys):
    assert "does not exist" in fails(capsys, "generate", f"--workdir={tmp_path / 'none'}", "--prompt=a")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    (tmp_path / "blank").write_text("\n \n")
    assert "is not UTF-8 (byte 3)" in fails(capsys, "generate", f"--workdir={tmp_path}", f"--prompts_file={tmp_path / 'latin'}")
    assert "holds no prompt" in fails(capsys, "generate", f"--workdir={tmp_path}", f"--prompts_file={tmp_path / 'blank'}")


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_help_teaches_and_is_light(verb):
    code = f"import jaxlm.cli; jaxlm.cli.run('{verb}', ['--help'])\nimport sys; assert not {{'jax', 'numpy', 'grain'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"jaxlm {verb} --workdir=runs/quickstart" in done.stdout and "--step" in done.stdout
