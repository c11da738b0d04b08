"""The real lm-evaluation-harness (Gao et al.) on a native checkpoint, through its LM interface: no export, no torch.

Home of lm_eval and of its datasets: pip install 'jaxlm[lm_eval]'.

Its prompts, filters and metrics are its own; only the three questions that it asks a model are answered here, by what our own tasks use.
"""

import hashlib
import json
import logging
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.evaluate import answers, benchmark, score
from jaxlm.evaluate.benchmark import Subject

INSTALL = "pip install 'jaxlm[lm_eval]'"


def check() -> None:
    """Raises ValueError, one line, where lm_eval is not installed."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--lm_eval needs the package lm_eval ({error}): {INSTALL}") from None


def language_model(of: Subject) -> Any:
    """An `lm_eval.api.model.LM` that asks this model."""
    from lm_eval.api.model import LM

    class Native(LM):
        """Requests -> answers, in their order. In several processes each asks the same and all get the same."""

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            asked, _ = score.pairs(of.tokenizer, [one.args[0] for one in requests], [one.args[1] for one in requests], of.context)
            found = _scores(of, asked)
            return [(found[i].logprob, found[i].greedy) for i in range(len(asked))]

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            parts = [score.windows(of.tokenizer, one.args[0], of.context) for one in requests]
            found, first = _scores(of, [part for one in parts for part in one]), np.cumsum([0, *map(len, parts)])
            return [sum(found[i].logprob for i in range(first[k], first[k + 1])) for k in range(len(parts))]

        def generate_until(self, requests: list) -> list[str]:
            kinds: dict[str, list[int]] = {}
            for i, one in enumerate(requests):
                kinds.setdefault(json.dumps(one.args[1], sort_keys=True), []).append(i)
            said = [""] * len(requests)
            for settings, numbers in kinds.items():
                how = json.loads(settings)
                until = how.get("until") or []
                tokens = int(how.get("max_gen_toks", how.get("max_tokens", 256)))
                prompts, _ = benchmark.cut_prompts(of, [requests[i].args[0] for i in numbers], tokens)
                sampled = float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0
                stop = [text for text in ([until] if isinstance(until, str) else until) if text]
                for batch in benchmark.written(of, prompts, max_tokens=tokens, stop=stop, temperature=sampled):
                    for i, text in batch.items():
                        said[numbers[i]] = text
            return said

    return Native()


def _scores(of: Subject, asked: Sequence[score.Request]) -> dict[int, score.Score]:
    found: dict[int, score.Score] = {}
    for batch in score.likelihoods(of.scorer, of.params, of.mesh, asked, context=of.context, batch_tokens=of.batch_tokens):
        found |= batch
    return found


def evaluate(of: Subject, names: Sequence[str], *, shots: int | None, limit: int, bootstrap: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Runs tasks of the harness: names that it knows, or .yaml files in its form.

    Returns:
      For each task the result and its items in the form of `results`, task "lm_eval-NAME".

    Raises:
      ValueError: one line: lm_eval is not installed, or does not know a task or cannot load its data.
    """
    check()
    import lm_eval
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wanted, folders = [], []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            path = pathlib.Path(name)
            match = re.search(r"^task:\s*['\"]?([^\s'\"]+)", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
            if match is None:
                raise ValueError(f"--lm_eval={name} " + ("names no task: a line 'task: NAME' is needed" if path.is_file() else "is no file"))
            folders.append(str(path.parent))
            name = match[1]
        wanted.append(name)
    manager = TaskManager(include_path=folders or None)
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm_eval {lm_eval.__version__} knows no task {unknown[0]!r}; its tasks: python -m lm_eval ls tasks; your own: give the .yaml file")
    try:
        found = lm_eval.simple_evaluate(model=language_model(of), tasks=wanted, num_fewshot=shots, limit=limit or None, task_manager=manager, log_samples=True,
                                        bootstrap_iters=bootstrap)
    except (ConnectionError, FileNotFoundError, DatasetsError) as error:
        raise ValueError(f"lm_eval could not load the data of {', '.join(wanted)}: {' '.join(str(error).split())[:300]}") from error
    return [_result(name, figures, found["samples"].get(name, []), found, bootstrap) for name, figures in found["results"].items() if name in found["samples"]]


def _result(name: str, figures: dict[str, Any], samples: list[dict[str, Any]], whole: dict[str, Any], bootstrap: int) -> tuple[dict[str, Any], list[dict]]:
    import lm_eval

    metrics, columns = {}, {}
    for key, value in figures.items():
        metric, _, how = key.partition(",")
        if not isinstance(value, (int, float)) or metric.endswith("_stderr"):
            continue
        label = metric if how in ("none", "") else f"{metric}.{how}"
        mine = [one for one in samples if one.get("filter", "none") == how or how == ""]
        values = [one.get(metric) for one in mine]
        if values and all(isinstance(value, (int, float)) for value in values) and np.isclose(np.mean(values), value):
            columns[label] = np.stack([np.array(values, np.float64), np.ones(len(values))], axis=1)
            metrics[label] = answers.figures(columns[label], "acc", bootstrap)
        elif metric != "sample_len":
            error = figures.get(f"{metric}_stderr,{how}")
            known = isinstance(error, (int, float))
            metrics[label] = {"value": value, "low": value - 1.96 * error if known else None, "high": value + 1.96 * error if known else None,
                              "interval": "1.96 standard errors of lm_eval", "stderr": error if known else None}
        if label in metrics:
            metrics[label]["higher_is_better"] = whole["higher_is_better"].get(name, {}).get(metric, True)
    first: dict[Any, dict] = {}
    for one in samples:
        first.setdefault(one["doc_id"], one)
    rows = [{"item": one["doc_id"], "asked": one["arguments"], "answers": one["filtered_resps"], "target": one["target"],
             "columns": {label: values[i] for label, values in columns.items()}} for i, one in enumerate(first.values())]
    digest = hashlib.sha256(json.dumps([one["doc_hash"] for one in first.values()]).encode()).hexdigest()
    return {"task": f"lm_eval-{name}", "kind": "lm_eval", "metric": next(iter(metrics), ""), "items": len(first), "shots": whole["n-shot"].get(name) or 0,
            "limit": whole["config"].get("limit") or 0, "metrics": metrics, "notes": [], "source": {"lm_eval": lm_eval.__version__},
            "items_sha256": digest}, rows
