"""Speed of each stage from raw text to batches, on one core, against what the machine can do at best and against other libraries.

    python tools/bench_data.py
    python tools/bench_data.py --stages=read,loader --megabytes=50 --rounds=5
    python tools/bench_data.py --peers=/tmp/peers            (makes a virtual environment there: datasets, datatrove, tensorflow-cpu, 1.9 GB)

The text is python_docs, repeated to --megabytes. Each stage and its floor (the least that must happen: decompression, parsing by the C library, copying
memory) take turns, A B A B, so that a noisy machine disturbs both; medians are printed. MB are those of the text, or of the page; seconds are those of the
CPU, of all threads together, so MB/s is per core. The loader also shows tokens/s by the wall clock. With --peers each library reads the same files in turn
with us, in processes of their own, from the first document or batch on. Their loaders shuffle rows that were packed beforehand; ours packs documents,
knows where they begin, and can start at any step. Figures of different runs on a shared machine do not compare; ratios do.
"""

import gzip
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

PEERS = ("datasets", "datatrove[io,processing]", "warcio", "faust-cchardet", "python-magic", "tensorflow-cpu")
SEQUENCE, BATCH = 1024, 64
STAGES = ("read", "clean", "dedup", "tokenise", "shards", "loader")


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_list("stages", list(STAGES), f"Of {', '.join(STAGES)}.", flag_values=values)
    flags.DEFINE_integer("megabytes", 20, "Text to work on.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "How often a stage and its floor take turns.", flag_values=values, lower_bound=1)
    flags.DEFINE_string("peers", "", "Folder of a virtual environment with other libraries, made if it is not there; none: leave them out.", flag_values=values)
    flags.DEFINE_string("keep", "", "Folder for the files, kept; without it, a temporary one.", flag_values=values)
    if "--help" in argv:
        sys.exit(f"{__doc__}\n{values.get_help()}")
    values(["bench_data", *argv])
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(values.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        texts = make_files(folder, values.megabytes)
        size = sum(len(text.encode()) for text in texts)
        print(f"{len(texts):,} documents, {size / 1e6:.1f} MB of text, {os.cpu_count()} cores, {values.rounds} rounds, medians\n")
        print(f"{'stage':<22} {'MB/s per core':>14} {'floor':>10} {'of floor':>9}   the floor is")
        for stage in values.stages:
            globals()[f"stage_{stage}"](folder, texts, size, values.rounds)
        if values.peers:
            compare(folder, size, pathlib.Path(values.peers), values.rounds)


def make_files(folder: pathlib.Path, megabytes: int) -> list[str]:
    """The same documents in every kind of file that is read, and as a prepared corpus."""
    import pyarrow
    from pyarrow import parquet

    from jaxlm.data import python_docs
    docs = [text for _, text in python_docs.texts()]
    pieces = [text[i:i + 4000] for text in docs for i in range(0, len(text), 4000)]
    texts, size = [], 0
    while size < megabytes * 1_000_000:  # each copy starts with its number, so that no two documents are equal
        texts.append(f"{len(texts)} {pieces[len(texts) % len(pieces)]}")
        size += len(texts[-1].encode())
    lines = "".join(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(texts)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    (folder / "a.csv").write_text("text\n" + "".join('"' + text.replace('"', '""') + '"\n' for text in texts), newline="")
    with open(folder / "a.warc.gz", "wb") as file:
        for i, text in enumerate(texts):
            file.write(gzip.compress(_page_record(i, text), 6))
    return texts


def _page(text: str) -> bytes:
    paragraphs = text.replace("&", "&amp;").replace("<", "&lt;").split("\n\n")
    body = "".join(f"<p>{p}</p>" for p in paragraphs)
    return f"<html><head><title>x</title></head><body><nav>a b c</nav><article>{body}</article></body></html>".encode()


def _page_record(i: int, text: str) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + _page(text)
    return (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.org/{i}\r\nWARC-Record-ID: <urn:uuid:{i}>\r\n"
            f"WARC-Date: 2026-11-22T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
            f"Content-Length: {len(http)}\r\n\r\n").encode() + http + b"\r\n\r\n"


def turns(*functions, rounds: int, clock=time.process_time) -> list[float]:
    """Median seconds of each, measured A B A B after one round that does not count."""
    seconds = [[] for _ in functions]
    for _ in range(rounds + 1):
        for found, function in zip(seconds, functions):
            begin = clock()
            function()
            found.append(clock() - begin)
    return [statistics.median(found[1:]) for found in seconds]


def show(name: str, size: int, seconds: list[float], floor: str) -> None:
    ours, least = (size / s / 1e6 for s in seconds)
    print(f"{name:<22} {ours:>14,.1f} {least:>10,.1f} {ours / least:>8.0%}   {floor}")


# --- stages -------------------------------------------------------------------------------------------------------------------------------


def stage_read(folder: pathlib.Path, texts: list[str], size: int, rounds: int) -> None:
    from pyarrow import csv, parquet

    from jaxlm.config import DataConfig
    from jaxlm.data import corpora

    def parse():
        for line in open(folder / "a.jsonl", "rb"):
            json.loads(line)

    def inflate(name):
        with gzip.open(folder / name) as file:
            while file.read(1 << 20):
                pass

    floors = {
        "a.jsonl": (parse, "json.loads of each line"), "a.jsonl.gz": (lambda: inflate("a.jsonl.gz"), "gzip, without parsing"),
        "a.parquet": (lambda: parquet.read_table(folder / "a.parquet")["text"].to_pylist(), "pyarrow, the column as a list"),
        "a.csv": (lambda: csv.read_csv(folder / "a.csv", parse_options=csv.ParseOptions(newlines_in_values=True)), "pyarrow's parser, nothing made of it"),
        "a.warc.gz": (lambda: inflate("a.warc.gz"), "gzip, without parsing"),
    }
    pages = sum(len(_page(text)) for text in texts)
    for name, (floor, what) in floors.items():
        data = DataConfig(source=(str(folder / name),))
        count = sum(1 for _ in corpora.documents(data))
        assert count == len(texts), (name, count)
        show(f"read {name[1:]}", pages if "warc" in name else size, turns(lambda: sum(1 for _ in corpora.documents(data)), floor, rounds=rounds), what)


def stage_clean(folder: pathlib.Path, texts: list[str], size: int, rounds: int) -> None:
    from jaxlm import config
    from jaxlm.data import clean, corpora
    documents = [corpora.Document(str(i), "a", text) for i, text in enumerate(texts[:500])]
    pages = [corpora.Document(str(i), "a", _page(text), html=True) for i, text in enumerate(texts[:500])]
    part = sum(len(text.encode()) for text in texts[:500])
    plain, full = (clean.cleaner(config.load(str(ROOT / "configs" / f"{name}.py"), [])) for name in ("quickstart", "web"))
    copy = lambda items: lambda: [str(item.text) if isinstance(item.text, str) else item.text.decode() for item in items]
    show("clean, all off", part, turns(lambda: [plain(d) for d in documents], copy(documents), rounds=rounds), "passing the text on")
    show("clean, web.py", part, turns(lambda: [full(d) for d in documents], copy(documents), rounds=rounds), "passing the text on")
    show("extract HTML", sum(len(page.text) for page in pages), turns(lambda: [plain(d) for d in pages], copy(pages), rounds=rounds), "decoding UTF-8")


def stage_dedup(folder: pathlib.Path, texts: list[str], size: int, rounds: int) -> None:
    import hashlib

    from jaxlm.config import DedupConfig
    from jaxlm.data import dedup
    cfg, some = DedupConfig(), texts[:500]
    part, hashes = sum(len(text.encode()) for text in some), dedup.MinHash(cfg.permutations, cfg.shingle)
    sha = lambda: [hashlib.sha256(text.encode()).digest() for text in some]
    show("dedup: digest", part, turns(lambda: [dedup.digest(text) for text in some], sha, rounds=rounds), "sha256")
    show("dedup: MinHash", part, turns(lambda: [hashes.signature(text) for text in some], lambda: [text.lower().split() for text in some], rounds=rounds),
         "lower case and split")


def _tokens(folder: pathlib.Path, texts: list[str]):
    from jaxlm.config import TokenizerConfig
    from jaxlm.data import tokenizer
    return tokenizer.train(texts[:300], TokenizerConfig(kind="bpe", vocab_size=4096))


def stage_tokenise(folder: pathlib.Path, texts: list[str], size: int, rounds: int) -> None:
    tok = _tokens(folder, texts)
    some = texts[:500]
    part = sum(len(text.encode()) for text in some)
    show("tokenise, bpe", part, turns(lambda: tok.encode_batch(some), lambda: [text.encode() for text in some], rounds=rounds), "UTF-8 as ids")


def _corpus(folder: pathlib.Path, megabytes: float) -> tuple[pathlib.Path, int]:
    """A corpus of random ids whose documents are as long as web pages are, and its number of tokens."""
    from jaxlm.config import TokenizerConfig
    from jaxlm.data import shards, tokenizer
    rng, tok, tokens, number = np.random.default_rng(0), tokenizer.train((), TokenizerConfig(kind="bytes")), 0, 0
    with shards_folder(folder / "corpus") as out:
        entry = shards.file_entry(tok.save(out)) | {k: getattr(tok, k) for k in ("kind", "bos", "eos", "pad")} | {"vocab_size": 32_000}
        writer = shards.ShardWriter(out, "train", 32_000, 64 << 20, ("web",))
        pool = rng.integers(0, 32_000, 1 << 20)
        while tokens * 2 < megabytes * 1e6:
            length = int(np.clip(rng.lognormal(6.1, 1.1), 8, 200_000))  # median 450, mean 800
            start = int(rng.integers(0, len(pool) - length))
            writer.add(f"crawl/part-{number % 100:05d}.jsonl:{number}", pool[start:start + length], length * 4, "web")
            tokens, number = tokens + length, number + 1
        shards.write_manifest(out, {"tokenizer": entry, "splits": {"train": writer.close()}})
    return folder / "corpus", tokens


def shards_folder(path: pathlib.Path):
    import contextlib
    import shutil
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return contextlib.nullcontext(path)


def stage_shards(folder: pathlib.Path, texts: list[str], size: int, rounds: int) -> None:
    tokens = [_corpus(folder, 4)[1]]
    data = np.zeros(tokens[0] * 2, np.uint8).tobytes()
    seconds = turns(lambda: _corpus(folder, 4), lambda: (folder / "floor").write_bytes(data), rounds=rounds)
    show("write shards", tokens[0] * 2, seconds, "the same bytes in one file; MB of tokens, 2 bytes each")


def stage_loader(folder: pathlib.Path, texts: list[str], size: int, rounds: int) -> None:
    from jaxlm.data import loader, rows, shards
    path, _ = _corpus(folder, 40)
    corpus = shards.open_corpus(path)
    for length in (SEQUENCE, 2 * SEQUENCE):
        steps = max(loader.epoch_size(corpus, "train", rows.Task(length), batch_size=BATCH).rows // BATCH // 4, 4)

        def load():
            for _ in loader.batches(corpus, "train", rows.Task(length), batch_size=BATCH, seed=0, start_step=1, stop_step=1 + steps, threads=1):
                pass

        def fill():  # what a batch is, written once
            source = np.zeros((BATCH, length), np.int32)
            for _ in range(steps):
                for _ in range(5):
                    np.zeros((BATCH, length), np.int32)[:] = source

        tokens = steps * BATCH * length
        for name, clock in (("CPU", time.process_time), ("wall", time.perf_counter)):
            ours, floor = turns(load, fill, rounds=rounds, clock=clock)
            print(f"loader, T={length}, {name:<4} {tokens / ours / 1e6:>10,.1f} M tokens/s {tokens / floor / 1e6:>10,.0f} M {floor / ours:>6.0%}   "
                  "writing the five arrays of a batch")


# --- other libraries ------------------------------------------------------------------------------------------------------------------------


def compare(folder: pathlib.Path, size: int, venv: pathlib.Path, rounds: int) -> None:
    """Each job by the peer and by us, in turns, each in a process of its own that reports its seconds without its start."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEERS, "absl-py", "numpy"], check=True)
    path, _ = _corpus(folder, 20)
    _rows(path, folder)
    print(f"\n{'MB or M tokens a second':<24} {'peer, CPU':>10} {'jaxlm':>10} {'ratio':>9} {'peer, wall':>12} {'jaxlm':>10} {'ratio':>9}")
    for peer, job in (("datasets", "a.jsonl"), ("datatrove", "a.jsonl"), ("datasets", "a.jsonl.gz"), ("datatrove", "a.jsonl.gz"), ("datasets", "a.parquet"),
                      ("datatrove", "a.parquet"), ("datatrove", "a.csv"), ("datatrove", "a.warc.gz"), ("datasets", "loader"), ("tf.data", "loader")):
        theirs, ours = [], []
        for _ in range(rounds):
            theirs.append(_child(python, peer, folder, job))
            ours.append(_child(pathlib.Path(sys.executable), "jaxlm", folder, job))
        if None in theirs + ours:
            print(f"{peer + ' ' + job:<34} failed")
            continue
        (cpu, wall), (our_cpu, our_wall) = ([statistics.median(column) / 1e6 for column in zip(*found)] for found in (theirs, ours))
        print(f"{peer + ' ' + job:<24} {cpu:>10,.1f} {our_cpu:>10,.1f} {our_cpu / cpu:>8.1f}x "
              f"{wall:>12,.1f} {our_wall:>10,.1f} {our_wall / wall:>8.1f}x", flush=True)


def _rows(corpus: pathlib.Path, folder: pathlib.Path) -> None:
    """The same tokens for libraries that do not pack: one long row of ids, cut into rows of a batch."""
    from jaxlm.data import shards
    opened = shards.open_corpus(corpus)
    line = np.concatenate([opened.read("train", i) for i in range(len(opened.splits["train"].tokens))])
    np.save(folder / "rows.npy", line[:len(line) // (SEQUENCE + 1) * (SEQUENCE + 1)].reshape(-1, SEQUENCE + 1).astype(np.uint16))


def _child(python: pathlib.Path, who: str, folder: pathlib.Path, job: str) -> list[float] | None:
    """Bytes of text or tokens a second of the CPU, and by the wall clock."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([str(python), __file__, "--job", who, str(folder), job], capture_output=True, text=True, env=environment)
    if ran.returncode:
        print((ran.stderr.strip().splitlines() or ["no message"])[-1][:150], file=sys.stderr)
        return None
    return [float(figure) for figure in ran.stdout.split()[-2:]]


def work(who: str, folder: str, job: str) -> None:
    """In a process of its own: does the job, prints its speed."""
    units = iter(_JOBS[who](pathlib.Path(folder), job))
    next(units)  # the first one: everything is imported and open
    begin, cpu, count = time.perf_counter(), time.process_time(), 0
    for amount in units:
        count += amount
    print(count / (time.process_time() - cpu), count / (time.perf_counter() - begin))


def _jaxlm(folder, job):
    if job == "loader":
        from jaxlm.data import loader, rows, shards
        corpus = shards.open_corpus(folder / "corpus")
        steps = loader.epoch_size(corpus, "train", rows.Task(SEQUENCE), batch_size=BATCH).rows // BATCH
        for _ in loader.batches(corpus, "train", rows.Task(SEQUENCE), batch_size=BATCH, seed=0, start_step=0, stop_step=steps):
            yield SEQUENCE * BATCH
    else:
        from jaxlm.config import DataConfig
        from jaxlm.data import corpora
        yield from (len(document.text) for document in corpora.documents(DataConfig(source=(str(folder / job),))))


def _datasets(folder, job):
    import datasets
    if job == "loader":
        features = datasets.Features({"ids": datasets.List(datasets.Value("uint16"), SEQUENCE + 1)})
        rows = datasets.Dataset.from_dict({"ids": np.load(folder / "rows.npy")}, features=features)
        for batch in rows.shuffle(seed=0).with_format("numpy").iter(BATCH, drop_last_batch=True):
            ids = batch["ids"].astype(np.int32)
            ids[:, :-1], ids[:, 1:]
            yield SEQUENCE * BATCH
    else:
        kind = "parquet" if job.endswith("parquet") else "json"
        rows = datasets.load_dataset(kind, data_files=str(folder / job), split="train", streaming=True)
        yield from (len(row["text"]) for row in rows)


def _datatrove(folder, job):
    import logging
    from datatrove.pipeline import readers
    logging.disable(logging.CRITICAL)
    kind = {"jsonl": readers.JsonlReader, "gz": readers.JsonlReader, "parquet": readers.ParquetReader, "csv": readers.CSVReader}[job.split(".")[-1]]
    kind = readers.WarcReader if "warc" in job else kind
    reader = kind(str(folder), glob_pattern=job)
    yield from (len(document.text) for document in reader.run())


def _tf_data(folder, job):
    import tensorflow as tf
    rows, path = np.load(folder / "rows.npy"), str(folder / "rows.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for row in rows:
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[row.tobytes()]))
            writer.write(tf.train.Example(features=tf.train.Features(feature={"ids": feature})).SerializeToString())

    def parse(batch):
        ids = tf.io.parse_example(batch, {"ids": tf.io.FixedLenFeature([], tf.string)})["ids"]
        ids = tf.cast(tf.io.decode_raw(ids, tf.uint16), tf.int32)
        return ids[:, :-1], ids[:, 1:]

    rows = tf.data.TFRecordDataset(path).shuffle(4096, seed=0).batch(BATCH, drop_remainder=True).map(parse, num_parallel_calls=2).prefetch(4)
    for _ in rows.as_numpy_iterator():
        yield SEQUENCE * BATCH


_JOBS = {"jaxlm": _jaxlm, "datasets": _datasets, "datatrove": _datatrove, "tf.data": _tf_data}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        work(*sys.argv[2:5])
    else:
        main(sys.argv[1:])
