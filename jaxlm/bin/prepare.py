"""jaxlm prepare: read text, split it, train a tokenizer, write token shards

  jaxlm prepare --config=quickstart --out=data/quickstart
  jaxlm prepare --config=quickstart '--config.data.source=books/,news/*.jsonl.gz' --out=data/mine
  jaxlm prepare --verify --out=data/mine

Sources are files, folders or globs of .txt, .jsonl, .json, .csv, .tsv (each also .gz and .zst), .html, .warc[.gz], .parquet and .arrow; folders that
Hugging Face `datasets` saved; tfds:NAME[/CONFIG][:SPLIT]; or "python_docs", the text that comes with Python itself. Each may have a name, web=crawl/, by
which config.data.licences and the manifest know it. One JSON object or row is a document, its text under the key config.data.text_key; so is a page and a
.txt file, but one above 64 KiB is divided at blank lines. (.zst, .parquet and .arrow need: pip install 'jaxlm[data]'.) What cannot be read stops it
with the file and line, or is passed over, counted and reported with config.data.on_error=skip.

Each document goes to the training, validation or test split by a hash of its text: equal texts are never apart, and the split is the same
on every machine. The tokenizer is trained on the training split, then all splits are written as ArrayRecord shards with manifest.json:
counts, checksums, tokenizer. The same text and config give the same bytes. A killed run leaves nothing behind that the next does not
remove; running it again on a finished folder reuses it, or says what differs.

It prints progress every few seconds and then, for each split, documents, bytes of text, tokens and bytes per token. --verify reads every
file of a prepared folder and compares it with its checksum.

Next: jaxlm train --config=... --config.data.dir=data/mine --workdir=runs/mine
(Training does this step by itself when config.data.dir is empty.)
"""

import shlex

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", "", "Recipe: a name (quickstart) or a path (configs/quickstart.py).", flag_values=values)
    flags.DEFINE_string("out", "", "Folder for the shards; without it, config.data.dir.", flag_values=values)
    flags.DEFINE_bool("verify", False, "Only check all checksums of a folder that was prepared before.", flag_values=values)


def main(values: flags.FlagValues, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import config
    from jaxlm.data import prepare, shards

    if not values.config and not (values.verify and values.out):
        raise ValueError("--config=... is needed, for example --config=quickstart; see jaxlm prepare --help")
    cfg = config.load(values.config, overrides) if values.config else None
    folder = values.out or cfg.data.dir
    if not folder:
        raise ValueError("--out=FOLDER is needed (or config.data.dir): where to put the shards")
    if values.verify:
        size = shards.verify(folder)
        print(f"{folder} is whole: {size / 1e6:,.1f} MB have the checksums of {shards.MANIFEST}")
    else:
        prepare.prepare(cfg.data, cfg.tokenizer, folder)
        same = "".join(" " + shlex.quote(f"--config.{key}={text}") for key, text in overrides if key != "data.dir")
        print(f"next: jaxlm train --config={values.config}{same} --config.data.dir={shlex.quote(folder)} --workdir=runs/NAME")
    return 0
