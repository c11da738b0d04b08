"""Whether a model finds chosen answers likelier than rejected ones, by itself: the reference of training is not asked."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxlm import metrics, sharding
from jaxlm.data.loader import evaluation_batches
from jaxlm.data.rows import Task
from jaxlm.data.shards import Corpus
from jaxlm.evaluate import uncertainty
from jaxlm.evaluate.likelihood import UNITS, Scorer, one_behind


def score(scorer: Scorer, params: Any, mesh: Mesh, corpus: Corpus, split: str, task: Task, *, batch_size: int, bootstrap: int, limit: int = 0,
          progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
    """`preferred`, `preferred_per_token` (shares of pairs), `loss` and `rejected_loss` (nats per token), each with its 95 % interval over pairs, and
    `documents` (pairs), `tokens`.

    Args:
      limit: pairs, spread evenly over the split; 0: all.

    Raises:
      ValueError: one line: a split without pairs.
    """
    ways = sharding.ways("batch", mesh)
    batch_size = -(-batch_size // ways) * ways
    count = len(corpus.splits[split].tokens)
    totals = np.zeros((2, 2 * count))  # nll, tokens
    local = evaluation_batches(corpus, split, task, batch_size=batch_size, overlap=0, rows=sharding.local_rows(mesh, batch_size), limit_documents=limit)
    for parts in one_behind(lambda batch: scorer(params, sharding.to_device(mesh, batch, batch_size)), local, mesh):
        nll, _, weights, document = map(np.asarray, parts)
        at = weights > 0
        for row, values in enumerate((nll, weights)):
            totals[row] += np.bincount(document[at], values[at].astype(np.float64), 2 * count)
        if progress is not None:
            progress(int((totals[1, ::2] > 0).sum()), limit or count)
    (chosen, rejected), (said, other) = (row.reshape(-1, 2).T for row in totals)
    known = (said > 0) & (other > 0)
    if not known.any():
        raise ValueError(f"no pair of the {split} split fits into rows of data.sequence_length={task.sequence_length} tokens: make it longer")
    chosen, rejected, said, other = (values[known] for values in (chosen, rejected, said, other))
    columns = np.stack([chosen < rejected, chosen / said < rejected / other, chosen, said, rejected, other, np.ones(len(said))], axis=1)
    found = _figures(columns.sum(axis=0))
    if len(columns) > 1:
        for name, values in _figures(uncertainty.resample(columns, bootstrap)).items():
            found[f"{name}_low"], found[f"{name}_high"] = uncertainty.interval(values)
    return {name: float(value) for name, value in found.items()} | {"documents": int(known.sum()), "tokens": int((said + other).sum())}


def _figures(sums: np.ndarray) -> dict[str, Any]:
    better, per_token, chosen, said, rejected, other, pairs = np.moveaxis(sums, -1, 0)
    return {"preferred": metrics.ratio(better, pairs), "preferred_per_token": metrics.ratio(per_token, pairs), "loss": metrics.ratio(chosen, said),
            "rejected_loss": metrics.ratio(rejected, other)}


def table(summary: dict[str, float]) -> str:
    """The figures as lines to print."""
    between = lambda name: f"{summary[f'{name}_low']:.4f} to {summary[f'{name}_high']:.4f}" if f"{name}_low" in summary else ""
    lines = [f"  {name.replace('_', ' '):<20} {summary[name]:>10.4f}   {between(name):<22} {unit}".rstrip() for name, unit in UNITS["preference"].items()]
    return "\n".join([f"  {'':<20} {'estimate':>10}   95 % interval", *lines, f"  {summary['documents']:,} pairs, {summary['tokens']:,} tokens of answers"])
