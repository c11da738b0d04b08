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
from jaxlm.data.rows import Task, evaluation_documents, evaluation_targets
from jaxlm.data.shards import Corpus
from jaxlm.evaluate import uncertainty
from jaxlm.models.decoder import Model
from jaxlm.objectives import token_nll

Scorer = Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, ...]]

# The figures that mean something for each objective, and their units in the table. Hidden tokens are no likelihood of a text, so they have no perplexity and
# no bits per byte; of a pair only the target is scored, which has no bytes of its own in the corpus's index.
UNITS = {
    "next_token": {"loss": "nats per token", "perplexity": "depends on the tokenizer", "bits_per_byte": "whatever the tokenizer",
                   "accuracy": "of the next token"},
    "masked_token": {"loss": "nats per masked token: no likelihood of a text, so no perplexity", "accuracy": "of the masked tokens"},
    "span_corruption": {"loss": "nats per token of the hidden spans: no likelihood of a text, so no perplexity", "accuracy": "of the tokens of hidden spans"},
    "seq2seq": {"loss": "nats per target token, given the input", "perplexity": "depends on the tokenizer", "accuracy": "of the next target token",
                "exact_match": "of whole greedy outputs"},
    "sft": {"loss": "nats per token of the assistant", "perplexity": "depends on the tokenizer", "accuracy": "of the assistant's next token"},
    "preference": {"preferred": "pairs whose chosen answer is likelier", "preferred_per_token": "likelier per token",
                   "loss": "nats per token of the chosen answers", "rejected_loss": "nats per token of the rejected answers"},
}


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


def score_documents(score: Scorer, params: Any, mesh: Mesh, corpus: Corpus, split: str, task: Task, *, batch_size: int, overlap: float,
                    limit_documents: int = 0, progress: Callable[[int, int], None] | None = None) -> Scores:
    """Evaluates each document of a split exactly once. In several processes all call this together, and all get everything.

    Args:
      score: from `scorer`.
      task: what is asked of the model. A document longer than its row is read in windows that overlap; masked tokens and hidden spans are the same in each
        evaluation, and documents where no token was chosen are left out.
      batch_size: rows of a batch, rounded up to a multiple of the devices that share them. It does not change the result.
      overlap: share of a window that a longer document sees again as context, in [0, 1).
      limit_documents: at most so many, spread evenly over the split; 0: all.
      progress: called after each batch with targets done and targets in all (about, under a limit or with masked tokens).

    Raises:
      ValueError: one line, for a split without documents or a damaged shard.
    """
    index = corpus.splits[split]
    ways = sharding.ways("batch", mesh)
    batch_size = -(-batch_size // ways) * ways
    documents = len(index.tokens)
    local = evaluation_batches(corpus, split, task, batch_size=batch_size, overlap=overlap, rows=sharding.local_rows(mesh, batch_size),
                               limit_documents=limit_documents)
    totals = np.zeros((3, documents))  # nll, right, tokens
    asked = evaluation_documents(index, limit_documents)
    expected = evaluation_targets(task, index, asked)
    total = int(expected.sum() * (1 if task.masking is None else task.masking.cfg.mask_rate))
    for parts in one_behind(lambda batch: score(params, sharding.to_device(mesh, batch, batch_size)), local, mesh):
        nll, right, weights, document = map(np.asarray, parts)
        counts = weights > 0
        for row, values in enumerate((nll, right, weights)):
            totals[row] += np.bincount(document[counts], values[counts].astype(np.float64), documents)
        if progress is not None:
            progress(int(totals[2].sum()), total)
    chosen = np.flatnonzero(totals[2])
    tokens = totals[2, chosen].astype(np.int64)
    assert task.masking or np.array_equal(totals[2, asked], expected) and tokens.sum() == expected.sum(), "a document was left out or counted twice"
    if not len(chosen):
        raise ValueError(f"no token of the {split} split counts: " + ("make data.sequence_length longer" if task.masking is None else
                         "raise objective.mask_rate, or give more text"))
    return Scores(chosen, totals[0, chosen], totals[1, chosen], tokens, index.text_bytes[chosen].astype(np.int64))


def one_behind(work: Callable, batches: Iterator, mesh: Mesh) -> Iterator:
    """The results of `work` on each batch, each handed out when the next is already on the devices."""
    pending = None
    for batch in batches:
        with jax.set_mesh(mesh):
            result = work(batch)
        if pending is not None:
            yield pending
        pending = result
    if pending is not None:
        yield pending


def summary(scores: Scores, bootstrap: int, objective: str = "next_token", exact: np.ndarray | None = None) -> dict[str, float]:
    """`loss` (nats per token), `perplexity`, `bits_per_byte`, `accuracy`, `exact_match`, those of them that mean something for the objective, each with the
    ends `_low` and `_high` of its 95 % interval over documents (left out for a single document, which has none), and `tokens`, `documents`, `bytes`.

    Args:
      bootstrap: resamples behind the intervals.
      objective: `ObjectiveConfig.name`.
      exact: of some pairs, whether the output was the target (`outputs.exact_matches`).
    """
    columns = np.stack([scores.nll, scores.right, scores.tokens, scores.bytes], axis=1)
    result = {name: float(value) for name, value in _figures(columns.sum(axis=0)).items()}
    if len(columns) > 1:
        for name, values in _figures(uncertainty.resample(columns, bootstrap)).items():
            result[f"{name}_low"], result[f"{name}_high"] = uncertainty.interval(values)
    result = {name: value for name, value in result.items() if name.removesuffix("_low").removesuffix("_high") in UNITS[objective]}
    if exact is not None and len(exact):
        result |= {"exact_match": float(exact.mean()), "outputs": len(exact)}
        if len(exact) > 1:
            drawn = uncertainty.resample(exact[:, None], bootstrap)[:, 0] / len(exact)
            result["exact_match_low"], result["exact_match_high"] = uncertainty.interval(drawn)
    return result | {"tokens": int(scores.tokens.sum()), "documents": len(columns), "bytes": int(scores.bytes.sum())}


def _figures(sums: np.ndarray) -> dict[str, Any]:
    """From sums `[..., 4]` of nll, right, tokens and bytes."""
    nll, right, tokens, size = np.moveaxis(sums, -1, 0)
    loss = metrics.ratio(nll, tokens)
    return {"loss": loss, "perplexity": metrics.perplexity(loss), "bits_per_byte": metrics.bits_per_byte(nll, size),
            "accuracy": metrics.ratio(right, tokens)}


def table(summary: dict[str, float], objective: str = "next_token") -> str:
    """A summary as lines to print."""
    lines = [f"  {'':<14} {'estimate':>10}   95 % interval" if "loss_low" in summary else f"  {'':<14} {'estimate':>10}"]
    for name, unit in UNITS[objective].items():
        if name not in summary:
            continue
        unit += f" ({summary['outputs']:,} pairs)" if name == "exact_match" else ""
        digits = 2 if name == "perplexity" else 4
        between = f"{summary[f'{name}_low']:.{digits}f} to {summary[f'{name}_high']:.{digits}f}" if f"{name}_low" in summary else ""
        lines.append(f"  {name.replace('_', ' '):<14} {summary[name]:>10.{digits}f}   {between:<22} {unit}".rstrip())
    kinds = {"masked_token": "masked tokens", "span_corruption": "tokens of hidden spans", "seq2seq": "target tokens", "sft": "tokens of the assistant"}
    of = f"  {summary['documents']:,} documents, {summary['tokens']:,} {kinds.get(objective, 'tokens')}, {summary['bytes']:,} bytes"
    return "\n".join([*lines, of + ("" if "loss_low" in summary else "; no interval from a single document")])
