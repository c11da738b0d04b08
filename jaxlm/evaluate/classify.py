"""What a model says of labelled texts, and the figures and tables that follow from it."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import sharding
from jaxlm.data import rows
from jaxlm.data.loader import evaluation_batches
from jaxlm.data.shards import Corpus
from jaxlm.evaluate import classification
from jaxlm.evaluate.likelihood import one_behind
from jaxlm.models.decoder import Model
from jaxlm.objectives import label_logits

Predictor = Callable[[Any, dict[str, jax.Array]], jax.Array]


class Answers(NamedTuple):
    """Of each text that was evaluated, in the order of the split; with token_classify of each word of each text in the row."""
    document: np.ndarray  # int64 [N], its number in the split
    logits: np.ndarray  # float32 [N, C]
    truth: np.ndarray  # float32 [N, C], see `labels.targets`; of a tag 1 at its class


def predictor(model: Model, mesh: Mesh) -> Predictor:
    """A jitted function `(params, batch of evaluation_batches)` -> the head's logits, `[B, C]` or `[B, T, C]`, whole on every device."""
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def predict(params, batch):
        return label_logits(model, params, batch)[0]

    return predict


def answers(predict: Predictor, params: Any, mesh: Mesh, corpus: Corpus, split: str, task: rows.Task, *, batch_size: int, limit: int = 0,
            progress: Callable[[int, int], None] | None = None) -> Answers:
    """What the model says of each text of a split, once. In several processes all call this together, and all get everything.

    Args:
      limit: texts, spread evenly over the split; 0: all.
      progress: called after each batch with texts done and in all.

    Raises:
      ValueError: one line, for a split without texts or a damaged shard.
    """
    ways, index = sharding.ways("batch", mesh), corpus.splits[split]
    batch_size = -(-batch_size // ways) * ways
    asked = rows.evaluation_documents(index, limit)
    local = evaluation_batches(corpus, split, task, batch_size=batch_size, overlap=0, rows=(0, batch_size), limit_documents=limit)
    begin, end = sharding.local_rows(mesh, batch_size)
    work = lambda batch: (predict(params, sharding.to_device(mesh, {k: v[begin:end] for k, v in batch.items() if k != "documents"}, batch_size)), batch)
    documents, logits, truth, done = [], [], [], 0
    for found, batch in one_behind(work, local, mesh):
        found = np.asarray(found, np.float32)
        if found.ndim == 3:
            if mesh.shape["sequence"] > 1:  # back into the order of the text
                back = np.argsort(sharding.zigzag(mesh.shape["sequence"], found.shape[1]))
                found = found[:, back]
            row, place = np.nonzero(batch["weights"])
            documents.append(batch["documents"][row, place])
            logits.append(found[row, place])
            truth.append(np.eye(found.shape[-1], dtype=np.float32)[batch["targets"][row, place]])
        else:
            row = np.flatnonzero(batch["documents"][:, 0] >= 0)
            documents.append(batch["documents"][row, 0])
            logits.append(found[row])
            truth.append(batch["labels"][row])
        done += int((batch["documents"][:, 0] >= 0).sum())
        if progress is not None:
            progress(done, len(asked))
    document = np.concatenate(documents).astype(np.int64)
    order = np.argsort(document, kind="stable")
    return Answers(document[order], np.concatenate(logits)[order], np.concatenate(truth)[order])


class Result(NamedTuple):
    """A split's figures."""
    summary: dict[str, float]  # the figures of `classification.FIGURES`, those of classes ("precision/NAME"), with _low and _high, "documents", "temperature"
    matrix: np.ndarray | None  # confusion of classes, int64 [C, C]; None where texts have several, or numbers


def result(objective: str, names: tuple[str, ...], found: Answers, temperature: float = 1.0, bootstrap: int = 0) -> Result:
    """The figures of a split.

    Args:
      names: of the classes.
      temperature: of the probabilities.
      bootstrap: draws behind the intervals; 0: none.
    """
    if objective == "token_classify":
        return _of_tags(names, found, temperature, bootstrap)
    probs, raw = (classification.probabilities(objective, found.logits, t) for t in (temperature, 1.0))
    losses, truth = classification.nll(objective, found.logits, found.truth), found.truth.astype(np.float64)

    def statistics(chosen: np.ndarray) -> dict[str, float]:
        values = classification.figures(objective, probs[chosen], raw[chosen], losses[chosen], truth[chosen])
        if objective != "regress":
            for kind, row in zip(("precision", "recall", "f1"), classification.by_class(objective, probs[chosen], truth[chosen])):
                values |= {f"{kind}/{name}": float(value) for name, value in zip(names, row)}
        return values

    summary = statistics(np.arange(len(losses))) | classification.intervals(statistics, len(losses), bootstrap)
    summary |= {f"texts/{name}": int(count) for name, count in zip(names, truth.sum(axis=0))} if objective != "regress" else {}
    matrix = classification.confusion(truth.argmax(axis=1), probs.argmax(axis=1), len(names)) if objective == "classify" else None
    return Result(summary | {"temperature": temperature, "documents": len(losses)}, matrix)


def _of_tags(names: tuple[str, ...], found: Answers, temperature: float, bootstrap: int) -> Result:
    objective = "token_classify"
    probs, raw = (classification.probabilities(objective, found.logits, t) for t in (temperature, 1.0))
    right, said, losses = found.truth.argmax(axis=1), probs.argmax(axis=1), classification.nll(objective, found.logits, found.truth)
    _, starts = np.unique(found.document, return_index=True)
    tags = lambda numbers: [[names[i] for i in some] for some in np.split(numbers, starts[1:])]
    kinds = classification.kinds_of(names)
    entities = classification.entity_counts(tags(right), tags(said), kinds)
    words = lambda values: np.add.reduceat(np.asarray(values, np.float64), starts) if len(starts) else np.zeros(0)
    columns = np.stack([words(right == said), words(losses), words(np.ones(len(right)))], axis=1)

    def statistics(chosen: np.ndarray) -> dict[str, float]:
        total, (hits, loss, count) = entities[chosen].sum(axis=0), columns[chosen].sum(axis=0)
        precision, recall, f1 = (float(value) for value in classification.precision_recall_f1(total.sum(axis=1)))
        values = {"f1": f1, "precision": precision, "recall": recall, "accuracy": hits / count, "loss": loss / count}
        for kind, row in zip(("precision", "recall", "f1"), classification.precision_recall_f1(total)):
            values |= {f"{kind}/{name}": float(value) for name, value in zip(kinds, row)}
        return values

    summary = statistics(np.arange(len(starts))) | {"ece": classification.ece(probs.max(axis=1), right == said),
                                                    "ece_uncalibrated": classification.ece(raw.max(axis=1), right == said)}
    summary |= classification.intervals(statistics, len(starts), bootstrap)
    summary |= {f"texts/{name}": int(count) for name, count in zip(kinds, entities[:, [0, 2]].sum(axis=(0, 1)))}
    return Result(summary | {"temperature": temperature, "documents": len(starts), "words": len(right)}, classification.confusion(right, said, len(names)))


def table(objective: str, names: tuple[str, ...], found: Result) -> str:
    """A result as lines to print: figures, classes, and the confusion matrix of up to 12 classes."""
    summary, lines = found.summary, [f"  {'':<18} {'estimate':>9}   95 % interval"]
    between = lambda name: f"{summary[f'{name}_low']:.4f} to {summary[f'{name}_high']:.4f}" if f"{name}_low" in summary else ""
    for name, what in classification.FIGURES[objective].items():
        lines.append(f"  {name.replace('_', ' '):<18} {summary[name]:>9.4f}   {between(name):<20} {what}".rstrip())
    kinds = [name.removeprefix("precision/") for name in summary if name.startswith("precision/") and not name.endswith(("_low", "_high"))]
    if kinds:
        wide = max(18, *map(len, kinds))
        counted = "entities" if "words" in summary else "texts"
        lines.append(f"  {'':<{wide}} precision   95 % interval         recall   95 % interval             f1   {counted}")
        lines += [f"  {name:<{wide}} {summary[f'precision/{name}']:>9.4f}   {between(f'precision/{name}'):<18} {summary[f'recall/{name}']:>9.4f}   "
                  f"{between(f'recall/{name}'):<18} {summary[f'f1/{name}']:>9.4f} {summary[f'texts/{name}']:>7,}" for name in kinds[:20]]
        lines += [f"  and {len(kinds) - 20} more classes in eval.jsonl"] if len(kinds) > 20 else []
    if found.matrix is not None and len(names) <= 12:
        wide = max(8, *(len(name) + 1 for name in names))
        lines.append(f"  confusion: a row for each true class, a column for each answer\n  {'':<{wide}}" + "".join(f"{name:>{wide}}" for name in names))
        lines += [f"  {name:<{wide}}" + "".join(f"{count:>{wide},}" for count in row) for name, row in zip(names, found.matrix)]
    temperature = "" if objective == "regress" else f", temperature {summary['temperature']:.3f}"
    words = f", {summary['words']:,} words" if "words" in summary else ""
    return "\n".join([*lines, f"  {summary['documents']:,} texts{words}{temperature}"])


def scalars(summary: Mapping[str, float]) -> dict[str, float]:
    """What curves and logs take: finite numbers."""
    return {name: float(value) for name, value in summary.items() if math.isfinite(value)}
