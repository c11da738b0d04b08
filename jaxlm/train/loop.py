"""A run from start to end: prepare or open the corpus, start or resume, step, log, evaluate, save, finish."""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm import sharding, trees
from jaxlm import metrics as figures
from jaxlm.config import Config
from jaxlm.data import audit, chat, ledger, loader, mixture, pack, prepare, rows, shards
from jaxlm.data import stream as streams
from jaxlm.evaluate import classify, compression
from jaxlm.train import best, checkpoint, classified, durable, energy, evaluation, health, initial, profile, report, resume, setup, writers
from jaxlm.train import clock as clocks
from jaxlm.train import lock as locks
from jaxlm.train.clock import Clock
from jaxlm.train.state import State
from jaxlm.train.stop import Stopped, StopRequest, Watchdog, abandon

# Of a run among many (jaxlm search): told the step and the figure of each evaluation (None where it is not finite) and says whether the run ends there.
Judge = Callable[[int, float | None], bool]


def run(config: Config, workdir: pathlib.Path, judge: Judge | None = None) -> int:
    """Trains, or resumes, until the last step or a request to stop.

    Args:
      judge: of a run whose use is its figure on the validation split: it shows no samples, and never looks at the test split. A run that the judge ends is
        saved and not marked as finished, so that it can go on. In several processes all must be told the same.

    Returns:
      The exit code: 0 at the end or after SIGTERM, 130 after Ctrl-C; either way everything is saved.

    Raises:
      ValueError, OSError: one line, for whatever the user can mend.
    """
    best.check(config)
    writers.check(config.train.writers)
    progress = report.Progress()
    note = progress.note if jax.process_index() == 0 else lambda line: None
    clock, account = Clock(note), energy.Account(config.energy)
    with StopRequest() as stop, locks.Lock(workdir) as lock, account:
        config = initial.resolve(config, workdir)
        sharding.first(lambda: _adopt(config, workdir))
        peak = report.peak_flops()
        mesh = sharding.make_mesh(config.mesh)
        folder = pathlib.Path(config.data.dir) if config.data.dir else workdir / "data"
        corpus = open_corpus(config, folder, note)
        parts, task, tokenizer, epoch = resume.build(config, mesh, corpus)
        subject = evaluation.Subject(parts.config, parts.model, mesh, corpus, tokenizer, task,
                                     evaluation.scorer(config.objective, parts.model, mesh))
        keep_every = parts.steps("checkpoint.keep_every", config.checkpoint.keep_every)
        with checkpoint.Checkpoints(lock, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best, keep_every=keep_every,
                                    log=note) as checkpoints, jax.set_mesh(mesh), Watchdog(config.train.watchdog_seconds) as watchdog:
            return _train(parts, subject, epoch, workdir, checkpoints, stop, watchdog, progress, peak, judge, clock, account)


def _adopt(config: Config, workdir: pathlib.Path) -> None:
    """Writes the config of a new workdir, refuses that of another run."""
    path = workdir / "config.json"
    if path.exists():
        if changed := resume.changed(configs.read(path), config):
            raise ValueError(f"{workdir} holds a run with another config ({changed}): choose another --workdir, or undo the change")
    durable.rewrite(path, configs.to_json(config))


def open_corpus(config: Config, folder: pathlib.Path, note: Callable[[str], None]) -> shards.Corpus:
    """Process 0 prepares what is missing; then all open the same shards. A `data.dir` without a `data.source` is taken as it is."""
    if config.data.source or not config.data.dir:
        sharding.first(lambda: prepare.prepare(config.data, config.tokenizer, folder, clean=config.clean, filter=config.filter, dedup=config.dedup,
                                               objective=config.objective.name, log=note) and None)
    return shards.open_corpus(folder)


def _train(parts: setup.Setup, subject: evaluation.Subject, epoch: pack.EpochSize, workdir: pathlib.Path, checkpoints: checkpoint.Checkpoints,
           stop: StopRequest, watchdog: Watchdog, progress: report.Progress, peak: tuple[float, str], judge: Judge | None, clock: Clock,
           account: energy.Account) -> int:
    config, total, primary = parts.config, parts.total, jax.process_index() == 0
    corpus, tokenizer, task = subject.corpus, subject.tokenizer, subject.task
    note = progress.note if primary else lambda line: None
    start, state, history, borrowed = resume.start(parts, corpus, task, workdir, note)
    watchdog.beat()
    note(_introduction(parts, epoch, state, start, peak[1], [*_sources(parts, corpus, task), *rows.notes(task, corpus.splits["train"]),
                                                             f"energy is {account.source}"]))
    finished = workdir / "FINISHED"
    if finished.exists() and (start >= total or json.loads(finished.read_text(encoding="utf-8")).get("early") == start):
        note(f"this run is finished (step {start}); jaxlm eval and jaxlm generate use it; for a longer one choose another --workdir")
        return 0
    if primary:
        finished.unlink(missing_ok=True)

    every = {name: parts.steps(key, duration) for name, key, duration in (
        ("log", "train.log_every", config.train.log_every), ("eval", "train.eval_every", config.train.eval_every),
        ("save", "checkpoint.every", config.checkpoint.every))}
    due = lambda name, step: step == total or (every[name] and step % every[name] == 0)
    files = {"config.json": configs.to_json(config).encode(), tokenizer.filename: tokenizer.model} | borrowed
    if template := corpus.manifest.get("chat_template"):
        files[chat.FILE] = template.encode()

    tolerance = durable.Tolerance(config.checkpoint.on_error == "go_on", note)

    def save(step: int, state: State, found: dict[str, float] | None) -> int:
        entry = ledger.entry(corpus, step, config.data.seed, config.data.batch_size, history)
        calibration = {key: found[key] for key in ("temperature", "documents")} if found and task.labelled else None
        more = {evaluation.CALIBRATION: json.dumps(calibration).encode()} if calibration else {}
        state = state._replace(params=trees.split(state.params, parts.kept)[0])
        checkpoints.save(step, state, files | more | recent.files() | {ledger.FILE: json.dumps(entry).encode()}, best.cost(config, found))
        return step

    # Compiled before any data is read: a request to stop that came meanwhile is seen before the first step.
    recent = health.Recent(config.train.spike, checkpoint.find_file(workdir, start, health.RECENT) if start else None)
    with clock.spent("compile"):
        run_step, mean = resume.compiled(parts, corpus, task, state, recent)
    batches = loader.batches(corpus, "train", task, batch_size=config.data.batch_size, seed=config.data.seed, start_step=start, stop_step=total,
                             rows=sharding.local_rows(parts.mesh, config.data.batch_size), threads=config.data.threads, prefetch=config.data.prefetch)
    before = report.read_metrics(workdir)
    clock.resume(before, start)
    account.resume(before)
    spent = lambda: clock.row() | account.row()
    reporter = report.Reporter(workdir, start, {"config": configs.to_json(config), "parameters": report.overview(state.params)},
                               tolerance, writers.Writers(config.train.writers, workdir, configs.to_dict(config), note)) if primary else None
    if reporter and before:  # the rows after the checkpoint are gone, what they took is not
        reporter.scalars(start, spent())
    vitals = health.Health(
        config.train, workdir, start, recent, rows=config.data.batch_size, note=note, tolerance=tolerance, primary=primary,
        newest=lambda: max(checkpoint.steps(workdir), default=None),
        occupants=lambda step: audit.occupants(corpus, task, config.data.seed, config.data.batch_size, step))
    log = _Log(parts, epoch, trees.count(parts.plain), peak[0], clock, account, vitals, reporter, progress, lambda step: due("log", step),
               mean / config.data.sequence_length)
    pending: tuple[int, dict] | None = None
    saved_step, step, found, costs = start, start, None, best.history(config, workdir, start)
    early, judged = best.ends(config, workdir, costs), False  # the first: killed after its last evaluation
    stop.arm()
    watchdog.beat()
    clock.begin(str(corpus.folder))
    trace = profile.Trace(workdir, parts.steps("train.profile", config.train.profile), note)
    with clock, trace, contextlib.closing(reporter) if primary else contextlib.nullcontext():
        while step < total and not early and not judged and not stop.at(step):
            with clock.spent("data"):
                try:
                    with stop.waiting():
                        local = next(batches)[1]
                except Stopped:
                    abandon(batches)
                    break
                batch = sharding.to_device(parts.mesh, local, config.data.batch_size)
            step += 1
            trace.before(step, state)
            state, new = run_step(step, state, batch)
            if pending:  # the metrics of the step before: the device is busy with the next one meanwhile
                log(*pending)
            watchdog.beat()
            pending = (step, new)
            if not (due("eval", step) or due("save", step)):
                continue
            log(*pending)
            watchdog.beat()
            pending = None
            found = None
            if due("eval", step) and not stop.now():
                with clock.spent("evaluation"):
                    found = _evaluate(subject, state, step, reporter, progress, watchdog, stop, sampled=judge is None)
                    costs += [value] if (value := best.cost(config, found)) is not None else []
                    early = best.ends(config, workdir, costs)
                    judged = judge is not None and found is not None and judge(step, best.figure(config, found)) and step < total
            if due("save", step) or early or judged:
                with clock.spent("checkpoint"):
                    with tolerance():
                        checkpoints.wait()  # the one before: when it fails, this one is tried all the same
                    with tolerance():
                        saved_step = save(step, state, found)
            if reporter and step < total:
                reporter.scalars(step, spent())
        if pending:
            log(*pending)
        with clock.spent("checkpoint"):
            failed = tolerance.failed
            with tolerance():
                checkpoints.wait()
            if step > saved_step or tolerance.failed > failed:  # the last one must succeed
                save(step, state, found if step == total or early else None)
            acknowledged = checkpoints.wait()
        if reporter:
            reporter.scalars(step, spent())
        if early:
            note(f"step {step}: {config.train.patience} evaluations without a better {config.checkpoint.metric}, so the run ends here (train.patience)")
        elif judged:
            note(f"step {step} of {total}: the search ends this run here; its checkpoint is whole, and jaxlm train goes on from there")
            return stop.exit_code
        elif step < total:
            safe = "nothing is lost, nothing was done yet" if acknowledged is None else f"the checkpoint of step {acknowledged} is safe"
            note(f"stopped at step {step} of {total}; {safe}; the same command goes on from there")
            return stop.exit_code
        if judge is None:
            with clock.spent("evaluation"):
                _finish(step, early, subject, _best(parts, state, step, workdir, note), workdir, reporter, progress, watchdog, stop, spent)
        elif primary:
            _mark(workdir, step, early)
    return stop.exit_code


def _sources(parts: setup.Setup, corpus: shards.Corpus, task: rows.Task) -> list[str]:
    """Of a mixture what the run takes of each source."""
    if task.mixture == mixture.Mixture():
        return []
    total = parts.total * parts.config.data.batch_size
    taken = streams.passes(streams.build(corpus, "train", task), total)
    unused = [name for name in corpus.sources if name not in [part[0] for part in taken]]
    return [*(f"source {name!r}: {count / total:.2%} of the rows, {report.count(targets)} tokens, {epochs:.2f} epochs"
              for name, count, targets, epochs in taken), *(f"source {name!r} is not in the mixture" for name in unused)]


def _introduction(parts: setup.Setup, epoch: pack.EpochSize, state: State, start: int, peak_source: str, notes: list[str]) -> str:
    config = parts.config
    device, tokens = jax.devices()[0], config.data.batch_size * setup.row_tokens(config)
    encoder = f"{config.model.encoder_layers} encoder and " * (config.model.encoder_layers > 0)
    axes = " x ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items() if size > 1) or "one device"
    epochs = parts.total * config.data.batch_size / epoch.rows
    return "\n".join([
        f"model    {report.count(trees.count(state.params))} parameters: {encoder}{config.model.layers} layers, width {config.model.width}, "
        f"{config.model.heads} heads, vocabulary {config.model.vocab_size}",
        f"devices  {jax.device_count()} x {device.device_kind} ({axes}, {jax.process_count()} process{'es' * (jax.process_count() > 1)}), peak {peak_source}",
        f"layout   {setup.layout(config, parts.mesh)}",
        f"plan     {parts.total} steps of {tokens} tokens = {report.count(parts.total * tokens)} tokens, {epochs:.2f} epochs "
        f"(padding {epoch.padding} tokens each, {epoch.padding / epoch.positions:.2%})" + (f"; resumed after step {start}" if start else ""),
        *([f"rows     {config.data.sequence_length} tokens for the encoder, {config.data.target_length} for the decoder"] if encoder else []),
        *(f"note     {line}" for line in notes)])


def _evaluate(subject: evaluation.Subject, state: State, step: int, reporter: report.Reporter | None, progress: report.Progress, watchdog: Watchdog,
              stop: StopRequest, sampled: bool) -> dict[str, float] | None:
    """Figures of the validation split, with a sample if one is wanted; None without one, or when the run was asked to stop meanwhile."""
    if not len(subject.corpus.splits["validation"].tokens):
        return None
    summary = _score(subject, _averaged(state), "validation", subject.config.train.eval_documents, watchdog, stop)
    if summary is None:
        return None
    sample = evaluation.sample(subject, _averaged(state)) if sampled else ""
    if reporter:
        reporter.scalars(step, {f"eval/{name}": value for name, value in summary.items()})
        progress.note(f"step {step}  {evaluation.line(subject.config, summary)}")
        if sample:
            reporter.text(step, "sample", sample)
    return summary


def _score(subject: evaluation.Subject, params: Any, split: str, limit: int, watchdog: Watchdog, stop: StopRequest) -> dict[str, float] | None:
    def alive(*_) -> None:
        watchdog.beat()
        if stop.now():
            raise Stopped

    try:
        if subject.task.labelled:
            return evaluation.classified(subject, params, split, limit=limit, progress=alive)[0].summary
        return evaluation.score(subject, params, split, limit=limit, progress=alive)
    except Stopped:
        return None


def _best(parts: setup.Setup, state: State, step: int, workdir: pathlib.Path, note: Callable[[str], None]) -> tuple[Any, int]:
    """The parameters that a run ends with, and their step: the last ones, or where that is what the config wants those of the best checkpoint."""
    found = sharding.first(lambda: best.step(workdir)) if best.chooses(parts.config) else None
    if found is None or found == step:
        return _averaged(state), step
    note(f"the best checkpoint by {parts.config.checkpoint.metric} is that of step {found}: it is what follows, and what eval and generate use")
    own = trees.flatten(checkpoint.restore_params(workdir, found, trees.split(parts.target.params, parts.kept)[0]))
    if parts.target.ema is not None:
        own |= trees.flatten(checkpoint.restore_params(workdir, found, parts.target.ema, ema=True))
    return trees.unflatten(trees.flatten(state.params) | own), found


def _averaged(state: State) -> Any:
    return state.params if state.ema is None else trees.unflatten(trees.flatten(state.params) | trees.flatten(state.ema))


def _finish(step: int, early: bool, subject: evaluation.Subject, chosen: tuple[Any, int], workdir: pathlib.Path, reporter: report.Reporter | None,
            progress: report.Progress, watchdog: Watchdog, stop: StopRequest, spent: Callable[[], dict[str, float]]) -> None:
    """The last word of a complete run: the whole test split, beside what compressors or simple baselines reach, a sample, and what to try next."""
    config, corpus, (params, chosen_step) = subject.config, subject.corpus, chosen
    split = next((s for s in ("test", "validation") if len(corpus.splits[s].tokens)), None)
    if subject.task.labelled and split:
        judged = classified.judge(subject, params, split, classified.temperature(workdir, chosen_step), bootstrap=config.eval.bootstrap,
                                  progress=lambda *_: watchdog.beat(), primary=reporter is not None)
        summary, lines = classify.scalars(judged.result.summary), judged.lines
    else:
        summary = _score(subject, params, split, 0, watchdog, stop) if split else None
        lines = evaluation.table(config, summary) if summary else ""
    if split and summary is None:  # asked to stop: the same command evaluates when it is run again
        return
    sample = evaluation.sample(subject, params)
    if reporter is None:
        return
    row = spent()
    reporter.scalars(step, {f"{split}/{name}": value for name, value in (summary or {}).items()} | row)
    if summary:
        progress.note(f"\n{split} split, {int(summary['documents'])} documents the model never saw:\n" + lines)
        if "bits_per_byte" in summary:
            progress.note(compression.table(corpus, subject.tokenizer, split, summary["bits_per_byte"]))
    if sample:
        reporter.text(step, "sample", sample)
        progress.note(f"\nA sample, after the prompt in brackets:\n{sample}\n")
    progress.note("\n".join(f"{what:<9}{said}" for what, said in [*clocks.told(row), *energy.told(row, config.energy)]))
    _mark(workdir, step, early)
    prompt = "an input" if config.objective.name == "seq2seq" else "Return the"
    continues = [f"  jaxlm generate --workdir={workdir} --prompt=\"{prompt}\""] * (bool(sample))
    if subject.task.labelled:
        continues = [f"  jaxlm generate --workdir={workdir} --classify --prompt=\"a text\""]
    progress.note("\n".join([
        "Next:", *continues, f"  jaxlm eval --workdir={workdir}" + " --split=test --report" * subject.task.labelled,
        f"  tensorboard --logdir={workdir}        (pip install tensorboard)"]))


def _mark(workdir: pathlib.Path, step: int, early: bool) -> None:
    """Says that the run is complete."""
    durable.rewrite(workdir / "FINISHED", json.dumps({"step": step} | ({"early": step} if early else {})) + "\n")


class _Log:
    """Reads a finished step's metrics, looks at their health, shows and writes them. Of labelled texts, whose batches differ in length, `share` is the mean
    length over the longest one: speed counts what was computed."""

    def __init__(self, parts: setup.Setup, epoch: pack.EpochSize, params: int, peak: float, clock: Clock, account: energy.Account, vitals: health.Health,
                 reporter: report.Reporter | None, progress: report.Progress, due: Callable[[int], bool], share: float):
        self._total, self._clock, self._account, self._vitals = parts.total, clock, account, vitals
        self._reporter, self._progress, self._due = reporter, progress, due
        config = parts.config
        self._tokens, self._padding = config.data.batch_size * setup.row_tokens(config), epoch.padding / epoch.positions
        flops = report.flops_per_token(config.model, params, config.data.sequence_length, config.data.target_length)
        self._computed = self._tokens * share
        self._load = self._computed * flops * setup.work(parts) / peak  # seconds at the peak

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        values = jax.device_get(metrics)
        self._vitals.check(step, values)
        self._clock.finished()
        self._account.worked(self._load)
        if self._reporter is None:
            return
        seconds = self._clock.step_seconds
        means, norms = figures.means(values.pop("sums")), values.pop("norms", {})
        if self._due(step):
            self._reporter.scalars(step, {
                **report.by_layer(norms),
                **{f"train/{name}": value for name, value in means.items()}, **{f"train/{name}": float(value) for name, value in values.items()},
                "train/skipped": self._vitals.skipped, "train/spikes": self._vitals.spikes, "train/tokens": step * self._tokens,
                "perf/tokens_per_second": self._computed / seconds, "perf/mfu": self._load / seconds, "perf/step_seconds": seconds,
                "perf/data_wait": self._clock.wait_share(), "perf/padding": self._padding, **report.memory_gib(), **self._clock.row(), **self._account.row()})
        self._progress.show(f"step {step}/{self._total}  loss {means['loss']:.3f}  {report.count(self._computed / seconds)} tokens/s  "
                            f"MFU {self._load / seconds:.0%}  left {report.duration((self._total - step) * seconds)}", final=step == self._total)
