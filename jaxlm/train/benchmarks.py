"""Tasks, and a corpus's splits, as results on file: what `jaxlm eval` asks of a saved run."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm import generate, trees
from jaxlm.data import contamination
from jaxlm.data.shards import Corpus
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.evaluate import answers, benchmark, definition, likelihood, results, sources, toxicity, verdict
from jaxlm.evaluate import harness as harnesses
from jaxlm.evaluate.benchmark import Ask, Subject
from jaxlm.models import kinds
from jaxlm.models.decoder import Model
from jaxlm.train import classified, saved

WORDS = 13  # of the n-grams that are looked for in the training data
_SCAN = 64 * 2**20  # bytes of training text that are read through for it without being asked to: about a minute
_CHUNK = 1024  # tokens whose logits exist at one time, where the run does not say


def subject(run: saved.Run, batch_size: int = 0) -> Subject:
    """A saved model as tasks ask it.

    Raises:
      ValueError: one line: a model that neither continues text nor fills in hidden tokens.
    """
    config = run.config
    if config.model.encoder_layers or config.model.output != "tokens":
        what = "an encoder-decoder" if config.model.encoder_layers else f"a model with model.output={config.model.output}"
        raise ValueError(f"{run.workdir} holds {what}, and tasks are answered by one that continues text (model.kind=decoder, model.output=tokens); its own "
                         "held-out data are evaluated by jaxlm eval without --tasks")
    rows = batch_size or config.eval.batch_size or config.data.batch_size
    about = {"workdir": str(run.workdir), "step": run.step, "fingerprint": run.fingerprint, "parameters": trees.count(run.params)}
    answer = answerer(run.model, run.params, run.tokenizer, config.model.context)
    return Subject(answer, run.params, run.mesh, run.tokenizer, _scorer(config.model, run.mesh, config.objective.chunk_rows or _CHUNK),
                   config.model.context, rows * min(config.data.sequence_length, config.model.context), about, config.model.kind == "encoder")


def answerer(model: Model, params: Any, tokenizer: Tokenizer, context: int) -> Callable[[list[str], int, Sequence[str], float], list[str]]:
    """`Subject.answer` of a model."""
    return lambda prompts, max_tokens, stop, temperature: generate.complete(
        model, params, tokenizer, prompts, max_tokens=max_tokens, context=context, settings=generate.Settings(temperature=temperature), stop=stop)


@functools.lru_cache(1)
def _scorer(model, mesh, chunk_rows: int) -> likelihood.Scorer:
    """Compiled once for all checkpoints of a run."""
    return likelihood.scorer(kinds.build(model), mesh, chunk_rows)


def asks(names: Sequence[str], folders: Sequence[str], *, tfds_dir: str, shots: int | None, limit: int) -> list[Ask]:
    """Reads the tasks of these names and their items, before any model is.

    Raises:
      ValueError: one line: see `definition.find` and `sources.read`.
    """
    places = [pathlib.Path(folder).expanduser() for folder in folders]
    for folder in places:
        if not folder.is_dir():
            raise ValueError(f"--task_data={folder} is not a folder")
    found = []
    for task in definition.find(names):
        count = task.shots if shots is None else shots
        found.append(Ask(task, sources.read(task, places, tfds_dir, count), count, limit))
    return found


def tasks(run: saved.Run, asked: Sequence[Ask], *, batch_size: int = 0, contaminated: bool | None = None, log: Callable[[str], None] = print,
          progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """Results of all tasks, one after the other. In several processes all call this together; only process 0 gets them.

    Args:
      contaminated: whether the training data are searched for the items; None: where that takes about a minute at most.
    """
    of, folder = subject(run, batch_size), results.folder(run.workdir, run.step)
    overlap = functools.partial(_overlap, run, contaminated)
    judges = [_judge(ask, log) for ask in asked]  # all of them before anything is asked
    return [found for ask, judge in zip(asked, judges) if (found := benchmark.evaluate(
        of, ask, folder, bootstrap=run.config.eval.bootstrap, log=log, progress=progress, overlap=overlap, judge=judge)) is not None]


def _judge(ask: Ask, log: Callable[[str], None]) -> Callable[[Sequence[str]], list[float]] | None:
    """What calls a continuation toxic: a list of words, or a class of a classifier when it is likelier than not."""
    if not ask.read.judge:
        return None
    if pathlib.Path(ask.read.judge).is_file():
        return toxicity.by_words(pathlib.Path(ask.read.judge))
    folder, _, label = ask.read.judge.rpartition(":")
    if jax.process_count() > 1:
        raise ValueError(f"task {ask.task.name}: a classifier judges in one process: run the audit without --processes, or with a list of words")
    run = saved.open_run(folder, log=log)
    if run.config.objective.name not in ("classify", "multi_label") or label not in run.config.model.label_names:
        raise ValueError(f"task {ask.task.name}: {folder} has no class {label!r}; " + (f"its classes: {', '.join(run.config.model.label_names)}" if
                         run.config.model.label_names else "it is no classifier"))
    return lambda texts: [float(one["probabilities"][label] > 0.5) for one in classified.label(run, texts)]


def _overlap(run: saved.Run, wanted: bool | None, texts: list[str]) -> dict[str, Any]:
    """How much of a task's items is in the run's training data; kept in the workdir, since it is the same for all checkpoints."""
    if wanted is False:
        return {"words": WORDS, "searched": False, "why": "not asked for"}
    unknown = [entry["origin"] for entry in run.data.get("history", ())]
    about = {"words": WORDS, "training": run.data["manifest"]} | ({"not_searched": unknown} if unknown else {})
    if not run.data["manifest"]:
        return about | {"searched": False, "why": "what the model was trained on is not known here"}
    try:
        corpus = saved.open_data(run)
    except ValueError as error:
        return about | {"searched": False, "why": str(error)}
    size = int(corpus.splits["train"].text_bytes.sum())
    if wanted is None and size > _SCAN:
        return about | {"searched": False, "why": f"the training text has {size / 2**20:,.0f} MiB; --contamination searches it"}
    kept = run.workdir / results.FOLDER / "contamination.json"
    key = hashlib.sha256(json.dumps([texts, WORDS, corpus.fingerprint]).encode()).hexdigest()
    try:
        known = json.loads(kept.read_text())
    except (OSError, ValueError):
        known = {}
    shares = known.get(key) or contamination.shares(texts, _training_texts(run, corpus), WORDS)
    if key not in known:
        kept.parent.mkdir(parents=True, exist_ok=True)
        results.replace(kept, json.dumps(known | {key: shares}))
    told = [share for share in shares if share is not None]
    return about | {"searched": True, "items": len(told), "hit": sum(share > 0 for share in told), "share": float(np.mean(told)) if told else None,
                    "shares": shares}


def _training_texts(run: saved.Run, corpus: Corpus) -> Iterator[str]:
    for document in range(len(corpus.splits["train"].tokens)):
        yield run.tokenizer.decode(corpus.read("train", document)[1:-1].tolist())


# --- a split of a corpus, in the same form ---


def split_name(split: str, limit: int, data: str) -> str:
    """The name of what was evaluated, in results."""
    return split + f"-of-{pathlib.Path(data).name}" * bool(data) + f"-{limit}documents" * bool(limit)


def split_items(corpus: Corpus, split: str, scores: likelihood.Scores) -> str:
    """sha256 of which documents were scored."""
    return hashlib.sha256(json.dumps([corpus.fingerprint, split, scores.document.tolist()]).encode()).hexdigest()


def write_split(run: saved.Run, corpus: Corpus, split: str, scores: likelihood.Scores, *, limit: int, data: str) -> dict[str, Any]:
    """The result of a split, of the whole and of each source, with a line for each document; see `results`."""
    columns = {"loss": (scores.nll, scores.tokens), "bits_per_byte": (scores.nll, scores.bytes), "accuracy": (scores.right, scores.tokens)}
    columns = {name: np.stack(pair, axis=1).astype(np.float64) for name, pair in columns.items() if name in likelihood.UNITS[run.config.objective.name]}
    names = [corpus.sources[i] for i in corpus.splits[split].sources[scores.document].tolist()] if len(corpus.sources) else [""] * len(scores.document)
    bootstrap = run.config.eval.bootstrap
    figures = lambda rows: {name: answers.figures(values[rows], name, bootstrap) for name, values in columns.items()}
    of_source = {name: np.array([one == name for one in names]) for name in dict.fromkeys(names)}
    result = {"task": split_name(split, limit, data), "kind": "loss", "metric": "loss", "items": len(names), "limit": limit, "metrics": figures(slice(None)),
              "by_source": {name: figures(rows) | {"items": int(rows.sum())} for name, rows in of_source.items()} if len(of_source) > 1 else {}, "notes": [],
              "source": {"corpus": str(corpus.folder), "manifest": corpus.fingerprint, "split": split}, "items_sha256": split_items(corpus, split, scores),
              "model": {"workdir": str(run.workdir), "step": run.step, "fingerprint": run.fingerprint, "parameters": trees.count(run.params)}}
    items = [{"item": int(document), "source": names[i], "columns": {name: values[i] for name, values in columns.items()}}
             for i, document in enumerate(scores.document)]
    path = results.folder(run.workdir, run.step) / f"{result['task']}.json"
    results.write(path, result, items)
    return results.read(path)


def sources_table(result: dict[str, Any]) -> str:
    """A line for each source of a split, where there are several; each begins with a line end."""
    rows = result.get("by_source") or {}
    first = next(iter(rows.values()), {})
    name = "bits_per_byte" if "bits_per_byte" in first else "loss"
    return "".join(f"\n  {source[:40]:<40} {row[name]['value']:.4f} {name.replace('_', ' ')}"
                   + (f" ({row[name]['low']:.4f} to {row[name]['high']:.4f})" if row[name]["low"] is not None else "") + f", {row['items']:,} documents"
                   for source, row in rows.items())


def judge(run: saved.Run, result: dict[str, Any], keep_best: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Adds a checkpoint's result to the run's verdict; what eval.jsonl says of it."""
    metric = f"{result['task']}/{result['metric']}"
    place = lambda step: results.folder(run.workdir, step) / result["files"]["items"].replace(".items.jsonl", ".json")
    found = verdict.after(verdict.read(run.workdir), metric, run.step, result["metrics"][result["metric"]],
                          lambda step: verdict.columns_of(place(step), result["metric"]), keep_best=keep_best)
    verdict.write(run.workdir, found)
    log(verdict.show(found, run.step))
    row = next(one for one in found.ranking if one["step"] == run.step)
    return {"verdict": row["verdict"], "best": found.best}


def harness(run: saved.Run, names: Sequence[str], *, batch_size: int, shots: int | None, limit: int) -> list[dict[str, Any]]:
    """Results of lm-evaluation-harness, on file beside ours; only process 0 writes them."""
    of, written = subject(run, batch_size), []
    if of.encoder:
        raise ValueError(f"{run.workdir} holds an encoder, and lm-evaluation-harness asks models that continue text (model.kind=decoder)")
    for result, items in harnesses.evaluate(of, names, shots=shots, limit=limit, bootstrap=run.config.eval.bootstrap):
        path = results.folder(run.workdir, run.step) / f"{result['task']}{f'-{shots}shot' * (shots is not None)}{f'-first{limit}' * bool(limit)}.json"
        if jax.process_index() == 0:
            results.write(path, result | {"model": of.about}, items)
            written.append(results.read(path))
    return written
