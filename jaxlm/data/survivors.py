"""Which documents live: de-duplication over the files of the first stage, in one process, by hashes alone (see dedup.py for its memory)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import DataConfig, DedupConfig
from jaxlm.data import corpora, counts, dedup, labels, stages

SPLITS = ("train", "validation", "test")
_TOP_LINES = 10


class Batch(NamedTuple):
    """The place of one batch among all documents."""

    unit: int
    number: int
    documents: slice  # of the corpus' documents
    lines: slice  # of its long lines


class Survey:
    """All documents that were cleaned, in order.

    Attributes:
      batches: where each lies.
      digests: uint64 [documents, 2]; sizes: int64, bytes of text; origin: int32, into `origins`, (source, licence) pairs; live: bool.
      line_counts: int64 [documents]; dead_lines: bool [long lines].
      counts: what the first stage counted, to which the steps here add what they removed.
      duplicates: what the report says of de-duplication.
    """

    def __init__(self, folder: Path, units: list[stages.Unit], cfg: DedupConfig, objective: str = ""):
        """`objective`: of labelled documents, what their labels are."""
        self.folder, self.cfg, self.counts, self.duplicates = folder, cfg, counts.Counts(), {}
        self.batches: list[Batch] = []
        self._signed: list[stages.Living] = []
        self._objective, found = objective, []
        self.origins: list[tuple[str, str]] = []
        arrays, numbers, documents, lines = ([], [], [], []), {}, 0, 0
        for unit in units:
            for number in range(stages.batches_of(folder, unit.number)):
                with stages.load(folder, "clean", unit.number, number) as batch:
                    report = json.loads(batch["report"].tobytes())
                    here = np.array([numbers.setdefault(tuple(origin), len(numbers)) for origin in report["origins"]], np.int32)
                    origin = here[batch["origin"]] if len(here) else batch["origin"]
                    found += stages.strings(batch, "label") if objective else []
                    values = batch["digests"], np.diff(batch["text_ends"], prepend=0), origin, batch["line_counts"]
                self.counts.merge(report["counts"])
                for array, value in zip(arrays, values):
                    array.append(value)
                end = documents + len(values[0]), lines + int(values[3].sum())
                self.batches.append(Batch(unit.number, number, slice(documents, end[0]), slice(lines, end[1])))
                documents, lines = end
        empty = np.zeros((0, 2), np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64)
        self.digests, self.sizes, self.origin, self.line_counts = (np.concatenate([start, *array]) for start, array in zip(empty, arrays))
        self.origins = list(numbers)
        self._labels = [label.decode() for label in found]
        self.live = np.ones(documents, bool)
        self.dead_lines = np.zeros(lines, bool)

    # --- steps ---------------------------------------------------------------------------------------------------------------------------

    def drop_equal(self, rule: str = "dedup.exact") -> None:
        """Of documents with one text the first lives."""
        rows = np.flatnonzero(self.live)
        first = rows[dedup.first_occurrences(self.digests[rows])]
        gone = first != rows
        self._remove(rule, rows[gone], first[gone])

    def drop_lines(self) -> None:
        """Of equal long lines the first lives, whatever document it stands in."""
        passes = max(1, -(-len(self.dead_lines) // dedup.LINES_PER_PASS))
        top: list[tuple[int, int]] = []
        for number in range(passes):
            keys, places = [], []
            for batch in self.batches:
                with stages.load(self.folder, "clean", batch.unit, batch.number) as file:
                    values = file["lines"]
                mine = np.repeat(self.live[batch.documents], self.line_counts[batch.documents]) & (values % np.uint64(passes) == number)
                keys.append(values[mine])
                places.append(np.flatnonzero(mine) + batch.lines.start)
            before, often, times = dedup.repeated(np.concatenate([np.zeros(0, np.uint64), *keys]))
            self.dead_lines[np.concatenate([np.zeros(0, np.int64), *places])[before]] = True
            best = np.lexsort((often, -times))[:_TOP_LINES]
            top = sorted(top + [(-int(times[i]), int(often[i])) for i in best])[:_TOP_LINES]
        self._count_lines(top)

    def take_signed(self, signed: list[stages.Living]) -> np.ndarray:
        """Sizes and digests of what is left of the texts; drops what is nothing now. Returns the documents that were signed: int64."""
        self._signed = signed
        rows, before = np.flatnonzero(self.live), self.sizes.copy()
        for key, column in (("digests", self.digests), ("sizes", self.sizes)):
            column[rows] = self._of_signed(key, column[:0])
        changed = np.flatnonzero(self.sizes != before)
        for source, mine in self._by_source(changed):
            self.counts.count(source, {"changed": {"dedup.lines": {"documents": len(mine), "bytes": int((before - self.sizes)[mine].sum())}}})
        self._remove("dedup.lines", changed[self.sizes[changed] == 0])
        return rows

    def drop_near(self, signed: np.ndarray) -> None:
        """Of a cluster of near-duplicates the longest lives, of equally long ones the first. `signed`: what `take_signed` returned."""
        cfg, keep = self.cfg, self.live[signed]
        rows = signed[keep]
        path = self.folder / "signatures.u32"
        with open(path, "wb") as file:
            start = 0
            for signatures in self._each_signed("signatures"):
                file.write(signatures[keep[start:start + len(signatures)]].tobytes())
                start += len(signatures)
        shape = len(rows), cfg.permutations
        signatures = np.memmap(path, np.uint32, "r", shape=shape) if len(rows) else np.zeros(shape, np.uint32)
        bands = cfg.permutations // dedup.rows_of_a_band(cfg.near, cfg.permutations)
        near = dedup.near_duplicates(lambda band: self._of_signed(f"band{band}", self.digests[:0, 0])[keep], bands, signatures, cfg.near)
        best = dedup.survivors(near.cluster, self.sizes[rows])
        gone = np.flatnonzero(best != np.arange(len(rows)))
        members = np.bincount(near.cluster, minlength=len(rows))
        similar = dedup.similarity(signatures, best[gone], gone)
        sizes, how_many = np.unique(members[members > 1], return_counts=True)
        self.duplicates["near"] = {
            "clusters": int(how_many.sum()), "documents_dropped": len(gone), "pairs_compared": near.candidates, "pairs_verified": near.verified,
            "cluster_sizes": {str(size): int(count) for size, count in zip(sizes, how_many)}}
        del signatures
        path.unlink()
        self._remove("dedup.near", rows[gone], rows[best[gone]], similar)

    def check_ids(self, data: DataConfig) -> None:
        """Documents that live and have one id: an error that names both. Equal documents with one id, a record that is there twice, are none."""
        hashes = []
        for batch in self.batches:
            with stages.load(self.folder, "clean", batch.unit, batch.number) as file:
                hashes.append(file["id_hashes"][self.live[batch.documents]])
        corpora.check_ids(np.concatenate([np.zeros(0, np.uint64), *hashes]), data)

    # --- what follows from it --------------------------------------------------------------------------------------------------------------

    def splits(self, data: DataConfig) -> np.ndarray:
        """The split of each document by its text alone, as a number into SPLITS: uint8 [documents]. With labels each has the same share of every split, and
        sources that are named after splits are these.

        Raises:
          ValueError: one line: some sources are named after splits, others are not.
        """
        if self._objective:
            return self._labelled_splits(data)
        share = self.digests[:, 0].astype(np.float64) / 2.0 ** 64
        return np.where(share < data.test, 2, np.where(share < data.test + data.validation, 1, 0)).astype(np.uint8)

    def _labelled_splits(self, data: DataConfig) -> np.ndarray:
        live = np.flatnonzero(self.live)
        out, strata = np.zeros(len(self.live), np.uint8), labels.strata(self._objective, [self._labels[i] for i in live])
        given = {name for name in corpora.sources(data) if name in SPLITS}
        if not given:
            out[live] = labels.stratified(self.digests[live, 0], strata, data.validation, data.test)
            return out
        if other := [name for name in corpora.sources(data) if name not in SPLITS]:
            raise ValueError(f"data.source names the splits {', '.join(sorted(given))}, and {other[0]!r} is none: name every source train, validation or test, "
                             "or none of them")
        named = np.array([SPLITS.index(source) for source, _ in self.origins], np.uint8)[self.origin[live]]
        rest = named == 0  # where a split has no source of its own, its share is taken from the training documents
        named[rest] = labels.stratified(self.digests[live, 0][rest], strata[rest], 0 if "validation" in given else data.validation, 0 if "test" in given else data.test)
        out[live] = named
        return out

    def sample(self, data: DataConfig, limit: int) -> np.ndarray:
        """Training documents of about `limit` bytes, those with the smallest hashes, so a fair sample of all files: bool [documents]."""
        rows = np.flatnonzero(self.live & (self.splits(data) == 0))
        rows = rows[np.argsort(self.digests[rows, 1], kind="stable")]
        fits = np.cumsum(self.sizes[rows]) <= limit
        fits[:1] = True
        chosen = np.zeros(len(self.live), bool)
        chosen[rows[fits]] = True
        return chosen

    def living(self, chosen: np.ndarray | None = None) -> list[stages.Living]:
        """Batches with the documents that live, or are chosen, and their dead lines; those without any are left out."""
        chosen = self.live if chosen is None else chosen
        pack = lambda flags: np.packbits(flags).tobytes() if flags.any() else b""
        return [stages.Living(batch.unit, batch.number, pack(chosen[batch.documents]), pack(self.dead_lines[batch.lines]))
                for batch in self.batches if chosen[batch.documents].any()]

    # --- details -------------------------------------------------------------------------------------------------------------------------

    def _each_signed(self, key: str) -> Iterator[np.ndarray]:
        for batch in self._signed:
            with stages.load(self.folder, "signed", batch.unit, batch.batch) as file:
                yield file[key]

    def _of_signed(self, key: str, none: np.ndarray) -> np.ndarray:
        return np.concatenate([none, *self._each_signed(key)])

    def _by_source(self, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for number, (source, _) in enumerate(self.origins):
            mine = rows[self.origin[rows] == number]
            if len(mine):
                yield source, mine

    def _remove(self, rule: str, rows: np.ndarray, instead: np.ndarray | None = None, values: np.ndarray | None = None) -> None:
        """Counts `rows` as removed by `rule`; `instead` are the documents that stand for them."""
        self.live[rows] = False
        for source, mine in self._by_source(rows):
            self.counts.count(source, {"removed": {rule: {"documents": len(mine), "bytes": int(self.sizes[mine].sum())}}})
        if values is not None and len(values):
            self.counts.value(rule, float(values.min()))
            self.counts.value(rule, float(values.max()))
        for i in np.lexsort((rows, self.digests[rows, 1], self.digests[rows, 0]))[:counts.EXAMPLES]:
            example = self._example(int(rows[i])) | {"value": 1.0 if values is None else float(values[i])}
            if instead is not None:
                example["kept"] = {key: value for key, value in self._example(int(instead[i])).items() if key != "order"}
            self.counts.example(rule, example)

    def _example(self, row: int) -> dict[str, Any]:
        batch = next(batch for batch in self.batches if batch.documents.start <= row < batch.documents.stop)
        with stages.load(self.folder, "clean", batch.unit, batch.number) as file:
            name, text = (stages.strings(file, key)[row - batch.documents.start].decode("utf-8", "replace") for key in ("id", "text"))
        return {"order": f"{self.digests[row, 0]:016x}{self.digests[row, 1]:016x}", "source": self.origins[self.origin[row]][0], "id": name,
                "text": counts.excerpt(text)}

    def _count_lines(self, top: list[tuple[int, int]]) -> None:
        """Counts dead lines by source and finds the text of the most frequent ones: `top` holds (-occurrences, hash)."""
        dead = np.flatnonzero(self.dead_lines)
        owners = np.repeat(np.arange(len(self.live)), self.line_counts)[dead]
        for source, mine in self._by_source(owners):
            self.counts.count(source, {"changed": {"dedup.lines": {"times": len(mine)}}})
        texts = {}
        for batch in self.batches:
            if texts.keys() == {key for _, key in top}:
                break
            with stages.load(self.folder, "clean", batch.unit, batch.number) as file:
                values = file["lines"]
                here = {key for _, key in top if key not in texts and key in values}
                lines = (line for text in stages.strings(file, "text") for _, line in dedup.long_lines(text.decode(), self.cfg.line_length)) if here else ()
                texts |= {int(value): counts.excerpt(line) for value, line in zip(values, lines) if int(value) in here}
        self.duplicates["lines"] = {"dropped": len(dead), "most_frequent": [{"times": -times, "line": texts[key]} for times, key in top]}
