"""The pipeline behind `jaxlm prepare`: the same bytes for any number of workers, runner and interruption; a report whose numbers add up."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxlm import cli
from jaxlm.config import DataConfig, DedupConfig, FilterConfig, TokenizerConfig
from jaxlm.data import beam, corpora, dedup, page, prepare, run, shards, stages, tokenizer

VOCABULARY = [f"word{i}" for i in range(2000)]
BOILERPLATE = "All rights reserved; reading this page you agree to our terms of use and to cookies."
DEDUP = DedupConfig(near=0.75, line_length=40)
TOKENIZER = TokenizerConfig(vocab_size=400)


def quiet(line):
    pass


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Four files: 120 texts, of which 10 twice, 10 once more with one word changed, 5 blank, 5 nothing but boilerplate, which 60 others begin with."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("planted")
    texts = [" ".join(rng.choices(VOCABULARY, k=rng.randrange(40, 200))) for _ in range(120)]
    near = []
    for text in texts[20:30]:
        words = text.split()
        words[len(words) // 2] = "changed"
        near.append(" ".join(words[:-1]))
    texts = [f"{BOILERPLATE}\n{text}" if 60 <= i else text for i, text in enumerate(texts)]
    everything = texts + texts[:10] + near + [" \n"] * 5 + [f"{BOILERPLATE}\n" * i for i in range(1, 6)]
    rng.shuffle(everything)
    for number in range(4):
        lines = [json.dumps({"text": text, "licence": "CC0" if number else "CC-BY"}) + "\n" for text in everything[number::4]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Many units and batches of little text; workers are given batches and need not know."""
    monkeypatch.setattr(stages, "UNIT_BYTES", 50_000)
    monkeypatch.setattr(stages, "BATCH_BYTES", 20_000)


def config(planted, **changes):
    source = (f"first={planted}/[01].jsonl", f"second={planted}/[23].jsonl")
    return DataConfig(**(dict(source=source, licence_key="licence", validation=0.15, test=0.15, shard_bytes=20_000) | changes))


@pytest.fixture(scope="module")
def whole(planted, tmp_path_factory):
    """One worker, never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "UNIT_BYTES", 50_000)
        patch.setattr(stages, "BATCH_BYTES", 20_000)
        return prepare.prepare(config(planted, workers=1), TOKENIZER, tmp_path_factory.mktemp("whole") / "data", dedup=DEDUP, log=quiet)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != prepare.TIMINGS}


def texts_of(corpus):
    tok = tokenizer.load(corpus.folder)
    return {split: [tok.decode(corpus.read(split, i)[1:-1]) for i in range(len(index.tokens))] for split, index in corpus.splits.items()}


# --- what lives ---------------------------------------------------------------------------------------------------------------------------


def test_what_was_planted_is_gone_and_nothing_else(whole, planted):
    documents = [document.text for document in corpora.documents(config(planted))]
    found = [text for split in texts_of(whole).values() for text in split]
    report = json.loads((whole.folder / "report.json").read_text())
    removed = {rule: entry["documents"] for rule, entry in report["removed"].items()}
    assert removed["clean.empty"] == 5 and removed["dedup.exact"] == 10
    # the boilerplate alone: the first keeps one line, unless another document had it before; and lines that are gone leave line ends only
    assert removed["dedup.lines"] in (4, 5) and 9 <= removed["dedup.near"] <= 10 and set(removed) == {"clean.empty", "dedup.exact", "dedup.lines", "dedup.near"}
    assert len(found) == len(set(found)) == len(documents) - sum(removed.values())
    assert sum(BOILERPLATE in text for text in found) == 1
    bodies = {text.removeprefix(BOILERPLATE).strip() for text in documents}
    assert {text.removeprefix(BOILERPLATE).strip() for text in found} <= bodies


def test_near_duplicates_never_straddle_splits(planted, tmp_path):
    """Of each pair one document lives, so however the splits fall no text of one is nearly in another."""
    corpus = prepare.prepare(config(planted, validation=0.3, test=0.3, workers=1), TokenizerConfig(kind="bytes"), tmp_path / "data", dedup=DEDUP, log=quiet)
    hashes = dedup.MinHash(128, 5)
    found = [(split, set(hashes.shingles(text).tolist())) for split, texts in texts_of(corpus).items() for text in texts]
    assert min(sum(split == name for split, _ in found) for name in prepare.SPLITS) > 20
    assert all(len(a & b) / len(a | b) < 0.75 for i, (split, a) in enumerate(found) for other, b in found[:i])


def test_lines_of_dropped_documents_do_not_count_as_seen(tmp_path, write_jsonl):
    line = "a long line that both documents have in common, and the third"
    texts = [f"one\n{line}", f"one\n{line}", f"two\n{line}", "three\n" + f"{line}\n" * 2 + "end"]
    data = DataConfig(source=(write_jsonl(tmp_path / "a.jsonl", texts),), validation=0, test=0)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", dedup=DedupConfig(line_length=30), log=quiet)
    assert texts_of(corpus)["train"] == [f"one\n{line}", "two", "three\nend"]


def test_documents_that_dead_lines_made_equal_are_dropped(tmp_path, write_jsonl):
    texts = ["a first long line of boilerplate\nsame", "a second long line of boilerplate\nother", "a first long line of boilerplate\nx",
             "a second long line of boilerplate\nx"]
    data = DataConfig(source=(write_jsonl(tmp_path / "a.jsonl", texts),), validation=0, test=0)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", dedup=DedupConfig(line_length=20), log=quiet)
    assert texts_of(corpus)["train"] == [*texts[:2], "x"]
    assert json.loads((corpus.folder / "report.json").read_text())["removed"]["dedup.lines"]["documents"] == 1


def test_many_passes_over_lines_are_one(planted, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(dedup, "LINES_PER_PASS", 7)
    corpus = prepare.prepare(config(planted, workers=1), TOKENIZER, tmp_path / "data", dedup=DEDUP, log=quiet)
    assert contents(corpus.folder) == contents(whole.folder)


def test_nothing_left_names_the_rule(planted, tmp_path):
    with pytest.raises(ValueError, match=r"none of 150 documents is left: filter.min_words removed the most, 150 \(values from \d+ to \d+\): loosen "
                       r"config.filter.min_words, or set it off"):
        prepare.prepare(config(planted), TOKENIZER, tmp_path / "data", filter=FilterConfig(min_words=5000), log=quiet)
    assert not list(tmp_path.iterdir())


# --- the same bytes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(planted, whole, tmp_path, workers):
    lines = []
    corpus = prepare.prepare(config(planted, workers=workers), TOKENIZER, tmp_path / "data", dedup=DEDUP, log=lines.append)
    assert contents(corpus.folder) == contents(whole.folder) and len(contents(whole.folder)) > 12
    assert json.loads((corpus.folder / prepare.TIMINGS).read_text())["workers"] == workers
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_beam_gives_the_same_bytes(planted, whole, tmp_path):
    pytest.importorskip("apache_beam")
    corpus = prepare.prepare(config(planted), TOKENIZER, tmp_path / "data", dedup=DEDUP, log=quiet, runner=beam.runner("DirectRunner"))
    assert contents(corpus.folder) == contents(whole.folder)
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 1: 'text' is 3, not text$"):
        prepare.prepare(DataConfig(source=(str(tmp_path / "bad.jsonl"),)), TOKENIZER, tmp_path / "none", log=quiet, runner=beam.runner("DirectRunner"))


def test_other_sizes_of_units_and_batches_give_the_same_shards(planted, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "UNIT_BYTES", 1)
    monkeypatch.setattr(stages, "BATCH_BYTES", 3000)
    corpus = prepare.prepare(config(planted, workers=1), TOKENIZER, tmp_path / "data", dedup=DEDUP, log=quiet)
    assert contents(corpus.folder) == contents(whole.folder)


def test_which_of_equal_documents_lives_depends_on_the_order_of_files_alone(planted, tmp_path):
    for name, source in (("a", ("[0-3]",)), ("b", ("0", "1", "2", "3")), ("c", ("3", "[0-2]"))):
        data = config(planted, source=tuple(f"{planted}/{part}.jsonl" for part in source), workers=1)
        prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / name, dedup=DEDUP, log=quiet)
    ids = lambda corpus: [corpus.document_id(split, i) for split in prepare.SPLITS for i in range(len(corpus.splits[split].tokens))]
    a, b, c = (ids(shards.open_corpus(tmp_path / name)) for name in "abc")
    assert a == b != c and abs(len(a) - len(c)) <= 1  # one document may be nothing but a line that another has first


# --- interruptions ------------------------------------------------------------------------------------------------------------------------


CODE = """if True:
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background inherits that it is ignored
    from jaxlm.config import DataConfig, DedupConfig, TokenizerConfig
    from jaxlm.data import prepare, run, shards, stages, survivors, tokenizer
    stages.UNIT_BYTES, stages.BATCH_BYTES = 50_000, 20_000
    calls = 0
    def reached(nth, function):
        def called(*arguments, **named):
            global calls
            calls += 1
            if calls == nth:
                print("reached", flush=True)
                time.sleep(60)
            return function(*arguments, **named)
        return called
    {point}
    try:
        prepare.prepare({data!r}, {tokenizer!r}, {folder!r}, dedup={dedup!r}, log=lambda line: print(line, file=sys.stderr))
    except KeyboardInterrupt:
        sys.exit(130)
"""
POINTS = {
    "the second batch is read": "stages._batches = reached(2, stages._batches)",
    "a batch is cleaned": "stages.clean_batch = reached(2, stages.clean_batch)",
    "a file has no name yet": "stages.os.replace = reached(4, stages.os.replace)",
    "lines are compared": "survivors.Survey.drop_lines = reached(1, survivors.Survey.drop_lines)",
    "a batch is signed": "stages.sign_batch = reached(3, stages.sign_batch)",
    "near-duplicates are sought": "survivors.Survey.drop_near = reached(1, survivors.Survey.drop_near)",
    "the tokenizer is trained": "tokenizer.train = reached(1, tokenizer.train)",
    "a batch is tokenised": "stages.tokenise_batch = reached(2, stages.tokenise_batch)",
    "shards are written": "shards.ShardWriter.add = reached(30, shards.ShardWriter.add)",
    "the manifest is written": "shards._fsync = reached(1, shards._fsync)",
    "before the rename": "shards.os.rename = reached(2, shards.os.rename)",
    "after the rename": "shards.shutil.rmtree = reached(1, shards.shutil.rmtree)",
}


def start(planted, folder, point="", workers=1):
    code = CODE.format(point=point, data=config(planted, workers=workers), tokenizer=TOKENIZER, folder=str(folder), dedup=DEDUP)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("point", POINTS)
def test_killed_in_any_stage_it_goes_on_to_the_same_bytes(planted, whole, tmp_path, point):
    process = start(planted, tmp_path / "data", POINTS[point])
    assert process.stdout.readline() == "reached\n", process.stderr.read()
    renamed = point == "after the rename"
    if not renamed:
        with pytest.raises(ValueError, match="another process is preparing"):
            prepare.prepare(config(planted), TOKENIZER, tmp_path / "data", dedup=DEDUP, log=quiet)
    process.kill()
    process.communicate()
    assert (tmp_path / "data").exists() == renamed and (tmp_path / ".data.preparing").exists()
    lines = []
    corpus = prepare.prepare(config(planted, workers=1), TOKENIZER, tmp_path / "data", dedup=DEDUP, log=lines.append)
    assert lines[0].startswith("using the corpus" if renamed else "going on with the work that was interrupted")
    assert contents(corpus.folder) == contents(whole.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_is_done_is_not_done_again(planted, whole, tmp_path, monkeypatch):
    process = start(planted, tmp_path / "data", POINTS["before the rename"])
    process.stdout.readline()
    process.kill()
    process.communicate()
    for name in ("clean_batch", "sign_batch", "tokenise_batch"):
        monkeypatch.setattr(stages, name, lambda *arguments: pytest.fail("done again"))
    monkeypatch.setattr(corpora, "read", lambda *arguments: pytest.fail("read again"))
    monkeypatch.setattr(tokenizer, "train", lambda *arguments: pytest.fail("trained again"))
    assert contents(prepare.prepare(config(planted, workers=1), TOKENIZER, tmp_path / "data", dedup=DEDUP, log=quiet).folder) == contents(whole.folder)


@pytest.mark.parametrize("change", ["file", "config"])
def test_work_on_something_else_starts_anew(planted, tmp_path, change, write_jsonl):
    source = tmp_path / "texts.jsonl"
    write_jsonl(source, [f"text {i}" for i in range(100)])
    data = DataConfig(source=(str(source),), validation=0, test=0, workers=1)
    code = CODE.format(point=POINTS["shards are written"], data=data, tokenizer=TokenizerConfig(kind="bytes"), folder=str(tmp_path / "data"),
                       dedup=DedupConfig())
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.kill()
    process.communicate()
    lines, cfg = [], DedupConfig()
    if change == "file":
        write_jsonl(source, [f"changed {i}" for i in range(100)])
    else:
        cfg = DedupConfig(exact=False)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", dedup=cfg, log=lines.append)
    assert "the files or the config have changed since the work that was interrupted" in lines[0]
    assert texts_of(corpus)["train"][0] == ("changed 0" if change == "file" else "text 0")


def test_ctrl_c_says_how_to_go_on(planted, whole, tmp_path):
    process = start(planted, tmp_path / "data", POINTS["a batch is tokenised"])
    process.stdout.readline()
    time.sleep(0.5)  # it sleeps now; an interrupt at the moment of a clean-up by Python is lost
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted: the same command goes on from here" in err and "Traceback" not in err
    corpus = prepare.prepare(config(planted, workers=1), TOKENIZER, tmp_path / "data", dedup=DEDUP, log=quiet)
    assert contents(corpus.folder) == contents(whole.folder)


def children(pid):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat:
                    fields = stat.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry))
    return found


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_workers_end_with_their_parent(planted, tmp_path):
    process = start(planted, tmp_path / "data", POINTS["shards are written"], workers=2)
    process.stdout.readline()
    workers = children(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert len(workers) >= 2 and not left


@pytest.mark.slow
def test_killed_at_ten_random_points_it_ends_with_the_same_bytes(planted, whole, tmp_path):
    started = time.monotonic()
    assert start(planted, tmp_path / "probe", workers=2).wait() == 0
    seconds, rng, kills = time.monotonic() - started, random.Random(time.time_ns()), 0
    while kills < 10:
        process = start(planted, tmp_path / f"data{kills}", workers=2)
        moment = rng.uniform(0.1, 1) * seconds
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        corpus = prepare.prepare(config(planted, workers=2), TOKENIZER, tmp_path / f"data{kills}", dedup=DEDUP, log=quiet)
        assert contents(corpus.folder) == contents(whole.folder), f"killed after {moment:.2f} s"
        kills += 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- the pool -----------------------------------------------------------------------------------------------------------------------------


def work(tmp_path, function, units=20):
    return run.Work("done", tmp_path, list(range(units)), lambda unit: [unit], function, lambda unit: 1)


def wrong(task):
    if task == 7:
        stages.corpora.files(DataConfig())  # a mistake of the user's, found in a worker
    return 1, 1


def broken(task):
    return int("a bug of ours")


def gone(task):
    os._exit(9)


def test_errors_come_through_the_pool(tmp_path):
    with pytest.raises(ValueError, match="^data.source is empty") as caught, run.local(2) as runner:
        runner(work(tmp_path, wrong), quiet)
    assert run.is_mistake(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="a bug of ours") as caught, run.local(2) as runner:
        runner(work(tmp_path, broken), quiet)
    assert not run.is_mistake(caught.value)  # shown with its traceback
    with pytest.raises(RuntimeError, match="a worker process ended without a word.*it goes on from here"), run.local(2) as runner:
        runner(work(tmp_path, gone), quiet)


def test_few_tasks_are_in_flight(tmp_path):
    made, done = [], []

    def expand(unit):
        made.append(unit)
        assert len(made) - len(done) <= 2 * 2 + 1
        return [unit]

    class Counted(run._Progress):
        def add(self, documents, size):
            done.append(documents)

    with pytest.MonkeyPatch.context() as patch, run.local(2) as runner:
        patch.setattr(run, "_Progress", Counted)
        runner(run.Work("done", tmp_path, list(range(100)), expand, wrong_never, lambda unit: 1), quiet)
    assert len(made) == len(done) == 100


def wrong_never(task):
    return 1, 1


def test_progress_says_how_fast_and_how_long(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_SECONDS", 0.0)
    path, lines = tmp_path / "file", []
    path.write_bytes(b"x" * 1000)

    def expand(unit):
        with open(path, "rb", buffering=0) as file:
            while file.read(100):
                yield unit

    with run.local(1) as runner:
        runner(run.Work("cleaned", tmp_path, [0, 1], expand, lambda task: (3, 2_000_000), lambda unit: 1000, lambda unit: [str(path)]), lines.append)
    assert re.fullmatch(r"cleaned 15 documents, 10.0 MB \([\d,]+ documents/s, [\d.]+ MB/s, 25%, \d+ s left\)", lines[4])
    assert run._duration(59.6) == "1 min 00 s" and run._duration(3700) == "1 h 01 min" and run._duration(4) == "4 s"


# --- the report ---------------------------------------------------------------------------------------------------------------------------


def test_the_report_adds_up(whole, planted):
    report = json.loads((whole.folder / "report.json").read_text())
    documents = list(corpora.documents(config(planted)))
    assert report["read"] == {"documents": len(documents), "bytes": sum(len(document.text.encode()) for document in documents)}
    assert report["read"]["documents"] == report["kept"]["documents"] + sum(entry["documents"] for entry in report["removed"].values())
    assert set(report["sources"]) == {"first", "second"}
    for source in report["sources"].values():
        assert source["read"]["documents"] == source["kept"]["documents"] + sum(entry["documents"] for entry in source["removed"].values())
        assert sum(split["documents"] for split in source["splits"].values()) == source["kept"]["documents"]
        assert sum(licence["tokens"] for licence in source["licences"].values()) == source["kept"]["tokens"]
    assert set(report["sources"]["second"]["licences"]) == {"CC0"} and set(report["sources"]["first"]["licences"]) == {"CC0", "CC-BY"}
    for kind in ("read", "kept"):
        assert sum(report["lengths"][kind].values()) == report[kind]["documents"]
    kept = sum(int(index.text_bytes.sum()) for index in whole.splits.values())
    tokens = sum(int(index.tokens.sum()) for index in whole.splits.values())
    assert (report["kept"]["bytes"], report["kept"]["tokens"], report["tokens"]["total"]) == (kept, tokens, tokens)
    lines = sum(entry["changed"]["dedup.lines"]["times"] for entry in report["sources"].values())
    assert lines == report["duplicates"]["lines"]["dropped"] == 60 + 15 - 1
    assert report["duplicates"]["lines"]["most_frequent"] == [{"times": 75, "line": BOILERPLATE}]
    assert report["duplicates"]["near"]["documents_dropped"] == report["removed"]["dedup.near"]["documents"]
    assert sum(report["tokens"]["document_lengths"].values()) == report["kept"]["documents"]
    occurrences = np.bincount(np.concatenate([whole.read(split, i) for split, index in whole.splits.items() for i in range(len(index.tokens))]))
    assert report["tokens"]["most_frequent"][0]["times"] == occurrences.max()
    assert report["tokens"]["unused"] == 400 - np.count_nonzero(occurrences)
    steps = [step["documents"] for step in report["funnel"]]
    assert steps == sorted(steps, reverse=True) and (steps[0], steps[-1]) == (len(documents), report["kept"]["documents"])


def test_examples_are_small_few_and_of_what_they_say(whole, planted):
    examples = json.loads((whole.folder / "report.json").read_text())["examples"]
    given = {document.id: document.text for document in corpora.documents(config(planted))}
    assert set(examples) == {"clean.empty", "dedup.exact", "dedup.lines", "dedup.near"}
    for rule, found in examples.items():
        assert 1 <= len(found) <= 5 and all(len(example["text"]) <= 402 for example in found)
        for example in found:
            assert given[example["id"]].startswith(example["text"].removesuffix(" …"))
            if rule == "dedup.exact":
                assert given[example["kept"]["id"]] == given[example["id"]] and example["kept"]["id"] != example["id"]
            if rule == "dedup.near":
                assert example["value"] >= 0.75


class Page(HTMLParser):
    """Every tag that opens must close, but for those that have no end."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.data = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


def test_the_page_is_whole_and_needs_nothing_from_outside(whole, tmp_path, write_jsonl):
    evil = '<script>alert("1")</script><img src=http://x.y/z> & \x1b[31m'
    data = DataConfig(source=(write_jsonl(tmp_path / "a & <b>.jsonl", [evil + str(i) for i in range(9)] + [evil + "0"]),), validation=0, test=0)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=quiet)
    for folder in (whole.folder, corpus.folder):
        text = (folder / page.NAME).read_text(encoding="utf-8")
        parsed = Page()
        parsed.feed(text)
        assert not parsed.open and not {"script", "img", "link", "iframe"} & set(parsed.tags) and {"svg", "table", "details"} <= set(parsed.tags)
        assert all(link.startswith("#") for link in parsed.links) and not re.search("https?:", text.replace("http://x.y/z", ""))
    assert "&lt;script&gt;" in text and "a &amp; &lt;b&gt;" in text and "\x1b" not in text
    assert any('<script>alert("1")</script>' in piece for piece in parsed.data)


def test_records_that_cannot_be_read_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\nno json\n{"text": 4}\n{"text": "five"}\n')
    data = DataConfig(source=(str(tmp_path / "a.jsonl"),), validation=0, test=0, on_error="skip")
    lines = []
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lines.append)
    report = json.loads((corpus.folder / "report.json").read_text())
    assert sum(report["skipped"].values()) == 3 and max(report["skipped"].values()) == 2 and "skipped: 3 records" in "\n".join(lines)
    assert len(report["examples"]["skipped"]) == 3 and report["read"]["documents"] == 2
    with pytest.raises(ValueError, match="a.jsonl, line 2: 'text' is 2"):
        prepare.prepare(DataConfig(source=data.source, workers=2), TokenizerConfig(kind="bytes"), tmp_path / "stop", log=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]


def test_an_id_that_two_documents_have(tmp_path):
    lines = [{"text": "one", "id": "a"}, {"text": "two", "id": "b"}, {"text": "one", "id": "a"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(source=(str(tmp_path / "a.jsonl"),), id_key="id", validation=0, test=0)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=quiet)
    assert [corpus.document_id("train", i) for i in range(2)] == ["a", "b"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": "three", "id": "b"}]))
    with pytest.raises(ValueError, match="two documents have the id 'b'"):
        prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "again", log=quiet)


def test_a_corpus_may_lie_among_its_sources(tmp_path, write_jsonl):
    (tmp_path / "page.html").write_text("<html><body><article><p>" + "A page of some words. " * 30 + "</p></article></body></html>")
    data, lines = DataConfig(source=(str(tmp_path),), validation=0, test=0), []
    first = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=quiet)
    assert len(first.splits["train"].tokens) == 1
    assert prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lines.append).fingerprint == first.fingerprint and len(lines) == 1


def test_runners_and_their_flags(tmp_path, capfd):
    def fails(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main(["prepare", "--config=quickstart", f"--out={tmp_path}/data", *arguments])
        assert exit.value.code == 2
        return capfd.readouterr().err

    assert "--runner=FastRunner is not known; allowed: DirectRunner, DataflowRunner" in fails("--runner=FastRunner")
    assert "--beam_options are for a Beam runner" in fails("--beam_options=--project=p")


def test_position_counts_files_that_were_read_before(tmp_path):
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        with open(path, "wb") as file:
            file.write(bytes(100))
    with open(paths[1], "rb", buffering=0) as file:
        file.read(30)
        assert run._position(paths) == 130
    assert run._position(paths) == 0  # none is open
