"""ASHA beside the whole grid: how near to the grid's best, at what share of its steps?

  python tools/bench_search.py --workdir=/tmp/bench_search

Trains a tiny language model (1 layer of width 32, bytes) on the help topics of Python for each of 16 combinations of learning rate and batch size, 81 steps with 9
evaluations each; then searches the same 16 with ASHA, for real, in several random orders. Runs again only what WORKDIR does not have. docs/search.md has the figures.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jaxlm import config  # noqa: E402
from jaxlm.search import show, space, study, trials  # noqa: E402

SPACE = "optim.lr=log(1e-3,1e-1,8); data.batch_size=4,16"
KEYS = {"tokenizer.kind": "bytes", "data.sequence_length": "64", "model.context": "64", "model.layers": "1", "model.width": "32", "model.heads": "2",
        "train.steps": "81", "train.eval_every": "9", "train.eval_documents": "40", "train.log_every": "9", "checkpoint.every": "100%", "checkpoint.keep_last": "1",
        "checkpoint.keep_best": "0", "eval.bootstrap": "1", "data.validation": "0.2", "data.test": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--orders", type=int, default=3)
    given = parser.parse_args()
    folder = pathlib.Path(given.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    from pydoc_data import topics
    source = folder / "topics.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in sorted(topics.topics.items())), encoding="utf-8")
    cfg = config.override(config.Config(), [*KEYS.items(), ("data.source", str(source))])
    found = space.read(SPACE, cfg)
    results = []
    for name, pruner, seed in [("the whole grid", "none", 0), *((f"ASHA, order {i}", "asha", i) for i in range(given.orders))]:
        opened = study.open_study(folder / name.replace(" ", "_").replace(",", ""), cfg, found)
        trials.run(opened, "grid", pruner, 0, seed, lambda line: print(line, flush=True))
        rows = study.rows(opened)
        best = study.best_row(opened, rows)
        results.append((name, best, show.steps(opened, rows)))
    _, best, steps = results[0]
    print(f"\n{'':<16}{'best loss':>10}{'over the grid':>15}{'steps':>8}{'share':>8}   best values")
    for name, row, taken in results:
        print(f"{name:<16}{row.figure:10.4f}{row.figure / best.figure - 1:15.2%}{taken:8}{taken / steps:8.0%}   {trials.describe(opened, row.values)}")


if __name__ == "__main__":
    main()
