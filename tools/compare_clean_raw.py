"""Does cleaning pay? python tools/compare_clean_raw.py PROSE.jsonl[.gz] FOLDER [--steps=400]

Cuts prose into pages, paragraphs unwrapped, keeps every tenth aside as held-out text, and makes a web of the others: as they are, with cookie notices and
menus, copied, copied with a few words changed, with broken encoding; pages in other languages (--foreign=FOLDER of .txt), spam, scripts. Prepares it once
as it is and once with the steps of configs/web.py, trains one small model on each for the same number of steps, so of tokens, and prints bits per byte of
the held-out pages: of all as they were cut, and of those that the recipe keeps, as it cleans them; both models read the same bytes.
"""

import argparse
import gzip
import json
import pathlib
import random
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

NOTICE = "We use cookies to improve your experience; by browsing this website you agree to our use of cookies and to our privacy policy.\n"
MENU = "Home\nAbout us\nContact\nSign in\nFacebook\nTwitter\nPrint this page\n"
MODEL = ("--config.model.layers=2", "--config.model.width=128", "--config.model.heads=4", "--config.model.context=256", "--config.model.dtype=float32",
         "--config.model.feedforward=384", "--config.data.sequence_length=256", "--config.data.batch_size=8", "--config.data.threads=1",
         "--config.tokenizer.vocab_size=4096", "--config.optim.name=muon", "--config.optim.lr=5e-3", "--config.optim.end_lr_ratio=0.05",
         "--config.checkpoint.every=100%", "--config.train.eval_every=100%", "--config.data.validation=0.01", "--config.data.test=0.01")
# The web as it is: nothing is cleaned, nothing is dropped.
RAW = ("--config.clean.repair=false", "--config.clean.normalise=false", "--config.clean.languages=()", "--config.clean.pii=()",
       "--config.dedup.exact=false", "--config.dedup.line_length=0", "--config.dedup.near=0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prose", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--foreign", type=pathlib.Path, help="folder of .txt files in other languages")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--megabytes", type=float, default=6.0, help="of clean pages")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    rng = random.Random(0)
    pages = cut(given.prose, given.megabytes * 1e6, rng)
    held_out, pages = pages[::10], [page for i, page in enumerate(pages) if i % 10]
    write(given.folder / "held_out.jsonl", held_out)
    write(given.folder / "web.jsonl", polluted(pages, given.foreign, rng))
    from jaxlm import config
    rules = config.to_dict(config.load("web"))["filter"]
    filters = [f"--config.filter.{key}={False if isinstance(value, bool) else 0}" for key, value in rules.items() if value]
    scores = {}
    for name, steps in (("raw", (*RAW, *filters)), ("cleaned", ())):
        run, data = given.folder / name, given.folder / f"{name}-data"
        recipe = ("--config=web", *MODEL, f"--config.data.source={given.folder}/web.jsonl", f"--config.train.steps={given.steps} steps")
        jaxlm("prepare", *recipe, *steps, f"--out={data}")
        jaxlm("train", *recipe, *steps, f"--config.data.dir={data}", f"--workdir={run}")
        for pages, how in (("all", (*RAW, *filters)), ("kept", ())):
            held_out = given.folder / f"{name}-held-out-{pages}"
            jaxlm("prepare", *recipe, *how, f"--config.data.source={given.folder}/held_out.jsonl", "--config.data.test=0.9",
                  f"--config.tokenizer.path={data}", f"--out={held_out}")
            jaxlm("eval", f"--workdir={run}", f"--data={held_out}", "--split=test")
            scores[f"trained on {name}, held-out {pages}"] = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    for name, score in scores.items():
        print(f"{name}: {score['bits_per_byte']:.3f} bits per byte ({score['bits_per_byte_low']:.3f} to {score['bits_per_byte_high']:.3f}), "
              f"{score['documents']} documents, {score['bytes']:,} bytes")


def cut(prose: pathlib.Path, limit: float, rng: random.Random) -> list[str]:
    """Pages of one to six thousand characters that end with a paragraph, of documents in random order."""
    with (gzip.open if prose.suffix == ".gz" else open)(prose, "rt", encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    rng.shuffle(documents)
    pages, size = [], 0
    for document in documents:
        for part in re.findall(r"(?s).{1000,6000}?(?:\n\s*\n|\Z)", document[:60_000]):
            pages.append(re.sub(r"(?<=\S)[ \t]*\n[ \t]*(?=\S)", " ", part).strip())
            size += len(part)
        if size > limit:
            break
    return list(dict.fromkeys(pages))


def polluted(pages: list[str], foreign: pathlib.Path | None, rng: random.Random) -> list[str]:
    few = lambda share: rng.sample(pages, int(share * len(pages)))
    web = [NOTICE + page + "\n" + MENU if rng.random() < 0.4 else page for page in pages]
    web += few(0.3)
    for page in few(0.2):
        words = page.split(" ")
        for _ in range(max(1, len(words) // 100)):
            words[rng.randrange(len(words))] = "update"
        web.append(" ".join(words))
    web += [page.replace("'", "’").replace('"', "”").encode().decode("cp1252", "replace") for page in few(0.1)]
    for path in sorted(foreign.glob("*.txt"))[::4] if foreign else ():
        web.append(path.read_text(encoding="utf-8", errors="replace"))
    goods = ("watches", "pills", "casino", "loans", "shoes", "handbags", "cheap", "online", "best", "price", "buy", "now", "free", "discount", "outlet")
    web += [" ".join(rng.choices(goods, k=rng.randrange(100, 600))) for _ in range(len(pages) // 5)]
    web += ["\n".join(f"var x{i} = {{a: {rng.random()}, b: [{i}, {i + 1}]}};" for i in range(60)) for _ in range(len(pages) // 20)]
    rng.shuffle(web)
    return web


def write(path: pathlib.Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def jaxlm(*arguments: str) -> None:
    print("jaxlm", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "jaxlm", *arguments], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
