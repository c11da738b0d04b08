"""jaxlm eval: how well a saved model predicts text that it was not trained on, and how well it answers questions.

  jaxlm eval --workdir=runs/quickstart                        the newest checkpoint, the whole validation split
  jaxlm eval --workdir=runs/quickstart --split=test --step=400
  jaxlm eval --workdir=runs/quickstart --data=data/other      another corpus, prepared with the same tokenizer
  jaxlm eval --workdir=runs/quickstart --watch                beside a training run: each checkpoint as it is saved, until the run ends
  jaxlm eval --workdir=runs/smollm2 --tasks=hellaswag,arc_easy --task_data=data/eval      tasks by name, from local files or TFDS
  jaxlm eval --workdir=runs/smollm2 --tasks=mine.toml --shots=5 --limit=200               your own (jaxlm/evaluate/definition.py has the form)
  jaxlm eval --compare runs/a runs/b                          which of two models is better, on what both were asked
  jaxlm eval --workdir=runs/smollm2 --lm_eval=hellaswag,my_task.yaml                      the real lm-evaluation-harness (pip install 'jaxlm[lm_eval]')
  jaxlm eval --workdir=runs/smollm2 --audit=eval_bias --task_data=data/bias               is it biased; exit code 1 if a limit is broken

Everything comes from the checkpoint: model, tokenizer, where the corpus lies, the moving average of the parameters if the run keeps one.
Each document counts exactly once; one longer than data.sequence_length is read in overlapping windows (eval.overlap).

It prints loss (nats per token), perplexity, bits per byte and token accuracy with 95 % intervals (bootstrap over documents), appends the
same in full precision to WORKDIR/eval.jsonl, and to TensorBoard (tensorboard --logdir=WORKDIR). Bits per byte compares models with
different tokenizers; perplexity does not. Of an encoder it prints loss and accuracy of masked tokens, the same ones each time (15 % by default):
they are no likelihood of a text, so there is no perplexity and nothing to compare with a decoder's. Of an encoder-decoder it prints the same of
hidden spans (objective.name=span_corruption), or (seq2seq) loss, perplexity and accuracy of the targets, given their inputs, and how many of
eval.outputs greedy outputs are the target, word for word.

Of a model with labels (objective.name=classify, multi_label, regress, token_classify) it prints accuracy, macro and micro F1, precision and recall of each
class, Matthews correlation, AUROC, Brier score, calibration error with and without the temperature that was fitted on the validation split, the confusion
matrix, or what goes with the objective, with intervals, beside the commonest label and TF-IDF with logistic regression trained on the same texts
(pip install 'jaxlm[classify]'), and says so where the model does not beat these. Without --step it takes the best checkpoint (checkpoint.metric). --report
also writes one self-contained HTML page: worst mistakes, slices, suspected label errors, near-duplicates of training texts, words that move answers.

  jaxlm eval --workdir=runs/sentiment --split=test --report

--tasks prints accuracy and what else belongs to each task with 95 % intervals, and how much of the items stands in the training data (13 words in a row).
Every evaluation leaves WORKDIR/results/step-N/NAME.json and, beside it, NAME.items.jsonl with a line for each item; killed and started again it goes on
where it was. --compare reads these and says better, worse or cannot tell (a paired test, 5 % false alarms in all), and how many items would be needed.

--audit names a config (a recipe or FILE.py; configs/eval_bias.py is one) with tasks about bias, lists of words to swap in a classifier's own texts, and
limits. It prints effects with 95 % intervals and p values corrected for their number, and ends with exit code 1 if an effect is beyond its limit and no
accident: a gate for releases. --tasks names some of its tasks only; --limit also takes the first so many texts to swap words in.

--watch also writes WORKDIR/verdict.json: the checkpoints ranked, the best --keep_best of them by paired tests (the run does not delete these), regressions,
and how many evaluations brought no gain, at which train.patience ends the run. It needs nothing but the shared folder.

--watch repeats nothing that is in eval.jsonl for the same split, --limit_documents and --data, so it may be stopped and started at will.
Several processes work together as in jaxlm train (--coordinator, --processes, --process).
"""

import functools

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_integer("step", None, "Checkpoint to evaluate; without it, the newest whole one.", flag_values=values)
    flags.DEFINE_enum("split", "validation", ["train", "validation", "test"], "Part of the corpus.", flag_values=values)
    flags.DEFINE_string("data", "", "Folder of another prepared corpus.", flag_values=values)
    flags.DEFINE_integer("limit_documents", 0, "Evaluate so many documents only, spread over the split; 0: all.", flag_values=values)
    flags.DEFINE_integer("batch_size", 0, "Rows of a batch, which changes the speed only; 0: the run's.", flag_values=values)
    flags.DEFINE_bool("report", False, "Of a model with labels also write a page about its mistakes, WORKDIR/report-SPLIT.html.", flag_values=values)
    flags.DEFINE_list("tasks", [], "Tasks: names of the catalogue, FILE.toml or FILE.toml:NAME.", flag_values=values)
    flags.DEFINE_list("task_data", [], "Folders with the tasks' files.", flag_values=values)
    flags.DEFINE_string("tfds_dir", "", "Where TFDS keeps its data sets; empty: as TFDS does.", flag_values=values)
    flags.DEFINE_integer("shots", None, "Examples before each question; without it, as the task says.", flag_values=values)
    flags.DEFINE_integer("limit", 0, "Ask the first so many items of each task; 0: all.", flag_values=values)
    flags.DEFINE_bool("contamination", None, "Search the training data for the tasks' items; without it, where that takes about a minute.", flag_values=values)
    flags.DEFINE_list("lm_eval", [], "Tasks of lm-evaluation-harness: names, or .yaml files.", flag_values=values)
    flags.DEFINE_string("audit", "", "Audit for bias: a recipe or config file with config.audit, such as eval_bias.", flag_values=values)
    flags.DEFINE_string("compare", "", "--compare A B: two workdirs, WORKDIR/results/step-N folders or results.", flag_values=values)
    flags.DEFINE_integer("keep_best", 3, "With --watch: so many checkpoints are kept.", flag_values=values)
    flags.DEFINE_bool("watch", False, "Follow a run: evaluate each new checkpoint until the run has ended.", flag_values=values)
    flags.DEFINE_float("interval", 10.0, "Seconds between two looks for a new checkpoint, with --watch.", flag_values=values)
    flags.DEFINE_string("coordinator", "", "host:port of process 0, for several processes outside TPU pods and Slurm.", flag_values=values)
    flags.DEFINE_integer("processes", 0, "Number of processes, with --coordinator.", flag_values=values)
    flags.DEFINE_integer("process", -1, "Index of this process, with --coordinator.", flag_values=values)


ARGUMENTS = True  # the second one of --compare A B


def main(values: flags.FlagValues, arguments: list[str]) -> int:
    import pathlib

    _check(values, arguments)
    if values.compare:
        return _compare(values.compare, arguments[0])

    import jax

    from jaxlm import sharding
    from jaxlm.evaluate import follow, harness
    from jaxlm.train import benchmarks, checkpoint, saved

    sharding.start_processes(values.coordinator, values.processes, values.process)
    log = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda line: None
    workdir = pathlib.Path(values.workdir)
    if values.lm_eval:
        harness.check()
    if values.audit:
        return _audit(values, log)
    asked = benchmarks.asks(values.tasks, values.task_data, tfds_dir=values.tfds_dir, shots=values.shots, limit=values.limit)
    score = functools.partial(_tasks, values, log, asked) if asked else functools.partial(_harness, values, log) if values.lm_eval else (
        functools.partial(_evaluate, values, log))
    if not values.watch:
        score(saved.open_run(workdir, values.step, log=log))
        return 0
    same = {"tasks": [ask.name for ask in asked]} if asked else {"split": values.split, "limit_documents": values.limit_documents, "data": values.data}
    done = {row["step"] for row in follow.read(workdir / "eval.jsonl") if "step" in row and all(row.get(key) == value for key, value in same.items())}
    damaged = follow.follow(functools.partial(_look, workdir), functools.partial(saved.open_run, workdir), score, done=done,
                            mark=functools.partial(checkpoint.mark, workdir), interval=values.interval, log=log)
    log(f"the run has ended and every checkpoint is evaluated: {workdir / 'eval.jsonl'}")
    return 1 if damaged else 0


def _check(values: flags.FlagValues, arguments: list[str]) -> None:
    for name in ("limit_documents", "batch_size", "limit", "shots", "keep_best"):
        if (values[name].value or 0) < 0:
            raise ValueError(f"--{name}={values[name].value} must be 0 or more")
    if len(arguments) != bool(values.compare):
        raise ValueError(f"unexpected argument {arguments[0]!r}; flags look like --name=value; see jaxlm eval --help" if arguments else
                         "--compare A B needs two workdirs or results")
    if values.compare:
        return
    if not values.workdir:
        raise ValueError("--workdir=FOLDER is missing: the folder of a run, or two of them after --compare")
    if values.interval <= 0:
        raise ValueError(f"--interval={values.interval} must be positive")
    if values.watch and values.step is not None:
        raise ValueError("--watch evaluates every checkpoint: leave out --step, or --watch")
    if values.lm_eval and (values.tasks or values.watch):
        raise ValueError("--lm_eval goes alone: leave out --tasks and --watch")
    if values.audit and (values.lm_eval or values.watch or values.report):
        raise ValueError("--audit judges one checkpoint: leave out --lm_eval, --watch and --report")


def _compare(a: str, b: str) -> int:
    import pathlib

    from jaxlm.evaluate import results

    print(results.comparison_table(results.compared(pathlib.Path(a), pathlib.Path(b), log=print), a, b))
    return 0


def _look(workdir, done: set[int]) -> tuple[int | None, bool]:
    """The oldest step that is not done, and whether the run had ended before; the same in every process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from jaxlm.train import checkpoint

    ended = (workdir / "FINISHED").exists()  # asked first: what an ended run saved last is then seen
    found = np.array([min((step for step in checkpoint.steps(workdir) if step not in done), default=-1), ended], np.int32)
    step, ended = map(int, multihost_utils.broadcast_one_to_all(found) if jax.process_count() > 1 else found)
    return None if step < 0 else step, bool(ended)


@functools.lru_cache(1)
def _scorer(model, mesh, objective):
    """Compiled once for all checkpoints of a run."""
    from jaxlm.models import kinds
    from jaxlm.train import evaluation

    return evaluation.scorer(objective, kinds.build(model), mesh)


def _evaluate(values: flags.FlagValues, log, run) -> None:
    """Scores one checkpoint, prints the table, appends to eval.jsonl and TensorBoard."""
    import jax

    from jaxlm.config import LABELLED
    from jaxlm.data import rows
    from jaxlm.evaluate import follow
    from jaxlm.train import benchmarks, evaluation, report, saved

    labelled = run.config.objective.name in LABELLED
    if run.config.model.output != "tokens" and not labelled:
        raise ValueError(f"{run.workdir} holds a model with model.output={run.config.model.output}: eval scores "
                         "tokens (model.output=tokens) and the labels that a run was trained on")
    if values.report and not labelled:
        raise ValueError(f"--report shows the mistakes of a classifier, and {run.workdir} holds a model of "
                         f"objective.name={run.config.objective.name}: leave it out")
    corpus, config = saved.open_data(run, values.data), run.config
    subject = evaluation.Subject(config, run.model, run.mesh, corpus, run.tokenizer, rows.build(config, run.tokenizer, corpus),
                                 _scorer(config.model, run.mesh, config.objective))
    progress = report.Progress()
    show = lambda done, total: progress.show(f"step {run.step}, {values.split}: {min(1, done / max(total, 1)):.0%}")
    if labelled:
        return _labelled(values, run, subject, show, progress)
    scores = []
    result = evaluation.score(subject, run.params, values.split, limit=values.limit_documents, batch_size=values.batch_size,
                              progress=show if jax.process_index() == 0 else None, keep=scores.append)
    if jax.process_index() > 0:
        return
    written = benchmarks.write_split(run, corpus, values.split, scores[0], limit=values.limit_documents, data=values.data) if scores else {}
    progress.note(f"{run.workdir}, step {run.step}, {values.split} split of {corpus.folder}\n{evaluation.table(config, result)}" +
                  benchmarks.sources_table(written))
    verdict = benchmarks.judge(run, written, values.keep_best, log) if values.watch and written else {}
    report.write_scalars(run.workdir / "eval" / values.split, run.step, {f"eval/{name}": value for name, value in result.items()})
    row = {"step": run.step, "split": values.split, "limit_documents": values.limit_documents, "data": values.data, **result, **verdict}
    follow.append(run.workdir / "eval.jsonl", row)  # last: a watch that is killed before it does the step again


def _labelled(values: flags.FlagValues, run, subject, show, progress) -> None:
    """The same of a model with labels, beside its baselines; with --report also the page."""
    import jax

    from jaxlm.evaluate import classify, follow
    from jaxlm.train import classified, mistakes, report

    primary = jax.process_index() == 0
    judged = classified.judge(subject, run.params, values.split, classified.temperature(run.workdir, run.step), limit=values.limit_documents,
                              batch_size=values.batch_size, bootstrap=run.config.eval.bootstrap, progress=show if primary else None, primary=primary)
    if values.report:
        mistakes.write(subject, run, values.split, judged, log=progress.note)
    if not primary:
        return
    progress.note(f"{run.workdir}, step {run.step}, {values.split} split of {subject.corpus.folder}\n{judged.lines}")
    figures = classify.scalars(judged.result.summary)
    report.write_scalars(run.workdir / "eval" / values.split, run.step, {f"eval/{name}": value for name, value in figures.items()})
    row = {"step": run.step, "split": values.split, "limit_documents": values.limit_documents, "data": values.data, **judged.result.summary}
    row |= {"confusion": judged.result.matrix.tolist()} if judged.result.matrix is not None else {}
    follow.append(run.workdir / "eval.jsonl", row | {"baselines": {one.name: classify.scalars(one.figures) for one in judged.baselines}})


def _tasks(values: flags.FlagValues, log, asked, run) -> None:
    """Asks one checkpoint all tasks, prints the table, appends to eval.jsonl and TensorBoard."""
    import jax

    from jaxlm.evaluate import follow, results
    from jaxlm.train import benchmarks, report

    progress = report.Progress()
    show = lambda done, total: progress.show(f"step {run.step}: {done:,} of {total:,} requests")
    found = benchmarks.tasks(run, asked, batch_size=values.batch_size, contaminated=values.contamination,
                             log=progress.note if jax.process_index() == 0 else log, progress=show if jax.process_index() == 0 else None)
    if jax.process_index() > 0:
        return
    progress.note(f"{run.workdir}, step {run.step}\n{results.table(found)}\n  in {results.folder(run.workdir, run.step)}")
    verdict = benchmarks.judge(run, found[0], values.keep_best, log) if values.watch else {}
    scalars = {f"{result['task']}/{name}": row["value"] for result in found for name, row in result["metrics"].items() if row["value"] is not None}
    report.write_scalars(run.workdir / "eval" / "tasks", run.step, scalars)
    follow.append(run.workdir / "eval.jsonl", {"step": run.step, "tasks": [ask.name for ask in asked], **scalars, **verdict})


def _audit(values: flags.FlagValues, log) -> int:
    """Audits one checkpoint for bias, prints the figures, and returns 1 if one breaks its limit."""
    import jax

    from jaxlm import config
    from jaxlm.evaluate import bias, follow, results
    from jaxlm.train import bias as audits
    from jaxlm.train import benchmarks, report, saved

    audit, limits = audits.check(config.load(values.audit).audit, values.tasks)
    run = saved.open_run(values.workdir, values.step, log=log)
    labelled = run.config.model.labels > 0
    asked = [] if labelled else benchmarks.asks(audit.tasks, values.task_data, tfds_dir=values.tfds_dir, shots=values.shots, limit=values.limit)
    progress = report.Progress()
    found, left_out = audits.run(
        run, asked, audit, limits, split=values.split, limit=values.limit, data=values.data, batch_size=values.batch_size, contaminated=values.contamination,
        log=progress.note if jax.process_index() == 0 else log,
        progress=(lambda done, total: progress.show(f"step {run.step}: {done:,} of {total:,} requests")) if jax.process_index() == 0 else None)
    if jax.process_index() == 0:
        progress.note(f"{run.workdir}, step {run.step}\n{bias.table(found, left_out)}\n  in {results.folder(run.workdir, run.step)}")
        scalars = {row.name: row.value for row in found if not row.group}
        report.write_scalars(run.workdir / "eval" / "audit", run.step, scalars)
        follow.append(run.workdir / "eval.jsonl", {"step": run.step, "audit": values.audit, "passed": not bias.broken(found), **scalars})
    return 1 if bias.broken(found) else 0


def _harness(values: flags.FlagValues, log, run) -> None:
    """Runs lm-evaluation-harness on one checkpoint and prints the table."""
    import jax

    from jaxlm.evaluate import results
    from jaxlm.train import benchmarks

    found = benchmarks.harness(run, values.lm_eval, batch_size=values.batch_size, shots=values.shots, limit=values.limit)
    if jax.process_index() == 0:
        log(f"{run.workdir}, step {run.step}\n{results.table(found)}\n  in {results.folder(run.workdir, run.step)}")
