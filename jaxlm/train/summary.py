"""Everything that a run's folder tells about it, read once, for the run report and the model card (`jaxlm report`)."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import config as configs
from jaxlm import trees
from jaxlm.config import LABELLED, Config
from jaxlm.data import shards
from jaxlm.data import summary as corpora
from jaxlm.evaluate import bias, follow, results, verdict
from jaxlm.models import decoder, kinds
from jaxlm.train import best, checkpoint, origin, report, saved


class Corpus(NamedTuple):
    """What was trained on, as far as it is here."""
    folder: pathlib.Path
    splits: Mapping[str, Mapping[str, int]]  # split -> documents, tokens, text_bytes
    sources: Mapping[str, int]  # training documents by source
    licences: Mapping[str, int]  # training documents by licence; "": not given
    report: Mapping[str, Any] | None  # the preparation's (data/summary.py)


class Summary(NamedTuple):
    """A run as its folder tells it."""
    workdir: pathlib.Path
    step: int | None  # of the checkpoint that this is about; None: there is none
    config: Config
    parameters: int
    ledger: Mapping[str, Any]  # what the checkpoint was trained on: data/ledger.py; {} without a checkpoint
    corpus: Corpus | None
    metrics: list[dict[str, Any]]  # the trainer's rows
    evaluations: list[dict[str, Any]]  # rows of eval.jsonl
    results: list[tuple[int, dict[str, Any]]]  # of each result's name that of the newest step, with the step
    audit: tuple[int, dict[str, Any]] | None
    verdict: verdict.Verdict | None
    samples: list[tuple[int, str]]
    error_pages: list[pathlib.Path]  # of `jaxlm eval --report`
    finished: bool
    missing: list[tuple[str, str]]  # what is not there, and the command that makes it

    @property
    def labelled(self) -> bool:
        """Whether the model gives labels."""
        return self.config.objective.name in LABELLED or self.config.model.labels > 0

    @property
    def imported(self) -> bool:
        """Made by `jaxlm import` and not trained here."""
        return bool(self.ledger) and not self.ledger.get("manifest")

    def origins(self) -> list[str]:
        """Where the first parameters came from, oldest first."""
        return [entry["origin"] for entry in self.ledger.get("history", ())]

    def last(self, prefix: str) -> dict[str, float]:
        """The last logged row with figures of this kind, such as "test/", by their names without it."""
        row = next((row for row in reversed(self.metrics) if any(key.startswith(prefix) for key in row)), {})
        return {"step": row["step"]} | {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)} if row else {}


def gather(workdir: pathlib.Path, step: int | None = None) -> Summary:
    """Reads a run's folder; nothing of it is changed, and no parameter is read.

    Args:
      step: the checkpoint to tell about; None: the best one where the run says what is best, else the newest.

    Raises:
      ValueError: one line: no run, or no such checkpoint.
    """
    if not workdir.is_dir():
        raise ValueError(f"{workdir} does not exist: give the folder of a run")
    there = checkpoint.steps(workdir)
    if step is not None and step not in there:
        raise ValueError(f"{workdir} holds no checkpoint of step {step}; it holds {', '.join(map(str, there)) or 'none'}")
    if there:
        config, _, told = origin.read_files(workdir, there[-1] if step is None else step)
        if step is None:
            chosen = best.step(workdir) if best.chooses(config) else None
            step = chosen if chosen in there else there[-1]
            config, _, told = origin.read_files(workdir, step)
    else:
        config, told = _begun(workdir), {}
    found = Summary(workdir, step, config, _parameters(config), told, _corpus(workdir, told or {"dir": config.data.dir or str(workdir / "data")}),
                    report.read_metrics(workdir), follow.read(workdir / "eval.jsonl"), _results(workdir), _audit(workdir), verdict.read(workdir),
                    report.read_texts(workdir, "sample"), sorted(workdir.glob("report-*.html")), (workdir / "FINISHED").exists(), [])
    return found._replace(missing=_missing(found))


def _begun(workdir: pathlib.Path) -> Config:
    """The config of a run without a checkpoint; with the vocabulary where the corpus is there."""
    if not (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} holds no run: neither checkpoints nor config.json; make one with jaxlm train --config=quickstart --workdir={workdir}")
    config = configs.read(workdir / "config.json")
    manifest = results.read_json(pathlib.Path(config.data.dir or workdir / "data") / "manifest.json")
    size = manifest["tokenizer"]["vocab_size"] if manifest else 0
    return dataclasses.replace(config, model=decoder.vocabulary(config.model, size)) if size else config


def _parameters(config: Config) -> int:
    """0: the vocabulary is not known yet."""
    if not config.model.vocab_size:
        return 0
    return trees.count(jax.eval_shape(kinds.build(config.model).init, jax.random.key(0)))


def _corpus(workdir: pathlib.Path, told: Mapping[str, Any]) -> Corpus | None:
    try:
        found = shards.open_corpus(saved.data_folder(workdir, dict(told)))
    except (ValueError, OSError, KeyError):
        return None
    train = found.splits["train"]
    count = lambda numbers, names: {name: int(n) for name, n in zip(names, np.bincount(numbers, minlength=len(names)).tolist()) if n}
    return Corpus(found.folder, {name: {key: split[key] for key in ("documents", "tokens", "text_bytes")} for name, split in found.manifest["splits"].items()},
                  count(train.sources, found.sources), count(train.licences, found.manifest["splits"]["train"]["licences"]),
                  results.read_json(found.folder / corpora.NAME))


def _results(workdir: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        found = results.found(workdir)
    except ValueError:
        return []
    return [(int(path.parent.name.removeprefix("step-")), results.read(path)) for _, path in sorted(found.items())]


def _audit(workdir: pathlib.Path) -> tuple[int, dict[str, Any]] | None:
    """The last audit of a run: its step, and what `bias.write` wrote."""
    steps = sorted((int(path.parent.name.removeprefix("step-")) for path in (workdir / results.FOLDER).glob(f"step-*/{bias.FILE}")), reverse=True)
    return next(((step, found) for step in steps if (found := bias.read(results.folder(workdir, step) / bias.FILE))), None)


def _missing(of: Summary) -> list[tuple[str, str]]:
    lines, flag = [], f"--workdir={of.workdir}"
    if of.step is None:
        return [("a checkpoint: the run has not saved one yet", f"jaxlm train {flag} ... goes on with it")]
    if of.corpus is None and not of.imported:
        lines.append((f"the corpus {of.ledger.get('dir', '')}: it is not here", "bring it back, or to WORKDIR/data"))
    if not of.finished and not of.imported:
        lines.append(("the end of the run: it has not finished", "the same jaxlm train command goes on with it"))
    tasks = [one for _, one in of.results if one["kind"] not in ("swap",) and "split" not in one.get("source", {})]
    if not of.labelled and of.config.model.kind == "decoder" and not of.config.model.encoder_layers and not tasks:
        lines.append(("tasks: none was asked", f"jaxlm eval {flag} --tasks=hellaswag,arc_easy --task_data=FOLDER"))
    held_out = any(row.get("split") for row in of.evaluations) or of.last("test/") or of.last("validation/") or of.results
    if not held_out and not of.imported:
        lines.append(("an evaluation of held-out text", f"jaxlm eval {flag} --split=test"))
    if of.labelled and not of.error_pages:
        lines.append(("an error report", f"jaxlm eval {flag} --split=test --report"))
    if of.audit is None and not of.config.model.encoder_layers:
        lines.append(("an audit for bias", f"jaxlm eval {flag} --audit=eval_bias" + ("" if of.labelled else " --task_data=FOLDER")))
    return lines
