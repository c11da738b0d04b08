"""The audit of a saved run for bias (evaluate/bias.py): tasks for models that continue or fill in text, swapped words for models with labels."""

import hashlib
import json
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxlm import trees
from jaxlm.config import LABELLED, AuditConfig
from jaxlm.data import readers
from jaxlm.evaluate import bias, definition, results, swaps
from jaxlm.evaluate.benchmark import Ask
from jaxlm.train import benchmarks, classified, saved


def check(config: AuditConfig, tasks: Sequence[str]) -> tuple[AuditConfig, dict[str, float]]:
    """The audit with these tasks only (none: all), and its limits.

    Raises:
      ValueError: one line: no such task, list or figure, a task without metrics about bias, or nothing to ask.
    """
    found, lists = definition.find(config.tasks), swaps.find(config.swaps)
    names = [f"{task.name}/{metric}" for task in found for metric in task.metrics if bias.metric_of(metric).unbiased is not None]
    for task in found:
        if not any(name.startswith(f"{task.name}/") for name in names):
            raise ValueError(f"audit.tasks: {task.name} has no metric about bias: {', '.join(task.metrics)}; ask it without --audit")
    for one in lists:
        names += [f"swap-{one.name}/{metric}" for metric in ("flips", "change", "shift", "shift/")]
    limits = bias.check_limits(config.limits, names)
    if not names:
        raise ValueError("this audit asks nothing: set audit.tasks, audit.swaps or both; configs/eval_bias.py is an example")
    if unknown := [name for name in tasks if name not in {task.name for task in found}]:
        raise ValueError(f"--tasks={unknown[0]}: with --audit it names tasks of the audit, {', '.join(task.name for task in found) or 'which has none'}")
    kept = [f"{task.where}:{task.name}" for task in found if not tasks or task.name in tasks]
    return AuditConfig(tuple(kept), config.swaps, config.limits), limits


def run(of: saved.Run, asked: Sequence[Ask], config: AuditConfig, limits: dict[str, float], *, split: str, limit: int, data: str = "", batch_size: int = 0,
        contaminated: bool | None = None, log: Callable[[str], None] = print, progress: Callable[[int, int], None] | None = None
        ) -> tuple[list[bias.Row], list[str]]:
    """Everything that this model can be asked, on file, and the verdict beside it (`bias.FILE`).

    Args:
      asked: the audit's tasks.
      split, limit, data: of the corpus whose texts are swapped, all or so many of them.

    Returns:
      The figures, and what was left out and why.

    Raises:
      ValueError: one line: this model can be asked nothing of the audit.
    """
    if jax.process_count() > 1:
        raise ValueError("--audit runs in one process: leave out --coordinator and --processes")
    folder, labelled = results.folder(of.workdir, of.step), of.config.model.labels > 0
    left_out = [f"{what}: {why}" for what, why, out in (
        (", ".join(name.rpartition(":")[2] for name in config.tasks), "a model with labels does not say how likely texts are", labelled and config.tasks),
        (", ".join(f"swap-{name}" for name in config.swaps), "only a model with labels answers to swapped words", not labelled and config.swaps)) if out]
    if not (config.swaps if labelled else asked):
        why = "it has labels, and audit.swaps is empty" if labelled else "audit.tasks is empty"
        raise ValueError(f"{of.workdir} can be asked nothing of this audit: {why}")
    if labelled:
        names = _swapped(of, swaps.find(config.swaps), split, limit, data, batch_size, left_out, log)
    else:
        benchmarks.tasks(of, asked, batch_size=batch_size, contaminated=contaminated, log=log, progress=progress)
        names = [ask.name for ask in asked]
    found = bias.rows([folder / f"{name}.json" for name in names], limits)
    if not found:
        raise ValueError(f"nothing was measured: {'; '.join(left_out)}")
    unchecked = sorted(set(limits) - {row.name for row in found})
    left_out += [f"the limits of {', '.join(unchecked)}: not measured on this model"] * bool(unchecked)
    bias.write(folder / bias.FILE, found, left_out)
    return found, left_out


def _swapped(of: saved.Run, lists: Sequence[swaps.Swap], split: str, limit: int, data: str, batch_size: int, left_out: list[str],
             log: Callable[[str], None]) -> list[str]:
    """Results of the swaps that change any text; returns their names."""
    objective = of.config.objective.name
    if objective not in LABELLED or objective == "token_classify":
        raise ValueError(f"{of.workdir} has objective.name={objective}: words are swapped for runs with objective.name=classify, multi_label or regress")
    corpus, written = saved.open_data(of, data), []
    examples = corpus.examples(split)
    some = np.arange(len(examples.texts))[:limit or None]
    texts, multi = [examples.texts[i].replace(readers.PAIR, " ||| ") for i in some], objective == "multi_label"
    names = of.config.model.label_names if objective != "regress" else ()
    log(f"swapping words in {len(texts):,} texts of the {split} split of {corpus.folder}")
    for swap in lists:
        both = swaps.versions(swap, texts)
        if not len(both.items):
            left_out.append(f"swap-{swap.name}: no text holds a word of the list")
            continue
        told = classified.label(of, [*both.first, *both.second], batch_size or 32)
        numbers = np.array([[one["probabilities"][name] for name in names] if names else [one["number"]] for one in told])
        first, second = numbers[:len(both.items)], numbers[len(both.items):]
        figures, columns = swaps.result(first, second, names, multi_label=multi, bootstrap=of.config.eval.bootstrap)
        about = {"workdir": str(of.workdir), "step": of.step, "fingerprint": of.fingerprint, "parameters": trees.count(of.params)}
        result = {"task": f"swap-{swap.name}", "kind": "swap", "metric": next(iter(figures)), "items": len(both.items), "limit": limit, "metrics": figures,
                  "groups": swap.groups, "model": about, "source": {"corpus": str(corpus.folder), "manifest": corpus.fingerprint, "split": split},
                  "items_sha256": hashlib.sha256(json.dumps([both.first, both.second]).encode()).hexdigest(),
                  "notes": [f"{len(both.items):,} of {len(texts):,} texts hold a word of the list; a shift is the {swap.groups[0]} version's less the "
                            f"{swap.groups[1]} version's"]}
        rows = [{"item": int(some[item]), "first": both.first[i], "second": both.second[i], "answers": [first[i], second[i]],
                 "columns": {name: values[i] for name, values in columns.items()}} for i, item in enumerate(both.items)]
        results.write(results.folder(of.workdir, of.step) / f"swap-{swap.name}.json", result, rows)
        written.append(f"swap-{swap.name}")
    return written
