"""Which documents a checkpoint has seen, how often and when: its rows are planned once more, from the corpus, the seed and the step alone."""

import bisect
import difflib
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data import ledger, mixture, rows, stream
from jaxlm.data.mixture import Mixture
from jaxlm.data.pack import FittedPlan, Piece, Plan
from jaxlm.data.rows import Task
from jaxlm.data.shards import Corpus, Split

_COMPARED = 1000  # ids that are compared letter by letter


class Seen(NamedTuple):
    """How often a training run has seen each document."""

    tokens: np.ndarray  # int64 [training documents]: of each, summed over all times that it was seen
    once: np.ndarray  # int64 [training documents]: in one pass of it; 0: it gives no row anything, or its source is not in the mixture

    @property
    def times(self) -> np.ndarray:
        """float64 [training documents]: how often each was seen; a part of a document is a part of a time."""
        return self.tokens / np.maximum(self.once, 1)


class Visit(NamedTuple):
    """One step that had tokens of a document in its batch."""

    step: int  # counted from 1, as training prints them
    tokens: int  # of the document in all rows of the step


def check(corpus: Corpus, saved: dict[str, Any], task: Task) -> list[str]:
    """Whether the corpus is the one of a ledger; returns notes on what does not change the rows.

    Raises:
      ValueError: one line: another corpus, or a ledger that does not say enough.
    """
    if "rows" not in saved:
        raise ValueError("this checkpoint's data.json has no seed and no rows: it was written by an older jaxlm, which kept no ledger")
    if saved["manifest"] != corpus.fingerprint:
        raise ValueError(f"{corpus.folder} (fingerprint {corpus.fingerprint[:12]}) is not the corpus that this checkpoint was trained on ({saved['dir']}, "
                         f"fingerprint {saved['manifest'][:12]}): give the right one with --data=FOLDER")
    if saved["sources"] != ledger.sources_sha256(corpus):
        if task.mixture != Mixture():
            raise ValueError(f"{corpus.folder} has the tokens that this checkpoint was trained on, but its documents belong to other sources than they did, so "
                             "its mixture is another one: give the right corpus with --data=FOLDER")
        return ["the documents had other sources when this checkpoint was trained; their tokens are the same"]
    return ["the documents had other ids when this checkpoint was trained; their tokens are the same"] if saved["ids"] != ledger.ids_sha256(corpus) else []


def seen(corpus: Corpus, task: Task, seed: int, total: int) -> Seen:
    """What the first `total` rows of training held."""
    split = corpus.splits["train"]
    found = Seen(np.zeros(len(split.tokens), np.int64), np.zeros(len(split.tokens), np.int64))
    whole = stream.build(corpus, "train", task)
    for part, count in enumerate(mixture.rows_until(whole.turns, total).tolist()):
        epochs, rest = divmod(count, whole.parts[part].size.rows)
        plan = stream.plan(whole, corpus, "train", task, seed, part, epochs)
        documents = whole.parts[part].documents
        documents = np.arange(len(split.tokens)) if documents is None else documents
        found.once[documents] = rows.document_tokens(task, split, documents)
        found.tokens[documents] = epochs * found.once[documents]
        found.tokens[:] += _tokens(task, split, plan, rest)
    return found


def _tokens(task: Task, split: Split, plan: Plan, count: int) -> np.ndarray:
    """Tokens of each document in the first `count` rows of an epoch: int64 [documents of the split]."""
    taken = np.zeros(len(plan.rows), bool)
    taken[plan.rows[:count]] = True
    if isinstance(plan, FittedPlan):
        sizes = np.where(np.repeat(taken, np.diff(plan.row_ends, prepend=0)), rows.piece_tokens(task, split, plan.pieces), 0)
        documents = plan.pieces[:, 0]
    else:
        # Up to any place of the line: the tokens in rows that were taken.
        before = np.concatenate([[0], np.cumsum(taken) * plan.sequence_length])
        row, within = np.divmod(np.concatenate([[0], plan.ends]), plan.sequence_length)
        sizes = np.diff(before[row] + np.append(taken, False)[row] * within)
        documents = plan.documents
    out = np.zeros(len(split.tokens), np.int64)
    np.add.at(out, documents, sizes)
    return out


def visits(corpus: Corpus, task: Task, seed: int, total: int, batch_size: int, document: int) -> list[Visit]:
    """The steps of the first `total` rows of training that held a training document, in order. Plans every epoch that was begun."""
    split, found = corpus.splits["train"], Counter()
    whole = stream.build(corpus, "train", task)
    for part, count in enumerate(mixture.rows_until(whole.turns, total).tolist()):
        _, documents, size = whole.parts[part]
        if documents is not None and document not in documents:
            continue
        for epoch in range(-(-count // size.rows)):
            plan = stream.plan(whole, corpus, "train", task, seed, part, epoch)
            places, sizes = _places(task, split, plan, document)
            numbers = np.argsort(plan.rows)[places] + epoch * size.rows  # of the part's rows
            kept = numbers < count
            for row, tokens in zip(mixture.rows_of(whole.turns, part, numbers[kept]).tolist(), sizes[kept].tolist()):
                found[row // batch_size + 1] += tokens
    return [Visit(*visit) for visit in sorted(found.items())]


def _places(task: Task, split: Split, plan: Plan, document: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a plan, before they are shuffled, that hold a document, and how many of its tokens: int64 [places] each."""
    if isinstance(plan, FittedPlan):
        pieces = np.flatnonzero(plan.pieces[:, 0] == document)
        return np.searchsorted(plan.row_ends, pieces, side="right"), rows.piece_tokens(task, split, plan.pieces[pieces])
    at, length = np.flatnonzero(plan.documents == document), plan.sequence_length
    if not len(at):
        return at, at
    start, stop = int(plan.ends[at[0] - 1]) if at[0] else 0, int(plan.ends[at[0]])
    places = np.arange(start // length, -(-stop // length))
    return places, np.minimum(stop, (places + 1) * length) - np.maximum(start, places * length)


class Occupant(NamedTuple):
    """A document, or a part of one, in a row of training."""

    row: int  # number in the token stream
    source: str
    id: str
    piece: Piece


def occupants(corpus: Corpus, task: Task, seed: int, batch_size: int, step: int) -> list[Occupant]:
    """What lay in the rows of one step's batch, in order; steps are counted from 1, as training prints them."""
    split = corpus.splits["train"]
    row = stream.reader(stream.build(corpus, "train", task), corpus, "train", task, seed)
    return [Occupant(number, corpus.sources[split.sources[piece.document]], corpus.document_id("train", piece.document), piece)
            for number in range((step - 1) * batch_size, step * batch_size) for piece in row(number)]


def name(one: Any) -> str:
    """Id of a document of `occupants`, and its source where the id does not say it."""
    return one.id if one.id.startswith(one.source) else f"{one.id} of {one.source}"


def tokens_of(corpus: Corpus, task: Task, document: int) -> int:
    """Tokens of a training document in one pass of it."""
    return int(rows.document_tokens(task, corpus.splits["train"], np.array([document]))[0])


def find(corpus: Corpus, document_id: str) -> tuple[str, int]:
    """The split of a document, and its number there.

    Raises:
      ValueError: one line with ids that are like it.
    """
    every = []
    for split in corpus.splits:
        ids = corpus.document_ids(split)
        if document_id in ids:
            return split, ids.index(document_id)
        every += ids
    near = _near(document_id, every)
    raise ValueError(f"no document of {corpus.folder} has the id {document_id!r}" + (f"; near it: {', '.join(map(repr, near))}" if near else ""))


def _near(document_id: str, ids: list[str]) -> list[str]:
    """Ids that hold it, or its file's name, or begin or end as it does: seconds for millions, where comparing each takes minutes."""
    for part in (document_id, document_id.rpartition(":")[0], document_id.rpartition("/")[2].rpartition(":")[0]):
        held = [name for name in ids if part in name] if part else []
        if held:
            return difflib.get_close_matches(document_id, held[::max(1, len(held) // _COMPARED)], n=3, cutoff=0.0)
    found = []
    for key in (lambda name: name, lambda name: name[::-1]):
        ordered = sorted(ids, key=key)
        at = bisect.bisect(ordered, key(document_id), key=key)
        found += ordered[max(at - 8, 0):at + 8]
    return difflib.get_close_matches(document_id, dict.fromkeys(found), n=3, cutoff=0.4)


def summary(corpus: Corpus, found: Seen) -> str:
    """A table: of each source its documents, seen and unseen, tokens, how often, licences."""
    split = corpus.splits["train"]
    licences = corpus.manifest["splits"]["train"]["licences"]
    lines = [("source", "documents", "seen", "unseen", "without row", "tokens seen", "times min", "mean", "max", "licences (documents seen)")]
    groups = [(name, split.sources == number) for number, name in enumerate(corpus.sources)]
    for name, mine in [*groups, *([("all", np.ones(len(split.tokens), bool))] if len(groups) > 1 else [])]:
        usable, once = mine & (found.once > 0), found.times[mine & (found.once > 0)]
        read = mine & (found.tokens > 0)
        counts = np.bincount(split.licences[read], minlength=len(licences))
        named = ", ".join(f"{licence or 'unknown'}: {count:,}" for licence, count in sorted(zip(licences, counts.tolist())) if count)
        times = [f"{value:.2f}" for value in (once.min(), once.mean(), once.max())] if len(once) else ["-"] * 3
        lines.append((name, *(f"{int(n):,}" for n in (mine.sum(), read.sum(), (usable & ~read).sum(), (mine & ~usable).sum(), found.tokens[mine].sum())),
                      *times, named or "-"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) if i in (0, 9) else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
                     for line in lines)


def most_seen(corpus: Corpus, found: Seen, count: int) -> list[tuple[int, float]]:
    """Numbers of the training documents that were seen most often, and how often; of equal ones the first."""
    order = np.lexsort((np.arange(len(found.tokens)), -found.times))[:count]
    return [(int(i), float(found.times[i])) for i in order if found.tokens[i]]
