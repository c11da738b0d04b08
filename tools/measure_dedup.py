"""Precision and recall of near-duplicate removal: python tools/measure_dedup.py [FOLDER]; prints the tables of docs/data.md.

Planted edits: documents, half of them once more with a share of the words (1 to 30 %) replaced by words of the same collection. FOLDER, if given, holds
articles_N.train (an id and a text in each line) with articles_N.truth (two ids in each line), the article sets of Chris McCormick's MinHash tutorial:
their own pairs are sought too, and their texts are those that are edited; without it texts of random words are.
"""

import argparse
import pathlib
import random
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jaxlm.data import dedup  # noqa: E402

SETTINGS = tuple((shingle, near) for shingle in (2, 3, 5) for near in (0.5, 0.75, 0.9))
RATES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)

Pairs = set[tuple[int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="articles_100.train, articles_100.truth ...")
    folder = parser.parse_args().folder
    sets = {path.stem: articles(path) for path in sorted(pathlib.Path(folder).glob("articles_*.train"))} if folder else {}
    base = max(sets.values(), key=lambda found: len(found[0]))[0] if sets else invented()
    columns = {f"{rate:.0%} replaced": planted(base, rate) for rate in RATES} | sets
    print(f"{len(base):,} texts; precision / recall\n")
    print(f"| dedup.shingle | dedup.near | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for shingle in sorted({shingle for shingle, _ in SETTINGS}):
        signed = {name: signatures(texts, shingle) for name, (texts, _) in columns.items()}
        for near in (near for of, near in SETTINGS if of == shingle):
            print(f"| {shingle} | {near} | {' | '.join(quality(signed[name], near, truth) for name, (_, truth) in columns.items())} |")
    started = time.process_time()
    signatures(base, 5)
    print(f"\nsignatures: {sum(len(text.encode()) for text in base) / (time.process_time() - started) / 1e6:.1f} MB/s on one core")


def articles(path: pathlib.Path) -> tuple[list[str], Pairs]:
    lines = [line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    number = {name: i for i, (name, _) in enumerate(lines)}
    pairs = [line.split() for line in path.with_suffix(".truth").read_text().splitlines()]
    return [text for _, text in lines], {tuple(sorted((number[a], number[b]))) for a, b in pairs}


def invented() -> list[str]:
    rng, words = random.Random(0), [f"word{i}" for i in range(20_000)]
    return [" ".join(rng.choices(words, k=rng.randrange(60, 600))) for _ in range(300)]


def planted(base: list[str], rate: float) -> tuple[list[str], Pairs]:
    """Texts that are not near-duplicates of each other, then edited copies of the first half of them, and the pairs of numbers."""
    hashes, rng = dedup.MinHash(128, 2), random.Random(rate)
    near = dedup.near_duplicates(lambda band: dedup.band_keys(signed, 3)[band], 42, signed := np.stack([hashes.signature(text) for text in base]), 0.4)
    texts = [text for i, text in enumerate(base) if near.cluster[i] == i]
    words = " ".join(texts).split()
    copies = [" ".join(rng.choice(words) if rng.random() < rate else word for word in text.split()) for text in texts[:len(texts) // 2]]
    return texts + copies, {(i, len(texts) + i) for i in range(len(copies))}


def signatures(texts: list[str], shingle: int) -> np.ndarray:
    hashes = dedup.MinHash(128, shingle)
    return np.stack([hashes.signature(text) for text in texts])


def quality(signed: np.ndarray, near: float, truth: Pairs) -> str:
    keys = dedup.band_keys(signed, dedup.rows_of_a_band(near, 128))
    cluster = dedup.near_duplicates(lambda band: keys[band], len(keys), signed, near).cluster
    found = {(int(first), i) for i, first in enumerate(cluster) if first != i}
    precision = f"{len(found & truth) / len(found):.2f}" if found else "-"
    return f"{precision} / {len(found & truth) / len(truth):.2f}"


if __name__ == "__main__":
    main()
