"""What preparation read, changed, removed and kept, by source: numbers that add up, histograms, and a small fair sample of what was removed.

Counts of batches are added in any grouping to the same result: sums of whole numbers, smallest and largest values, and of each rule the
examples with the smallest digests.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

EXAMPLES = 5  # kept of each rule
EXCERPT = 400  # characters of an example


class Counts:
    """Attributes:

    sources: for each source {"read": {"documents", "bytes"}, "skipped": {reason: n}, "removed": {rule: {"documents", "bytes"}},
      "changed": {what: {"documents", "times"}}, "languages": {code: {"documents", "bytes"}}, "cleaned": {"documents", "bytes"},
      "lengths": {"read" | "cleaned": {lower edge in bytes: documents}}}; bytes are those of UTF-8 text, of "read" as they were in the source.
    values: for each rule the smallest and the largest value of what it removed.
    examples: for each rule documents that it removed, and of "skipped" records the reasons.
    """

    def __init__(self):
        self.sources: dict[str, Any] = {}
        self.values: dict[str, list[float]] = {}
        self.examples: dict[str, list[dict[str, Any]]] = {}

    @property
    def bytes_read(self) -> int:
        """Bytes of all documents that were read, as they were in their sources."""
        return sum(source["read"]["bytes"] for source in self.sources.values())

    def skipped(self, record) -> None:
        """A `corpora.Skipped`: counted by its reason without the names and numbers in it."""
        path = record.id.rpartition(":")[0] or record.id
        reason = re.sub(r"\d+", "#", record.reason.replace(path, "FILE"))[:120]
        self.count(record.source, {"read": {"documents": 0, "bytes": 0}, "skipped": {reason: 1}})
        self.example("skipped", {"order": f"{len(record.id):08d}{record.id}", "id": record.id, "reason": record.reason[:EXCERPT]})

    def document(self, document, cleaned, size: int, rule: str, digest: bytes) -> None:
        """A `corpora.Document` and the `clean.Cleaned` of it, whose text has `size` bytes; `rule` removed it unless empty."""
        given = len(document.text.encode() if isinstance(document.text, str) else document.text)
        entry = {"read": {"documents": 1, "bytes": given}, "lengths": {"read": {str(length_bin(given)): 1}}}
        if cleaned.language:
            entry["languages"] = {cleaned.language: {"documents": 1, "bytes": size}}
        if cleaned.counts:
            entry["changed"] = {what: {"documents": 1, "times": times} for what, times in cleaned.counts.items() if times}
        if rule:
            entry["removed"] = {rule: {"documents": 1, "bytes": size}}
            self.value(rule, cleaned.value)
            self.example(rule, {"order": digest.hex(), "id": document.id, "source": document.source, "value": float(cleaned.value),
                                "text": excerpt(cleaned.text)})
        else:
            entry["cleaned"] = {"documents": 1, "bytes": size}
            entry["lengths"]["cleaned"] = {str(length_bin(size)): 1}
        self.count(document.source, entry)

    def count(self, source: str, entry: Mapping[str, Any]) -> None:
        """Adds nested numbers to those of one source."""
        add(self.sources.setdefault(source, {}), entry)

    def value(self, rule: str, value: float) -> None:
        """Widens the range of values that a rule has removed."""
        low, high = self.values.get(rule, (value, value))
        self.values[rule] = [float(min(low, value)), float(max(high, value))]

    def example(self, rule: str, example: Mapping[str, Any]) -> None:
        """Keeps the `EXAMPLES` examples of a rule that come first by "order": the same ones whichever worker saw them."""
        found = self.examples.setdefault(rule, [])
        found.append(dict(example))
        found.sort(key=lambda item: (item["order"], item["id"]))
        del found[EXAMPLES:]

    def to_dict(self) -> dict[str, Any]:
        """As `merge` and JSON take it."""
        return {"sources": self.sources, "values": self.values, "examples": self.examples}

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds what `to_dict` gave for another batch."""
        for source, entry in other["sources"].items():
            self.count(source, entry)
        for rule, values in other["values"].items():
            for value in values:
                self.value(rule, value)
        for rule, examples in other["examples"].items():
            for example in examples:
                self.example(rule, example)


def add(total: dict[str, Any], entry: Mapping[str, Any]) -> None:
    """Adds nested numbers in place."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def excerpt(text: str) -> str:
    """The beginning of a text, cut so that an example stays small."""
    return text if len(text) <= EXCERPT else text[:EXCERPT] + " …"


def length_bin(size: int) -> int:
    """The lower edge of the bin of a length: 0, 16, 24, 32, 48, 64, 96, ...: two to an octave."""
    if size < 16:
        return 0
    power = 1 << (size.bit_length() - 1)
    return power * 3 // 2 if size >= power * 3 // 2 else power


def histogram(sizes: np.ndarray) -> dict[str, int]:
    """How many of `sizes` (int64) fall in each bin: {lower edge: number}, ascending."""
    edges = np.array([0, *(edge for power in range(4, 60) for edge in (2 ** power, 2 ** power * 3 // 2))])
    found, how_many = np.unique(np.searchsorted(edges, sizes, side="right") - 1, return_counts=True)
    return {str(edges[i]): int(n) for i, n in zip(found, how_many)}
