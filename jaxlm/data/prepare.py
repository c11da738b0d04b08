"""From raw text to a prepared corpus: read, clean, de-duplicate, split by the text's own hash, train the tokenizer, tokenise, write shards.

The order of the stages; what each does to a batch stands in stages.py, what de-duplication decides in survivors.py. The same files and config
give the same bytes, wherever and whenever, for any number of workers and any runner, and after any number of interruptions.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxlm
from jaxlm.config import LABELLED, CleanConfig, Config, DataConfig, DedupConfig, FilterConfig, ObjectiveConfig, TokenizerConfig, keys
from jaxlm.data import chat, conversations, corpora, page, readers, run, shards, stages, summary, tokenizer
from jaxlm.data.survivors import SPLITS, Survey

TIMINGS = "timings.json"
# Of data: those that the bytes depend on.
_KEYS = ("source", "text_key", "input_key", "label_key", "slice_keys", "format", "chat_template", "id_key", "licence_key", "licences", "on_error", "validation",
         "test", "shard_bytes")


def prepare(data: DataConfig, tokenizer_cfg: TokenizerConfig, folder: str | Path, *, clean: CleanConfig = CleanConfig(), filter: FilterConfig = FilterConfig(),
            dedup: DedupConfig = DedupConfig(), objective: str = "", log: Callable[[str], None] = print,
            runner: run.Runner | None = None) -> shards.Corpus:
    """Prepares `data.source` in `folder`, or opens what was prepared there from the same config.

    Args:
      data: what to read and how to split it.
      tokenizer_cfg: the tokenizer to train or to load.
      folder: made whole or not at all; not there yet, empty, or prepared from the same config.
      clean: what is done to each document, and which are kept.
      filter: rules of quality.
      dedup: which documents are dropped for another one.
      objective: with data.label_key what the labels are, see `ObjectiveConfig.name`.
      log: receives progress, a line at a time.
      runner: who does the work; None: this machine, with `data.workers` processes. These import `__main__`, so a script that calls this
        needs the usual `if __name__ == "__main__":`.

    Raises:
      ValueError: one line: bad input (see `corpora.read`), nothing left, nothing to train on, or a folder that holds something else.
      OSError: the disk is full or must not be written.
      KeyboardInterrupt: as it came; the work so far is kept for the next call, as it is after a kill.
    """
    folder = Path(folder)
    config = _config(data, tokenizer_cfg, clean, filter, dedup, objective)
    made_from = _made_from(config)
    if (folder / shards.MANIFEST).exists():
        shards.remove_leftover(folder)
        return _reuse(folder, made_from, config.data, log)
    files = _files(config.data, folder)
    if unread := corpora.left_out(config.data):
        log(f"left out: {sum(unread.values()):,} files of kinds that are not read: "
            + ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in list(unread.items())[:10]))
    with shards.replacing(folder, [jaxlm.__version__, made_from, *_fingerprints(files, made_from)], log) as (work, out):
        workers = _workers(config.data, files)
        try:
            with contextlib.nullcontext(runner) if runner else run.local(workers) as runner:
                stage = _Stages(config, work, files, log, runner)
                survey = stage.survivors()
                tok = stage.train_tokenizer(survey)
                manifest, report = _write(stage, survey, tok, out, made_from, files)
        except KeyboardInterrupt:
            log(f"interrupted: the same command goes on from here ({work}); to start anew, delete that folder")
            raise
        (out / TIMINGS).write_text(json.dumps({"workers": workers, "stages": stage.timings()}, indent=1) + "\n")
    log(summary.table(manifest, report))
    log(f"prepared {folder} in {sum(stage.seconds.values()):.1f} s; see {folder / page.NAME}")
    return shards.open_corpus(folder)


def make_tokenizer(data: DataConfig, tokenizer_cfg: TokenizerConfig, work: str | Path, *, clean: CleanConfig = CleanConfig(),
                   filter: FilterConfig = FilterConfig(), dedup: DedupConfig = DedupConfig(), objective: str = "",
                   log: Callable[[str], None] = print) -> tokenizer.Tokenizer:
    """The tokenizer that `prepare` would make. `work`: an empty or new folder for what lies between, the text as cleaned among it."""
    config = _config(data, tokenizer_cfg, clean, filter, dedup, objective)
    files = [] if _is_given(tokenizer_cfg) else corpora.files(config.data)
    with run.local(_workers(config.data, files)) as runner:
        stage = _Stages(config, Path(work), files, log, runner)
        return stage.train_tokenizer(stage.survivors() if files else None)


def _workers(data: DataConfig, files: list[corpora.SourceFile]) -> int:
    """A pool takes a second to start: no more workers than there are batches, if it is left to us."""
    return data.workers or max(1, min(os.cpu_count() or 1, sum(file.size for file in files) // stages.BATCH_BYTES))


class _Stages:
    """The stages of one preparation, each over all batches before the next one begins."""

    def __init__(self, config: Config, work: Path, files: list[corpora.SourceFile], log: Callable[[str], None], runner: run.Runner):
        self.config, self.work, self.log, self.units, self._runner = config, work, log, stages.units(files), runner
        work.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    def survivors(self) -> Survey:
        """Reads and cleans everything, then decides what lives."""
        cfg = self.config.dedup
        self._run("clean", run.Work("cleaned", self.work, self.units, functools.partial(stages.read, self.config.data, self.work),
                                    functools.partial(stages.clean_batch, self.config, self.work), lambda unit: unit.size,
                                    lambda unit: [file.path for file in unit.files]))
        with self._timed("de-duplicate"):
            survey = Survey(self.work, self.units, cfg, self.config.objective.name if self.config.data.label_key else "")
            self.bytes["clean"] = sum(source["read"]["bytes"] for source in survey.counts.sources.values())
            if cfg.exact:
                survey.drop_equal()
            if self.config.data.id_key:
                survey.check_ids(self.config.data)
            if cfg.line_length:
                survey.drop_lines()
        if cfg.line_length or cfg.near:
            tasks = survey.living()
            self._over("signed", "sign", tasks, functools.partial(stages.sign_batch, self.config, self.work))
            with self._timed("de-duplicate"):
                signed = survey.take_signed(tasks)
                self.bytes["sign"] = int(survey.sizes[signed].sum())
                if cfg.exact:
                    survey.drop_equal("dedup.lines")  # documents that differed in dead lines only
                if cfg.near:
                    survey.drop_near(signed)
        _need_training_text(survey, self.config.data)
        return survey

    def train_tokenizer(self, survey: Survey | None) -> tokenizer.Tokenizer:
        """Bytes, a file, or one trained on at most `tokenizer.train_bytes` of the training split: the documents with the smallest hashes."""
        cfg, file = self.config.tokenizer, self.work / "tokenizer"
        if _is_given(cfg):
            tok = tokenizer.train((), cfg) if cfg.kind == "bytes" else tokenizer.load(Path(cfg.path).expanduser())
        elif file.is_dir():
            return tokenizer.load(file)
        else:
            with self._timed("tokenizer"):
                chosen = survey.sample(self.config.data, cfg.train_bytes)
                texts = (text for living in survey.living(chosen) for text in stages.texts_of(self.work, living, self.config.dedup.line_length))
                if self.config.data.input_key:
                    texts = (side for text in texts for side in text.split(readers.PAIR))
                if self.config.data.format != "text":
                    texts = (message["content"] for text in texts for side in conversations.sides(text) for message in side)
                tok = tokenizer.train(texts, cfg)
            self.log(f"tokenizer: {cfg.kind}, {tok.vocab_size} pieces, trained on {survey.sizes[chosen].sum() / 1e6:.1f} MB in "
                     f"{self.seconds['tokenizer']:.1f} s")
        unfinished = self.work / "tokenizer.unfinished"
        unfinished.mkdir(exist_ok=True)
        tok.save(unfinished)
        if not file.is_dir():
            unfinished.rename(file)
        return tok

    def tokenise(self, survey: Survey, tok: tokenizer.Tokenizer) -> None:
        if self.config.data.format != "text":
            chat.template(self.config.data.chat_template, tok)  # refused here rather than by every worker
        self._over("tokenised", "tokens", survey.living(), functools.partial(stages.tokenise_batch, self.config, self.work, tok.fingerprint))
        self.bytes["tokens"] = int(survey.sizes[survey.live].sum())

    def timings(self) -> dict[str, Any]:
        """Seconds of each stage in this run, and text that went through it, MB/s."""
        rates = {name: {"bytes": size, "MB/s": round(size / self.seconds[name] / 1e6, 2)} for name, size in self.bytes.items()}
        return {name: {"seconds": round(seconds, 3)} | rates.get(name, {}) for name, seconds in self.seconds.items()}

    def _over(self, verb: str, name: str, tasks: list[stages.Living], function: Callable[[stages.Living], tuple[int, int]]) -> None:
        expand = functools.partial(_unless_done, self.work, name if name == "tokens" else "signed")
        self._run(name, run.Work(verb, self.work, tasks, expand, function, functools.partial(_clean_size, self.work)))

    def _run(self, name: str, work: run.Work) -> None:
        with self._timed(name):
            self._runner(work, self.log)

    def _timed(self, name: str) -> "_Timer":
        return _Timer(self.seconds, name)


class _Timer(NamedTuple):
    seconds: dict[str, float]
    name: str

    def __enter__(self) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) - time.monotonic()

    def __exit__(self, *_) -> None:
        self.seconds[self.name] += time.monotonic()


def _unless_done(work: Path, stage: str, living: stages.Living) -> Iterator[stages.Living]:
    if not stages.name(work, stage, living.unit, living.batch).exists():
        yield living


def _clean_size(work: Path, living: stages.Living) -> int:
    return stages.name(work, "clean", living.unit, living.batch).stat().st_size


def _write(stage: _Stages, survey: Survey, tok: tokenizer.Tokenizer, out: Path, made_from: Mapping[str, Any],
           files: list[corpora.SourceFile]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokens, shards, report and manifest."""
    stage.tokenise(survey, tok)
    data = stage.config.data
    with stage._timed("shards"):
        splits, names = survey.splits(data), corpora.sources(data)
        writers = {split: shards.ShardWriter(out, split, tok.vocab_size, data.shard_bytes, names) for split in SPLITS}
        tokens = summary.Tokens(tok)
        for batch in survey.batches:
            rows = np.flatnonzero(survey.live[batch.documents])
            if not len(rows):
                continue
            with stages.load(stage.work, "clean", batch.unit, batch.number) as file:
                ids = stages.strings(file, "id")
                examples = _examples(file, rows, data)
            with stages.load(stage.work, "tokens", batch.unit, batch.number) as file:
                words = np.split(file["words"], np.cumsum(file["word_counts"])[:-1])
                sequences, sizes, inputs = np.split(file["tokens"], np.cumsum(file["lengths"])[:-1]), file["sizes"], file["inputs"]
                turns = np.split(file["turns"], np.cumsum(file["turn_counts"])[:-1])
                tokens.add(file["occurrences"])
            for number, (row, sequence, size, read, said) in enumerate(zip(rows, sequences, sizes, inputs, turns)):
                document = row + batch.documents.start
                source, licence = survey.origins[survey.origin[document]]
                split = SPLITS[splits[document]]
                writers[split].add(ids[row].decode("utf-8", "surrogateescape"), sequence, int(size), source, licence, int(read), said,
                                   (*examples[number], words[number]) if examples else None)
                tokens.document(source, licence, split, len(sequence), int(size))
        entries = {split: writer.close() for split, writer in writers.items()}
        report = summary.report(made_from, survey, tokens, entries)
        (out / summary.NAME).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / page.NAME).write_text(page.render(report), encoding="utf-8")
        manifest = {
            "jaxlm": jaxlm.__version__,
            "made_from": made_from,
            "source": _size(files),
            "empty_documents_dropped": report["removed"].get("clean.empty", {}).get("documents", 0),
            "tokenizer": shards.file_entry(tok.save(out)) | {k: getattr(tok, k) for k in ("kind", "vocab_size", "bos", "eos", "pad")},
            "splits": entries,
        } | ({"chat_template": chat.template(data.chat_template, tok).jinja} if data.format != "text" else {})
        shards.write_manifest(out, manifest)
    return manifest, report


def _examples(file: Mapping[str, Any], rows: np.ndarray, data: DataConfig) -> list[tuple[bytes, bytes, bytes]]:
    """Text, label and fields of the labelled documents of a batch that live."""
    if not data.label_key:
        return []
    columns = [stages.strings(file, key) for key in ("text", "label", "fields")]
    return [tuple(column[row] for column in columns) for row in rows]


def _config(data: DataConfig, tokenizer_cfg: TokenizerConfig, clean: CleanConfig, filter: FilterConfig, dedup: DedupConfig, objective: str) -> Config:
    """The parts that the bytes depend on; what concerns the model alone stays at its defaults."""
    free = {key: DataConfig.__dataclass_fields__[key].default for key in ("sequence_length", "batch_size")}
    name = {"chat": "sft", "preference": "preference"}.get(data.format, "seq2seq" if data.input_key else "next_token")
    if data.label_key:
        name = objective if objective in LABELLED else "classify"
    return Config(data=dataclasses.replace(data, **free), objective=ObjectiveConfig(name=name), tokenizer=tokenizer_cfg, clean=clean, filter=filter, dedup=dedup)


def _is_given(cfg: TokenizerConfig) -> bool:
    return cfg.kind == "bytes" or bool(cfg.path)


def _made_from(config: Config) -> dict[str, Any]:
    made_from = {f"data.{key}": getattr(config.data, key) for key in _KEYS}
    if config.data.label_key:
        made_from["objective.name"] = config.objective.name
    for part in ("tokenizer", "clean", "filter", "dedup"):
        made_from |= {f"{part}.{key}": value for key, value in dataclasses.asdict(getattr(config, part)).items()}
    return json.loads(json.dumps(made_from))


def _files(data: DataConfig, folder: Path) -> list[corpora.SourceFile]:
    """The files of the sources but what lies in `folder`: a report may lie where pages are read from."""
    inside = os.path.join(os.path.realpath(folder), "")
    return [file for file in corpora.files(data) if not os.path.realpath(file.path).startswith(inside)]


def _size(files: list[corpora.SourceFile]) -> dict[str, int]:
    """Number of files and their bytes; what Python or TFDS hold counts as none."""
    sizes = [file.size for file in files if os.path.exists(file.path)]
    return {"files": len(sizes), "bytes": sum(sizes)}


def _fingerprints(files: list[corpora.SourceFile], made_from: Mapping[str, Any]) -> list[Any]:
    """Sizes and times of change of all files that are read or that the config names: where one differs, work is not gone on with."""
    named = [os.path.expanduser(text) for value in made_from.values() for text in _texts(value)]
    named = [path if os.path.exists(path) else path.rpartition(":")[0] for path in named]  # "path.jsonl:field"
    paths = [file.path for file in files] + [path for path in named if os.path.exists(path)]
    found = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) if os.path.exists(path) else path for path in paths]
    return [sys.version, stages.UNIT_BYTES, stages.BATCH_BYTES, found]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _reuse(folder: Path, made_from: Mapping[str, Any], data: DataConfig, log: Callable[[str], None]) -> shards.Corpus:
    corpus = shards.open_corpus(folder)
    old = corpus.manifest["made_from"]
    default = json.loads(json.dumps(keys()))  # of keys that came after the folder was prepared
    changes = [f"{key}: {old.get(key, default[key])!r} -> {value!r}" for key, value in made_from.items() if old.get(key, default[key]) != value]
    file = Path(made_from["tokenizer.path"]).expanduser()
    if not changes and file.is_file() and tokenizer.load(file).fingerprint != corpus.manifest["tokenizer"]["sha256"]:
        changes = [f"tokenizer.path: {file} has changed"]
    if changes:
        raise ValueError(f"{folder} was prepared from another config ({'; '.join(changes)}): choose another data.dir, or delete it")
    log(f"using the corpus prepared in {folder}")
    try:
        now = _size(_files(data, folder))
    except ValueError:  # shards may be used where the raw text is not
        return corpus
    if now != corpus.manifest["source"]:
        before = corpus.manifest["source"]
        log(f"note: the source has changed since then ({before['files']} files, {before['bytes']:,} bytes -> {now['files']} files, "
            f"{now['bytes']:,} bytes); delete {folder} to prepare it again")
    return corpus


def _need_training_text(survey: Survey, data: DataConfig) -> None:
    if not survey.live.any():
        removed = summary.removed(survey.counts)
        if set(removed) <= {"clean.empty"}:
            raise ValueError(f"data.source={list(data.source)} holds no text: every document is empty")
        rule, most = max(removed.items(), key=lambda item: (item[1]["documents"], item[0]))
        total = sum(entry["documents"] for entry in removed.values())
        low, high = survey.counts.values.get(rule, (math.nan, math.nan))
        raise ValueError(f"none of {total:,} documents is left: {rule} removed the most, {most['documents']:,} (values from {low:g} to {high:g}): "
                         f"loosen config.{rule}, or set it off")
    counts = np.bincount(survey.splits(data)[survey.live], minlength=3)
    if not counts[0]:
        raise ValueError(f"no training document: all {counts.sum()} fell to validation ({counts[1]}) and test ({counts[2]}); "
                         "give more documents, or lower data.validation and data.test")
