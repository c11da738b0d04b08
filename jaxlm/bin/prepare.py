"""jaxlm prepare: read text, clean and de-duplicate it, split it, train a tokenizer, write token shards, report

  jaxlm prepare --config=quickstart --out=data/quickstart
  jaxlm prepare --config=web '--config.data.source=crawl/' --out=data/web                       raw web pages, every step on
  jaxlm prepare --config=quickstart '--config.data.source=books/,news/*.jsonl.gz' --out=data/mine --config.dedup.near=0.8
  jaxlm prepare --verify --out=data/mine

Steps, each of which can be switched off and says what it removed (jaxlm/config.py explains every key):
  read           config.data.source (see Sources)
  clean, filter  config.clean.*, config.filter.*: extraction from HTML, repair, languages, quality rules, personal data, decontamination
  de-duplicate   config.dedup.*: equal documents (on), equal lines, near-duplicates (MinHash), within and across sources
  split          training, validation or test by a hash of the text that is left: equal texts are never apart, on any machine
  tokenise       a tokenizer is trained on the training split, or taken from config.tokenizer.path
  write          ArrayRecord shards, manifest.json (counts, checksums), report.json and report.html

Sources are files, folders or globs of .txt, .jsonl, .json, .csv, .tsv (each also .gz and .zst), .html, .warc[.gz], .parquet and .arrow; folders that
Hugging Face `datasets` saved; tfds:NAME[/CONFIG][:SPLIT]; or "python_docs", the text that comes with Python itself. Each may have a name, web=crawl/, by
which config.data.licences and the manifest know it. One JSON object or row is a document, its text under the key config.data.text_key; so is a page and a
.txt file, but one above 64 KiB is divided at blank lines. (.zst, .parquet and .arrow need: pip install 'jaxlm[data]'.) What cannot be read stops it
with the file and line, or is passed over, counted and reported with config.data.on_error=skip.

Read report.html before you spend money on training: what each rule removed, with examples, lengths, languages, duplicates, tokens.

All cores work (config.data.workers); memory does not grow with the corpus but for some 40 bytes a document. While it works, a hidden folder beside
--out holds the text as cleaned, about as large as the text itself. It prints progress and the time left every few seconds. Stopped by Ctrl-C, a
kill or a power cut, the same command goes on where it was; the result has the same bytes for any number of workers, interruptions and any
runner. Run again on a finished folder it reuses it, or says what differs. --verify compares every file with its checksum.

On a cluster: --runner=DataflowRunner, SparkRunner or FlinkRunner (Apache Beam; pip install 'jaxlm[beam]') with --beam_options='--project=...'.
Workers must see the sources and the folder of --out under the same paths. DirectRunner tries it on this machine.

Next: jaxlm train --config=... --config.data.dir=data/mine --workdir=runs/mine
(Training does this step by itself when config.data.dir is empty.)
"""

import shlex

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", "", "Recipe: a name (quickstart) or a path (configs/quickstart.py).", flag_values=values)
    flags.DEFINE_string("out", "", "Folder for the shards; without it, config.data.dir.", flag_values=values)
    flags.DEFINE_bool("verify", False, "Only check all checksums of a folder that was prepared before.", flag_values=values)
    flags.DEFINE_string("runner", "", "An Apache Beam runner instead of this machine's processes: DirectRunner, DataflowRunner, SparkRunner, FlinkRunner.",
                        flag_values=values)
    flags.DEFINE_string("beam_options", "", "Options of the Beam pipeline, as one text: '--project=p --region=r'.", flag_values=values)


def main(values: flags.FlagValues, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import config
    from jaxlm.data import beam, prepare, shards

    if not values.config and not (values.verify and values.out):
        raise ValueError("--config=... is needed, for example --config=quickstart; see jaxlm prepare --help")
    cfg = config.load(values.config, overrides) if values.config else None
    folder = values.out or cfg.data.dir
    if not folder:
        raise ValueError("--out=FOLDER is needed (or config.data.dir): where to put the shards")
    if values.beam_options and not values.runner:
        raise ValueError("--beam_options are for a Beam runner: give --runner=... too")
    if values.verify:
        size = shards.verify(folder)
        print(f"{folder} is whole: {size / 1e6:,.1f} MB have the checksums of {shards.MANIFEST}")
    else:
        runner = beam.runner(values.runner, values.beam_options) if values.runner else None
        prepare.prepare(cfg.data, cfg.tokenizer, folder, clean=cfg.clean, filter=cfg.filter, dedup=cfg.dedup, objective=cfg.objective.name, runner=runner)
        same = "".join(" " + shlex.quote(f"--config.{key}={text}") for key, text in overrides if key != "data.dir")
        print(f"next: jaxlm train --config={values.config}{same} --config.data.dir={shlex.quote(folder)} --workdir=runs/NAME")
    return 0
