"""What needs no neural network: the commonest label, and TF-IDF with logistic regression, beside which a fine-tuned model must show its worth.

Home of scikit-learn: pip install 'jaxlm[classify]'.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.evaluate import classification, uncertainty

MISSING = "TF-IDF + logistic regression is left out: pip install 'jaxlm[classify]'"


class Baseline(NamedTuple):
    """What a simple model answers to the same texts."""
    name: str
    logits: np.ndarray  # [N, C], whose softmax (of multi_label the sigmoid) are its probabilities; of regress [N, 1] numbers


def available() -> bool:
    """Whether scikit-learn is installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return False
    return True


def baselines(objective: str, train_texts: Sequence[str], train_truth: np.ndarray, texts: Sequence[str]) -> list[Baseline]:
    """Trains on the training split and answers `texts`.

    Args:
      train_truth: [documents, C], see `labels.targets`; of token_classify see `tag_baselines`.
    """
    share = train_truth.mean(axis=0, dtype=np.float64)
    constant = share if objective == "regress" else _logit(share) if objective == "multi_label" else np.log(np.maximum(share, 1e-9))
    found = [Baseline("mean" if objective == "regress" else "majority", np.tile(constant, (len(texts), 1)))]
    if available():
        found.append(Baseline(_NAMES.get(objective, "TF-IDF + logistic regression"), linear(objective, tfidf(train_texts), train_truth)(texts)))
    return found


_NAMES = {"regress": "TF-IDF + ridge regression"}


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


class Features(NamedTuple):
    """What a linear model sees of texts."""
    train: object  # [documents, features], dense or sparse
    of: Callable[[Sequence[str]], object]  # texts -> the same


def tfidf(texts: Sequence[str]) -> Features:
    """Words and pairs of words, term frequency (its logarithm) times inverse document frequency, rows of length 1 (Salton & Buckley 1988)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        train = vectors.fit_transform(texts)
    except ValueError:  # no word in any text, as in scripts of symbols
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
        train = vectors.fit_transform(texts)
    return Features(train, lambda some: vectors.transform(some))


def linear(objective: str, features: Features, truth: np.ndarray) -> Callable[[Sequence[str]], np.ndarray]:
    """A linear model on features of the training texts: texts -> logits [N, C]."""
    answer = fit(objective, features.train, truth)
    return lambda texts: answer(features.of(texts))


def fit(objective: str, train: object, truth: np.ndarray, strength: float = 10.0) -> Callable[[object], np.ndarray]:
    """Logistic regression (of regress a ridge): features -> logits [N, C]. `strength`: the inverse of its L2 penalty. A class that is not in `truth` gets
    log(1e-9)."""
    from sklearn.linear_model import LogisticRegression, Ridge
    if objective == "regress":
        model = Ridge(1.0).fit(train, truth[:, 0])
        return lambda x: model.predict(x)[:, None]
    one = lambda y: LogisticRegression(C=strength, max_iter=1000).fit(train, y)
    if objective == "multi_label":
        models = [one(column) if 0 < column.sum() < len(column) else float(column.mean()) for column in truth.T]
        return lambda x: np.stack([np.full(x.shape[0], float(_logit(np.array(m)))) if isinstance(m, float) else m.decision_function(x) for m in models], axis=1)
    right = truth.argmax(axis=1)
    if len(set(right.tolist())) == 1:
        return lambda x: np.log(np.maximum(np.tile(truth[0], (x.shape[0], 1)), 1e-9))
    model = one(right)

    def answer(x) -> np.ndarray:
        out = np.full((x.shape[0], truth.shape[1]), np.log(1e-9))
        out[:, model.classes_] = np.log(np.maximum(model.predict_proba(x), 1e-9))
        return out

    return answer


def tag_baselines(train_words: Sequence[Sequence[str]], train_tags: Sequence[np.ndarray], words: Sequence[Sequence[str]], classes: int) -> list[Baseline]:
    """Of token_classify: the commonest tag, and the commonest tag of each word (that of all words for a word that training does not have)."""
    overall, of = Counter(), defaultdict(Counter)
    for some, tags in zip(train_words, train_tags):
        for word, tag in zip(some, tags.tolist()):
            overall[tag] += 1
            of[word][tag] += 1
    most = overall.most_common(1)[0][0]
    best = {word: count.most_common(1)[0][0] for word, count in of.items()}
    scores = lambda tags: np.log(np.where(np.eye(classes)[np.array(tags, np.int64)] > 0, 1.0, 1e-9)) if tags else np.zeros((0, classes))
    return [Baseline("majority", scores([most for some in words for _ in some])),
            Baseline("commonest tag of each word", scores([best.get(word, most) for some in words for word in some]))]


def compare(objective: str, model: np.ndarray, baseline: np.ndarray, truth: np.ndarray, document: np.ndarray) -> uncertainty.Comparison:
    """The model against a baseline on the same texts: right answers (of token_classify the share of a text's words), of regress squared errors."""
    if objective == "regress":
        return uncertainty.paired(*(np.square(logits[:, 0] - truth[:, 0]).astype(np.float64) for logits in (model, baseline)), higher_is_better=False)
    right = lambda logits: (((logits > 0) == (truth > 0)).all(axis=1) if objective == "multi_label" else logits.argmax(axis=1) == truth.argmax(axis=1))
    if objective == "token_classify":
        _, of, words = np.unique(document, return_inverse=True, return_counts=True)
        return uncertainty.paired(*(np.bincount(of.reshape(-1), right(logits)) / words for logits in (model, baseline)))
    return uncertainty.paired(*(right(logits).astype(np.float64) for logits in (model, baseline)))


def verdict(objective: str, name: str, found: uncertainty.Comparison) -> str:
    """One line that says whether the model beats a baseline."""
    scale, unit = (1, "squared error") if objective == "regress" else (100, "points of accuracy")
    sign = -1 if objective == "regress" else 1
    low, high = sorted((sign * scale * found.low, sign * scale * found.high))
    figure = f"{sign * scale * found.difference:+.1f} {unit}" if scale == 100 else f"{sign * found.difference:+.4g} {unit}"
    sure = f"95 % interval {low:+.1f} to {high:+.1f}, p = {found.p:.2g}" if scale == 100 else f"95 % interval {low:+.4g} to {high:+.4g}, p = {found.p:.2g}"
    if found.verdict == "better":
        return f"better than {name}: {figure} ({sure})"
    what = "worse than" if found.verdict == "worse" else "not shown to be better than"
    return f"THIS MODEL DOES NOT BEAT {name}: it is {what} it, {figure} ({sure})"


def row(objective: str, found: Baseline, truth: np.ndarray) -> dict[str, float]:
    """The figures of a baseline that need whole texts only."""
    probs = classification.probabilities(objective, found.logits)
    return classification.figures("classify" if objective == "token_classify" else objective, probs, probs,
                                  classification.nll("classify" if objective == "token_classify" else objective, found.logits, truth), truth.astype(np.float64))
