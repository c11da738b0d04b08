"""Figures against scikit-learn, entities against cases from seqeval's own rules, planted label noise, near-duplicates, words."""

import math

import numpy as np
import pytest

from jaxlm.evaluate import baselines, classification, classify, mistakes

sklearn = pytest.importorskip("sklearn")
from sklearn import metrics  # noqa: E402


def drawn(classes, texts=300, seed=0):
    random = np.random.default_rng(seed)
    right = random.integers(0, classes, texts)
    logits = random.normal(size=(texts, classes)) + 1.2 * np.eye(classes)[right]
    return logits.astype(np.float32), np.eye(classes, dtype=np.float32)[right], right


@pytest.mark.parametrize("classes", [2, 5])
def test_classes_against_scikit_learn(classes):
    logits, truth, right = drawn(classes)
    found = classify.result("classify", tuple(map(str, range(classes))), classify.Answers(np.arange(len(right)), logits, truth), 1.0, 0)
    probs = classification.probabilities("classify", logits)
    said, summary = probs.argmax(axis=1), found.summary
    assert summary["accuracy"] == pytest.approx(metrics.accuracy_score(right, said))
    for average in ("macro", "micro"):
        assert summary[f"f1_{average}"] == pytest.approx(metrics.f1_score(right, said, average=average))
    assert summary["mcc"] == pytest.approx(metrics.matthews_corrcoef(right, said))
    assert summary["loss"] == pytest.approx(metrics.log_loss(right, probs))
    area = metrics.roc_auc_score(right, probs[:, 1]) if classes == 2 else metrics.roc_auc_score(right, probs, multi_class="ovr")
    assert summary["auroc"] == pytest.approx(area)
    if classes == 2:
        assert summary["brier"] == pytest.approx(metrics.brier_score_loss(right, probs[:, 1]))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(right, said)
    assert [summary[f"precision/{c}"] for c in range(classes)] == pytest.approx(precision.tolist())
    assert [summary[f"recall/{c}"] for c in range(classes)] == pytest.approx(recall.tolist()) and [summary[f"f1/{c}"] for c in range(classes)] == pytest.approx(f1.tolist())
    assert np.array_equal(found.matrix, metrics.confusion_matrix(right, said))


def test_several_classes_and_numbers_against_scikit_learn():
    random = np.random.default_rng(1)
    truth = (random.random((200, 4)) < [0.5, 0.3, 0.1, 0.6]).astype(np.float32)
    logits = (random.normal(size=truth.shape) + 2 * truth - 1).astype(np.float32)
    summary = classify.result("multi_label", tuple("abcd"), classify.Answers(np.arange(200), logits, truth)).summary
    said, probs = logits > 0, classification.probabilities("multi_label", logits)
    assert summary["accuracy"] == pytest.approx(metrics.accuracy_score(truth, said)) and summary["auroc"] == pytest.approx(metrics.roc_auc_score(truth, probs))
    assert summary["f1_macro"] == pytest.approx(metrics.f1_score(truth, said, average="macro"))
    assert summary["f1_micro"] == pytest.approx(metrics.f1_score(truth, said, average="micro"))
    y, x = random.normal(size=100), random.normal(size=100)
    x = np.round(x + y, 1)
    summary = classify.result("regress", (), classify.Answers(np.arange(100), x[:, None], y[:, None])).summary
    scipy = pytest.importorskip("scipy.stats")
    assert summary["loss"] == pytest.approx(metrics.mean_squared_error(y, x)) and summary["mae"] == pytest.approx(metrics.mean_absolute_error(y, x))
    assert summary["r2"] == pytest.approx(metrics.r2_score(y, x)) and summary["spearman"] == pytest.approx(scipy.spearmanr(y, x)[0])
    assert summary["pearson"] == pytest.approx(scipy.pearsonr(y, x)[0])


def test_where_there_is_nothing_to_divide_by():
    assert classification.mcc(np.array([[5, 0], [3, 0]])) == 0 == metrics.matthews_corrcoef([0] * 5 + [1] * 3, [0] * 8)
    assert math.isnan(classification.auroc(np.ones(3, bool), np.arange(3.0)))
    assert classification.auroc(np.array([True, False, True, False]), np.ones(4)) == 0.5


def test_temperature_undoes_a_scale():
    logits, truth, _ = drawn(3, 4000)
    at = classification.fit_temperature("classify", logits, truth)
    assert classification.fit_temperature("classify", 5 * logits, truth) == pytest.approx(5 * at, rel=1e-3)
    losses = [classification.nll("classify", logits / (at * factor), truth).mean() for factor in (0.9, 1, 1.1)]
    assert min(losses) == losses[1]
    probs = classification.probabilities("classify", 5 * logits)
    calibrated = classification.probabilities("classify", 5 * logits, 5 * at)
    error = lambda p: classification.ece(p.max(axis=1), p.argmax(axis=1) == truth.argmax(axis=1))
    assert error(calibrated) < 0.03 < error(probs)


def test_calibration_error_by_hand():
    """Over- and underconfident answers of different bins do not make up for each other; of one bin they do. A bin has its upper end."""
    found = lambda confidence, right: classification.ece(np.array(confidence), np.array(right, float))
    assert found([0.62, 0.62, 0.95, 0.95], [1, 1, 0, 1]) == pytest.approx((0.76 + 0.9) / 4)
    assert found([0.62, 0.64], [1, 0]) == pytest.approx(0.26 / 2) and found([1.0, 1.0], [1, 1]) == 0
    assert found([0.2, 0.19], [1, 0]) == pytest.approx(0.61 / 2) and found([0.2, 0.21], [1, 0]) == pytest.approx((0.8 + 0.21) / 2)


def test_intervals_cover_and_follow_the_seed():
    logits, truth, _ = drawn(2, 100)
    found = lambda: classify.result("classify", ("a", "b"), classify.Answers(np.arange(100), logits, truth), bootstrap=200).summary
    summary = found()
    for name in classification.FIGURES["classify"]:
        assert summary[f"{name}_low"] <= summary[name] * (1 + 1e-9) or name.startswith("ece")  # resampling only raises a distance from calibration
        assert summary[f"{name}_low"] < summary[f"{name}_high"]
    assert summary == found() and summary["precision/a_low"] < summary["precision/a"] < summary["precision/a_high"]
    n, p = 100, summary["accuracy"]
    assert summary["accuracy_high"] - summary["accuracy_low"] == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / n), rel=0.25)


@pytest.mark.parametrize("tags, spans", [
    ("B-per I-per O B-loc", {(0, 2, "per"), (3, 4, "loc")}), ("B-per B-per", {(0, 1, "per"), (1, 2, "per")}), ("I-per I-loc I-loc", {(0, 1, "per"), (1, 3, "loc")}),
    ("O I-per O", {(1, 2, "per")}), ("B-per I-loc", {(0, 1, "per"), (1, 2, "loc")}), ("O O", set()), ("NN NN VB", {(0, 2, "NN"), (2, 3, "VB")})])
def test_entities(tags, spans):
    assert classification.entities(tags.split()) == spans


def test_entity_f1():
    names = ("O", "B-x", "I-x", "B-y")
    truth, said = [["B-x", "I-x", "O"], ["B-y", "O"]], [["B-x", "I-x", "B-y"], ["B-x", "O"]]
    flat = lambda rows: np.eye(4, dtype=np.float32)[[names.index(tag) for row in rows for tag in row]]
    summary = classify.result("token_classify", names, classify.Answers(np.array([4, 4, 4, 9, 9]), 9 * flat(said), flat(truth)), bootstrap=10).summary
    assert (summary["precision"], summary["recall"]) == (pytest.approx(1 / 3), 0.5) and summary["f1"] == pytest.approx(2 / 5)
    assert summary["accuracy"] == 0.6 and summary["documents"] == 2 and summary["precision/x"] == 0.5 and summary["texts/y"] == 1


def sentences(count=400, seed=0):
    random = np.random.default_rng(seed)
    good, bad, other = ["good", "great", "lovely", "fine"], ["bad", "awful", "poor", "dull"], [f"word{i}" for i in range(60)]
    y = np.arange(count) % 2
    return [" ".join([*random.choice(other, 6), random.choice(good if label else bad), random.choice(good if label else bad), f"n{i}"]) for i, label in enumerate(y)], y


def test_planted_label_noise_is_found():
    """Of 8 % flipped labels at least 90 % are suspected, and at least 80 % of the suspects are flipped."""
    texts, y = sentences()
    flipped = np.random.default_rng(1).choice(len(y), 32, replace=False)
    given = y.copy()
    given[flipped] = 1 - given[flipped]
    truth = np.eye(2)[given]
    probs = classification.probabilities("classify", mistakes.cross_validated(baselines.tfidf(texts).train, truth))
    suspects = {one.place for one in mistakes.label_errors(probs, given)}
    assert len(suspects & set(flipped)) >= 0.9 * len(flipped) and len(suspects & set(flipped)) >= 0.8 * len(suspects)
    assert all(one.likely == y[one.place] and one.given == given[one.place] for one in mistakes.label_errors(probs, given) if one.place in set(flipped))


def test_baselines_and_their_verdict():
    texts, y = sentences()
    truth = np.eye(2, dtype=np.float32)[y]
    majority, linear = baselines.baselines("classify", texts[:300], truth[:300], texts[300:])
    right = truth[300:]
    assert baselines.row("classify", majority, right)["accuracy"] == 0.5 and baselines.row("classify", linear, right)["accuracy"] > 0.95
    compared = baselines.compare("classify", majority.logits, linear.logits, right, np.arange(100))
    assert baselines.verdict("classify", linear.name, compared).startswith("THIS MODEL DOES NOT BEAT TF-IDF + logistic regression: it is worse than it, -")
    compared = baselines.compare("classify", 9 * right - 4, majority.logits, right, np.arange(100))
    assert baselines.verdict("classify", majority.name, compared).startswith("better than majority: +50.0 points of accuracy")
    same = baselines.compare("classify", linear.logits, linear.logits, right, np.arange(100))
    assert "not shown to be better" in baselines.verdict("classify", linear.name, same)
    words, tags = [["the", "cat"], ["the", "dog"]], [np.array([0, 1]), np.array([0, 1])]
    assert baselines.tag_baselines(words, tags, [["the", "dog", "new"]], 2)[1].logits.argmax(axis=1).tolist() == [0, 1, 0]
    assert baselines.baselines("regress", texts, y[:, None].astype(float), texts)[1].logits[:, 0] == pytest.approx(y, abs=0.4)
    assert baselines.row("multi_label", baselines.baselines("multi_label", texts, truth, texts)[1], truth)["accuracy"] > 0.95


def test_slices_near_duplicates_and_words():
    columns = mistakes.columns(["it is not good", "it is good", "very very good indeed and more"], ["a", "a", "b"], [{"site": "x"}, {"site": "y"}, {"site": "y"}], [])
    assert columns["negation"] == ["with negation", "without negation", "without negation"] and columns["site"] == ["x", "y", "y"]
    found = {(one.column, one.value): one for one in mistakes.slices(columns, np.array([0.0, 1.0, 1.0]))}
    assert found["negation", "without negation"].mean == 1 and found["source", "a"].texts == 2 and 0 < found["source", "a"].low < 0.5 < found["source", "a"].high < 1
    train = ["the food was really very good here", "a wholly different sentence about nothing", "third one of them all"]
    near = mistakes.near_duplicates(train, ["The food was really very good here!", "nothing like any of those"])
    assert [(one.place, one.train) for one in near] == [(0, 0)] and near[0].similarity == 1
    texts = ["good film today", "good food here", "bad film again", "good bad film"]
    answer = lambda some: np.array([[1 - (0.5 + 0.4 * ("good" in t) - 0.4 * ("bad" in t)), 0.5 + 0.4 * ("good" in t) - 0.4 * ("bad" in t)] for t in some])
    words = mistakes.moving_words(texts, answer, 2, least=2)
    assert words[1][0].word == "good" and words[1][0].effect == pytest.approx(0.4) and words[0][0].word == "bad"
