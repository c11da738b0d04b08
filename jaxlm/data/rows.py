"""From documents to rows: what each objective makes of a split, planned ahead (`pack.py`) and then filled (`tasks.py`)."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.config import LABELLED, PAIRS, Config, ObjectiveConfig
from jaxlm.data import labels, pack, tasks
from jaxlm.data.mixture import Mixture
from jaxlm.data.pack import EpochSize, Piece, Plan
from jaxlm.data.shards import Corpus, Split
from jaxlm.data.tasks import Batch
from jaxlm.data.tokenizer import Tokenizer

CHATS = ("sft", "preference")  # objectives of what an assistant says
PAIRED = ("span_corruption", "seq2seq")  # objectives of encoder-decoders


class Task(NamedTuple):
    """What is asked of a model, and of what size. `Task(n)` is the next token in rows of n that are cut from a stream."""
    sequence_length: int
    objective: ObjectiveConfig = ObjectiveConfig()
    packing: str = "stream"
    masking: tasks.Masking | None = None  # objective masked_token
    mixture: Mixture = Mixture()  # of sources, in training
    # Objectives of encoder-decoders:
    target_length: int = 0  # the decoder's row; sequence_length is then the encoder's
    start: int = 0  # id with which the decoder begins
    eos: int = 0
    sentinels: np.ndarray = np.zeros(0, np.int32)  # span_corruption: ids of <extra_id_0>, ...
    # Objectives with labels, whose rows hold one text each and are as long as the longest text of their batch needs (`lengths`):
    batch_size: int = 0
    label_names: tuple[str, ...] = ()
    class_weights: np.ndarray = np.zeros(0, np.float32)  # [classes]; of regress [0]
    last: bool = False  # the label of a text is read from its last token (decoders), not its first
    types: bool = False  # the tokens of a pair's second text are of type 1

    @property
    def fitted(self) -> bool:
        """Whether rows hold whole pieces rather than parts of a stream."""
        return self.packing == "best_fit" or self.objective.name in PAIRED + CHATS or self.labelled

    @property
    def labelled(self) -> bool:
        """Whether documents carry labels instead of being predicted themselves."""
        return self.objective.name in LABELLED

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that a labelled batch may have, ascending: data.sequence_length and its halves of at least 16. Each is a program of its own."""
        found = [self.sequence_length]
        while found[0] % 2 == 0 and found[0] >= 32:
            found.insert(0, found[0] // 2)
        return tuple(found)

    @property
    def room(self) -> tuple[int, ...]:
        """Places of a row, on each side; of preferences also how many there may be."""
        if self.objective.name == "preference":
            return self.sequence_length, PAIRS
        return (self.sequence_length, self.target_length) if self.objective.name in PAIRED else (self.sequence_length,)


def build(config: Config, tokenizer: Tokenizer, corpus: Corpus) -> Task:
    """The task of a run, with `target_length` filled in.

    Raises:
      ValueError: one line: a tokenizer without mask or sentinels, a corpus with or without pairs that should be the other, a decoder's row too short.
    """
    name, data = config.objective.name, config.data
    if (name in LABELLED) != ("examples" in corpus.manifest["splits"]["train"]):
        raise ValueError(f"{corpus.folder} was prepared without data.label_key and holds no labels: prepare it with that key for objective.name={name}"
                         if name in LABELLED else f"{corpus.folder} holds labels (data.label_key): they are for "
                         f"objective.name={', '.join(LABELLED)}, not {name}")
    if name in LABELLED:
        return _labelled(config, tokenizer, corpus)
    train = corpus.splits["train"]
    if (train.turns is not None) != (name in CHATS) or name in CHATS and (train.inputs is not None) != (name == "preference"):
        asked, found = ("chat" if name == "sft" else name) if name in CHATS else "text", "text"
        if train.turns is not None:
            found = "chat" if train.inputs is None else "preference"
        raise ValueError(f"{corpus.folder} was prepared with data.format={found}, and objective.name={name} needs data.format={asked}: prepare it "
                         "again with that")
    if name not in CHATS and (name == "seq2seq") != (train.inputs is not None):
        raise ValueError(f"{corpus.folder} was prepared without data.input_key and holds no pairs: prepare it with that key for objective.name=seq2seq"
                         if name == "seq2seq" else f"{corpus.folder} holds pairs (data.input_key): they are for objective.name=seq2seq, not {name}")
    task = Task(data.sequence_length, config.objective, data.packing, tasks.masking(config.objective, tokenizer),
                Mixture(data.weights, data.temperature, data.epochs), data.target_length, config.model.decoder_start, tokenizer.eos)
    if name == "seq2seq":
        task = task._replace(target_length=data.target_length or data.sequence_length)
    if name in CHATS and not len(_items(task, train, None)[0]):
        raise ValueError(f"nothing that an assistant says is left in rows of data.sequence_length={task.sequence_length} tokens" + ", half of which each "
                         "answer gets with its prompt" * (name == "preference") + ": make it longer (half of the chats have "
                         f"{int(np.median(train.tokens))} or more)")
    if name == "span_corruption":
        task = _with_sentinels(task, tokenizer, corpus, config.model.context)
    if task.target_length > config.model.context:
        raise ValueError(f"data.target_length={task.target_length} is longer than model.context={config.model.context}: make the first smaller or the second "
                         "larger")
    return task


def _labelled(config: Config, tokenizer: Tokenizer, corpus: Corpus) -> Task:
    """The task of a labelled corpus. Where the model knows classes (model.label_names) that the corpus' are among, these are meant, in their order.

    Raises:
      ValueError: one line: labels of another kind, one class only, a class that is not in training, a weight for no class.
    """
    name, data, model = config.objective.name, config.data, config.model
    made_for = corpus.manifest["made_from"].get("objective.name")
    if made_for != name:
        raise ValueError(f"{corpus.folder} was prepared with labels for objective.name={made_for}, not {name}: prepare it again, in another data.dir")
    train = corpus.examples("train").labels
    found = labels.names(name, train)
    known = model.label_names if set(found) <= set(model.label_names) else found
    if name in ("classify", "token_classify") and len(found) < 2 and known == found:
        raise ValueError(f"{corpus.folder} has one class only ({', '.join(map(repr, found))}), so there is nothing to tell apart: give examples of another")
    if name == "multi_label" and not found:
        raise ValueError(f"{corpus.folder} has no label at all in its training split: give examples of some class")
    for split in ("validation", "test"):
        held_out = corpus.examples(split).labels
        if held_out and not set(held_out) <= set(train):
            labels.check(name, known, held_out, [f"{corpus.document_id(split, i)} ({split})" for i in range(len(held_out))], "the training split")
    factors = np.zeros(0, np.float32)
    if name != "regress":
        often = dict.fromkeys(known, 0)
        for label in train:
            for one in labels.classes(name, label):
                often[one] += 1
        counts = np.maximum(np.array([often[one] for one in known], np.float64), 1)
        factors = labels.weights(known, counts, dict(config.objective.class_weights), config.objective.class_balance)
    return Task(data.sequence_length, config.objective, mixture=Mixture(data.weights, data.temperature, data.epochs), eos=tokenizer.eos,
                batch_size=data.batch_size, label_names=known, class_weights=factors, last=model.kind == "decoder",
                types=bool(data.input_key) and model.token_types > 1)


def for_labels(config: Config, task: Task) -> Config:
    """The config whose model has the head that the task needs; an imported one that fits keeps its classes."""
    if not task.labelled:
        return config
    model = config.model
    output = "token_labels" if task.objective.name == "token_classify" else "sequence_labels"
    count = len(task.label_names) or 1  # a number is one output
    # Encoders without types of tokens are DistilBERT's kind, whose heads of transformers have a ReLU. BERT's have tanh.
    activation = model.pooler_activation if model.output == output or model.kind == "decoder" or model.token_types else "relu"
    model = dataclasses.replace(model, output=output, labels=count, label_names=task.label_names, pooler_activation=activation)
    return dataclasses.replace(config, model=model)


def _with_sentinels(task: Task, tokenizer: Tokenizer, corpus: Corpus, context: int) -> Task:
    named, sentinels = tokenizer.special_tokens, []
    while (found := named.get(f"<extra_id_{len(sentinels)}>")) is not None and found < tokenizer.vocab_size:
        sentinels.append(found)
    if not sentinels:
        raise ValueError("objective.name=span_corruption needs a tokenizer with the special tokens <extra_id_0>, <extra_id_1>, ...: set "
                         "tokenizer.sentinels=100 to train one, or tokenizer.path to that of a T5")
    task = task._replace(sentinels=np.array(sentinels, np.int32))
    most = longest_window(task)
    if not most:
        raise ValueError(f"data.sequence_length={task.sequence_length} and data.target_length={task.target_length} have no room for a hidden span: they must "
                         "be at least 2 and 3")
    if task.target_length:
        return task
    # What a full window needs, or, where short documents need more of the decoder's row than of the encoder's, what lets both fill at the same pace.
    _, sizes = _items(task, corpus.splits["train"], None)
    read, said = sizes.sum(axis=0)
    full = int(_span_room(task, np.array([most]))[0, 1])
    return task._replace(target_length=max(full, min(context, -(-task.sequence_length * int(said) // max(int(read), 1)))))


def longest_window(task: Task) -> int:
    """Tokens of the longest text whose corrupted form fits both sides of a row (the decoder's is not looked at where it is 0) and the sentinels."""
    sizes = np.arange(1, int(task.sequence_length / (1 - task.objective.span_rate)) + 2 * task.sequence_length)
    spans = tasks.span_sizes(sizes, task.objective.span_rate, task.objective.span_length)[1]
    room = _span_room(task, sizes)
    fits = (room[:, 0] <= task.sequence_length) & (spans <= len(task.sentinels)) & (room[:, 1] <= (task.target_length or np.inf))
    return int(np.argmin(np.append(fits, False)))


def _span_room(task: Task, sizes: np.ndarray) -> np.ndarray:
    hidden, spans = tasks.span_sizes(sizes, task.objective.span_rate, task.objective.span_length)
    return np.stack([sizes - hidden + spans + 1, hidden + spans + 1], axis=1)


def _items(task: Task, split: Split, documents: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Whole pieces of the documents (all, or those numbered), and the places that each takes: int64 [pieces, 4] and [pieces, sides].

    The start and stop of a piece count targets, as `pack.Piece` says; of a text for span corruption they count its tokens after the first; a pair has all.
    """
    documents = np.arange(len(split.tokens)) if documents is None else documents
    lengths = split.tokens[documents].astype(np.int64)
    if task.labelled:
        return np.stack([documents, np.zeros_like(lengths), lengths, np.zeros_like(lengths)], axis=1), np.minimum(lengths, task.sequence_length)[:, None]
    if task.objective.name in CHATS:
        sides = _sides(task, split, documents)
        sizes = sum(stop - start for start, stop in sides)
        learns = np.minimum.reduce([_said(split, documents, start + 1, stop + 1) for start, stop in sides]) > 0
        pieces = np.stack([documents, np.zeros_like(sizes), sizes, np.zeros_like(sizes)], axis=1)[learns]
        return pieces, np.stack([sizes, np.ones_like(sizes)], axis=1)[learns][:, :len(task.room)]
    if task.objective.name == "seq2seq":
        read = split.inputs[documents].astype(np.int64)
        sizes = np.minimum(np.stack([read, lengths - read], axis=1), task.room)
        return np.stack([documents, np.zeros_like(lengths), lengths, np.zeros_like(lengths)], axis=1), sizes
    spans = task.objective.name == "span_corruption"
    of, start, stop = pack.windows(np.maximum(lengths - (2 if spans else 1), 0), longest_window(task) if spans else task.sequence_length)
    sizes = _span_room(task, stop - start) if spans else (stop - start)[:, None]
    return np.stack([documents[of], start, stop, np.zeros_like(of)], axis=1), sizes


def _sides(task: Task, split: Split, documents: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of chats, first and last input of what a row takes of each, int64; of preferences likewise of both sides. What is beyond is cut off."""
    lengths = split.tokens[documents].astype(np.int64)
    if task.objective.name == "sft":
        return [(np.zeros_like(lengths), np.minimum(lengths - 1, task.sequence_length))]
    middle, most = split.inputs[documents].astype(np.int64), task.sequence_length // 2
    return [(np.zeros_like(lengths), np.minimum(middle - 1, most)), (middle, middle + np.minimum(lengths - middle - 1, most))]


def _said(split: Split, documents: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """How many of the tokens [start, stop) of each chat the assistant says: int64 [documents]."""
    number = np.full(len(split.tokens), -1)
    number[documents] = np.arange(len(documents))
    of = number[np.repeat(np.arange(len(split.tokens)), np.diff(split.turn_ends, prepend=0) // 2)]
    begins, ends, of = split.turns[::2][of >= 0], split.turns[1::2][of >= 0], of[of >= 0]
    inside = np.maximum(np.minimum(ends, stop[of]) - np.maximum(begins, start[of]), 0)
    return np.bincount(of, inside, len(documents)).astype(np.int64)


def piece_tokens(task: Task, split: Split, pieces: np.ndarray) -> np.ndarray:
    """Tokens of its document that each piece, int64 [pieces, 4], brings into a row: targets; of a text for span corruption all that can be hidden; of a pair
    both sides, as far as they are not cut. int64 [pieces]."""
    if task.labelled:
        return np.minimum(pieces[:, 2] - pieces[:, 1], task.sequence_length)
    if task.objective.name != "seq2seq":
        return pieces[:, 2] - pieces[:, 1]
    read, whole = split.inputs[pieces[:, 0]].astype(np.int64), split.tokens[pieces[:, 0]].astype(np.int64)
    return np.minimum(read, task.room[0]) + np.minimum(whole - read, task.room[1])


def document_tokens(task: Task, split: Split, documents: np.ndarray) -> np.ndarray:
    """The same of whole documents, int64 [documents]."""
    if task.objective.name in CHATS:
        pieces, sizes = _items(task, split, documents)
        return np.bincount(pieces[:, 0], sizes[:, 0], len(split.tokens))[documents].astype(np.int64)
    lengths = split.tokens[documents].astype(np.int64)
    bare = 0 if task.labelled else 2 if task.objective.name == "span_corruption" else 1  # bos and eos, or the first token, which is no target
    whole = np.stack([documents, np.zeros_like(lengths), np.maximum(lengths - bare, 0), np.zeros_like(lengths)], axis=1)
    return piece_tokens(task, split, whole)


def plan(task: Task, split: Split, key: tuple, documents: np.ndarray | None = None) -> Plan:
    """The rows of one epoch of training over the documents (all, or those numbered), shuffled by `key`; a pure function of its arguments."""
    if task.labelled:
        return pack.grouped_plan(*_items(task, split, documents), task.batch_size, *key)
    if task.fitted:
        return pack.fitted_plan(*_items(task, split, documents), task.room, *key)
    if documents is None:
        return pack.epoch_plan(split.tokens, task.sequence_length, *key)
    found = pack.epoch_plan(split.tokens[documents], task.sequence_length, *key)
    return found._replace(documents=documents[found.documents])


def epoch_size(task: Task, split: Split, documents: np.ndarray | None = None) -> EpochSize:
    """Rows, targets, padding and positions of an epoch, the same for each."""
    if task.labelled:
        _, sizes = _items(task, split, documents)
        rows = -(-len(sizes) // task.batch_size) * task.batch_size
        return EpochSize(rows, len(sizes), rows * task.sequence_length - int(sizes.sum()), rows * task.sequence_length)
    if not task.fitted:
        return pack.epoch_size(split.tokens if documents is None else split.tokens[documents], task.sequence_length)
    _, sizes = _items(task, split, documents)
    if task.objective.name in CHATS:
        rows, taken, places = int(pack.best_fit(sizes, task.room).max(initial=-1)) + 1, int(sizes[:, 0].sum()), task.sequence_length
        return EpochSize(rows, taken, rows * places - taken, rows * places)
    rows = int(pack.best_fit(sizes, task.room).max(initial=-1)) + 1
    return EpochSize(rows, int(sizes[:, -1].sum()), rows * sum(task.room) - int(sizes.sum()), rows * sum(task.room))


def notes(task: Task, split: Split) -> list[str]:
    """What a user should know of how documents become rows: what is cut, and how."""
    if task.labelled:
        long = int((split.tokens > task.sequence_length).sum())
        used, mean = padded(task, split)
        return [f"{len(split.tokens):,} training texts; batches are {', '.join(map(str, used))} tokens long, {mean:.0f} on average",
                *([f"{long:,} texts are longer than data.sequence_length={task.sequence_length} tokens; what is beyond is left out"] if long else [])]
    if task.objective.name == "seq2seq":
        room = task.room
        cut = [int((part > most).sum()) for part, most in zip((split.inputs, split.tokens - split.inputs), room)]
        return [f"cut: {cut[0]:,} inputs are longer than data.sequence_length={room[0]} and {cut[1]:,} targets than data.target_length={room[1]} tokens; "
                "what is beyond is left out"] if any(cut) else []
    if task.objective.name in CHATS:
        documents = np.arange(len(split.tokens))
        whole = split.tokens - len(_sides(task, split, documents[:1]))
        cut = sum(stop - start for start, stop in _sides(task, split, documents)) < whole
        gone = len(documents) - len(_items(task, split, None)[0])
        return [f"{int(cut.sum()):,} of {len(documents):,} chats are longer than their row and lose their end; of {gone:,} nothing is left to learn, and they "
                "are left out"] if cut.any() or gone else []
    if not task.fitted:
        return []
    spans = task.objective.name == "span_corruption"
    most = longest_window(task) if spans else task.sequence_length
    long = int((split.tokens - (2 if spans else 1) > most).sum())
    return [f"{long:,} of {len(split.tokens):,} documents are longer than a row and are cut into windows of {most} tokens; none is lost"] if long else []


def length(task: Task, split: Split, rows: Sequence[Sequence[Piece]]) -> int:
    """Tokens of the rows of a whole batch of labelled texts: the least of `lengths` that holds them."""
    most = max((int(split.tokens[piece.document]) for row in rows for piece in row), default=0)
    return next((n for n in task.lengths if n >= most), task.sequence_length)


def padded(task: Task, split: Split) -> tuple[list[int], float]:
    """The lengths that the batches of an epoch have, and their mean, as in the first epoch of seed 0."""
    order = plan(task, split, (0, 0))
    rows = [pack.row(order, i) for i in range(len(order.rows))]
    found = [length(task, split, rows[i:i + task.batch_size]) for i in range(0, len(rows), task.batch_size)]
    return sorted({*found}), float(np.mean(found))


def evaluation_documents(split: Split, limit: int) -> np.ndarray:
    """Numbers of the documents to evaluate: all, or `limit` spread evenly over the split."""
    count = min(limit or len(split.tokens), len(split.tokens))
    return np.arange(count) * len(split.tokens) // max(count, 1)


def evaluation_plan(task: Task, split: Split, documents: np.ndarray, overlap: float) -> Plan:
    """The rows in which every target of `documents` counts once; `overlap` as in `pack.evaluation_plan`, for encoder-decoders none."""
    if task.labelled:  # the shortest first, so that little is padding
        pieces, sizes = _items(task, split, documents)
        order = np.argsort(sizes[:, 0], kind="stable")
        return pack.FittedPlan(pieces[order], np.arange(1, len(order) + 1), np.arange(len(order)))
    if task.objective.name in PAIRED + CHATS:
        return pack.fitted_plan(*_items(task, split, documents), task.room)
    return pack.evaluation_plan(split.tokens, task.sequence_length, overlap, documents)


def evaluation_targets(task: Task, split: Split, documents: np.ndarray) -> np.ndarray:
    """Targets of each document in an evaluation, int64 [documents]; with masked tokens all of which some are chosen."""
    if task.objective.name in CHATS:
        return sum(_said(split, documents, start + 1, stop + 1) for start, stop in _sides(task, split, documents))
    if task.objective.name not in PAIRED:
        return split.tokens[documents].astype(np.int64) - 1
    pieces, sizes = _items(task, split, documents)
    return np.bincount(pieces[:, 0], sizes[:, 1], len(split.tokens))[documents].astype(np.int64)


def fill(task: Task, rows: Sequence[Sequence[Piece]], corpus: Corpus, split: str, first: int | None, seed: int = 0) -> Batch:
    """The batch of planned rows, with the key "documents".

    Args:
      first: number of the first row in the run, from which masks and spans follow; None in an evaluation, where they follow from the document.
    """
    assert not task.labelled, "loader.py fills batches of labelled texts by fill_labelled"
    key = ("evaluation",) if first is None else ("train", seed)
    name = task.objective.name
    if name in CHATS:
        return _chats(task, rows, corpus, split)
    if name not in PAIRED:
        batch = tasks.next_token_batch(rows, lambda document, start, stop: corpus.read(split, document, start, stop), task.sequence_length)
        if task.masking is None:
            return batch
        if first is None:
            numbers = (batch["documents"].astype(np.uint64) << np.uint64(32)) + batch["positions"].astype(np.uint64)
        else:
            numbers = np.arange(batch["tokens"].size, dtype=np.uint64).reshape(batch["tokens"].shape) + np.uint64(first * task.sequence_length)
        return tasks.mask_batch(batch, task.masking, numbers, *key)
    counts = np.array([len(row) for row in rows], np.int64)
    pieces = [piece for row in rows for piece in row]
    pairs = _pairs(task, pieces, corpus, split) if name == "seq2seq" else _spans(task, rows, pieces, corpus, split, first, key)
    return tasks.pair_batch(counts, *pairs, np.array([piece.document for piece in pieces], np.int64), encoder_length=task.sequence_length,
                            decoder_length=task.target_length, start=task.start)


class Targets(NamedTuple):
    """The labels of a split's documents, as numbers."""
    classes: np.ndarray  # float32 [documents, classes], see `labels.targets`; of token_classify empty
    tags: list[np.ndarray]  # token_classify: of each document the tags of its words; else empty
    words: list[np.ndarray]  # likewise the places of their first tokens


def targets(task: Task, corpus: Corpus, split: str) -> Targets:
    """Labels of a split as arrays: one row of numbers for each document, or tags of its words."""
    found = corpus.examples(split)
    if task.objective.name == "token_classify":
        return Targets(np.zeros((0, 0), np.float32), labels.tags(task.label_names, found.labels), found.words)
    return Targets(labels.targets(task.objective.name, task.label_names, found.labels), [], [])


def cut_text(task: Task, tokens: np.ndarray, inputs: int) -> tuple[np.ndarray, int]:
    """A labelled text that fits a row, and the tokens of a pair's first text in it: the end of the longer text of a pair is left out first."""
    most = task.sequence_length
    if len(tokens) <= most:
        return tokens, inputs
    if not inputs:
        return np.append(tokens[:most - 1], task.eos), 0
    between = 2 if inputs > 2 and tokens[inputs - 2] == task.eos else 1
    first, second = tokens[:inputs - between], tokens[inputs:-1]
    room = most - between - 1
    keep = min(len(first), max(room - len(second), (room + 1) // 2))
    return np.concatenate([first[:keep], [task.eos] * between, second[:room - keep], [task.eos]]), keep + between


def fill_labelled(task: Task, rows: Sequence[Sequence[Piece]], corpus: Corpus, split: str, of: Targets, length: int, *, train: bool) -> Batch:
    """The batch of planned rows of labelled texts, each `length` tokens; in training classes count with their weights, else alike."""
    index, texts = corpus.splits[split], []
    for row in rows:
        tokens = corpus.read(split, row[0].document) if row else np.zeros(0, np.int32)
        texts.append(cut_text(task, tokens, int(index.inputs[row[0].document]) if row and index.inputs is not None else 0))
    documents = np.array([row[0].document if row else -1 for row in rows], np.int64)
    factors, classes = task.class_weights if train and len(task.class_weights) else None, of.classes
    if factors is not None and task.objective.name == "multi_label":
        factors, classes = None, of.classes * factors
    batch = tasks.text_batch(texts, documents, length, last=task.last, types=task.types)
    if task.objective.name == "token_classify":
        return tasks.tag_words(batch, documents, of.words, of.tags, factors)
    return tasks.label_texts(batch, documents, classes, factors)


def _chats(task: Task, rows: Sequence[Sequence[Piece]], corpus: Corpus, split: str) -> Batch:
    """Rows of chats, with weights on what the assistant says. Of a preference the chosen and the rejected chat are segments one after the other, and
    "documents" has twice its number, and one more for the rejected one."""
    index, parts = corpus.splits[split], []
    for row in rows:
        sides = [_sides(task, index, np.array([piece.document])) for piece in row]
        parts.append([Piece(piece.document, int(start[0]), int(stop[0])) for piece, both in zip(row, sides) for start, stop in both])
    batch = tasks.next_token_batch(parts, lambda document, start, stop: corpus.read(split, document, start, stop), task.sequence_length)
    for number, row in enumerate(parts):
        column = 0
        for k, (document, start, stop, _) in enumerate(row):
            place = number, slice(column, column + stop - start)
            batch["weights"][place] = index.said(document, start + 1, stop + 1)
            if task.objective.name == "preference":
                batch["documents"][place] = 2 * document + k % 2
            column = place[1].stop
    return batch


def _pairs(task: Task, pieces: Sequence[Piece], corpus: Corpus, split: str) -> tuple[np.ndarray, ...]:
    read, said = [], []
    for piece in pieces:
        tokens, middle = corpus.read(split, piece.document), int(corpus.splits[split].inputs[piece.document])
        read.append(cut_input(task, tokens[:middle]))
        said.append(tokens[middle:][:task.target_length])
    sizes = lambda parts: np.array([len(part) for part in parts], np.int64)
    return _joined(read), sizes(read), _joined(said), sizes(said)


def cut_input(task: Task, tokens: np.ndarray) -> np.ndarray:
    """An input (its tokens and eos) that fits the encoder's row: a longer one loses its end and is ended again, as the encoder expects; a target that is cut
    is not, since its text does not end there."""
    return tokens if len(tokens) <= task.sequence_length else np.append(tokens[:task.sequence_length - 1], tokens[-1])


def _spans(task: Task, rows: Sequence[Sequence[Piece]], pieces: Sequence[Piece], corpus: Corpus, split: str, first: int | None,
           key: tuple) -> tuple[np.ndarray, ...]:
    if first is None:
        numbers = [(piece.document << 32) + piece.start for piece in pieces]
    else:
        numbers = [(first + i << 16) + k for i, row in enumerate(rows) for k in range(len(row))]
    texts = [corpus.read(split, piece.document, piece.start + 1, piece.stop + 1) for piece in pieces]
    return tasks.span_corruption(_joined(texts), np.array([len(text) for text in texts], np.int64), np.array(numbers, np.uint64), task.sentinels, task.eos,
                                 *key, rate=task.objective.span_rate, length=task.objective.span_length)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) else np.zeros(0, np.int32)
