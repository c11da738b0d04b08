"""How well a model predicts a split: each document's negative log-likelihood, once, and the figures that follow from it.

Devices return one number per token; the sums per document are made on the host in float64, so that neither the batch size nor the number of
devices or processes matters.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import metrics, sharding
from jaxlm.data.loader import evaluation_batches
from jaxlm.data.shards import Corpus
from jaxlm.data.tasks import Masking
from jaxlm.models.decoder import Model
from jaxlm.objectives import token_nll

Scorer = Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, ...]]


class Scores(NamedTuple):
    """Of each document that was evaluated, `[documents]`."""
    document: np.ndarray  # int64, its number in the split
    nll: np.ndarray  # float64, nats of all its targets: its tokens and the end of the text
    right: np.ndarray  # float64, targets that the model ranked first
    tokens: np.ndarray  # int64, targets
    bytes: np.ndarray  # int64, of its text as UTF-8


def scorer(model: Model, mesh: Mesh, chunk_rows: int = 0) -> Scorer:
    """A jitted function `(params, batch of evaluation_batches)` -> nll in nats, right or not (1 or 0), the batch's weights and
    its documents; each `[B, T]` and whole on every device, so that any process can read it all.

    Args:
      chunk_rows: tokens whose logits exist at one time; 0: all.
    """
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def score(params, batch):
        nll, _, right, _ = token_nll(model, params, batch, chunk_rows=chunk_rows)
        return nll, right, batch["weights"], batch["documents"]

    return score


def score_documents(score: Scorer, params: Any, mesh: Mesh, corpus: Corpus, split: str, *, sequence_length: int, batch_size: int, overlap: float,
                    limit_documents: int = 0, progress: Callable[[int, int], None] | None = None, masking: Masking | None = None) -> Scores:
    """Evaluates each document of a split exactly once. In several processes all call this together, and all get everything.

    Args:
      score: from `scorer`.
      sequence_length: window in tokens; a longer document is read in windows that overlap.
      batch_size: rows of a batch, rounded up to a multiple of the devices that share them. It does not change the result.
      overlap: share of a window that a longer document sees again as context, in [0, 1).
      limit_documents: at most so many, spread evenly over the split; 0: all.
      progress: called after each batch with targets done and targets in all (about, under a limit or with masked tokens).
      masking: score hidden tokens only, which are the same in each evaluation; documents where none was chosen are left out.

    Raises:
      ValueError: one line, for a split without documents or a damaged shard.
    """
    index = corpus.splits[split]
    ways = sharding.ways("batch", mesh)
    batch_size = -(-batch_size // ways) * ways
    documents = len(index.tokens)
    expected = min(limit_documents or documents, documents)
    local = evaluation_batches(corpus, split, sequence_length=sequence_length, batch_size=batch_size, overlap=overlap,
                               rows=sharding.local_rows(mesh, batch_size), limit_documents=limit_documents, masking=masking)
    totals = np.zeros((3, documents))  # nll, right, tokens
    total = int(index.tokens.astype(np.int64).sum() - documents) * expected // max(documents, 1)
    total = total if masking is None else int(total * masking.cfg.mask_rate)
    for parts in _one_behind(lambda batch: score(params, sharding.to_device(mesh, batch, batch_size)), local, mesh):
        nll, right, weights, document = map(np.asarray, parts)
        counts = weights > 0
        for row, values in enumerate((nll, right, weights)):
            totals[row] += np.bincount(document[counts], values[counts].astype(np.float64), documents)
        if progress is not None:
            progress(int(totals[2].sum()), total)
    chosen = np.flatnonzero(totals[2])
    tokens = totals[2, chosen].astype(np.int64)
    assert masking or (len(chosen) == expected and np.array_equal(tokens, index.tokens[chosen] - 1)), "a document was left out or counted twice"
    if not len(chosen):
        raise ValueError(f"no token of the {split} split was masked: raise objective.mask_rate, or give more text")
    return Scores(chosen, totals[0, chosen], totals[1, chosen], tokens, index.text_bytes[chosen].astype(np.int64))


def _one_behind(work: Callable, batches: Iterator, mesh: Mesh) -> Iterator:
    """The results of `work`, each handed out when the next is already on the devices."""
    pending = None
    for batch in batches:
        with jax.set_mesh(mesh):
            result = work(batch)
        if pending is not None:
            yield pending
        pending = result
    if pending is not None:
        yield pending


def summary(scores: Scores, bootstrap: int, masked: bool = False) -> dict[str, float]:
    """`loss` (nats per token), `perplexity`, `bits_per_byte`, `accuracy`, each with the ends `_low` and `_high` of its 95 % interval over
    documents (left out for a single document, which has none), and `tokens`, `documents`, `bytes`.

    Args:
      bootstrap: resamples behind the intervals.
      masked: the scores are of masked tokens, which have no perplexity and no bits per byte: their likelihoods are not that of a text.
    """
    columns = np.stack([scores.nll, scores.right, scores.tokens, scores.bytes], axis=1)
    result = {name: float(value) for name, value in _figures(columns.sum(axis=0)).items()}
    if len(columns) > 1:
        for name, values in _figures(metrics.resample(columns, bootstrap)).items():
            result[f"{name}_low"], result[f"{name}_high"] = metrics.interval(values)
    if masked:
        result = {name: value for name, value in result.items() if not name.startswith(("perplexity", "bits_per_byte"))}
    return result | {"tokens": int(scores.tokens.sum()), "documents": len(columns), "bytes": int(scores.bytes.sum())}


def _figures(sums: np.ndarray) -> dict[str, Any]:
    """From sums `[..., 4]` of nll, right, tokens and bytes."""
    nll, right, tokens, size = np.moveaxis(sums, -1, 0)
    loss = metrics.ratio(nll, tokens)
    return {"loss": loss, "perplexity": metrics.perplexity(loss), "bits_per_byte": metrics.bits_per_byte(nll, size),
            "accuracy": metrics.ratio(right, tokens)}


def table(summary: dict[str, float]) -> str:
    """A summary as lines to print."""
    lines = [f"  {'':<14} {'estimate':>10}   95 % interval" if "loss_low" in summary else f"  {'':<14} {'estimate':>10}"]
    units = {"loss": "nats per token", "perplexity": "depends on the tokenizer", "bits_per_byte": "whatever the tokenizer", "accuracy": "of the next token"}
    if "perplexity" not in summary:
        units = {"loss": "nats per masked token: no likelihood of a text, so no perplexity", "accuracy": "of the masked tokens"}
    for name, unit in units.items():
        digits = 2 if name == "perplexity" else 4
        between = f"{summary[f'{name}_low']:.{digits}f} to {summary[f'{name}_high']:.{digits}f}" if f"{name}_low" in summary else ""
        lines.append(f"  {name.replace('_', ' '):<14} {summary[name]:>10.{digits}f}   {between:<22} {unit}".rstrip())
    of = f"  {summary['documents']:,} documents, {summary['tokens']:,} {'masked ' * ('perplexity' not in summary)}tokens, {summary['bytes']:,} bytes"
    return "\n".join([*lines, of + ("" if "loss_low" in summary else "; no interval from a single document")])
