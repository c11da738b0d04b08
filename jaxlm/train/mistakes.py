"""`jaxlm eval --report`: one self-contained page about what a classifier gets wrong (jaxlm/page.py, evaluate/mistakes.py)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import page, sharding
from jaxlm.data import labels, languages, loader
from jaxlm.data.shards import Corpus
from jaxlm.evaluate import baselines, classification, likelihood, mistakes
from jaxlm.models import kinds
from jaxlm.train import classified, evaluation, report, saved
from jaxlm.train import origin as origins

_SHOWN = 30  # rows of a list of texts
_OCCLUDED = 120  # texts whose words are left out one by one


def write(of: evaluation.Subject, run: saved.Run, split: str, judged: classified.Judged, *, log: Callable[[str], None] = print) -> None:
    """Writes WORKDIR/report-SPLIT.html. In several processes all call this together; process 0 writes."""
    name, corpus = of.config.objective.name, of.corpus
    sections: list[tuple[str, str, str]] = []
    words = _words(of, run, split, judged) if name in ("classify", "multi_label") else ""
    features, told = _features(of, run, log) if name == "classify" and baselines.available() else (None, "")
    if jax.process_index() > 0:
        return
    here = _Texts(of, split, judged)
    sections = [
        ("figures", "Figures", _figures(of, judged)), ("confusion", "Confusion", _confusion(of, judged)), ("mistakes", "Worst mistakes", _worst(here)),
        ("slices", "Slices", _slices(here)), ("labels", "Suspected label errors", _suspects(here, corpus, features, told)),
        ("duplicates", "Near-duplicates of training texts", _duplicates(here, corpus)), ("curve", "Learning curve", _curve(of, run, here, features)),
        ("words", "Words that move answers", words),
        ("about", "About", page.details("config of the run", f"<pre>{page.text(_config(run))}</pre>"))]
    summary = judged.result.summary
    tiles = [(_figure(name, summary, key), f"{key.replace('_', ' ')}{_between(summary, key)}") for key in list(classification.FIGURES[name])[:4]]
    tiles += [(f"{summary['documents']:,}", f"{split} texts"), (f"{len(corpus.splits['train'].tokens):,}", "training texts")]
    intro = f"{page.text(run.workdir)}, step {run.step}: {page.text(name)} on the {page.text(split)} split of {page.text(corpus.folder)}"
    path = run.workdir / f"report-{split}.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page.render("Error report", intro, sections, page.tiles(tiles) + _verdicts(name, judged)), encoding="utf-8")
    temporary.replace(path)
    log(f"wrote {path}")


class _Texts:
    """The evaluated texts, one entry each, whatever the objective: what was right, what was said, how sure, how wrong."""

    def __init__(self, of: evaluation.Subject, split: str, judged: classified.Judged):
        self.name, self.names, examples = of.config.objective.name, of.task.label_names, of.corpus.examples(split)
        answers, calibrated = judged.answers, judged.result.summary["temperature"]
        documents, first = np.unique(answers.document, return_index=True)
        self.split, self.documents = split, documents
        self.row = np.repeat(np.arange(len(documents)), np.diff([*first, len(answers.document)]))  # of each answer its text: of tags there is one for each word
        self.place = np.arange(len(answers.document)) - first[self.row]
        self.texts = [classified.plain(examples.texts[i]) for i in documents]
        self.fields = [examples.fields[i] for i in documents]
        self.ids = [of.corpus.document_id(split, int(i)) for i in documents]
        self.sources = [of.corpus.sources[of.corpus.splits[split].sources[i]] for i in documents]
        self.truth, self.probs = answers.truth, classification.probabilities(self.name, answers.logits, calibrated)
        loss = classification.nll(self.name, answers.logits, answers.truth)
        if self.name == "regress":
            self.right = np.abs(self.probs[:, 0] - self.truth[:, 0]).astype(np.float64)
            self.said, self.given, self.confidence = ([f"{v:.4g}" for v in self.probs[:, 0]], [f"{v:.4g}" for v in self.truth[:, 0]], np.zeros(len(documents)))
        elif self.name == "multi_label":
            some = lambda chosen: [", ".join(self.names[c] for c in np.flatnonzero(row)) or "none" for row in chosen]
            said = self.probs > 0.5
            self.right = (said == (self.truth > 0)).all(axis=1).astype(np.float64)
            self.said, self.given = some(said), some(self.truth)
            self.confidence = np.where(said, self.probs, 1 - self.probs).min(axis=1)
        else:
            hits, sure = self.probs.argmax(axis=1) == self.truth.argmax(axis=1), self.probs.max(axis=1)
            over = lambda f, values: f.reduceat(values, first)
            self.right = over(np.add, hits.astype(np.float64)) / np.diff([*first, len(hits)])
            loss, self.confidence = over(np.add, loss), over(np.maximum, np.where(hits, 0.0, sure)) if self.name == "token_classify" else sure
            tags = lambda numbers: [" ".join(self.names[i] for i in some) for some in np.split(numbers, first[1:])]
            self.said, self.given = tags(self.probs.argmax(axis=1)), tags(self.truth.argmax(axis=1))
        self.loss = loss

    @property
    def what(self) -> str:
        return {"regress": "mean absolute error", "token_classify": "right words"}.get(self.name, "accuracy")


# --- sections -----------------------------------------------------------------------------------------------------------------------------


def _figures(of: evaluation.Subject, judged: classified.Judged) -> str:
    name, summary, found = of.config.objective.name, judged.result.summary, judged.baselines
    rows = []
    for key, what in classification.FIGURES[name].items():
        rows.append([page.text(key.replace("_", " ")) + f"<small>{page.text(what)}</small>", _figure(name, summary, key),
                     page.text(_between(summary, key).strip(" ()")), *(f"{one.figures[key]:.4f}" if key in classified.SHOWN[name] and key in one.figures else "" for one in found)])
    parts = [page.table(["figure", ">this model", ">95 % interval", *(f">{one.name}" for one in found)], rows)]
    kinds_ = [key.removeprefix("precision/") for key in summary if key.startswith("precision/") and not key.endswith(("_low", "_high"))]
    cell = lambda key: f"{summary[key]:.3f}<small>{page.text(_between(summary, key).strip(' ()'))}</small>"
    rows = [[page.text(kind), f"{summary[f'texts/{kind}']:,}", *(cell(f"{figure}/{kind}") for figure in ("precision", "recall", "f1")),
             page.bar(summary[f"f1/{kind}"])] for kind in kinds_]
    parts += ["<h3>Classes</h3>" + page.table(["class", ">texts", ">precision", ">recall", ">F1", "="], rows)] if rows else []
    if "ece" in summary:
        parts.append(f"<h3>Calibration</h3><p>Probabilities are those after a temperature of {summary['temperature']:.3f}, fitted on the validation split. "
                     "Of a well calibrated model the texts answered with a confidence of 90 % are right in 90 of 100.</p>" + _reliability(of, judged))
    return "".join(parts)


def _reliability(of: evaluation.Subject, judged: classified.Judged) -> str:
    name, answers = of.config.objective.name, judged.answers
    lines = {}
    for label, temperature in (("calibrated", judged.result.summary["temperature"]), ("without temperature", 1.0)):
        probs = classification.probabilities(name, answers.logits, temperature)
        if name == "multi_label":
            sure, right = np.where(probs > 0.5, probs, 1 - probs).reshape(-1), ((probs > 0.5) == (answers.truth > 0)).reshape(-1)
        else:
            sure, right = probs.max(axis=1), probs.argmax(axis=1) == answers.truth.argmax(axis=1)
        order = np.array_split(np.argsort(sure, kind="stable"), min(8, max(1, len(sure) // 10)))
        lines[label] = [(float(sure[some].mean()), float(right[some].mean())) for some in order if len(some)]
    if min(len(points) for points in lines.values()) < 3:
        return "<p>Too few texts for a curve.</p>"
    ends = [point for points in lines.values() for point in points]
    low, high = min(p[0] for p in ends), max(p[0] for p in ends)
    return page.chart(lines | {"perfect": [(low, low), (high, high)]}, "confidence", "share of right answers")


def _confusion(of: evaluation.Subject, judged: classified.Judged) -> str:
    matrix, names = judged.result.matrix, of.task.label_names
    if matrix is None or len(names) > 40:
        return ""
    rows = []
    for name, row in zip(names, matrix):
        total = max(1, int(row.sum()))
        cells = [f'<div class="cell{" hit" if i == len(rows) else ""}" style="--share:{count / total:.3f}">{count:,}<small>{count / total:.0%}</small></div>'
                 for i, count in enumerate(row.tolist())]
        rows.append([f"<b>{page.text(name)}</b>", *cells])
    return "<p>A row for each true class, a column for each answer; shares are of the row.</p>" + page.table(["true", *(f">{name}" for name in names)], rows)


def _worst(here: _Texts) -> str:
    order = [i for i in np.argsort(-here.loss, kind="stable") if here.name == "regress" or here.right[i] < 1][:_SHOWN]
    rows = [[page.text(here.given[i]), page.text(here.said[i]), "" if here.name == "regress" else f"{here.confidence[i]:.1%}",
             f"{page.text(here.texts[i])}<small>{page.text(here.ids[i])}</small>"] for i in order]
    wrong = int((here.right < 1).sum())
    say = "" if here.name == "regress" else f"<p>{wrong:,} of {len(here.texts):,} texts are not answered right; the surest first.</p>"
    return say + page.table(["label", "answer", ">confidence", "text"], rows) if rows else "<p>None.</p>"


def _slices(here: _Texts) -> str:
    try:
        identify = languages.identifier((languages.ANY,))
        told = [identify(text)[0] for text in here.texts]
    except ValueError:  # the package is not installed
        told = []
    found = mistakes.slices(mistakes.columns(here.texts, here.sources, here.fields, told), here.right)
    most = max((one.mean for one in found), default=1.0) if here.name == "regress" else 1.0
    rows = [[page.text(one.column if i == 0 or found[i - 1].column != one.column else ""), page.text(one.value), f"{one.texts:,}", _share(here, one.mean),
             f"{_share(here, one.low)} to {_share(here, one.high)}", page.bar(one.mean / (most or 1))] for i, one in enumerate(found)]
    say = f"<p>{here.what.capitalize()} of parts of the split, with 95 % intervals.</p>"
    return say + page.table(["", "slice", ">texts", f">{here.what}", ">95 % interval", "="], rows)


def _share(here: _Texts, value: float) -> str:
    return f"{value:.4g}" if here.name == "regress" else f"{value:.1%}"


def _suspects(here: _Texts, corpus: Corpus, features: Any, told: str) -> str:
    if here.name == "regress":
        return ""
    parts = ["<p>Texts that look like another class at least as much as its own texts do on average (confident learning). Read them before you change a label: "
             "an unusual text looks the same as a wrong label.</p>"]
    if here.name == "multi_label":
        sets = [(name, one) for c, name in enumerate(here.names)
                for one in mistakes.label_errors(np.stack([1 - here.probs[:, c], here.probs[:, c]], axis=1), (here.truth[:, c] > 0).astype(np.int64))]
        found = [one for _, one in sets]
        rows = sorted(((one.margin, (f"not {name}", name), one) for name, one in sets), key=lambda row: -row[0])[:_SHOWN]
        table = [[page.text(said[one.given]), page.text(said[one.likely]), f"{margin:.2f}", _cell(here.texts[one.place], here.ids[one.place])]
                 for margin, said, one in rows]
        shown, what = page.table(["label", "looks like", ">margin", "text"], table) if table else "<p>None.</p>", f"{len(here.texts):,} texts, class by class"
    else:
        found, what = mistakes.label_errors(here.probs, here.truth.argmax(axis=1)), f"{len(here.probs):,}" + " words" * (here.name == "token_classify")
        shown = _suspect_table(found, here.names, [_in_place(here, i) for i in range(len(here.row))], [here.ids[i] for i in here.row])
    parts.append(f"<h3>{page.text(here.split)}: {len(found):,} of {what}</h3><p>By the probabilities of this model, which has not seen them.</p>" + shown)
    if features is not None and here.split != "train":
        train = corpus.examples("train")
        truth = labels.targets("classify", here.names, train.labels)
        probs = classification.probabilities("classify", mistakes.cross_validated(features, truth))
        found = mistakes.label_errors(probs, truth.argmax(axis=1))
        parts.append(f"<h3>train: {len(found):,} of {len(train.labels):,}</h3><p>By logistic regressions on {page.text(told)}, each text judged by one that was "
                     "not trained on it (5 parts).</p>")
        parts.append(_suspect_table(found, here.names, [classified.plain(text) for text in train.texts], corpus.document_ids("train")))
    return "".join(parts)


def _cell(text: str, place: str) -> str:
    return f"{page.text(text)}<small>{page.text(place)}</small>"


def _in_place(here: _Texts, answer: int) -> str:
    """A text, of tags the word before the text it stands in."""
    text = here.texts[here.row[answer]]
    return f"{text.split()[here.place[answer]]}: {text}" if here.name == "token_classify" else text


def _suspect_table(found: Sequence[mistakes.Suspect], names: Sequence[str], texts: Sequence[str], ids: Sequence[str]) -> str:
    rows = [[page.text(names[one.given]), page.text(names[one.likely]), f"{one.margin:.2f}", _cell(texts[one.place], ids[one.place])] for one in found[:_SHOWN]]
    return page.table(["label", "looks like", ">margin", "text"], rows) if rows else "<p>None.</p>"


def _duplicates(here: _Texts, corpus: Corpus) -> str:
    if here.split == "train":
        return ""
    train = corpus.examples("train")
    found = mistakes.near_duplicates([classified.plain(text) for text in train.texts], here.texts)
    other = sum(train.labels[one.train] != corpus.examples(here.split).labels[here.documents[one.place]] for one in found)
    cell = lambda shown, place, label: f"{page.text(classified.plain(shown))}<small>{page.text(place)}, {page.text(label)}</small>"
    rows = [[f"{one.similarity:.2f}", cell(here.texts[one.place], here.ids[one.place], here.given[one.place]),
             cell(train.texts[one.train], corpus.document_id("train", one.train), train.labels[one.train])] for one in found[:_SHOWN]]
    say = (f"<p>{len(found):,} of {len(here.texts):,} texts share at least 60 % of their pairs of words with a training text; {other:,} of these have another "
           "label than it. They flatter the figures; config.dedup.near=0.6 removes them before the split.</p>")
    return say + (page.table([">similarity", here.split, "training"], rows) if rows else "")


def _curve(of: evaluation.Subject, run: saved.Run, here: _Texts, features: Any) -> str:
    rows = report.read_metrics(run.workdir)
    series = lambda key: [(float(row["step"]), row[key]) for row in rows if key in row]
    metric = list(classification.FIGURES[here.name])[0]
    parts = [page.chart({"training": series("train/loss"), "validation": series("eval/loss")}, "step", "loss")]
    parts += [page.chart({f"validation {metric}": series(f"eval/{metric}")}, "step", metric.replace("_", " "))] if metric != "loss" else []
    if here.name == "classify" and baselines.available() and here.split != "train":
        train = of.corpus.examples("train")
        truth, order = labels.targets("classify", here.names, train.labels), np.random.default_rng(0).permutation(len(train.labels))
        points = []
        for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0):
            some = order[:max(2, round(share * len(order)))]
            answer = baselines.linear("classify", baselines.tfidf([classified.plain(train.texts[i]) for i in some]), truth[some])(here.texts)
            points.append((float(len(some)), float((answer.argmax(axis=1) == here.truth.argmax(axis=1)).mean())))
        parts.append(page.chart({"TF-IDF + logistic regression": points}, "training texts", "accuracy", {"this model, all texts": float(here.right.mean())}))
    return "".join(parts)


def _words(of: evaluation.Subject, run: saved.Run, split: str, judged: classified.Judged) -> str:
    documents = judged.answers.document
    chosen = documents[np.arange(min(_OCCLUDED, len(documents))) * len(documents) // min(_OCCLUDED, len(documents))]
    texts, names = [of.corpus.examples(split).texts[i].replace("\x1e", " ||| ") for i in chosen], of.task.label_names

    def answer(some: Sequence[str]) -> np.ndarray:
        return np.array([[one["probabilities"][name] for name in names] for one in classified.label(run, some, batch_size=64)])

    found = mistakes.moving_words(texts, answer, len(names))
    parts = [f"<p>Mean change of a class's probability by a word, over the texts with it (of {len(texts)} texts, words in at least 3): each word is left out "
             "once.</p>"]
    for name, words in list(zip(names, found))[:6]:
        up = [one for one in words if one.effect > 0][:15]
        most = max((one.effect for one in up), default=1.0)
        rows = [[page.text(one.word), f"{one.texts:,}", f"{one.effect:+.3f}", page.bar(one.effect / most)] for one in up]
        parts.append(f"<div><h3>{page.text(name)}</h3>{page.table(['word', '>texts', '>effect', '='], rows)}</div>")
    return parts[0] + f'<div class="pair">{"".join(parts[1:])}</div>'


# --- details ------------------------------------------------------------------------------------------------------------------------------


def _features(of: evaluation.Subject, run: saved.Run, log: Callable[[str], None]) -> tuple[Any, str]:
    """Features of the training texts from what has not been trained on their labels: the mean state of the model that the run began from, else TF-IDF."""
    origin, train = run.config.train.init_from, of.corpus.examples("train")
    if origin:
        try:
            return _states(of, origin, run), f"the mean states of {origin}"
        except (ValueError, OSError) as error:
            log(f"{origin} cannot be read any more ({error}): label errors are sought by TF-IDF")
    return baselines.tfidf([classified.plain(text) for text in train.texts]).train, "TF-IDF"


def _states(of: evaluation.Subject, origin: str, run: saved.Run) -> np.ndarray:
    """Mean hidden state of each training text, by the model in `origin`: float32 [documents, D]."""
    cfg = origins.model(origin)[0]
    model = kinds.build(cfg)
    whole = NamedSharding(of.mesh, PartitionSpec())
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), jax.eval_shape(model.init, jax.random.key(0)))
    params = origins.params(origin, target, log=lambda line: None)

    @functools.partial(jax.jit, out_shardings=whole)
    def mean(params, batch):
        hidden, inside = model.apply(params, batch)[0].astype(jnp.float32), (batch["segments"] > 0)[..., None]
        return (hidden * inside).sum(axis=1) / jnp.maximum(inside.sum(axis=1), 1)

    ways = sharding.ways("batch", of.mesh)
    size = -(-32 // ways) * ways
    begin, end = sharding.local_rows(of.mesh, size)
    batches = loader.evaluation_batches(of.corpus, "train", of.task, batch_size=size, overlap=0, rows=(0, size))
    keep = ("tokens", "positions", "segments", "types")
    work = lambda batch: (mean(params, sharding.to_device(of.mesh, {k: v[begin:end] for k, v in batch.items() if k in keep}, size)), batch["documents"][:, 0])
    out = np.zeros((len(of.corpus.splits["train"].tokens), cfg.width), np.float32)
    for states, documents in likelihood.one_behind(work, batches, of.mesh):
        out[documents[documents >= 0]] = np.asarray(states)[documents >= 0]
    return out


def _verdicts(name: str, judged: classified.Judged) -> str:
    lines = [baselines.verdict(name, one.name, one.comparison) for one in judged.baselines]
    kinds_ = ["good" if one.comparison.verdict == "better" else "warn" for one in judged.baselines]
    return "".join(f'<div class="{kind}">{page.text(line)}</div>' for kind, line in zip(kinds_, lines))


def _figure(name: str, summary: dict[str, float], key: str) -> str:
    return f"{summary[key]:.4f}" if name == "regress" or key in ("loss", "brier", "ece", "ece_uncalibrated", "mcc") else f"{summary[key]:.1%}"


def _between(summary: dict[str, float], key: str) -> str:
    return f" ({summary[f'{key}_low']:.3f} to {summary[f'{key}_high']:.3f})" if f"{key}_low" in summary else ""


def _config(run: saved.Run) -> str:
    from jaxlm import config
    default = config.keys()
    return "\n".join(f"{part}.{key} = {value!r}" for part, values in config.to_dict(run.config).items() for key, value in values.items()
                     if value != default[f"{part}.{key}"])
