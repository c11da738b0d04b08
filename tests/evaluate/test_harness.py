"""Our own numbers against those of the real lm-evaluation-harness on the same items. Skipped where lm_eval is not installed (pip install 'jaxlm[lm_eval]')."""

import json

import numpy as np
import pytest

from jaxlm.evaluate import follow, results
from tests.evaluate.test_binaries import call, fails

OURS = """
[mine]
kind = "choice"
prompt = "Q: {{q}}\\nA:"
metrics = ["acc", "acc_norm"]
licence = "CC0-1.0"
get = "here"
[[mine.from]]
file = "mine.jsonl"
examples = "train.jsonl"
[roll]
kind = "loss"
metrics = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
licence = "CC0-1.0"
get = "here"
[[roll.from]]
file = "roll.jsonl"
[say]
kind = "generate"
prompt = "Q: {{q}}\\nA:"
metrics = ["exact_match"]
max_tokens = 6
stop = ["e"]
licence = "CC0-1.0"
get = "here"
[[say.from]]
file = "mine.jsonl"
fields = {{ q = "q", target = "choices" }}
"""
COMMON = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{file}.jsonl{train}}}}}
test_split: test
"""
THEIRS = {
    "mine": 'task: mine_lm_eval\noutput_type: multiple_choice\nfewshot_split: train\nfewshot_config: {{sampler: first_n}}\ndoc_to_text: "Q: {{{{q}}}}\\nA:"\n'
            'doc_to_choice: "{{{{choices}}}}"\ndoc_to_target: target\nmetric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n',
    "roll": 'task: roll_lm_eval\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{{{text}}}}"\n'
            "metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]\n",
    "say": 'task: say_lm_eval\noutput_type: generate_until\ndoc_to_text: "Q: {{{{q}}}}\\nA:"\ndoc_to_target: "{{{{choices[0]}}}}"\n'
           "generation_kwargs: {{until: [e], max_gen_toks: 6, do_sample: false}}\nmetric_list: [{{metric: exact_match}}]\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    rows = [{"q": f"{'really ' * (i % 3)}{i}?", "choices": [f"it {i}", "no", "x" * (1 + i % 5)], "target": i % 3} for i in range(8)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.jsonl").write_text(json.dumps({"q": "a?", "choices": ["b", "c", "d"], "target": 1}) + "\n")
    (folder / "roll.jsonl").write_text("".join(json.dumps({"text": f"text {i} of some length " * (1 + 4 * i)}) + "\n" for i in range(3)))
    (folder / "ours.toml").write_text(OURS.format())
    for name, text in THEIRS.items():
        train = f", train: {folder / 'train.jsonl'}" * (name == "mine")
        (folder / f"{name}.yaml").write_text((text + COMMON).format(folder=folder, file="roll" if name == "roll" else "mine", train=train))
    return folder


def test_our_numbers_are_those_of_lm_eval_item_by_item(run_copy, folder, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert call("eval", f"--workdir={run_copy}", f"--tasks={folder / 'ours.toml'}") == 0
    assert call("eval", f"--workdir={run_copy}", "--lm_eval=" + ",".join(str(folder / f"{name}.yaml") for name in THEIRS)) == 0
    step = run_copy / "results" / "step-4"
    for name in THEIRS:
        ours, theirs = results.read(step / f"{name}.json")["metrics"], results.read(step / f"lm_eval-{name}_lm_eval.json")["metrics"]
        for metric in set(ours) & set(theirs) - {"exact_match"}:
            assert ours[metric]["value"] == pytest.approx(theirs[metric]["value"], rel=1e-5), (name, metric)
        assert set(theirs) >= set(ours)
    mine, yours = (follow.read(step / f"{name}.items.jsonl") for name in ("mine", "lm_eval-mine_lm_eval"))
    for one, other in zip(mine, yours, strict=True):
        np.testing.assert_allclose(one["logprobs"], [answer[0] for answer in other["answers"]], atol=1e-4)
        assert one["columns"]["acc"] == other["columns"]["acc"] and one["columns"]["acc_norm"] == other["columns"]["acc_norm"]
    said, told = (follow.read(step / f"{name}.items.jsonl") for name in ("say", "lm_eval-say_lm_eval"))
    assert [one["text"] if "text" in one else "" for one in said] == [other["answers"][0] for other in told]


def test_examples_are_lm_evals_first_ones(run_copy, folder, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    for flag in (f"--tasks={folder / 'ours.toml'}:mine", f"--lm_eval={folder / 'mine.yaml'}"):
        assert call("eval", f"--workdir={run_copy}", flag, "--shots=1", "--limit=4") == 0
    step = run_copy / "results" / "step-4"
    mine, yours = (follow.read(step / f"{name}.items.jsonl") for name in ("mine-1shot-first4", "lm_eval-mine_lm_eval-1shot-first4"))
    for one, other in zip(mine, yours, strict=True):
        np.testing.assert_allclose(one["logprobs"], [answer[0] for answer in other["answers"]], atol=1e-4)


def test_without_lm_eval_and_with_strange_tasks_it_is_one_line(run_copy, tmp_path, capsys, monkeypatch):
    import sys
    (tmp_path / "x.yaml").write_text("dataset_path: json\n")
    try:
        import lm_eval  # noqa: F401
        assert "names no task" in fails(capsys, "eval", f"--workdir={run_copy}", f"--lm_eval={tmp_path / 'x.yaml'}")
        assert "knows no task 'helaswag'" in fails(capsys, "eval", f"--workdir={run_copy}", "--lm_eval=helaswag")
    except ImportError:
        pass
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert "pip install 'jaxlm[lm_eval]'" in fails(capsys, "eval", f"--workdir={run_copy}", "--lm_eval=hellaswag")
