"""Whether a model's own outputs are what they should be, word for word."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.data import rows
from jaxlm.data.shards import Corpus
from jaxlm.data.tokenizer import Tokenizer

Answer = Callable[[Sequence[Sequence[int]]], list[list[int]]]


def exact_matches(answer: Answer, corpus: Corpus, split: str, task: rows.Task, tokenizer: Tokenizer, *, limit: int, batch_size: int,
                  progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Of pairs spread evenly over a split, whether the output is the target, as text: float64 `[pairs]`, 1 or 0.

    Args:
      answer: inputs as token ids -> the model's outputs, without eos; always given `batch_size` inputs.
      limit: at most so many pairs.
      progress: called after each batch with the pairs done and those in all.
    """
    index = corpus.splits[split]
    documents = rows.evaluation_documents(index, limit)
    found: list[bool] = []
    for begin in range(0, len(documents), batch_size):
        some = documents[begin:begin + batch_size].tolist()
        inputs, targets = [], []
        for document in some:
            tokens, middle = corpus.read(split, document), int(index.inputs[document])
            inputs.append(rows.cut_input(task, tokens[:middle]).tolist())
            targets.append(tokens[middle:-1].tolist())
        outputs = answer(inputs + inputs[:1] * (batch_size - len(inputs)))  # one shape for all batches
        found += [tokenizer.decode(output) == tokenizer.decode(target) for output, target in zip(outputs, targets)]
        if progress is not None:
            progress(len(found), len(documents))
    return np.array(found, np.float64)
