"""What a batch is: a dict of numpy arrays on the host, of jax arrays on the devices, all [B, T].

  key        dtype    meaning
  tokens     int32    inputs; 0 in padding
  targets    int32    the token that follows each input in its document; 0 in padding
  weights    float32  1 where the target counts, else 0 (padding, and what an earlier window of the same document has counted)
  positions  int32    place in the segment, from 0
  segments   int32    0 in padding, 1, 2, ... for the pieces of documents in a row; attention never leaves a segment
  documents  int32    evaluation only: the document's number in its split, -1 in padding

A document is bos, its text's tokens, eos. Every token after bos is a target, exactly once in an epoch or an evaluation.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.data.pack import Piece

Batch = dict[str, np.ndarray]


def next_token_batch(rows: Sequence[Sequence[Piece]], read: Callable[[int, int, int], np.ndarray], sequence_length: int) -> Batch:
    """Fills a batch with the pieces planned for each of its rows.

    Args:
      rows: the pieces of each row; none for a row of padding.
      read: `(document, start, stop)` -> tokens [stop - start] of a document.
      sequence_length: T.

    Returns:
      All the keys above, [len(rows), T].
    """
    shape = (len(rows), sequence_length)
    batch = {key: np.zeros(shape, np.int32) for key in ("tokens", "targets", "positions", "segments")}
    batch |= {"weights": np.zeros(shape, np.float32), "documents": np.full(shape, -1, np.int32)}
    for row, pieces in enumerate(rows):
        column = 0
        for segment, (document, start, stop, seen) in enumerate(pieces, 1):
            tokens = read(document, start, stop + 1)
            place = row, slice(column, column + stop - start)
            batch["tokens"][place] = tokens[:-1]
            batch["targets"][place] = tokens[1:]
            batch["weights"][row, column + seen:place[1].stop] = 1
            batch["positions"][place] = np.arange(stop - start)
            batch["segments"][place] = segment
            batch["documents"][place] = document
            column = place[1].stop
    return batch
