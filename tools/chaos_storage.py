"""Faults of numbers and of storage, planted by the hundred: python tools/chaos_storage.py numbers|flips [--trials=N] [--seed=N]

  numbers   (50)   NaN and Inf in a parameter of one layer, a token whose embedding overflows, documents of noise: is each found by the run, and named with its
                   documents, and does `jaxlm replay` name the layer or the document?
  flips     (500)  bytes of a checkpoint, shard, tokenizer, ledger, config or adapter flipped, zeroed or cut: is each seen when the file is read, and named, and
                   is the checkpoint before it used? Silent is what reads as other numbers.

Prints a line for each fault that is not found, then a table; exits 1 if there was one. Runs on one CPU device in a temporary folder.
"""

import argparse
import contextlib
import functools
import io
import os
import pathlib
import random
import sys
import tempfile
import time
from collections import Counter

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import tests.conftest  # noqa: E402, F401  machine code that compiles quickly

from jaxlm.train import report, setup  # noqa: E402
from tests.faults import damaged, planted  # noqa: E402
from tests.train import runs  # noqa: E402


def numbers(folder: pathlib.Path, trials: int, dice: random.Random) -> Counter:
    """Two fifths each of spoilt parameters and of tokens that overflow, the rest documents of noise."""
    base = planted.base(folder, 560, 40)
    paths = [f"layers/{name}" for name in ("attn/q", "attn/o", "mlp/up", "mlp/down", "attn_norm/scale")]
    visits, found = planted.noise(base), Counter()
    for number in range(trials):
        workdir, step = folder / str(number), dice.choice(range(200, 521, 40))
        kind = ("parameter", "parameter", "token", "token", "noise")[number % 5]
        if kind == "parameter":
            what = (dice.choice(paths), dice.randrange(3), dice.choice([float("nan"), float("inf"), -float("inf")]))
            wrong = planted.parameter(base, step, *what, workdir)
        elif kind == "token":
            what = dice.choice([letter for letter in planted.LETTERS if planted.visited(base, letter, step)])
            wrong = planted.activation(base, step, what, workdir)
        else:
            what = visits[number // 5 % len(visits)]
            wrong = planted.poisoned(base, *what)
        _count(found, kind, what, wrong)
    return found


def flips(folder: pathlib.Path, trials: int, dice: random.Random) -> Counter:
    """As many of each kind; the files of a kind in turn, then by their size."""
    world, found = damaged.world(folder), Counter()
    for kind in damaged.KINDS:
        for path in damaged.files_of(world, kind, -(-trials // len(damaged.KINDS)), dice):
            how = dice.choice(["flip", "zero", "cut"])
            said = damaged.trial(world, kind, path, how, dice)
            found[f"{kind}, {said}" if said == "harmless" else kind, said in ("named", "harmless")] += 1
            if said not in ("named", "harmless"):
                print(f"{kind} {path.relative_to(folder)} {how}: {said}", file=sys.stderr, flush=True)
    return found


def _count(found: Counter, kind: str, what: object, wrong: str) -> None:
    found[kind, not wrong] += 1
    if wrong:
        print(f"NOT FOUND {kind} {what}: {wrong}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"numbers": (numbers, 50), "flips": (flips, 500)}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    run, usual = kinds[given.kind]
    for module, name in ((setup, "build"), (report, "measure_matmul")):  # compiled once
        setattr(module, name, functools.cache(getattr(module, name)))
    start, quiet = time.monotonic(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, runs.devices(1), contextlib.redirect_stdout(quiet):
        found = run(pathlib.Path(folder), given.trials or usual, random.Random(given.seed))
    for kind in dict.fromkeys(kind for kind, _ in found):
        print(f"{kind:<24} {found[kind, True]:>4} of {found[kind, True] + found[kind, False]} found and named")
    missed = sum(count for (_, ok), count in found.items() if not ok)
    print(f"{sum(found.values())} faults planted, {missed} not found, in {time.monotonic() - start:.0f} s ({os.cpu_count()} cores)")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
