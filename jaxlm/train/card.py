"""MODEL_CARD.md: what a run's folder tells about its model, in the form of the Hugging Face Hub: metadata in YAML between lines of dashes, then Markdown
(huggingface.co/docs/hub/model-cards; the sections follow Mitchell et al. 2019, "Model cards for model reporting").

Figures come from the folder and are written anew each time. What only people know, the sections in PEOPLE and the licence, is kept as it stands in the file.
"""

import json
import pathlib
import re
from typing import Any

import jaxlm
from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.evaluate import classification, likelihood, results
from jaxlm.train import clock, energy, report
from jaxlm.train.summary import Summary

FILE = "MODEL_CARD.md"
PEOPLE = {
    "Intended use": "What the model is for, who should use it, and what it must not be used for.",
    "Limitations": "What it does badly, and what was not tested.",
    "Licence and contact": "Under which terms the model is released (set `license` at the top of this file too), and who answers questions.",
}
_TODO = "*Not written yet.*"
PROMISE = ("The corpus's fingerprint is in the ledger. With the same corpus, package versions and number of devices, training on CPUs repeats bit for bit; "
           "elsewhere to rounding.")
_ROWS = 30  # of a table


def describe(of: Summary) -> str:
    """The model in a few words."""
    model = of.config.model
    kind = "encoder-decoder" if model.encoder_layers else model.kind
    size = f" of {report.count(of.parameters)} parameters" if of.parameters else ""
    objective = {"next_token": "next token", "masked_token": "masked tokens", "span_corruption": "hidden spans", "seq2seq": "pairs of texts", "sft": "chats",
                 "preference": "preferences", "classify": "classes of texts", "multi_label": "labels of texts", "regress": "numbers",
                 "token_classify": "tags of words"}.get(of.config.objective.name, of.config.objective.name)
    layers = f"{model.encoder_layers} + {model.layers}" if model.encoder_layers else f"{model.layers}"
    return f"{kind}{size}, {layers} layers of width {model.width}" + ("" if of.imported else f", trained on {objective}")


def changed(config: Config) -> list[tuple[str, Any]]:
    """Keys that differ from the defaults."""
    default = configs.keys()
    return [(f"{part}.{key}", value) for part, values in configs.to_dict(config).items() for key, value in values.items() if value != default[f"{part}.{key}"]]


def recipe(config: Config) -> str:
    """A config file that gives this config."""
    parts: dict[str, list[str]] = {}
    for key, value in changed(config):
        part, _, name = key.partition(".")
        parts.setdefault(part, []).append(f"{name}={value!r}")
    lines = [f"    c.{part} = ConfigDict(dict({', '.join(values)}))" for part, values in parts.items()]
    return "\n".join(["from ml_collections import ConfigDict", "", "", "def get_config():", "    c = ConfigDict()", *lines, "    return c"])


def commands(of: Summary) -> list[str]:
    """How to make the model again."""
    lines = [f"pip install jaxlm=={jaxlm.__version__}"]
    if of.imported:
        place = re.sub("^(hf|gguf):", "", of.origins()[-1]) if of.origins() else "DIRECTORY"
        return [*lines, f"jaxlm import --from={place} --to={of.workdir}-again"]
    return [*lines, f"jaxlm train --config=again.py --workdir={of.workdir}-again", "", "# again.py", *recipe(of.config).splitlines()]


def write(of: Summary, path: pathlib.Path, before: str | None = None) -> list[str]:
    """Writes the card; returns the sections that people still have to write.

    Args:
      before: an earlier card whose sections by people are kept; None: the one at `path`, if there is one.
    """
    before = before if before is not None else path.read_text(encoding="utf-8") if path.is_file() else ""
    text = render(of, before)
    results.replace(path, text)
    return [name for name in PEOPLE if _TODO in _section(text, name)]


def render(of: Summary, before: str = "") -> str:
    """The whole card."""
    parts = {"Intended use": "", "Model": _model(of), "Use": _use(of), "Training data": _data(of), "Training": _training(of), "Evaluation": _evaluation(of),
             "Bias": _bias(of), "Limitations": "", "Reproduce": "```\n" + "\n".join(commands(of)) + "\n```" + ("" if of.imported else f"\n{PROMISE}"), "Licence and contact": ""}
    body = [f"## {name}\n\n{(_section(before, name) or _TODO + ' ' + PEOPLE[name]) if name in PEOPLE else text}" for name, text in parts.items()
            if text or name in PEOPLE]
    name = of.workdir.resolve().name
    lead = (f"Model: {describe(of)}. Figures in this card were written by jaxlm {jaxlm.__version__} from the run's folder; `jaxlm report` renews them "
            "and leaves the sections alone that people write.")
    return "\n\n".join([_metadata(of, before), f"# {name}", lead, *body]) + "\n"


def _section(text: str, name: str) -> str:
    found = re.search(rf"(?ms)^## {re.escape(name)}[ \t]*\n(.*?)(?=^## |\Z)", text)
    return found[1].strip() if found else ""


def _metadata(of: Summary, before: str) -> str:
    """The Hub's YAML: strings as JSON, which is YAML."""
    head = before.split("\n---", 1)[0] if before.startswith("---\n") else ""
    kept = re.search(r"(?m)^license: *(\S.*)$", head)
    model, task = of.config.model, pipeline(of.config)
    lines = [f"license: {kept[1] if kept else 'unknown'}", "library_name: transformers", f"pipeline_tag: {task}", "tags:", "- jaxlm",
             f"- {'encoder-decoder' if model.encoder_layers else model.kind}"]
    languages = [name for name, row in (of.corpus.report or {}).get("languages", {}).items() if re.fullmatch("[a-z]{2,3}", name)][:10] if of.corpus else []
    lines += ["language:", *(f"- {json.dumps(name)}" for name in languages)] if languages else []
    if row := next((row for row in reversed(of.metrics) if "energy/kg_co2" in row), None):
        lines += ["co2_eq_emissions:", f"  emissions: {row['energy/kg_co2'] * 1e3:.3g}", f"  source: {json.dumps('jaxlm, ' + dict(spent(of))['energy'])}",
                  "  training_type: " + ("fine-tuning" if of.origins() else "pre-training"), f"  geographical_location: {json.dumps(of.config.energy.region)}"]
    entries = []
    for dataset, kind, split, figures in _measured(of):
        entries += ["  - task:", f"      type: {task}", "    dataset:", f"      type: {json.dumps(kind)}", f"      name: {json.dumps(dataset)}",
                    *([f"      split: {json.dumps(split)}"] if split else []), "    metrics:"]
        for name, value, _, _ in figures:
            entries += [f"    - type: {json.dumps(name)}", f"      value: {json.dumps(round(value, 6))}"]
    lines += ["model-index:", f"- name: {json.dumps(of.workdir.resolve().name)}", "  results:", *entries] if entries else []
    return "\n".join(["---", *lines, "---"])


def pipeline(config: Config) -> str:
    """What the Hub calls what the model does."""
    if config.model.encoder_layers:
        return "text2text-generation"
    return {"tokens": "fill-mask" if config.model.kind == "encoder" else "text-generation", "token_labels": "token-classification",
            "sequence_labels": "text-classification"}.get(config.model.output, "feature-extraction")


def _measured(of: Summary) -> list[tuple[str, str, str, list[tuple[str, float, Any, Any]]]]:
    """(data set, its kind, split, [(metric, value, low, high)]): the last figures of the run's own splits, and its tasks."""
    found, units = [], classification.FIGURES.get(of.config.objective.name) or likelihood.UNITS.get(of.config.objective.name, {})
    for split in ("test", "validation"):
        rows = [row for row in of.evaluations if row.get("split") == split and not row.get("data") and row.get("step") == of.step]
        figures = rows[-1] if rows else of.last(f"{split}/")
        shown = [(name, figures[name], figures.get(f"{name}_low"), figures.get(f"{name}_high")) for name in units
                 if isinstance(figures.get(name), (int, float))]
        if shown:
            found.append((", ".join(list(of.corpus.sources)[:3]) if of.corpus else "the run's corpus", "own", split, shown))
    for _, result in of.results:
        shown = [(name, row["value"], row.get("low"), row.get("high")) for name, row in result["metrics"].items() if row["value"] is not None]
        if result["kind"] != "swap" and "split" not in result.get("source", {}) and shown:
            found.append((result["task"] + (f" (first {result['items']})" if result.get("limit") else ""), result["task"], "", shown))
    return found


# --- sections -----------------------------------------------------------------------------------------------------------------------------


def _table(heads: list[str], rows: list[list[Any]]) -> str:
    clean = lambda cell: str(cell).replace("|", "\\|").replace("\n", " ")
    lines = ["| " + " | ".join(map(clean, row)) + " |" for row in rows[:_ROWS]]
    more = [f"\n({len(rows) - _ROWS:,} more)"] if len(rows) > _ROWS else []
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *lines, *more])


def _number(value: Any) -> str:
    return results.number(value) if isinstance(value, (int, float)) else ""


def _model(of: Summary) -> str:
    model = of.config.model
    rows = [["parameters", f"{of.parameters:,}" if of.parameters else "not known yet"], ["kind", "encoder-decoder" if model.encoder_layers else model.kind],
            ["layers, width, heads", f"{model.layers}, {model.width}, {model.heads}"], ["longest text", f"{model.context:,} tokens"],
            ["vocabulary", f"{model.vocab_size:,}" if model.vocab_size else "not known yet"]]
    rows += [["classes", ", ".join(model.label_names[:_ROWS]) or model.labels]] if model.labels else []
    rows += [["began from", " -> ".join(of.origins())]] if of.origins() else []
    return _table(["", ""], rows)


def _use(of: Summary) -> str:
    classes = {"text-generation": "AutoModelForCausalLM", "fill-mask": "AutoModelForMaskedLM", "text-classification": "AutoModelForSequenceClassification",
               "token-classification": "AutoModelForTokenClassification", "text2text-generation": "AutoModelForSeq2SeqLM"}
    name = classes.get(pipeline(of.config), "AutoModel")
    return ("In the directory that `jaxlm export` makes:\n\n```python\nimport transformers\n"
            f'model = transformers.{name}.from_pretrained(".")\ntokenizer = transformers.AutoTokenizer.from_pretrained(".")\n```')


def _data(of: Summary) -> str:
    if of.imported:
        return "The model was imported; what it was trained on is not known here."
    if of.corpus is None:
        return f"The corpus ({of.ledger.get('dir', 'not prepared yet')}) was not here when this card was written."
    splits = _table(["split", "documents", "bytes of text", "tokens"], [[name, *(f"{split[key]:,}" for key in ("documents", "text_bytes", "tokens"))]
                                                                      for name, split in of.corpus.splits.items()])
    many = lambda counts: ", ".join(f"{name or 'not given'} ({count:,} documents)" for name, count in sorted(counts.items(), key=lambda one: -one[1])[:_ROWS])
    lines = [splits, f"Sources: {many(of.corpus.sources)}.", f"Licences: {many(of.corpus.licences)}."]
    if of.origins():
        lines.append("The first parameters had been trained on other data: " + "; ".join(of.origins()) + ".")
    return "\n\n".join(lines)


def _training(of: Summary) -> str:
    if of.imported or not of.metrics:
        return ""
    last = next((row for row in reversed(of.metrics) if "train/loss" in row), {})
    rows = [["steps", f"{last.get('step', 0):,} of {of.config.train.steps}" + ("" if of.finished else " (not finished)")]]
    rows += [["tokens read", f"{last['train/tokens']:,.0f}"]] if "train/tokens" in last else []
    rows += [["rows of a step", f"{of.config.data.batch_size} x {of.config.data.sequence_length} tokens"],
             ["optimiser", f"{of.config.optim.name}, learning rate {of.config.optim.lr:g}, {of.config.optim.schedule}"]]
    return _table(["", ""], [*rows, *(list(row) for row in spent(of))])


def spent(of: Summary) -> list[tuple[str, str]]:
    """What the run took in time, electricity, CO2 and money: what and how much."""
    row = next((row for row in reversed(of.metrics) if "energy/kwh" in row), {})
    return [*clock.told(row), *energy.told(row, of.config.energy)]


def _evaluation(of: Summary) -> str:
    rows = [[dataset, split, name, _number(value), f"{_number(low)} to {_number(high)}" if low is not None else ""]
            for dataset, _, split, figures in _measured(of) for name, value, low, high in figures]
    if not rows:
        return "Nothing was evaluated yet: `jaxlm eval`."
    hit = [f"{result['task']}: {result['contamination']['hit']:,} of {result['contamination']['items']:,}" for _, result in of.results
           if result.get("contamination", {}).get("searched")]
    note = f"\n\nItems that share 13 words in a row with the training data: {'; '.join(hit)}." if hit else ""
    return _table(["data", "split", "metric", "value", "95 % interval"], rows) + note


def _bias(of: Summary) -> str:
    if of.audit is None:
        return "No audit was made: `jaxlm eval --audit=eval_bias`."
    step, found = of.audit
    rows = [[row["task"], row["group"] or "all", row["metric"], _number(row["value"]),
             f"{_number(row['low'])} to {_number(row['high'])}" if row["low"] is not None else "",
             f"{row['effect']:+.4f}", "" if row["p"] is None else f"{row['p']:.4f}", "" if row["limit"] is None else f"{row['limit']:g}: {row['verdict']}"]
            for row in found["rows"]]
    said = "" if not any(row["limit"] is not None for row in found["rows"]) else " No limit was broken." if found["passed"] else " **A limit was broken.**"
    left = "".join(f"\n\nLeft out: {line}." for line in found["left_out"])
    return (f"Audit of step {step}.{said} Effects are distances from a model that treats groups alike; p is corrected for the number of tests (Holm).\n\n"
            + _table(["task", "group", "metric", "value", "95 % interval", "effect", "p", "limit"], rows) + left)

