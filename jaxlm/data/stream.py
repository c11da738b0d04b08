"""The endless stream of a split's training rows, and where in which epoch of which source each row lies.

Without a mixture the stream is epoch after epoch of all documents. In a mixture each source runs through epochs of its own, shuffled by (seed, epoch,
name), and the sources take turns (mixture.py). A row is known by its number alone.
"""

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxlm.data import mixture, pack, rows
from jaxlm.data.pack import EpochSize, Piece, Plan
from jaxlm.data.rows import Task
from jaxlm.data.shards import Corpus


class Part(NamedTuple):
    """The documents of one source."""

    name: str  # of a source; "" without a mixture
    documents: np.ndarray | None  # int64, numbers of its documents; None: all of the split
    size: EpochSize  # of one epoch of its own


class Stream(NamedTuple):
    """The rows of a split in order: parts, and whose turn it is."""

    parts: tuple[Part, ...]
    turns: mixture.Turns  # numbers of parts
    size: EpochSize  # one pass: an epoch; of a mixture see `build`


def build(corpus: Corpus, split: str, task: Task) -> Stream:
    """The stream of `task`. One pass of a mixture is as many rows as its sources have together, with data.epochs each as often as it says.

    Raises:
      ValueError: one line: an unknown source, or one that does not fill a row.
    """
    index, asked = corpus.splits[split], task.mixture
    if asked == mixture.Mixture():
        size = rows.epoch_size(task, index)
        return Stream((Part("", None, size),), mixture.turns([1]), size)
    parts = []
    for name in mixture.used(asked, corpus.sources):
        documents = np.flatnonzero(index.sources == corpus.sources.index(name))
        size = rows.epoch_size(task, index, documents)
        if not size.rows or not task.fitted and size.targets < task.sequence_length:
            raise ValueError(f"the source {name!r} in {corpus.folder} has {size.targets} training tokens, less than a row of data.sequence_length="
                             f"{task.sequence_length}: leave it out of the mixture, or give more text")
        parts.append(Part(name, documents, size))
    shares = mixture.shares(asked, [part.name for part in parts], [part.size.rows for part in parts], [part.size.targets for part in parts])
    turns = mixture.turns(shares)
    total = round(sum(shares)) if asked.epochs else sum(part.size.rows for part in parts)
    return Stream(tuple(parts), turns, _pass(parts, turns, max(total, 1)))


def _pass(parts: list[Part], turns: mixture.Turns, total: int) -> EpochSize:
    passes = total * turns.counts / turns.counts.sum() / np.array([part.size.rows for part in parts])
    summed = [round(float(times @ np.array(column))) for times, column in ((passes, column) for column in zip(*(part.size[1:] for part in parts)))]
    return EpochSize(total, *summed)


def place(stream: Stream, row: int) -> tuple[int, int, int]:
    """Of a row of the stream its part, the part's epoch, and its number in the epoch."""
    part, number = mixture.place(stream.turns, row)
    return part, *divmod(number, stream.parts[part].size.rows)


def plan(stream: Stream, corpus: Corpus, split: str, task: Task, seed: int, part: int, epoch: int) -> Plan:
    """The rows of one epoch of a part."""
    name, documents, _ = stream.parts[part]
    return rows.plan(task, corpus.splits[split], (seed, epoch, *([name] if name else [])), documents)


def reader(stream: Stream, corpus: Corpus, split: str, task: Task, seed: int) -> Callable[[int], list[Piece]]:
    """The pieces of a row, by its number in the stream; threads may share it."""
    lock = threading.Lock()
    cached = [functools.lru_cache(2)(functools.partial(plan, stream, corpus, split, task, seed, part)) for part in range(len(stream.parts))]

    def read(number: int) -> list[Piece]:
        part, epoch, index = place(stream, number)
        with lock:  # a plan is large and takes a second for ten million documents: one thread makes it, the others wait
            order = cached[part](epoch)
        return pack.row(order, index)

    return read


def passes(stream: Stream, row: int) -> list[tuple[str, int, int, float]]:
    """What rows [0, row) hold of each part: name, rows, targets (on average), epochs."""
    counts = mixture.rows_until(stream.turns, row).tolist()
    return [(part.name, count, round(count * part.size.targets / part.size.rows), count / part.size.rows) for part, count in zip(stream.parts, counts)]
