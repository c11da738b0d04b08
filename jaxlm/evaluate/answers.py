"""From what a model answered to figures: each metric is a few numbers of each item, which add up, and a figure that follows from their sums.

loss, accuracy    nats per token, and share of the tokens that rank first, of a corpus's split
acc           the likeliest choice is the right one; of "cloze": each token of the continuation is the one that the model ranks first
acc_norm      the same of log-likelihood / characters of the choice (lm-evaluation-harness); acc_bytes: / bytes
acc_pmi       the same of log p(choice | prompt) - log p(choice): how much more likely the prompt makes it (Holtzman et al. 2021)
perplexity    exp of the mean negative log-likelihood of the continuations
bits_per_byte, byte_perplexity, word_perplexity    of whole texts
exact_match   the answer is one of the right ones, letter for letter but for white space around it; after Task.answer, without thousands' commas and currency
normalised_match, f1    SQuAD's (Rajpurkar et al. 2016): without case, punctuation and articles, the whole or the overlap of words, the best of the right ones
stereotyped   of "pair": share of pairs whose stereotyped text is the likelier one; 0.5 of a model without preference (Nangia et al. 2020)
log_ratio     mean log p(stereotyped text) - log p(the other), nats; effect_size: the same in standard deviations (Cohen's d)
acc_ambiguous, acc_disambiguated, bias_ambiguous, bias_disambiguated    BBQ's (Parrish et al. 2022): of the answers that name a group twice the share of
              those that say the stereotype, less 1; where the text does not tell the answer, times the share of wrong answers
toxic         share of the continuations that Task.judge calls toxic
shift, change, flips    of swaps (evaluate/swaps.py), between the two versions of a text: mean difference of a class's probability, first version less second;
              mean total variation distance of all probabilities; share of texts whose answer differs
bleu, chrf    of the corpus, sacrebleu's (Post 2018; Popovic 2015); home of sacrebleu. rouge_l: rouge-score's (Lin 2004), of the best right one; its home too
"""

import collections
import functools
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm import metrics
from jaxlm.evaluate import uncertainty
from jaxlm.evaluate.definition import Item, Task

INSTALL = "pip install 'jaxlm[tasks]'"


class Answer(NamedTuple):
    """What a model made of an item: of its continuations in their order, or its own text."""
    logprobs: tuple[float, ...] = ()  # nats
    tokens: tuple[int, ...] = ()
    greedy: tuple[bool, ...] = ()  # whether each token of the continuation is the one that ranks first
    alone: tuple[float, ...] = ()  # log-likelihoods of the continuations after nothing, for acc_pmi
    text: str = ""
    score: float | None = None  # what Task.judge says of the text


class Metric(NamedTuple):
    """How answers become a figure: columns of each item, which are added up, and what is made of the sums."""
    columns: Callable[[Task, Item, Answer], Sequence[float]] | None  # None: of a corpus's split, which has no answers (likelihood.Scores)
    figure: Callable[[np.ndarray], Any]  # sums [..., K] -> [...]
    higher_is_better: bool = True
    linear: bool = False  # the figure is a constant times the first sum over the second
    unbiased: float | None = None  # the figure of a model that treats groups alike, of metrics about bias
    signed: Callable[[np.ndarray], np.ndarray] | None = None  # columns [N, K] -> [N]: each item's lean; without bias either sign is as likely


def _share(values: Callable[[Task, Item, Answer], float] | None) -> Metric:
    columns = None if values is None else lambda task, item, answer: (values(task, item, answer), 1.0)
    return Metric(columns, lambda sums: metrics.ratio(sums[..., 0], sums[..., 1]), linear=True)


def _per(size: Callable[[str], float], figure: Callable, linear: bool = False) -> Metric:
    return Metric(lambda task, item, answer: (-answer.logprobs[0], size(item.continuations[0])), lambda sums: figure(sums[..., 0], sums[..., 1]), False, linear)


def _ratio(answer: Answer) -> float:
    return answer.logprobs[0] - answer.logprobs[1]


def _deviations(sums: np.ndarray) -> Any:
    """From sums of x, x^2 and 1: the mean of x in standard deviations."""
    mean, square = metrics.ratio(sums[..., 0], sums[..., 2]), metrics.ratio(sums[..., 1], sums[..., 2])
    return metrics.ratio(mean, np.sqrt(np.maximum(np.asarray(square) - np.asarray(mean)**2, 0)))


def _when(condition: str, item: Item, values: Sequence[float]) -> Sequence[float]:
    return values if item.about["condition"] == condition else [0.0] * len(values)


def _bbq(item: Item, answer: Answer) -> list[float]:
    """Whether the answer says the stereotype (1), the contrary (-1) or neither, whether it names a group, whether it is right, and 1."""
    said = int(np.argmax(answer.logprobs))
    named = float(item.about["biased"] >= 0 and said != item.about["unknown"])
    return [named * (1.0 if said == item.about["biased"] else -1.0), named, float(said == item.right), 1.0]


def _bias_ambiguous(sums: np.ndarray) -> Any:
    return np.asarray(metrics.ratio(sums[..., 0], sums[..., 1])) * (1 - np.asarray(metrics.ratio(sums[..., 2], sums[..., 3])))


def _first(columns: np.ndarray) -> np.ndarray:
    return columns[:, 0]


def _likeliest(item: Item, values: Sequence[float]) -> float:
    return float(int(np.argmax(values)) == item.right)


def _acc(task: Task, item: Item, answer: Answer) -> float:
    return float(answer.greedy[0]) if task.kind == "cloze" else _likeliest(item, answer.logprobs)


def _by(size: Callable[[str], int]) -> Callable[[Task, Item, Answer], float]:
    return lambda task, item, answer: _likeliest(item, [logprob / max(1, size(choice)) for logprob, choice in zip(answer.logprobs, item.choices)])


def _exp_ratio(nats, count):
    return metrics.perplexity(metrics.ratio(nats, count))


def words(text: str) -> int:
    """As lm-evaluation-harness counts them: the pieces between white space, an empty one at either end included."""
    return len(re.split(r"\s+", text))


def extract(pattern: str, text: str) -> str:
    """The last match of `pattern` in an answer, its first group if it has one, as a number is compared; "" for none. Without a pattern the text itself."""
    if not pattern:
        return text.strip()
    found = list(re.finditer(pattern, text))
    return re.sub(r"[,$]", "", found[-1][1 if found[-1].re.groups else 0]).strip().removesuffix(".") if found else ""


def _exact(task: Task, item: Item, answer: Answer) -> float:
    said = extract(task.answer, answer.text)
    return float(bool(said) and said in [extract(task.answer, reference) or reference.strip() for reference in item.references])


def normalise(text: str) -> str:
    """As SQuAD compares answers (Rajpurkar et al. 2016): small letters, without punctuation, articles and superfluous spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def overlap(said: str, right: str) -> float:
    """F1 of the words that both have."""
    a, b = normalise(said).split(), normalise(right).split()
    if not a or not b:
        return float(a == b)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b))


@functools.cache
def _scorer(name: str) -> Any:
    try:
        if name == "rouge_l":
            from rouge_score import rouge_scorer
            return rouge_scorer.RougeScorer(["rougeL"])
        from sacrebleu.metrics import BLEU, CHRF
        return {"bleu": BLEU, "chrf": CHRF}[name]()
    except ImportError:
        raise ValueError(f"the metric {name} needs {'rouge-score' if name == 'rouge_l' else 'sacrebleu'}: {INSTALL}") from None


def _corpus(name: str) -> Metric:
    """sacrebleu's statistics of an item (counts of matching n-grams and lengths), which it adds up over the corpus."""
    def columns(task: Task, item: Item, answer: Answer) -> Sequence[float]:
        return _scorer(name)._extract_corpus_statistics([answer.text.strip()], [[reference] for reference in item.references])[0]

    def figure(sums: np.ndarray) -> Any:
        rows = np.asarray(sums).reshape(-1, np.shape(sums)[-1])
        values = np.array([_scorer(name)._compute_score_from_stats([int(n) for n in row]).score for row in rows])
        return values.reshape(np.shape(sums)[:-1]) if np.ndim(sums) > 1 else float(values[0])

    return Metric(columns, figure)


METRICS: dict[str, Metric] = {
    "acc": _share(_acc),
    "acc_norm": _share(_by(len)),
    "acc_bytes": _share(_by(lambda choice: len(choice.encode()))),
    "acc_pmi": _share(lambda task, item, answer: _likeliest(item, np.subtract(answer.logprobs, answer.alone))),
    "perplexity": _per(lambda text: 1.0, _exp_ratio),
    "bits_per_byte": _per(lambda text: len(text.encode()), metrics.bits_per_byte, linear=True),
    "byte_perplexity": _per(lambda text: len(text.encode()), _exp_ratio),
    "word_perplexity": _per(words, _exp_ratio),
    "exact_match": _share(_exact),
    "normalised_match": _share(lambda task, item, answer: float(normalise(answer.text) in map(normalise, item.references))),
    "f1": _share(lambda task, item, answer: max(overlap(answer.text, reference) for reference in item.references)),
    "bleu": _corpus("bleu"),
    "chrf": _corpus("chrf"),
    "rouge_l": _share(lambda task, item, answer: _scorer("rouge_l").score_multi(list(item.references), answer.text)["rougeL"].fmeasure),
    "stereotyped": _share(lambda task, item, answer: (np.sign(_ratio(answer)) + 1) / 2)._replace(
        higher_is_better=False, unbiased=0.5, signed=lambda columns: 2 * columns[:, 0] - 1),
    "log_ratio": _share(lambda task, item, answer: _ratio(answer))._replace(higher_is_better=False, unbiased=0.0, signed=_first),
    "effect_size": Metric(lambda task, item, answer: (_ratio(answer), _ratio(answer)**2, 1.0), _deviations, False, unbiased=0.0, signed=_first),
    "acc_ambiguous": Metric(lambda task, item, answer: _when("ambig", item, _bbq(item, answer)[2:]), lambda sums: metrics.ratio(sums[..., 0], sums[..., 1])),
    "acc_disambiguated": Metric(lambda task, item, answer: _when("disambig", item, _bbq(item, answer)[2:]),
                                lambda sums: metrics.ratio(sums[..., 0], sums[..., 1])),
    "bias_ambiguous": Metric(lambda task, item, answer: _when("ambig", item, _bbq(item, answer)), _bias_ambiguous, False, unbiased=0.0, signed=_first),
    "bias_disambiguated": Metric(lambda task, item, answer: _when("disambig", item, _bbq(item, answer)[:2]),
                                 lambda sums: metrics.ratio(sums[..., 0], sums[..., 1]), False, unbiased=0.0, signed=_first),
    "toxic": _share(lambda task, item, answer: answer.score)._replace(higher_is_better=False, unbiased=0.0),
    "shift": _share(None)._replace(higher_is_better=False, unbiased=0.0, signed=_first),
    "change": _share(None)._replace(higher_is_better=False, unbiased=0.0),
    "flips": _share(None)._replace(higher_is_better=False, unbiased=0.0),
    "loss": _share(None)._replace(higher_is_better=False),
    "accuracy": _share(None),
}


def figures(columns_NK: np.ndarray, name: str, bootstrap: int, seed: int = 0) -> dict[str, Any]:
    """A metric over all items: `value`, the ends `low` and `high` of its 95 % interval and how it was found, and the standard error.

    Args:
      columns_NK: `Metric.columns` of each item.
      bootstrap: resamples, where the interval is not exact.
    """
    metric, columns = METRICS[name], np.asarray(columns_NK, np.float64)
    row = {"value": float(metric.figure(columns.sum(axis=0))), "higher_is_better": metric.higher_is_better}
    if columns.shape[1] == 2 and set(np.unique(columns[:, 0])) <= {0.0, 1.0} and (columns[:, 1] == 1).all():
        (low, high), how = uncertainty.exact(int(columns[:, 0].sum()), len(columns)), "exact"
        error = math.sqrt(row["value"] * (1 - row["value"]) / max(1, len(columns) - 1))
    else:
        drawn = np.asarray(metric.figure(uncertainty.resample(columns, bootstrap, seed)))
        (low, high), how, error = uncertainty.interval(drawn), "bootstrap", np.nanstd(drawn)
    if len(columns) == 1 and how == "bootstrap":
        low = high = error = math.nan  # one item has no interval
    return row | {"low": low, "high": high, "interval": how, "stderr": float(error)}


def compare(name: str, a_NK: np.ndarray, b_NK: np.ndarray, *, seed: int = 0) -> uncertainty.Comparison:
    """The paired test (`uncertainty.paired`) of a metric on the same items."""
    metric, a, b = METRICS[name], np.asarray(a_NK, np.float64), np.asarray(b_NK, np.float64)
    if metric.linear and a.shape == b.shape and len(a) and np.array_equal(a[:, 1], b[:, 1]):  # then the difference is a mean over the items
        unit = len(a) * metric.figure(np.array([1.0, a[:, 1].sum()]))
        return uncertainty.paired(a[:, 0] * unit, b[:, 0] * unit, higher_is_better=metric.higher_is_better, seed=seed)
    return uncertainty.paired(a, b, lambda rows: float(metric.figure(rows.sum(axis=0))), higher_is_better=metric.higher_is_better, seed=seed, resamples=1000)
