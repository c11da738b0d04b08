"""Runs one task on one model: each item is asked exactly once, however often the evaluation is killed and started again."""

import hashlib
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlm import sharding
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.evaluate import answers, definition, follow, results, score
from jaxlm.evaluate.answers import Answer
from jaxlm.evaluate.definition import Item, Task
from jaxlm.evaluate.likelihood import Scorer
from jaxlm.evaluate.sources import Read


class Subject(NamedTuple):
    """What is asked."""
    answer: Callable[[list[str], int, Sequence[str], float], list[str]]  # prompts, most tokens, texts that end an answer, temperature -> its answers
    params: Any
    mesh: Mesh
    tokenizer: Tokenizer
    scorer: Scorer
    context: int  # longest sequence that the model may see
    batch_tokens: int  # of a batch, about
    about: dict[str, Any]  # which model this is: its fingerprint decides whether a result is its own
    encoder: bool = False  # it is asked by hiding tokens


class Ask(NamedTuple):
    """A task and how much of it."""
    task: Task
    read: Read
    shots: int
    limit: int  # the first so many items; 0: all

    @property
    def name(self) -> str:
        """The task's, with what differs from its definition."""
        return self.task.name + f"-{self.shots}shot" * (self.shots != self.task.shots) + f"-first{self.limit}" * bool(self.limit)


def evaluate(of: Subject, ask: Ask, folder: pathlib.Path, *, bootstrap: int, log: Callable[[str], None] = print,
             progress: Callable[[int, int], None] | None = None, overlap: Callable[[list[str]], dict[str, Any]] | None = None,
             judge: Callable[[list[str]], Sequence[float]] | None = None) -> dict[str, Any] | None:
    """The result of a task (see `results`), on file in `folder`: read from there if this model has answered these items before, else continued or begun.
    In several processes all call this together; process 0 alone writes, and returns the result.

    Args:
      bootstrap: resamples behind the intervals that are not exact.
      progress: called with requests done and requests in all.
      overlap: the items' texts -> how much of them is in the training data: {"shares": one per item or None, ...}, for the result.
      judge: of Task.judge: texts -> 1 for each that it calls toxic, else 0. Called in process 0 alone.

    Raises:
      ValueError: one line: a continuation longer than the model, too few examples, an encoder that is asked to continue text.
    """
    if of.encoder and ask.task.kind != "pair":
        raise ValueError(f"task {ask.task.name} is answered by a model that continues text (model.kind=decoder), and this is an encoder: it can be asked "
                         "tasks of kind 'pair', such as crows_pairs")
    path = folder / f"{ask.name}.json"
    asked = definition.with_examples(ask.task, ask.read.items[:ask.limit or None], ask.read.examples, ask.shots)
    header = {"definition": ask.task.fingerprint(), "items_sha256": _sha256(asked), "model": of.about["fingerprint"], "context": of.context}
    header |= {"judge": ask.read.origin["judge"]} if ask.task.judge else {}
    before, part = results.read(path), folder / f"{ask.name}.part.jsonl"
    complete = before is not None and all(before.get(key) == value for key, value in header.items() if key != "model") and before["model"] == of.about
    if _agreed(complete):
        log(f"{ask.name}: this model has answered these items before: {path}")
        return before
    started, kept = time.monotonic(), _begin(part, header) if jax.process_index() == 0 else []
    if kept:
        log(f"{ask.name}: going on after {len(kept):,} requests that were done before")
    work = _generate if ask.task.kind == "generate" else _score
    rows, cut = work(of, ask.task, asked, kept, lambda new: follow.append(part, *new) if jax.process_index() == 0 else None, progress)
    if jax.process_index() > 0:
        return None
    if judge is not None:
        rows = [row | {"score": float(said)} for row, said in zip(rows, judge([row["text"] for row in rows]), strict=True)]
    result, items = _result(ask, asked, rows, bootstrap, overlap)
    notes = [f"{cut:,} of {len(rows):,} requests were longer than the model's context of {of.context}: their beginnings were cut"] * bool(cut)
    result |= header | {"model": of.about, "cut": cut, "notes": notes + result["notes"], "seconds": round(time.monotonic() - started, 1)}
    results.write(path, result, items)
    part.unlink(missing_ok=True)
    return results.read(path)


def _agreed(here: bool) -> bool:
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(here))) if jax.process_count() > 1 else here


def _sha256(items: Sequence[Item]) -> str:
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


def _begin(part: pathlib.Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """What an evaluation of the same thing has done before it was killed; else the file is begun anew."""
    rows = follow.read(part)
    if rows and rows[0] == header:
        return rows[1:]
    part.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    follow.append(part, header)
    return []


def _left(keys: Sequence[tuple[int, int]], kept: Sequence[dict[str, Any]]) -> list[int]:
    """Numbers of the requests that are not done; process 0, which has the file, tells the others."""
    done = {(row["item"], row["part"]) for row in kept}
    mask = np.array([key not in done for key in keys])
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(mask) if jax.process_count() > 1 else mask).tolist()


def _score(of: Subject, task: Task, items: Sequence[Item], kept: list[dict], note: Callable[[list[dict]], None], progress) -> tuple[list[dict], int]:
    """A row per request: part 0, 1, ... are the continuations (or windows of a text), -1, -2, ... the same after nothing."""
    keys, requests, cut = [], [], 0
    if of.encoder:
        for item in items:
            for side, some in enumerate(score.hidden(of.tokenizer, item.continuations, of.context)):
                keys += [(item.number, 2 * i + side) for i in range(len(some))]
                requests += some
    elif task.kind == "loss":
        for item in items:
            parts = score.windows(of.tokenizer, item.continuations[0], of.context)
            keys += [(item.number, i) for i in range(len(parts))]
            requests += parts
    else:
        flat = [(item.number, i, before, after) for item in items for i, (before, after) in enumerate(zip(item.contexts, item.continuations))]
        flat += [(number, -1 - i, "", after) for number, i, _, after in flat] if "acc_pmi" in task.metrics else []
        keys = [(number, i) for number, i, _, _ in flat]
        requests, cut = score.pairs(of.tokenizer, [entry[2] for entry in flat], [entry[3] for entry in flat], of.context)
    left = _left(keys, kept)
    rows = list(kept)
    for batch in score.likelihoods(of.scorer, of.params, of.mesh, [requests[i] for i in left], context=of.context, batch_tokens=of.batch_tokens):
        new = [{"item": keys[left[i]][0], "part": keys[left[i]][1], "logprob": found.logprob, "greedy": found.greedy, "tokens": requests[left[i]].targets}
               for i, found in batch.items()]
        note(new)
        rows += new
        if progress:
            progress(len(rows), len(keys))
    return rows, cut


def _generate(of: Subject, task: Task, items: Sequence[Item], kept: list[dict], note: Callable[[list[dict]], None], progress) -> tuple[list[dict], int]:
    """A row per item, with the text of its greedy answer."""
    left, rows = _left([(item.number, 0) for item in items], kept), list(kept)
    prompts, cut = cut_prompts(of, [item.contexts[0] for item in items], task.max_tokens)
    for batch in written(of, [prompts[i] for i in left], max_tokens=task.max_tokens, stop=task.stop):
        new = [{"item": items[left[i]].number, "part": 0, "text": text} for i, text in batch.items()]
        note(new)
        rows += new
        if progress:
            progress(len(rows), len(items))
    return rows, cut


def cut_prompts(of: Subject, prompts: Sequence[str], max_tokens: int) -> tuple[list[str], int]:
    """Prompts without the beginnings for which the model has no room, and how many lost one.

    Raises:
      ValueError: one line: there is no room for any prompt.
    """
    room = of.context - max_tokens - 1
    if room < 1:
        raise ValueError(f"answers of up to {max_tokens} tokens leave no room for a question in the model's context of {of.context}: lower max_tokens")
    encoded = of.tokenizer.encode_batch(prompts)
    return ([prompt if len(ids) <= room else of.tokenizer.decode(ids[-room:].tolist()) for prompt, ids in zip(prompts, encoded)],
            sum(len(ids) > room for ids in encoded))


def written(of: Subject, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str], temperature: float = 0.0) -> Iterator[dict[int, str]]:
    """The model's continuations of the prompts, by their numbers, batch by batch, longest first. In several processes all call this together."""
    sizes = [len(ids) for ids in of.tokenizer.encode_batch(list(prompts))]
    left, ways = sorted(range(len(prompts)), key=lambda i: -sizes[i]), sharding.ways("batch", of.mesh)
    while left:
        size = -(-min(max(1, of.batch_tokens // (sizes[left[0]] + max_tokens)), len(prompts)) // ways) * ways
        some, left = left[:size], left[size:]
        filled = [prompts[i] for i in some] + [prompts[some[0]]] * (size - len(some))  # whole batches, so few shapes
        yield dict(zip(some, of.answer(filled, max_tokens, stop, temperature)))


def _result(ask: Ask, asked: Sequence[Item], rows: Sequence[dict], bootstrap: int, overlap) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and items, from what is on file alone."""
    task, by = ask.task, {}
    for row in rows:
        assert (row["item"], row["part"]) not in by, "an item was scored twice"
        by[row["item"], row["part"]] = row
    found = [_answer(task, item, by) for item in asked]
    groups = dict.fromkeys(item.about["group"] for item in asked if "group" in item.about)
    of_group = {name: np.array([item.about.get("group") == name for item in asked]) for name in groups}
    columns = {metric: np.array([answers.METRICS[metric].columns(task, item, answer) for item, answer in zip(asked, found)], np.float64)
               for metric in task.metrics}
    result = {"task": task.name, "kind": task.kind, "metric": task.metrics[0], "items": len(asked), "shots": ask.shots, "limit": ask.limit,
              "metrics": {metric: answers.figures(values, metric, bootstrap) for metric, values in columns.items()}, "notes": [],
              "by_group": {name: {metric: answers.figures(values[rows], metric, bootstrap) for metric, values in columns.items()} | {"items": int(rows.sum())}
                           for name, rows in of_group.items()} if len(of_group) > 1 else {},
              "licence": task.licence, "get": task.get, "source": ask.read.origin}
    bare = ask.read.items[:ask.limit or None]  # without examples, which all items share
    shares = None
    if overlap is not None:
        result["contamination"] = overlap([_whole(item) for item in bare])
        shares = result["contamination"].pop("shares", None)
        if shares is not None:
            clean = np.array([i for i, share in enumerate(shares) if not share], np.int64)
            figures = {metric: answers.figures(values[clean], metric, bootstrap) for metric, values in columns.items()} if len(clean) else {}
            result["contamination"]["clean"] = figures
            hit = len(shares) - len(clean)
            result["notes"] += [f"{hit:,} of {len(shares):,} items share {result['contamination']['words']} words in a row with the training data"] * bool(hit)
    items = []
    for i, (item, answer) in enumerate(zip(bare, found)):
        row = {"item": item.number, "context": item.contexts[max(item.right, 0)] if item.contexts else "", "continuations": item.continuations,
               "right": item.right, "references": item.references, "about": item.about, **answer._asdict(),
               "columns": {metric: values[i] for metric, values in columns.items()}}
        row = {key: value for key, value in row.items() if value is not None and value not in ((), "", {})}
        items.append(row if shares is None else row | {"overlap": shares[i]})
    return result, items


def _answer(task: Task, item: Item, by: dict[tuple[int, int], dict]) -> Answer:
    if task.kind == "generate":
        return Answer(text=by[item.number, 0]["text"], score=by[item.number, 0].get("score"))
    if (item.number, len(item.continuations)) in by and task.kind == "pair":  # an encoder's: a request for each token, the two texts in turn
        parts = [[by[item.number, part] for part in itertools.takewhile(lambda part: (item.number, part) in by, itertools.count(side, 2))] for side in (0, 1)]
        merge = {"logprob": math.fsum, "tokens": sum, "greedy": all}
        return Answer(*(tuple(reduce(row[key] for row in some) for some in parts) for key, reduce in merge.items()))
    if task.kind == "loss":
        parts = []
        while (item.number, len(parts)) in by:
            parts.append(by[item.number, len(parts)])
        return Answer((sum(row["logprob"] for row in parts),), (sum(row["tokens"] for row in parts),), (all(row["greedy"] for row in parts),))
    parts = [by[item.number, i] for i in range(len(item.continuations))]
    alone = tuple(by[item.number, -1 - i]["logprob"] for i in range(len(parts))) if "acc_pmi" in task.metrics else ()
    return Answer(*(tuple(row[key] for row in parts) for key in ("logprob", "tokens", "greedy")), alone)


def _whole(item: Item) -> str:
    """What of an item should not have been training text: the question and what is right."""
    if not item.contexts:
        return item.continuations[0]
    right = max(item.right, 0)
    said = item.references[0] if item.references else item.continuations[right] if item.continuations else ""
    return f"{item.contexts[right]} {said}".strip()
