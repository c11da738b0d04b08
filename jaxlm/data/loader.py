"""Batches of a prepared corpus, read ahead by Grain in threads. Home of grain.

The batch of a step is a pure function of (corpus, seed, step): the step is the whole position, there is no other state to save, and it is
the same for any number of hosts, each of which reads its own rows of it.
"""

import math
from collections.abc import Callable, Iterator

import grain

from jaxlm.data import mixture, pack
from jaxlm.data import rows as of_rows
from jaxlm.data import stream as streams
from jaxlm.data.rows import Task
from jaxlm.data.shards import Corpus
from jaxlm.data.tasks import Batch


def epoch_size(corpus: Corpus, split: str, task: Task, batch_size: int) -> pack.EpochSize:
    """Rows, targets and padding of an epoch, or of one pass of a mixture, which has rows / batch_size steps: a batch may end one and begin the next.

    Raises:
      ValueError: the split is smaller than one batch, which would have to repeat itself; see `stream.build`.
    """
    return _checked(streams.build(corpus, split, task), corpus, split, task, batch_size).size


def _checked(stream: streams.Stream, corpus: Corpus, split: str, task: Task, batch_size: int) -> streams.Stream:
    size = stream.size
    if task.mixture == mixture.Mixture() and size.rows < batch_size:
        raise ValueError(
            f"the {split} split in {corpus.folder} is smaller than one batch: its {size.targets} tokens fill {size.rows} rows of "
            f"data.sequence_length={task.sequence_length}, data.batch_size={batch_size} needs more: lower one of them, or give more text")
    return stream


def batches(corpus: Corpus, split: str, task: Task, *, batch_size: int, seed: int, start_step: int, stop_step: int, rows: tuple[int, int] | None = None,
            threads: int = 1, prefetch: int = 4) -> Iterator[tuple[int, Batch]]:
    """The training batches of steps [start_step, stop_step), epoch after epoch, nothing dropped between them.

    Args:
      task: what is asked of the model; masks and hidden spans are others in each step.
      batch_size: rows of the global batch.
      rows: the rows [a, b) of each global batch that this process reads; None: all.
      threads: 0 reads in the caller's own thread, when a batch is asked for.
      prefetch: batches read ahead.

    Returns:
      An iterator of (step, batch of [b - a, length]) without "documents".

    Raises:
      ValueError: see `epoch_size`; while iterating, a damaged shard (see `Corpus.read`).
    """
    stream = _checked(streams.build(corpus, split, task), corpus, split, task, batch_size)
    begin, end = rows or (0, batch_size)
    row = streams.reader(stream, corpus, split, task, seed)
    of = of_rows.targets(task, corpus, split) if task.labelled else None

    def batch(step: int) -> tuple[int, Batch]:
        first = step * batch_size + begin
        if task.labelled:
            whole = [row(step * batch_size + i) for i in range(batch_size)]  # whose longest text decides, on every host
            local = of_rows.fill_labelled(task, whole[begin:end], corpus, split, of, of_rows.length(task, corpus.splits[split], whole), train=True)
            del local["documents"]
            return step, local
        local = of_rows.fill(task, [row(first + i) for i in range(end - begin)], corpus, split, first, seed)
        del local["documents"]
        return step, local

    return _read_ahead(batch, start_step, stop_step, threads, prefetch)


def evaluation_batches(corpus: Corpus, split: str, task: Task, *, batch_size: int, overlap: float, limit_documents: int = 0,
                       rows: tuple[int, int] | None = None, threads: int = 1, prefetch: int = 4) -> Iterator[Batch]:
    """Batches in which every target of the split has weight 1 exactly once; the last is filled up with rows of padding.

    Args:
      task: masks and hidden spans are the same ones of a document each time; of masked tokens those chosen, not all, have weight 1 exactly once.
      overlap: see `pack.evaluation_plan`.
      rows: the rows [a, b) of each global batch that this process reads; None: all.
      limit_documents: at most so many documents, spread evenly over the split; 0: all.

    Returns:
      An iterator of batches of [b - a, length], the same number for every process.

    Raises:
      ValueError: the split has no documents.
    """
    index = corpus.splits[split]
    if not len(index.tokens):
        raise ValueError(f"the {split} split in {corpus.folder} has no documents: raise data.{split} and prepare again, or give more text")
    plan = of_rows.evaluation_plan(task, index, of_rows.evaluation_documents(index, limit_documents), overlap)
    begin, end = rows or (0, batch_size)
    total = len(plan.rows)

    of = of_rows.targets(task, corpus, split) if task.labelled else None

    def batch(number: int) -> Batch:
        if task.labelled:
            whole = [pack.row(plan, i) if i < total else [] for i in range(number * batch_size, (number + 1) * batch_size)]
            return of_rows.fill_labelled(task, whole[begin:end], corpus, split, of, of_rows.length(task, index, whole), train=False)
        indices = range(number * batch_size + begin, number * batch_size + end)
        return of_rows.fill(task, [pack.row(plan, i) if i < total else [] for i in indices], corpus, split, None)

    return _read_ahead(batch, 0, math.ceil(total / batch_size), threads, prefetch)


def _read_ahead(element: Callable, start: int, stop: int, threads: int, prefetch: int) -> Iterator:
    """`element(start)` ... `element(stop - 1)` in order. What `element` raises is raised here."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(start, stop).map(element).to_iter_dataset(options))
