import dataclasses
import hashlib
import re
import shutil

import numpy as np
import pytest

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import loader, prepare, rows, shards

TASK, ROWS = rows.Task(64), 16
KEYS = {"tokens", "targets", "weights", "positions", "segments"}


def stream(corpus, start, stop, **changes):
    options = {"batch_size": ROWS, "seed": 5, "threads": 1} | changes
    return list(loader.batches(corpus, "train", TASK, start_step=start, stop_step=stop, **options))


def digest(batches):
    found = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            found.update(np.ascontiguousarray(batch[key]).tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def whole(corpus):
    """Two epochs and a bit."""
    size = loader.epoch_size(corpus, "train", TASK, ROWS)
    return stream(corpus, 0, 2 * size.rows // ROWS + 3)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_any_number_of_hosts_reads_the_same_batches(corpus, whole, hosts):
    share = ROWS // hosts
    parts = [stream(shards.open_corpus(corpus.folder), 0, len(whole), rows=(host * share, (host + 1) * share)) for host in range(hosts)]
    assert all(part[0][1]["tokens"].shape == (share, 64) for part in parts)
    joined = [{key: np.concatenate([batch[key] for _, batch in step]) for key in step[0][1]} for step in zip(*parts)]
    assert digest(joined) == digest([batch for _, batch in whole])


def test_the_stream_stays_what_it_is(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " * (i % 40 + 1) for i in range(200)])
    corpus = prepare.prepare(DataConfig(source=(source,)), TokenizerConfig(kind="bytes"), tmp_path / "data", log=lambda line: None)
    # If this changes, every run that is resumed sees other batches than it would have: change it never, or with the format of the manifest.
    assert digest([batch for _, batch in stream(corpus, 0, 60)])[:16] == "83ff849cedb5cd75"


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_resumed_anywhere_with_any_threads_it_goes_on_the_same(corpus, whole, threads):
    assert [step for step, _ in whole] == list(range(len(whole)))
    for start in (0, 1, 7, len(whole) // 2, len(whole) - 1):
        part = stream(corpus, start, len(whole), threads=threads, prefetch=2)
        assert [step for step, _ in part] == list(range(start, len(whole)))
        assert digest([batch for _, batch in part]) == digest([batch for _, batch in whole[start:]])
    assert stream(corpus, 3, 3) == []


def test_epochs_follow_each_other_without_loss(corpus, whole):
    size = loader.epoch_size(corpus, "train", TASK, ROWS)
    lengths = corpus.splits["train"].tokens
    assert (size.targets, size.rows) == (int(lengths.sum()) - len(lengths), -(-size.targets // 64))
    assert size.padding == size.rows * 64 - size.targets
    assert set(whole[0][1]) == KEYS
    rows = {key: np.concatenate([batch[key] for _, batch in whole]) for key in KEYS}
    expected = np.bincount(np.concatenate([corpus.read("train", i)[1:] for i in range(len(lengths))]), minlength=259)
    epochs = [slice(0, size.rows), slice(size.rows, 2 * size.rows)]
    for epoch in epochs:
        counted = rows["targets"][epoch][rows["weights"][epoch] > 0]
        assert (np.bincount(counted, minlength=259) == expected).all()
    assert (rows["tokens"][epochs[0]] != rows["tokens"][epochs[1]]).any()
    assert digest([dict(batch) for _, batch in stream(corpus, 0, 5, seed=6)]) != digest([batch for _, batch in whole[:5]])


def test_a_split_smaller_than_a_batch_is_refused(corpus):
    rows = loader.epoch_size(corpus, "train", TASK, ROWS).rows
    with pytest.raises(ValueError, match=rf"the train split in .* is smaller than one batch: its \d+ tokens fill {rows} rows of "
                       rf"data.sequence_length=64, data.batch_size={rows + 1} needs more: lower one"):
        stream(corpus, 0, 1, batch_size=rows + 1)
    assert len(stream(corpus, 0, 2, batch_size=rows)) == 2


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_damage_reaches_the_caller_in_its_own_words(corpus, tmp_path, threads):
    folder = shutil.copytree(corpus.folder, tmp_path / "copy")
    damaged = shards.open_corpus(folder)
    for shard in folder.glob("train-*.array_record"):
        data = bytearray(shard.read_bytes())
        data[200] ^= 1
        shard.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        stream(damaged, 0, 1000, threads=threads)
    assert re.fullmatch(r"\S+train-\d+.array_record, record \d+ is damaged \(.*\): check with jaxlm prepare --verify --out=\S+, "
                        "then prepare again", str(caught.value))
    assert "/jaxlm/data/" in caught.traceback[-1].path.as_posix()  # the command line shows one line only for errors that jaxlm raised


def evaluate(corpus, **changes):
    return list(loader.evaluation_batches(corpus, "validation", TASK, **{"batch_size": ROWS, "overlap": 0.5} | changes))


def test_an_evaluation_has_every_target_once_in_batches_of_one_shape(corpus):
    batches = evaluate(corpus)
    assert len(batches) > 2 and all(batch[key].shape == (16, 64) for batch in batches for key in KEYS | {"documents"})
    assert batches[-1]["segments"][-1].sum() == 0, "the last batch should end in padding, or this test shows nothing"
    lengths = corpus.splits["validation"].tokens
    counted = np.concatenate([batch["documents"][batch["weights"] > 0] for batch in batches])
    assert (np.bincount(counted, minlength=len(lengths)) == lengths - 1).all()
    halves = [evaluate(corpus, rows=rows) for rows in ((0, 8), (8, 16))]
    assert digest([{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)]) == digest(batches)


def test_an_evaluation_of_some_documents_takes_them_from_everywhere(corpus):
    total = len(corpus.splits["validation"].tokens)
    found = np.unique(np.concatenate([batch["documents"][batch["weights"] > 0] for batch in evaluate(corpus, limit_documents=5)]))
    assert len(found) == 5 and found[0] == 0 and found[-1] >= total - total // 5 - 1
    assert digest(evaluate(corpus, limit_documents=10 * total)) == digest(evaluate(corpus))


def test_an_empty_split_cannot_be_evaluated(tmp_path, data_config):
    data = dataclasses.replace(data_config, validation=0)
    corpus = prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "data", log=lambda line: None)
    with pytest.raises(ValueError, match="the validation split in .* has no documents: raise data.validation"):
        evaluate(corpus)
