"""The last word on labelled texts: a split's figures beside those of baselines, for the end of a run and for `jaxlm eval`."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import sharding
from jaxlm.config import LABELLED
from jaxlm.data import labels, readers, rows, stages, tasks
from jaxlm.data import tokenizer as tokenizers
from jaxlm.evaluate import baselines, classification, classify, uncertainty
from jaxlm.train import checkpoint, evaluation, saved

SHOWN = {"classify": ("accuracy", "f1_macro", "mcc", "auroc"), "multi_label": ("accuracy", "f1_macro", "f1_micro", "auroc"), "regress": ("loss", "mae", "r2"),
         "token_classify": ("accuracy",)}


class Beside(NamedTuple):
    """A baseline beside the model."""
    name: str
    figures: dict[str, float]
    comparison: uncertainty.Comparison
    logits: np.ndarray


class Judged(NamedTuple):
    """A classifier's figures on a split, beside simple models."""
    result: classify.Result
    answers: classify.Answers
    baselines: list[Beside]
    lines: str  # to print


def temperature(workdir: pathlib.Path, step: int) -> float | None:
    """What a checkpoint's logits are divided by for calibrated probabilities; None where it was saved without an evaluation."""
    try:
        return float(json.loads(checkpoint.read_file(workdir, step, evaluation.CALIBRATION))["temperature"])
    except ValueError:
        return None


def judge(of: evaluation.Subject, params: Any, split: str, temperature: float | None, *, limit: int = 0, batch_size: int = 0, bootstrap: int = 0,
          progress: Callable[[int, int], None] | None = None, primary: bool = True) -> Judged:
    """Evaluates a split and trains the baselines that it is compared with. In several processes all call this together; only `primary` ones compare.

    Args:
      temperature: of the probabilities; None: 1, and the lines say so.
    """
    name, task = of.config.objective.name, of.task
    result, answers = evaluation.classified(of, params, split, limit=limit, batch_size=batch_size, temperature=temperature or 1.0,
                                            bootstrap=bootstrap if primary else 0, progress=progress)
    if not primary:
        return Judged(result, answers, [], "")
    lines = [classify.table(name, task.label_names, result)]
    if temperature is None and name != "regress":
        lines.append("  no temperature is stored with this checkpoint (it was saved without an evaluation): probabilities are not calibrated")
    found = [] if split == "train" else _baselines(of, split, answers)
    if found:
        shown = SHOWN[name]
        wide = max(len("this model"), *(len(one.name) for one in found))
        figures = {"this model": result.summary, **{one.name: one.figures for one in found}}
        lines.append("Beside it, trained on the same texts:\n  " + " " * wide + "".join(f"{key.replace('_', ' '):>10}" for key in shown))
        lines += [f"  {label:<{wide}}" + "".join(f"{values.get(key, float('nan')):>10.4f}" for key in shown) for label, values in figures.items()]
        lines += [baselines.verdict(name, one.name, one.comparison) for one in found]
        lines += [baselines.MISSING] if not baselines.available() and name != "token_classify" else []
    return Judged(result, answers, found, "\n".join(lines))


def label(run: saved.Run, texts: Sequence[str], batch_size: int = 32) -> list[dict[str, Any]]:
    """What a run's model says of texts, of a pair with " ||| " between its two.

    Returns:
      Of each text {"number"}, {"tags": [(word, tag, probability)]}, or {"labels": [(class, probability)]}: the likeliest, or with multi_label those above
      one half; and {"probabilities": {class: probability}}, {"calibrated"}: whether the probabilities are divided by a temperature of the checkpoint.
    """
    config, tok = run.config, run.tokenizer
    objective, names = config.objective.name, config.model.label_names or tuple(f"LABEL_{i}" for i in range(config.model.labels))
    if objective not in LABELLED:  # an imported model
        objective = "token_classify" if config.model.output == "token_labels" else "regress" if config.model.labels == 1 else "classify"
    found = temperature(run.workdir, run.step)
    task = rows.Task(min(config.data.sequence_length, config.model.context), dataclasses.replace(config.objective, name=objective), eos=tok.eos,
                     label_names=names, last=config.model.kind == "decoder", types=config.model.token_types > 1)
    predict, answers = classify.predictor(run.model, run.mesh), []
    batch_size = -(-batch_size // sharding.ways("batch", run.mesh)) * sharding.ways("batch", run.mesh)
    for begin in range(0, len(texts), batch_size):
        some = texts[begin:begin + batch_size]
        cut = [rows.cut_text(task, tokens, first) for tokens, first, _ in (_encode(tok, text, objective) for text in some)]
        cut += [(np.zeros(0, np.int32), 0)] * (batch_size - len(cut))
        length = next(n for n in task.lengths if n >= max(len(tokens) for tokens, _ in cut))
        batch = tasks.text_batch(cut, np.arange(batch_size), length, last=task.last, types=task.types)
        del batch["documents"]
        if objective != "token_classify":
            batch["labels"] = np.zeros((batch_size, config.model.labels), np.float32)
        with jax.set_mesh(run.mesh):
            logits = np.asarray(predict(run.params, sharding.to_device(run.mesh, batch, batch_size)), np.float32)
        if logits.ndim == 3 and run.mesh.shape["sequence"] > 1:
            logits = logits[:, np.argsort(sharding.zigzag(run.mesh.shape["sequence"], length))]
        answers += [_answer(objective, names, out, found or 1.0, text, tok, length) for out, text in zip(logits, some)]
    return [answer | {"calibrated": found is not None} for answer in answers]


def _encode(tok: tokenizers.Tokenizer, text: str, objective: str) -> tuple[np.ndarray, int, np.ndarray]:
    """Tokens of a text, how many of them are the first of a pair, and of token_classify where its words begin; as data/stages.py does."""
    if objective == "token_classify":
        [tokens], [words] = stages.words_of(tok, [text])
        return tokens, 0, words
    first, pair, second = text.partition(" ||| ")
    sides = [np.array(tok.encode(side), np.int32) for side in ((first, second) if pair else (text,))]
    tokens, inputs = stages.pair_of(tok, *sides) if pair else (np.concatenate([[tok.bos], sides[0], [tok.eos]]), 0)
    return tokens.astype(np.int32), inputs, np.zeros(0, np.int32)


def _answer(objective: str, names: Sequence[str], logits: np.ndarray, divisor: float, text: str, tok: tokenizers.Tokenizer, length: int) -> dict[str, Any]:
    if objective == "regress":
        return {"number": float(logits[0])}
    if objective == "token_classify":
        places = _encode(tok, text, objective)[2]
        probs = classification.probabilities(objective, logits[places[places < length]], divisor)
        said = [(names[p.argmax()], round(float(p.max()), 4)) for p in probs]
        return {"tags": [(word, *answer) for word, answer in zip(text.split(), said)]}
    probs = classification.probabilities(objective, logits[None], divisor)[0]
    order = np.argsort(-probs, kind="stable")
    chosen = [i for i in order if probs[i] > 0.5] if objective == "multi_label" else order[:1]
    rounded = [round(float(p), 4) for p in probs]
    return {"labels": [(names[i], rounded[i]) for i in chosen], "probabilities": dict(zip(names, rounded))}


def plain(text: str) -> str:
    """A pair as one text."""
    return text.replace(readers.PAIR, " \n ")


def _baselines(of: evaluation.Subject, split: str, answers: classify.Answers) -> list[Beside]:
    name, names, train, here = of.config.objective.name, of.task.label_names, of.corpus.examples("train"), of.corpus.examples(split)
    labels.check(name, names, train.labels, ["a training text"] * len(train.labels), "the model")
    if name == "token_classify":
        documents = np.unique(answers.document)
        kept = {int(i): int(n) for i, n in zip(*np.unique(answers.document, return_counts=True))}  # words beyond the row are not judged
        found = baselines.tag_baselines([text.split() for text in train.texts], labels.tags(names, train.labels),
                                        [here.texts[i].split()[:kept[int(i)]] for i in documents], len(names))
    else:
        found = baselines.baselines(name, [plain(text) for text in train.texts], labels.targets(name, names, train.labels),
                                    [plain(here.texts[i]) for i in answers.document])
    compared = lambda one: baselines.compare(name, answers.logits, one.logits, answers.truth, answers.document)
    return [Beside(one.name, baselines.row(name, one, answers.truth), compared(one), one.logits) for one in found]
