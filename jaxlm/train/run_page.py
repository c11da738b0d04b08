"""The run report: one self-contained HTML page about a run (jaxlm/page.py), from what its folder tells (train/summary.py)."""

import math
from collections.abc import Mapping
from typing import Any

import jaxlm
from jaxlm import config as configs
from jaxlm import page
from jaxlm.evaluate import classification, likelihood
from jaxlm.train import card, report
from jaxlm.train.summary import Summary

_POINTS = 400  # of a curve: more than its pixels
_SAMPLES = 12
_ROWS = 40


def render(of: Summary) -> str:
    """The whole page; what comes from data, names and configs is escaped."""
    sections = [
        ("missing", "What is missing", _missing(of)), ("curves", "Learning curves", _curves(of)), ("speed", "Throughput", _speed(of)),
        ("figures", "Held-out figures", _held_out(of)), ("tasks", "Tasks", _tasks(of)), ("verdict", "Checkpoints compared", _verdict(of)),
        ("errors", "Errors", _errors(of)), ("bias", "Bias", _bias(of)), ("samples", "Samples over time", _samples(of)), ("data", "Data", _data(of)),
        ("ledger", "Ledger", _ledger(of)), ("config", "Config", _config(of)), ("again", "How to reproduce", _again(of))]
    state = "finished" if of.finished else "imported" if of.imported else "not finished"
    intro = (f"{page.text(card.describe(of))}, {state}" + (f", checkpoint of step {of.step:,}" if of.step is not None else ", no checkpoint yet")
             + f". Written by jaxlm {page.text(jaxlm.__version__)} from what the folder holds.")
    return page.render(f"Run {of.workdir.resolve().name}", intro, sections, _tiles(of))


def _series(of: Summary, key: str) -> list[tuple[float, float]]:
    points = [(float(row["step"]), float(row[key])) for row in of.metrics if isinstance(row.get(key), (int, float)) and "step" in row]
    return points if len(points) <= _POINTS else [points[i * len(points) // _POINTS] for i in range(_POINTS - 1)] + points[-1:]


def _tiles(of: Summary) -> str:
    tiles = [(report.count(of.parameters), "parameters")] if of.parameters else []
    last = next((row for row in reversed(of.metrics) if "train/loss" in row), None)
    if last:
        tiles += [(f"{last['step']:,}", "steps"), (f"{last['train/loss']:.4f}", "last training loss")]
        tiles += [(report.count(last["train/tokens"]), "tokens read")] if "train/tokens" in last else []
    figures = of.last("test/") or of.last("eval/")
    shown = [name for name in ("bits_per_byte", "accuracy", "f1_macro", "loss", "preferred", "mae") if name in figures][:2]
    tiles += [(_number(figures[name]), f"{'test' if of.last('test/') else 'validation'} {name.replace('_', ' ')}") for name in shown]
    return page.tiles(tiles)


def _missing(of: Summary) -> str:
    rows = [[page.text(what), f"<code>{page.text(how)}</code>"] for what, how in of.missing]
    return page.table(["not here", "how to get it"], rows) if rows else ""


def _curves(of: Summary) -> str:
    parts = [page.chart({"training": _series(of, "train/loss"), "validation": _series(of, "eval/loss")}, "step", "loss")]
    for key in ("bits_per_byte", "accuracy", "f1_macro", "preferred", "mae"):
        if len(points := _series(of, f"eval/{key}")) > 1:
            parts.append(page.chart({f"validation {key.replace('_', ' ')}": points}, "step", key.replace("_", " ")))
    parts += [page.chart({"learning rate": _series(of, "train/lr")}, "step", "learning rate"),
              page.chart({"gradient norm": _series(of, "train/grad_norm")}, "step", "gradient norm")]
    if skipped := max((row.get("train/skipped", 0) for row in of.metrics), default=0):
        parts.append(f'<div class="warn">{skipped:,.0f} steps were skipped for a loss or gradient that is not finite or a spike: bad_steps.jsonl names them'
                     "</div>")
    return "".join(parts)


def _speed(of: Summary) -> str:
    rates = sorted(value for _, value in _series(of, "perf/tokens_per_second"))
    if not rates:
        return ""
    middle = lambda key: (lambda values: values[len(values) // 2] if values else math.nan)(sorted(value for _, value in _series(of, key)))
    tiles = [(f"{report.count(rates[len(rates) // 2])}", "tokens per second (median)")]
    tiles += [(f"{share:.0%}", "of the devices' peak (MFU, median)")] if not math.isnan(share := middle("perf/mfu")) else []
    waits = middle("perf/data_wait") / middle("perf/step_seconds")
    tiles += [(f"{waits:.1%}", "of a step spent waiting for data")] if not math.isnan(waits) else []
    tiles += [(f"{max(peaks):.2f} GiB", "peak memory")] if (peaks := [value for _, value in _series(of, "memory/peak_gib")]) else []
    return page.tiles(tiles) + page.chart({"tokens per second": _series(of, "perf/tokens_per_second")}, "step", "tokens per second")


def _held_out(of: Summary) -> str:
    """The trainer's last word on the test split, and each evaluation since."""
    rows = [(f"end of the run, step {figures['step']}", split, figures) for split in ("test", "validation") if (figures := of.last(f"{split}/"))]
    rows += [(f"jaxlm eval, step {row['step']}", row["split"] + (f" of {row['data']}" if row.get("data") else ""), row)
             for row in of.evaluations if "split" in row]
    units = classification.FIGURES.get(of.config.objective.name) or likelihood.UNITS.get(of.config.objective.name, {})
    cells = []
    for place, split, figures in rows[-_ROWS:]:
        for name, what in units.items():
            if isinstance(figures.get(name), (int, float)):
                cells.append([page.text(place), page.text(split), f"{page.text(name.replace('_', ' '))}<small>{page.text(what)}</small>",
                              _number(figures[name]), _between(figures.get(f"{name}_low"), figures.get(f"{name}_high")),
                              f"{figures['documents']:,.0f}" if "documents" in figures else ""])
                place = split = ""
    if not cells:
        return ""
    return "<p>On text that was held out of training; intervals are drawn over documents.</p>" + page.table(
        ["when", "split", "figure", ">value", ">95 % interval", ">documents"], cells)


def _tasks(of: Summary) -> str:
    cells, notes = [], []
    for step, result in of.results:
        if result["kind"] == "swap" or "split" in result.get("source", {}):
            continue
        name = result["task"] + (f", {result['shots']} examples" if result.get("shots") else "") + (f", first {result['limit']}" if result.get("limit") else "")
        overlap = result.get("contamination", {})
        hit = f"{overlap['hit']:,} of {overlap['items']:,}" if overlap.get("searched") else "not searched"
        for metric, row in result["metrics"].items():
            cells.append([page.text(name), f"{step:,}" if name else "", page.text(metric), _number(row["value"]), _between(row.get("low"), row.get("high")),
                          f"{result['items']:,}" if name else "", page.text(hit) if name else ""])
            name = ""
        notes += [f"{result['task']}: {note}" for note in result.get("notes", ())]
    if not cells:
        return ""
    return (page.table(["task", ">step", "metric", ">value", ">95 % interval", ">items", ">in training data"], cells)
            + "".join(f'<p class="note">{page.text(note)}</p>' for note in notes))


def _verdict(of: Summary) -> str:
    if of.verdict is None:
        return ""
    rows = [[f"{row['step']:,}", _number(row["value"]), _between(row.get("low"), row.get("high")), page.text(row["verdict"]),
             "" if row.get("p") is None else f"{row['p']:.4f}"] for row in of.verdict.ranking[:_ROWS]]
    return (f"<p>By {page.text(of.verdict.metric)}, best value first; the verdict is a paired test against the best checkpoint of its time. Best: step "
            f"{of.verdict.best:,}.</p>" + page.table([">step", ">value", ">95 % interval", "verdict", ">p"], rows))


def _errors(of: Summary) -> str:
    parts = [f'<p>Worst mistakes, slices, suspected label errors: <a href="{page.text(path.name)}">{page.text(path.name)}</a></p>' for path in of.error_pages]
    row = next((row for row in reversed(of.evaluations) if "confusion" in row), None)
    names = of.config.model.label_names
    if row and len(names) == len(row["confusion"]) <= 20:
        cells = []
        for name, counts in zip(names, row["confusion"]):
            total = max(1, sum(counts))
            cells.append([f"<b>{page.text(name)}</b>", *(f'<div class="cell{" hit" if i == len(cells) else ""}" style="--share:{count / total:.3f}">{count:,}'
                                                       f"<small>{count / total:.0%}</small></div>" for i, count in enumerate(counts))])
        parts.append(f"<p>{page.text(row['split'])} split, step {row['step']:,}: a row for each true class, a column for each answer.</p>"
                     + page.table(["true", *(f">{name}" for name in names)], cells))
    return "".join(parts)


def _bias(of: Summary) -> str:
    if of.audit is None:
        return ""
    step, found = of.audit
    kind, word = ("good", "No limit is broken.") if found["passed"] else ("warn", "A limit is broken.")
    checked = any(row["limit"] is not None for row in found["rows"])
    rows = [[page.text(row["task"]) + (f"<small>{page.text(row['group'])}</small>" if row["group"] else ""), page.text(row["metric"]), _number(row["value"]),
             _between(row["low"], row["high"]), f"{row['effect']:+.4f}", "" if row["p"] is None else f"{row['p']:.4f}", f"{row['items']:,}",
             "" if row["limit"] is None else f"{row['limit']:g}: {page.text(row['verdict'])}"] for row in found["rows"]]
    return (f'<div class="{kind}">{word if checked else "No limit was set."}</div><p>Step {step:,}. An effect is the value less that of a model that treats '
            "groups alike; p is the chance of so large an effect in such a model, corrected for the number of tests (Holm). Small lists of words and pairs "
            "find some biases and miss others: a passed audit is no proof of fairness.</p>"
            + page.table(["task", "metric", ">value", ">95 % interval", ">effect", ">p", ">items", "limit"], rows)
            + "".join(f'<p class="note">left out: {page.text(line)}</p>' for line in found["left_out"]))


def _samples(of: Summary) -> str:
    some = of.samples if len(of.samples) <= _SAMPLES else [of.samples[i * (len(of.samples) - 1) // (_SAMPLES - 1)] for i in range(_SAMPLES)]
    if not some:
        return ""
    *before, (last, newest) = [(step, f"<pre>{page.text(text)}</pre>") for step, text in some]
    return f"<h3>step {last:,}</h3>{newest}" + "".join(page.details(f"step {step:,}", text) for step, text in reversed(before))


def _data(of: Summary) -> str:
    if of.corpus is None:
        return ""
    heads, rows = ["split", ">documents", ">text", ">tokens"], []
    for name, split in of.corpus.splits.items():
        rows.append([page.text(name), f"{split['documents']:,}", page.size(split["text_bytes"]), f"{split['tokens']:,}"])
    parts = [f"<p>{page.text(of.corpus.folder)}</p>", page.table(heads, rows)]
    for what, counts in (("source", of.corpus.sources), ("licence", of.corpus.licences)):
        shown = sorted(counts.items(), key=lambda item: -item[1])
        more = f'<p class="note">and {len(shown) - _ROWS:,} more</p>' if len(shown) > _ROWS else ""
        parts.append(page.table([what, ">training documents"], [[page.text(name or "not given"), f"{count:,}"] for name, count in shown[:_ROWS]]) + more)
    if of.corpus.report:
        funnel = of.corpus.report["funnel"]
        most = max(1, funnel[0]["documents"])
        parts.append("<p>Documents left after each step of the preparation (report.html in the corpus has more).</p>" + page.table(
            ["after", ">documents", "="], [[page.text(step["step"]), f"{step['documents']:,}", page.bar(step["documents"] / most)] for step in funnel]))
    return "".join(parts)


def _ledger(of: Summary) -> str:
    if not of.ledger:
        return ""
    told = {key: value for key, value in of.ledger.items() if key != "history"}
    rows = [[page.text(f"before: {entry['origin']}"), page.text(_told(entry))] for entry in of.ledger.get("history", ())]
    rows.append([page.text("this run"), page.text(_told(told) if of.ledger.get("manifest") else "imported: what the model was trained on is not known here")])
    say = f"<p>With config and corpus this determines every row that was read: <code>jaxlm data audit {page.text(of.workdir)}</code> lists each document.</p>"
    return (say if of.ledger.get("manifest") else "") + page.table(["parameters", "trained on"], rows)


def _told(entry: Mapping[str, Any]) -> str:
    if not entry.get("manifest"):
        return "not known here"
    return (f"{entry.get('rows', 0):,} rows in {entry.get('step', 0):,} steps with seed {entry.get('seed')}, of {entry.get('dir')} "
            f"(fingerprint {str(entry['manifest'])[:16]})")


def _config(of: Summary) -> str:
    rows = [[f"<code>{page.text(key)}</code>", f"<code>{page.text(value)}</code>"] for key, value in card.changed(of.config)]
    every = "\n".join(f"{part}.{key} = {value!r}" for part, values in configs.to_dict(of.config).items() for key, value in values.items())
    return "<p>What differs from the defaults.</p>" + page.table(["key", "value"], rows) + page.details("every key", f"<pre>{page.text(every)}</pre>")


def _again(of: Summary) -> str:
    return f"<pre>{page.text(chr(10).join(card.commands(of)))}</pre>" + ("" if of.imported else f"<p>{page.text(card.PROMISE)}</p>")


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "none"
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4f}"


def _between(low: Any, high: Any) -> str:
    return f"{_number(low)} to {_number(high)}" if isinstance(low, (int, float)) and isinstance(high, (int, float)) else ""

