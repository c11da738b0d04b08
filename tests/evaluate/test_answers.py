"""Metrics against sacrebleu, rouge-score, scikit-learn and SQuAD's own definition."""

import math
import re

import numpy as np
import pytest

from jaxlm.evaluate import answers, definition
from jaxlm.evaluate.answers import Answer
from jaxlm.evaluate.definition import Item

TASK = definition.Task("t", "", "generate", ("f1",), "", "", ())
HYPOTHESES = ["The cat sat on the mat .", "there is a dog in the garden", "he said nothing at all", "so it goes", ""]
REFERENCES = [("The cat sat on a mat .",), ("a dog is in the garden", "there is a dog in this garden"), ("he said nothing",),
              ("and so it went on and on",), ("words",)]


def columns(name, hypotheses=HYPOTHESES, references=REFERENCES, task=TASK):
    return np.array([answers.METRICS[name].columns(task, Item(i, ("",), (" x",), (), -1, reference), Answer(text=said))
                     for i, (said, reference) in enumerate(zip(hypotheses, references))])


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_figures_are_sacrebleus(name):
    metrics = pytest.importorskip("sacrebleu.metrics")
    streams = [[one[0] for one in REFERENCES], [one[1] if len(one) > 1 else None for one in REFERENCES]]
    expected = {"bleu": metrics.BLEU, "chrf": metrics.CHRF}[name]()
    found = answers.figures(columns(name), name, 20)
    assert found["value"] == pytest.approx(expected.corpus_score(HYPOTHESES, streams).score, abs=1e-9) and found["low"] < found["value"] < found["high"]
    some = answers.METRICS[name].figure(columns(name)[:2].sum(axis=0))
    assert some == pytest.approx(expected.corpus_score(HYPOTHESES[:2], [stream[:2] for stream in streams]).score, abs=1e-9)


def test_rouge_is_rouge_scores():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    expected = [max(scorer.score(one, said)["rougeL"].fmeasure for one in reference) for said, reference in zip(HYPOTHESES, REFERENCES)]
    assert columns("rouge_l")[:, 0] == pytest.approx(expected)


def test_words_in_common_are_squads():
    found = columns("f1", ["The  Cat, sat!", "a dog", "", "blue", "the"], [("cat sat",), ("dogs", "big dog"), ("",), ("red",), ("a",)])[:, 0]
    assert found == pytest.approx([1, 2 / 3, 1, 0, 1])
    assert columns("normalised_match", ["The  Cat, sat!", "a dog"], [("cat sat",), ("dogs", "big dog")])[:, 0].tolist() == [1, 0]


@pytest.mark.parametrize("said, right, same", [
    ("so 3 + 4 = 7\n#### 7", "it is\n#### 7", 1), ("#### 1,234.", "#### 1234", 1), ("#### 8", "#### 7", 0), ("no answer", "#### 7", 0),
    ("#### 6 #### 7", "#### 7", 1)])
def test_answers_are_extracted(said, right, same):
    task = definition.load(definition.CATALOGUE)["gsm8k"]
    assert columns("exact_match", [said], [(right,)], task)[0, 0] == same


def test_exact_match_is_of_the_whole_answer():
    assert columns("exact_match", [" yes\n", "Yes", "yes sir"], [("yes", "si")] * 3)[:, 0].tolist() == [1, 0, 0]


def test_choices_by_hand():
    item = Item(0, ("",) * 3, (" aa", " bbbb", " é"), ("aa", "bbbb", "é"), 1, ())
    answer = Answer((-2.0, -3.2, -1.5), (1, 2, 1), (False,) * 3, (-1.0, -9.0, -2.0))
    value = lambda name, right: answers.METRICS[name].columns(TASK, item._replace(right=right), answer)[0]
    assert [value("acc", k) for k in range(3)] == [0, 0, 1] and [value("acc_norm", k) for k in range(3)] == [0, 1, 0]  # per character -1, -0.8, -1.5
    assert [value("acc_bytes", k) for k in range(3)] == [0, 0, 1]  # -1, -0.8, -0.75: é has two bytes
    assert [value("acc_pmi", k) for k in range(3)] == [0, 1, 0]


def test_likelihoods_by_hand():
    task = definition.Task("t", "", "loss", ("bits_per_byte",), "", "", ())
    rows = [answers.METRICS[name].columns(task, Item(0, (), (text,), (), -1, ()), Answer((-nats,), (2,), (False,)))
            for name in ("bits_per_byte", "word_perplexity", "byte_perplexity", "perplexity")
            for text, nats in (("é a", 4 * math.log(2)), (" a b", 2 * math.log(2)))]
    figure = lambda name, k: answers.METRICS[name].figure(np.array(rows[2 * k:2 * k + 2]).sum(axis=0))
    assert figure("bits_per_byte", 0) == pytest.approx(6 / 8)
    assert figure("word_perplexity", 1) == pytest.approx(2**(6 / 5))  # " a b" has an empty piece before it
    assert figure("byte_perplexity", 2) == pytest.approx(2**(6 / 8)) and figure("perplexity", 3) == pytest.approx(2**3)
    assert answers.words(" a b") == len(re.split(r"\s+", " a b")) == 3


def test_shares_have_exact_intervals_and_the_rest_bootstrap():
    right = np.array([[1.0, 1.0]] * 7 + [[0.0, 1.0]] * 3)
    found = answers.figures(right, "acc", 100)
    assert found["interval"] == "exact" and found["value"] == 0.7 and found["stderr"] == pytest.approx(right[:, 0].std(ddof=1) / math.sqrt(10))
    assert found["low"] == pytest.approx(0.3475, abs=1e-4) and found["high"] == pytest.approx(0.9333, abs=1e-4)
    nats = np.array([[2.0, 1], [3.0, 2], [9.0, 3]])
    assert answers.figures(nats, "bits_per_byte", 200)["interval"] == "bootstrap" and math.isnan(answers.figures(nats[:1], "bits_per_byte", 10)["low"])


def test_a_model_against_itself_and_against_a_worse_one():
    generator = np.random.default_rng(0)
    a = np.stack([generator.uniform(1, 3, 200), np.full(200, 5.0)], axis=1)
    worse = a + [0.2, 0] + np.stack([generator.normal(0, 0.1, 200), np.zeros(200)], axis=1)
    for name in ("loss", "bits_per_byte", "perplexity"):
        same, found = answers.compare(name, a, a), answers.compare(name, a, worse)
        assert same.verdict == "cannot tell" and same.p == 1 and found.verdict == "better", name
        assert found.difference == pytest.approx(answers.METRICS[name].figure(a.sum(axis=0)) - answers.METRICS[name].figure(worse.sum(axis=0))), name
    right = np.stack([np.repeat([1.0, 0.0], [30, 10]), np.ones(40)], axis=1)
    assert answers.compare("acc", right, right[::-1]).verdict == "cannot tell" and answers.compare("acc", np.ones((40, 2)), right).verdict == "better"


def test_what_is_not_installed_is_one_line(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    answers._scorer.cache_clear()
    with pytest.raises(ValueError, match=r"the metric bleu needs sacrebleu: pip install 'jaxlm\[tasks\]'"):
        columns("bleu")
