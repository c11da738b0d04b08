"""Batches of encoder-decoders: pairs in segments, the spans that are left out, and rows in which no token is lost."""

import dataclasses

import numpy as np
import pytest

from jaxlm.config import CleanConfig, DataConfig, FilterConfig, ObjectiveConfig, TokenizerConfig
from jaxlm.data import loader, pack, prepare, rows, shards, tasks

SENTINELS = np.arange(1099, 999, -1)
EOS = 1


def corrupt(sizes, seed=0, **options):
    """Both sides of texts 2, 3, 4, ..., each as a list."""
    sizes = np.array(sizes)
    tokens = np.concatenate([np.arange(2, 2 + size) for size in sizes])
    read, read_sizes, said, said_sizes = tasks.span_corruption(tokens, sizes, np.arange(len(sizes), dtype=np.uint64), SENTINELS, EOS, seed, **options)
    cut = lambda ids, parts: [part.tolist() for part in np.split(ids, np.cumsum(parts)[:-1])]
    assert read_sizes.sum() == len(read) and said_sizes.sum() == len(said) and read.dtype == said.dtype == np.int32
    return list(zip(cut(read, read_sizes), cut(said, said_sizes)))


def restored(read, said):
    """The text from both sides: what follows each sentinel on the second is put in its place on the first."""
    answers = {}
    for token in said[:-1]:
        if token >= 1000:
            answers[token] = current = []
        else:
            current.append(token)
    return [token for item in read[:-1] for token in (answers[item] if item >= 1000 else [item])]


@pytest.mark.parametrize("options", [{}, {"rate": 0.5, "length": 3.0}, {"rate": 0.9, "length": 10.0}, {"rate": 0.15, "length": 1.0}])
def test_nothing_is_lost(options):
    sizes = [1, 2, 3, 7, 20, 100, 511, 1, 64]
    for seed in range(20):
        for size, (read, said) in zip(sizes, corrupt(sizes, seed, **options)):
            assert read[-1] == said[-1] == EOS and restored(read, said) == list(range(2, 2 + size))
            marks = [token for token in read if token >= 1000]
            assert marks == SENTINELS[:len(marks)].tolist() and said[0] == 1099 and (read[0] < 1000 or size == 1)
            hidden = min(max(round(options.get("rate", 0.15) * size), 1), max(size - 1, 1))
            assert len(said) - 1 - len(marks) == hidden
            assert len(marks) == max(min(max(round(hidden / options.get("length", 3.0)), 1), hidden, size - hidden), 1)


def test_spans_follow_from_key_and_number_alone_and_lie_anywhere():
    same, again, other = (corrupt([200] * 50, seed) for seed in (5, 5, 6))
    assert same == again and all(a != b for a, b in zip(same, other)) and len({tuple(read) for read, _ in same}) == 50
    hidden = np.zeros(200)
    for seed in range(40):
        for _, said in corrupt([200] * 50, seed):
            hidden[[token - 2 for token in said if EOS < token < 1000]] += 1
    assert np.abs(hidden[20:180] / 2000 - 0.15).max() < 0.05


def test_pairs_in_rows():
    flat = lambda *parts: np.array([token for part in parts for token in part])
    batch = tasks.pair_batch(np.array([2, 0, 1]), flat([5, 6, 1], [8, 1], [4, 1]), np.array([3, 2, 2]), flat([7, 1], [9, 4, 1], [1]), np.array([2, 3, 1]),
                             np.array([10, 11, 12]), encoder_length=6, decoder_length=6, start=0)
    assert batch["encoder_tokens"].tolist() == [[5, 6, 1, 8, 1, 0], [0] * 6, [4, 1, 0, 0, 0, 0]]
    assert batch["encoder_segments"].tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6, [1, 1, 0, 0, 0, 0]]
    assert batch["encoder_positions"][0].tolist() == [0, 1, 2, 0, 1, 0]
    assert batch["tokens"][0].tolist() == [0, 7, 0, 9, 4, 0] and batch["targets"][0].tolist() == [7, 1, 9, 4, 1, 0]
    assert batch["segments"][0].tolist() == [1, 1, 2, 2, 2, 0] and batch["weights"].sum() == 6 and batch["weights"].dtype == np.float32
    assert batch["documents"].tolist() == [[10, 10, 11, 11, 11, -1], [-1] * 6, [12, -1, -1, -1, -1, -1]]
    empty = tasks.pair_batch(np.zeros(2, int), *[np.zeros(0, int)] * 5, encoder_length=4, decoder_length=3, start=5)
    assert {key: value.shape for key, value in empty.items() if key.startswith("encoder")} == dict.fromkeys(
        ("encoder_tokens", "encoder_positions", "encoder_segments"), (2, 4)) and not empty["weights"].any()


# --- best fit ---


@pytest.mark.parametrize("sides", [1, 2])
def test_best_fit_loses_nothing_and_wastes_little(sides):
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(1, 65, 4000), rng.integers(1, 33, 4000)], axis=1)[:, :sides]
    room = (64, 32)[:sides]
    row = pack.best_fit(sizes, room)
    assert row.shape == (4000,) and (np.bincount(row) > 0).all()
    for side in range(sides):
        filled = np.bincount(row, sizes[:, side])
        assert filled.max() <= room[side]
    assert sizes[:, 0].sum() / (len(np.bincount(row)) * 64) > (0.99 if sides == 1 else 0.85)
    # Which thing of a size is which does not matter: the same sizes in another order fill the same number of rows.
    assert pack.best_fit(sizes[::-1], room).max() == row.max()


def test_best_fit_is_best_fit():
    """Against the plain form: one thing after the other, each into the row with the least space that holds it."""
    sizes = np.random.default_rng(1).integers(1, 31, 500)
    spaces = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= size]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= size
        else:
            spaces.append(30 - size)
    found = np.bincount(pack.best_fit(sizes[:, None], (30,)), sizes)
    assert sorted(30 - found) == sorted(spaces)
    assert pack.best_fit(np.zeros((0, 2), int), (3, 3)).tolist() == []


def test_best_fit_is_fast():
    """A million documents in a fraction of a second; the bound is loose for slow machines."""
    import time
    sizes = np.minimum(np.random.default_rng(0).lognormal(5, 1, 10**6).astype(int) + 1, 1024)[:, None]
    start = time.perf_counter()
    row = pack.best_fit(sizes, (1024,))
    assert time.perf_counter() - start < 10 and sizes.sum() / ((row.max() + 1) * 1024) > 0.99


# --- rows of a corpus ---


@pytest.fixture(scope="module")
def spans(corpus):
    """Bytes as tokens; sentinels are ids that no text has."""
    task = rows.Task(64, ObjectiveConfig(name="span_corruption"), eos=258, sentinels=np.arange(300, 304, dtype=np.int32))
    return task._replace(target_length=24)


def stream(corpus, task, start, stop, **changes):
    return list(loader.batches(corpus, "train", task, **{"batch_size": 8, "seed": 5, "start_step": start, "stop_step": stop} | changes))


def equal(a, b):
    assert len(a) == len(b)
    for (step, one), (other_step, other) in zip(a, b):
        assert step == other_step and one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def texts_of(batch):
    """The texts of a batch, put together from both sides of each segment."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            read = batch["encoder_tokens"][row][batch["encoder_segments"][row] == segment]
            said = batch["targets"][row][batch["segments"][row] == segment]
            answers, text = {}, []
            for token in said[:-1].tolist():
                if token >= 300:
                    answers[token] = current = []
                else:
                    current.append(token)
            for token in read[:-1].tolist():
                text += answers[token] if token >= 300 else [token]
            assert read[-1] == said[-1] == 258
            yield bytes(text)


def test_an_epoch_of_span_corruption_has_every_token_once(corpus, spans):
    split = corpus.splits["train"]
    size = rows.epoch_size(spans, split)
    whole = b"".join(bytes(corpus.read("train", i)[1:-1].tolist()) for i in range(len(split.tokens)))
    fills = []
    for epoch in (0, 1):
        plan = rows.plan(spans, split, (5, epoch))
        assert len(plan.rows) == size.rows
        batch = rows.fill(spans, [pack.row(plan, i) for i in range(size.rows)], corpus, "train", epoch * size.rows, 5)
        found = list(texts_of(batch))
        assert sum(map(len, found)) == len(whole) and sorted(b"".join(found)) == sorted(whole)
        assert size.targets == batch["weights"].sum() and size.positions == batch["tokens"].size + batch["encoder_tokens"].size
        assert size.padding == (batch["segments"] == 0).sum() + (batch["encoder_segments"] == 0).sum()
        fills.append(batch["encoder_tokens"])
    assert (fills[0] != fills[1]).any()
    assert size.padding < 0.15 * size.positions
    longest = rows.longest_window(spans)
    assert longest == 70 and np.bincount([len(text) for text in found]).argmax() == longest  # 71 - 11 + 4 + 1 = 65


def test_any_hosts_any_start_any_threads(corpus, spans):
    whole = stream(corpus, spans, 0, 30)
    parts = [stream(corpus, spans, 0, 30, rows=(a, a + 2)) for a in (0, 2, 4, 6)]
    equal(whole, [(step[0][0], {key: np.concatenate([part[1][key] for part in step]) for key in step[0][1]}) for step in zip(*parts)])
    for start, threads in ((1, 0), (17, 3)):
        equal(whole[start:], stream(corpus, spans, start, 30, threads=threads))
    assert (stream(corpus, spans, 0, 1, seed=6)[0][1]["targets"] != whole[0][1]["targets"]).any()


def test_an_evaluation_hides_the_same_spans_each_time(corpus, spans):
    evaluate = lambda size: [b for b in loader.evaluation_batches(corpus, "validation", spans, batch_size=size, overlap=0.5)]
    split = corpus.splits["validation"]
    found = []
    for size in (8, 3):
        batches = evaluate(size)
        joined = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
        found.append(sorted(zip(joined["documents"][joined["weights"] > 0].tolist(), joined["targets"][joined["weights"] > 0].tolist())))
        text = sorted(b"".join(texts_of(joined)))
        assert text == sorted(b"".join(bytes(corpus.read("validation", i)[1:-1].tolist()) for i in range(len(split.tokens))))
    assert found[0] == found[1]
    counts = rows.evaluation_targets(spans, split, np.arange(len(split.tokens)))
    assert (np.bincount([document for document, _ in found[0]], minlength=len(split.tokens)) == counts).all()


@pytest.mark.parametrize("name", ["next_token", "masked_token"])
def test_best_fit_keeps_documents_whole(corpus, name):
    task = rows.Task(512, ObjectiveConfig(name=name), packing="best_fit")
    split = corpus.splits["train"]
    size = rows.epoch_size(task, split)
    found = []
    for epoch in (0, 1):
        plan = rows.plan(task, split, (3, epoch))
        planned = [pack.row(plan, i) for i in range(size.rows)]
        pieces = sorted(piece for row in planned for piece in row)
        ends = {piece.document: piece.stop for piece in pieces}
        assert all(ends[i] == split.tokens[i] - 1 for i in range(len(split.tokens)))
        assert sum(piece.stop - piece.start for piece in pieces) == size.targets == split.tokens.sum() - len(split.tokens)
        assert all(piece.start % 512 == 0 and (piece.stop - piece.start == 512 or piece.stop == ends[piece.document]) for piece in pieces)
        found.append(planned)
    assert found[0] != found[1] and size.padding == size.positions - size.targets < 0.1 * size.positions
    batch = rows.fill(task, found[0], corpus, "train", 0)
    used = batch["segments"] > 0
    assert ((batch["positions"] == 0) & used).sum() == len(pieces) and (name != "next_token" or batch["weights"].sum() == size.targets)
    long = int((split.tokens - 1 > 512).sum())
    assert rows.notes(task, split) == [f"{long} of {len(split.tokens)} documents are longer than a row and are cut into windows of 512 tokens; none is lost"]
    assert rows.notes(rows.Task(512), split) == []


def test_longest_window_by_hand():
    task = rows.Task(512, ObjectiveConfig(name="span_corruption"), sentinels=SENTINELS)
    assert rows.longest_window(task) == 568  # Raffel et al.'s 568 tokens for an encoder of 512 and a decoder of 114
    assert rows.longest_window(task._replace(target_length=114)) == 568 and rows.longest_window(task._replace(target_length=113)) < 568
    assert rows.longest_window(task._replace(sentinels=SENTINELS[:1])) < 60


# --- pairs ---


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    import json
    folder = tmp_path_factory.mktemp("pairs")
    lines = [{"question": f"{'x' * (i % 50)} {i}?", "answer": f"{'y' * (i % 30)}{i}"} for i in range(200)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(source=(str(folder / "pairs.jsonl"),), text_key="answer", input_key="question", validation=0.1, test=0.0)
    return prepare.prepare(data, TokenizerConfig(kind="bytes"), folder / "data", log=lambda line: None), lines


def test_pairs_on_disk(pairs):
    corpus, lines = shards.open_corpus(pairs[0].folder), pairs[1]
    found = {}
    for split, index in corpus.splits.items():
        for i in range(len(index.tokens)):
            tokens, middle = corpus.read(split, i), int(index.inputs[i])
            assert tokens[middle - 1] == tokens[-1] == 258 and (tokens == 258).sum() == 2
            line = int(corpus.document_id(split, i).rpartition(":")[2]) - 1
            found[line] = {"question": bytes(tokens[:middle - 1].tolist()).decode(), "answer": bytes(tokens[middle:-1].tolist()).decode()}
    assert [found[i] for i in range(len(lines))] == lines
    assert corpus.manifest["splits"]["train"]["text_bytes"] == int(sum(corpus.splits["train"].tokens - 2))


def test_rows_of_pairs(pairs):
    corpus = pairs[0]
    task, split = rows.Task(64, ObjectiveConfig(name="seq2seq"), eos=258, target_length=40), corpus.splits["train"]
    plan = rows.plan(task, split, (0, 0))
    batch = rows.fill(task, [pack.row(plan, i) for i in range(len(plan.rows))], corpus, "train", 0)
    of = [(row, segment) for row in range(len(plan.rows)) for segment in range(1, batch["segments"][row].max() + 1)]
    assert len(of) == len(split.tokens) and rows.notes(task, split) == []
    for row, segment in of:
        here, there = batch["segments"][row] == segment, batch["encoder_segments"][row] == segment
        document = batch["documents"][row][here][0]
        np.testing.assert_array_equal(np.append(batch["encoder_tokens"][row][there], batch["targets"][row][here]), corpus.read("train", document))
        assert batch["tokens"][row][here][0] == task.start == 0 and (batch["tokens"][row][here][1:] == batch["targets"][row][here][:-1]).all()


def test_what_is_too_long_is_cut_and_counted(pairs):
    corpus, _ = pairs
    task, split = rows.Task(30, ObjectiveConfig(name="seq2seq"), eos=258, target_length=20), corpus.splits["train"]
    targets = split.tokens - split.inputs
    long = int((split.inputs > 30).sum()), int((targets > 20).sum())
    assert min(long) > 0
    assert rows.notes(task, split) == [f"cut: {long[0]} inputs are longer than data.sequence_length=30 and {long[1]} targets than data.target_length=20 "
                                       "tokens; what is beyond is left out"]
    plan = rows.plan(task, split, (0, 0))
    batch = rows.fill(task, [pack.row(plan, i) for i in range(len(plan.rows))], corpus, "train", 0)
    assert batch["weights"].sum() == np.minimum(targets, 20).sum() and (batch["encoder_tokens"] == 258).sum() == len(split.tokens)
    assert (batch["targets"] == 258).sum() == len(split.tokens) - long[1]


@pytest.mark.parametrize("line, words", [
    ('{"answer": "b"}', r"line 2: no key 'question'; its keys: 'answer'; set data.input_key"),
    ('{"question": "a", "answer": " "}', r"line 2: 'answer' is empty: each pair needs a target"),
    ('{"question": 3, "answer": "b"}', r"line 2: 'question' is 3, not text"),
])
def test_bad_pairs(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text('{"question": "", "answer": "b"}\n' + line + "\n")
    data = DataConfig(source=(str(tmp_path / "a.jsonl"),), text_key="answer", input_key="question")
    with pytest.raises(ValueError, match=words):
        prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lambda line: None)
    assert not (tmp_path / "data").exists()


def test_pairs_in_other_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pa.table({"question": ["a", "b"], "answer": ["c", "d"]}), tmp_path / "a.parquet")
    data = DataConfig(source=(str(tmp_path / "a.parquet"),), text_key="answer", input_key="question", validation=0, test=0)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lambda line: None)
    assert [corpus.read("train", i).tolist() for i in (0, 1)] == [[97, 258, 99, 258], [98, 258, 100, 258]]
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="a.txt has no fields: data.input_key='question' needs JSON lines, CSV, Parquet, Arrow, datasets or TFDS"):
        prepare.prepare(dataclasses.replace(data, source=(str(tmp_path / "a.txt"),)), TokenizerConfig(kind="bytes"), tmp_path / "other", log=lambda line: None)
    with pytest.raises(ValueError, match="no column 'answr'; .* set data.text_key"):
        prepare.prepare(dataclasses.replace(data, text_key="answr"), TokenizerConfig(kind="bytes"), tmp_path / "other", log=lambda line: None)


def test_pairs_with_one_input_fall_to_one_split(tmp_path):
    import json
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"question": f"q{i % 20}", "answer": f"a{i}"}) + "\n" for i in range(400)))
    data = DataConfig(source=(str(tmp_path / "a.jsonl"),), text_key="answer", input_key="question", validation=0.3, test=0.3)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lambda line: None)
    found = [{bytes(corpus.read(name, i)[:split.inputs[i]].tolist()[:-1]) for i in range(len(split.tokens))} for name, split in corpus.splits.items()]
    assert sum(map(len, found)) == 20 and all(found)


def test_a_pair_is_cleaned_on_each_side(tmp_path):
    import json
    lines = [{"question": "write to a@b.org", "answer": "c@d.org does"}, {"question": "", "answer": "nothing was asked"},
             {"question": "kept", "answer": "\u200b"}, {"question": "{", "answer": "none of this side"}, {"question": "kept", "answer": "kept"}, {"question": "kept", "answer": "kept"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(source=(str(tmp_path / "a.jsonl"),), text_key="answer", input_key="question", validation=0, test=0)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", clean=CleanConfig(pii=("email",), normalise=True),
                             filter=FilterConfig(curly_brackets=1), log=lambda line: None)
    index = corpus.splits["train"]
    sides = [[bytes(part.tolist()).decode() for part in (tokens[:middle - 1], tokens[middle:-1])]
             for tokens, middle in ((corpus.read("train", i), index.inputs[i]) for i in range(len(index.tokens)))]
    assert sides == [["write to <EMAIL>", "<EMAIL> does"], ["", "nothing was asked"], ["kept", "kept"]]
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert {rule: found["documents"] for rule, found in report["removed"].items()} == {"clean.normalise": 1, "filter.curly_brackets": 1, "dedup.exact": 1}
    assert index.text_bytes.tolist() == [len(read) + len(said) for read, said in sides]
    (tmp_path / "a.jsonl").write_text('{"question": "a\\u001eb", "answer": "c"}\n')
    with pytest.raises(ValueError, match="line 1: 'question' holds the character U\\+001E"):
        prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "other", log=lambda line: None)


def test_pairs_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\na,b\n\"c\nd\",e\n")
    data = DataConfig(source=(str(tmp_path / "a.csv"),), text_key="answer", input_key="question", validation=0, test=0)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lambda line: None)
    assert [corpus.read("train", i).tolist() for i in (0, 1)] == [[97, 258, 98, 258], [99, 10, 100, 258, 101, 258]]
