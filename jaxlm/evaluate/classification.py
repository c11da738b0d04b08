"""Figures of labelled texts, in numpy: from what a model says of each item and what is right, to F1, MCC, AUROC, calibration and their intervals.

accuracy     share of texts with the right class (of several classes: all of them right)
f1           2 TP / (2 TP + FP + FN); macro: the mean over the classes that occur in labels or answers, micro: of the counts of all classes together
mcc          Matthews correlation (Matthews 1975), of more than two classes R_K (Gorodkin 2004)
auroc        chance that a text of a class gets a higher probability of it than one of another, ties half (Mann & Whitney 1947); two classes: of the second;
             more: the mean over the classes that occur, one against the rest
brier        squared distance of the probabilities from the truth (Brier 1950); of two classes half of it, so that it is that of one probability
ece          expected calibration error: mean distance of confidence and accuracy over 15 bins of equal width, weighed by their texts (Guo et al. 2017)
temperature  what logits are divided by so that the log-likelihood of the validation texts is greatest (Guo et al. 2017)
entities     F1 of spans of words as conlleval and seqeval count them: right are those with both ends and the type right (Tjong Kim Sang & De Meulder 2003)
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxlm.evaluate import uncertainty

BINS = 15

# Of each objective the figures of a whole split, in the order in which they are printed, and what they are.
FIGURES: dict[str, dict[str, str]] = {
    "classify": {"accuracy": "right answers", "f1_macro": "mean of the classes", "f1_micro": "of all classes together",
                 "mcc": "Matthews correlation, 0 is chance", "auroc": "0.5 is chance", "loss": "nats per text", "brier": "of calibrated probabilities, 0 is best",
                 "ece": "calibration error, 0 is best", "ece_uncalibrated": "the same without temperature"},
    "multi_label": {"accuracy": "texts with all classes right", "f1_macro": "mean of the classes", "f1_micro": "of all classes together",
                    "auroc": "mean of the classes", "loss": "nats per class", "brier": "of calibrated probabilities, 0 is best",
                    "ece": "calibration error, 0 is best", "ece_uncalibrated": "the same without temperature"},
    "regress": {"loss": "mean squared error", "mae": "mean absolute error", "r2": "1 - error over variance", "pearson": "linear correlation",
                "spearman": "correlation of ranks"},
    "token_classify": {"f1": "of entities, both ends and type right", "precision": "of entities", "recall": "of entities", "accuracy": "of words",
                       "loss": "nats per word", "ece": "of words: calibration error, 0 is best", "ece_uncalibrated": "the same without temperature"},
}
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "brier", "ece", "ece_uncalibrated", "mae")


def probabilities(objective: str, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 like `logits` [N, C]: softmax over classes, of multi_label a sigmoid of each; of regress the numbers as they are."""
    scaled = np.asarray(logits, np.float64) / temperature
    if objective == "regress":
        return np.asarray(logits, np.float64)
    if objective == "multi_label":
        return 0.5 * (1 + np.tanh(0.5 * scaled))
    scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return scaled / scaled.sum(axis=1, keepdims=True)


def nll(objective: str, logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Loss of each item in nats, float64 [N], as the objective has it: `truth` is [N, C], see `labels.targets`."""
    z, truth = np.asarray(logits, np.float64), np.asarray(truth, np.float64)
    if objective == "regress":
        return np.square(z[:, 0] - truth[:, 0])
    if objective == "multi_label":
        return (np.logaddexp(0, z) - z * truth).mean(axis=1)
    top = z.max(axis=1, keepdims=True)
    return (np.log(np.exp(z - top).sum(axis=1)) + top[:, 0]) - (z * truth).sum(axis=1)


def fit_temperature(objective: str, logits: np.ndarray, truth: np.ndarray) -> float:
    """The temperature in [0.05, 20] of the least loss, by golden-section search over its logarithm: the loss is convex in 1 / temperature."""
    if objective == "regress" or not len(logits):
        return 1.0
    loss = lambda t: float(nll(objective, logits / math.exp(t), truth).mean())
    low, high, ratio = math.log(0.05), math.log(20.0), (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    while high - low > 1e-5:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return math.exp((low + high) / 2)


def confusion(truth: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes, classes]: rows are what is right, columns what was answered; both given as numbers [N]."""
    return np.bincount(np.asarray(truth, np.int64) * classes + answers, minlength=classes * classes).reshape(classes, classes)


def counts(truth: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Of each class TP, FP and FN: int64 [3, C], from booleans [N, C]."""
    return np.stack([(truth & answers).sum(axis=0), (~truth & answers).sum(axis=0), (truth & ~answers).sum(axis=0)])


def precision_recall_f1(found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of TP, FP and FN [3, ...]; 0 where there is nothing to divide by, as scikit-learn has it."""
    tp, fp, fn = np.asarray(found, np.float64)
    ratio = lambda a, b: np.divide(a, b, out=np.zeros_like(a), where=b > 0)
    return ratio(tp, tp + fp), ratio(tp, tp + fn), ratio(2 * tp, 2 * tp + fp + fn)


def mcc(matrix: np.ndarray) -> float:
    """Of a confusion matrix; 0 where only one class is right, or answered."""
    c = np.asarray(matrix, np.float64)
    total, right, truth, said = c.sum(), np.trace(c), c.sum(axis=1), c.sum(axis=0)
    below = math.sqrt(max(total**2 - said @ said, 0)) * math.sqrt(max(total**2 - truth @ truth, 0))
    return float((right * total - truth @ said) / below) if below else 0.0


def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Of one class: `truth` bool [N], `scores` [N]; NaN where all are of the class, or none."""
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return math.nan
    return float((ranks(scores)[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def ranks(values: np.ndarray) -> np.ndarray:
    """1, 2, ... in ascending order, equal values their mean: float64 [N]."""
    _, of, many = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(many) - (many - 1) / 2)[of.reshape(-1)]


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """[N] each; bins (0, 1/15], (1/15, 2/15], ..."""
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gap = np.bincount(place, right, BINS) - np.bincount(place, confidence, BINS)
    return float(np.abs(gap).sum() / max(1, len(confidence)))


def figures(objective: str, probs: np.ndarray, raw: np.ndarray, losses: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The figures of `FIGURES` but those of entities.

    Args:
      probs: [N, C], calibrated; of regress the numbers. raw: without temperature. losses: [N], from `nll`. truth: [N, C].
    """
    if objective == "regress":
        return _of_numbers(probs[:, 0], truth[:, 0])
    loss = float(losses.mean())
    if objective == "multi_label":
        said, right = probs > 0.5, truth > 0
        found = counts(right, said)
        seen = found.sum(axis=0) > 0
        areas = [auroc(right[:, c], raw[:, c]) for c in range(truth.shape[1])]
        sure = lambda p: ece(np.where(p > 0.5, p, 1 - p).reshape(-1), ((p > 0.5) == right).reshape(-1))
        return {"accuracy": float((said == right).all(axis=1).mean()), "f1_macro": float(precision_recall_f1(found)[2][seen].mean()) if seen.any() else 0.0,
                "f1_micro": float(precision_recall_f1(found.sum(axis=1))[2]), "auroc": _mean(areas), "loss": loss,
                "brier": float(np.square(probs - truth).mean()), "ece": sure(probs), "ece_uncalibrated": sure(raw)}
    classes, right, said = truth.shape[1], truth.argmax(axis=1), probs.argmax(axis=1)
    matrix = confusion(right, said, classes)
    tp = np.diag(matrix)
    found = np.stack([tp, matrix.sum(axis=0) - tp, matrix.sum(axis=1) - tp])
    areas = [auroc(right == c, raw[:, c]) for c in (range(classes) if classes > 2 else [1])]
    sure = lambda p: ece(p.max(axis=1), right == said)
    return {"accuracy": float((right == said).mean()), "f1_macro": float(precision_recall_f1(found)[2][found.sum(axis=0) > 0].mean()),
            "f1_micro": float(precision_recall_f1(found.sum(axis=1))[2]), "mcc": mcc(matrix), "auroc": _mean(areas), "loss": loss,
            "brier": float(np.square(probs - truth).sum(axis=1).mean() / (2 if classes == 2 else 1)), "ece": sure(probs), "ece_uncalibrated": sure(raw)}


def _mean(values: Sequence[float]) -> float:
    some = [value for value in values if not math.isnan(value)]
    return float(np.mean(some)) if some else math.nan


def _of_numbers(said: np.ndarray, right: np.ndarray) -> dict[str, float]:
    error, spread = said - right, float(np.square(right - right.mean()).sum())
    correlation = lambda a, b: float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else math.nan
    return {"loss": float(np.square(error).mean()), "mae": float(np.abs(error).mean()),
            "r2": 1 - float(np.square(error).sum()) / spread if spread else math.nan,
            "pearson": correlation(said, right), "spearman": correlation(ranks(said), ranks(right))}


def by_class(objective: str, probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Precision, recall and F1 of each class: float64 [3, C]."""
    said = probs > 0.5 if objective == "multi_label" else np.eye(truth.shape[1], dtype=bool)[probs.argmax(axis=1)]
    return np.stack(precision_recall_f1(counts(truth > 0, said)))


def intervals(statistics: Callable[[np.ndarray], Mapping[str, float]], items: int, resamples: int, seed: int = 0) -> dict[str, float]:
    """`name_low` and `name_high` of each figure: 95 % of its values over items drawn again, the same draws for all.

    Args:
      statistics: from the numbers of items, int64 [items], to figures.
    """
    generator = np.random.default_rng(seed)
    drawn = [statistics(generator.integers(items, size=items)) for _ in range(resamples if items > 1 else 0)]
    out = {}
    for name in drawn[0] if drawn else ():
        out[f"{name}_low"], out[f"{name}_high"] = uncertainty.interval(np.array([values[name] for values in drawn], np.float64))
    return out


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Spans (first word, one past the last, type) of BIO tags. As seqeval does by default, an I- after another type, or after O, begins a span; a tag without
    a type ("B", "I") has the type "_", and tags of another form are spans of neighbours that are equal."""
    spans, begin, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        head, _, rest = tag.partition("-")
        now = "" if tag == "O" else (rest or "_") if head in ("B", "I") else tag
        if kind and (now != kind or head == "B"):
            spans.add((begin, place, kind))
            kind = ""
        if now and not kind:
            begin, kind = place, now
    return spans


def entity_counts(truth: Sequence[Sequence[str]], said: Sequence[Sequence[str]], kinds: Sequence[str]) -> np.ndarray:
    """TP, FP and FN of each text and type: int64 [texts, 3, kinds]."""
    number, out = {kind: i for i, kind in enumerate(kinds)}, np.zeros((len(truth), 3, len(kinds)), np.int64)
    for row, (right, answer) in enumerate(zip(truth, said)):
        a, b = entities(right), entities(answer)
        for column, spans in enumerate((a & b, b - a, a - b)):
            for span in spans:
                out[row, column, number[span[2]]] += 1
    return out


def kinds_of(names: Sequence[str]) -> list[str]:
    """The types of entities that tags name."""
    return sorted({kind for name in names for _, _, kind in entities([name])})
