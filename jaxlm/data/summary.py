"""report.json: what a preparation read, changed, removed and kept, with examples; the same bytes for any number of workers."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

import jaxlm
from jaxlm.data import counts, tokenizer
from jaxlm.data.survivors import Survey

NAME = "report.json"
_STEPS = ("clean.extract", "clean.empty", "clean", "filter", "decontaminate", "dedup.exact", "dedup.lines", "dedup.near")  # in the order they are taken
_TOP = 50  # tokens shown


class Tokens:
    """Statistics of tokens, by document and by id."""

    def __init__(self, tok: tokenizer.Tokenizer):
        self._tokenizer, self._occurrences = tok, np.zeros(tok.vocab_size, np.int64)
        self._lengths: list[int] = []
        self.sources: dict[str, Any] = {}

    def add(self, occurrences: np.ndarray) -> None:
        """How often each id occurs in some documents: int64 [vocab_size]."""
        self._occurrences += occurrences

    def document(self, source: str, licence: str, split: str, tokens: int, size: int) -> None:
        """Counts a document of `tokens` tokens and `size` bytes under its source, licence and split."""
        self._lengths.append(tokens)
        entry = {"documents": 1, "bytes": size, "tokens": tokens}
        counts.add(self.sources, {source: {"kept": entry, "licences": {licence or "not given": entry}, "splits": {split: entry}}})

    def to_dict(self) -> dict[str, Any]:
        """For the report, as JSON: lengths, totals, the most frequent pieces and those never used."""
        order = np.lexsort((np.arange(len(self._occurrences)), -self._occurrences))
        total = int(self._occurrences.sum())
        unused = np.flatnonzero(self._occurrences == 0)
        pieces = lambda ids: self._tokenizer.pieces([int(i) for i in ids])
        top = [i for i in order[:_TOP] if self._occurrences[i]]
        return {
            "total": total, "vocab_size": len(self._occurrences), "document_lengths": counts.histogram(np.array(self._lengths, np.int64)),
            "most_frequent": [{"id": int(i), "piece": piece, "times": int(self._occurrences[i])} for i, piece in zip(top, pieces(top))],
            "unused": len(unused), "unused_examples": pieces(unused[:_TOP]),
        }


def report(made_from: Mapping[str, Any], survey: Survey, tokens: Tokens, splits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The whole of report.json. Documents add up: read = kept + removed by all rules, in each source and in sum."""
    sources = copy.deepcopy(survey.counts.sources)
    counts.add(sources, tokens.sources)
    total: dict[str, Any] = {}
    for source in sources.values():
        counts.add(total, source)
    kept = total["kept"]
    dropped = {rule: entry | _values(survey, rule) for rule, entry in sorted(total.get("removed", {}).items(), key=lambda item: _place(item[0]))}
    assert total["read"]["documents"] == kept["documents"] + sum(entry["documents"] for entry in dropped.values()), "documents do not add up"
    return {
        "jaxlm": jaxlm.__version__,
        "made_from": dict(made_from),
        "funnel": _funnel(total["read"], total["cleaned"], dropped, kept),
        "read": total["read"], "kept": {key: kept[key] for key in ("documents", "bytes", "tokens")},
        "skipped": _most_first(total.get("skipped", {})),
        "removed": dropped,
        "changed": dict(sorted(total.get("changed", {}).items())),
        "languages": dict(sorted(total.get("languages", {}).items(), key=lambda item: (-item[1]["documents"], item[0]))),
        "lengths": {"read": _bins(total["lengths"]["read"]), "cleaned": _bins(total["lengths"].get("cleaned", {})),
                    "kept": counts.histogram(survey.sizes[survey.live])},
        "duplicates": survey.duplicates,
        "tokens": tokens.to_dict() | {"bytes_per_token": round(kept["bytes"] / max(kept["tokens"] - 2 * kept["documents"], 1), 4)},
        "splits": {name: {key: split[key] for key in ("documents", "text_bytes", "tokens")} for name, split in splits.items()},
        "sources": {name: {key: source[key] for key in sorted(source) if key != "lengths"} for name, source in sorted(sources.items())},
        "examples": {rule: [{key: value for key, value in example.items() if key != "order"} for example in survey.counts.examples[rule]]
                     for rule in sorted(survey.counts.examples, key=_place)},
    }


def removed(found: counts.Counts) -> dict[str, dict[str, int]]:
    """Documents and bytes that each rule removed, over all sources."""
    total: dict[str, Any] = {}
    for source in found.sources.values():
        counts.add(total, source.get("removed", {}))
    return total


def table(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What a person should see at the end of a run: what was removed, and the splits."""
    lines = []
    for what, number in (("skipped", sum(report["skipped"].values())), ("dropped", report["removed"].get("clean.empty", {}).get("documents", 0))):
        if number:
            lines.append(f"{what}: {number:,} " + ("records that cannot be read" if what == "skipped" else "empty documents"))
    rules = {rule: entry for rule, entry in report["removed"].items() if rule != "clean.empty"}
    if rules:
        read = report["read"]["documents"]
        lines.append(f"{'removed by':<40} {'documents':>12} {'share':>7} {'text bytes':>16}")
        lines += [f"{rule:<40} {entry['documents']:>12,} {entry['documents'] / read:>7.1%} {entry['bytes']:>16,}" for rule, entry in rules.items()]
    for what, entry in report["changed"].items():
        lines.append(f"{'changed by ' + what:<40} {entry.get('documents', 0):>12,} documents, {entry.get('times', 0):,} times")
    lines.append(f"{'split':<10} {'documents':>12} {'text bytes':>16} {'tokens':>16} {'bytes/token':>12} {'shards':>7}")
    for name, split in manifest["splits"].items():
        ratio = split["text_bytes"] / max(split["tokens"] - 2 * split["documents"], 1)
        numbers = f"{split['documents']:>12,} {split['text_bytes']:>16,} {split['tokens']:>16,}"
        lines.append(f"{name:<10} {numbers} {ratio:>12.2f} {len(split['shards']):>7,}")
    return "\n".join(lines)


def _funnel(read: Mapping[str, int], cleaned: Mapping[str, int], dropped: Mapping[str, Mapping[str, int]], kept: Mapping[str, int]) -> list[dict[str, Any]]:
    """Documents, and where they are known bytes of text, that are left after each step that removed something."""
    steps, left = [{"step": "read", **read}], read["documents"]
    for step in _STEPS:
        gone = sum(entry["documents"] for rule, entry in dropped.items() if _step(rule) == step)
        left -= gone
        if gone:
            steps.append({"step": step, "documents": left, "removed": gone})
        if step == "decontaminate":
            steps.append({"step": "cleaned", **cleaned})
            assert left == cleaned["documents"], "documents do not add up"
    return [*steps, {"step": "kept", "documents": kept["documents"], "bytes": kept["bytes"]}]


def _step(rule: str) -> str:
    return rule if rule in _STEPS else rule.partition(".")[0]


def _place(rule: str) -> tuple[int, str]:
    return _STEPS.index(_step(rule)) if _step(rule) in _STEPS else -1, rule


def _values(survey: Survey, rule: str) -> dict[str, float]:
    return dict(zip(("lowest", "highest"), survey.counts.values.get(rule, ())))


def _bins(histogram: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(histogram.items(), key=lambda item: int(item[0])))


def _most_first(numbers: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(numbers.items(), key=lambda item: (-item[1], item[0])))
