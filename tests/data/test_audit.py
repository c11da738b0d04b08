"""The audit against a log of what the loader really delivered, token by token."""

import collections
import re
import time

import numpy as np
import pytest

from jaxlm.config import ObjectiveConfig
from jaxlm.data import audit, ledger, loader, rows, stream
from jaxlm.data.mixture import Mixture
from tests.data import made

BATCH, LENGTH, SEED = 4, 24, 3
LENGTHS = np.random.default_rng(1).integers(1, 70, 60)  # some with no target, some longer than two rows
LENGTHS[7] = 1
NAMES = ("web", "books")
MIXED = Mixture(weights=(("web", 0.3), ("books", 0.7)))
TASKS = {
    "next_token": rows.Task(LENGTH),
    "best_fit": rows.Task(LENGTH, packing="best_fit"),
    "mixture": rows.Task(LENGTH, mixture=MIXED),
    "best_fit mixture": rows.Task(LENGTH, packing="best_fit", mixture=Mixture(epochs=(("books", 2.5),))),
    "part of the sources": rows.Task(LENGTH, mixture=Mixture(weights=(("books", 1),))),
    "span_corruption": rows.Task(LENGTH, ObjectiveConfig(name="span_corruption"), eos=1, sentinels=np.arange(2, 16, dtype=np.int32), target_length=16),
    "seq2seq": rows.Task(LENGTH, ObjectiveConfig(name="seq2seq"), target_length=16),
}


def name_of(number):
    return NAMES[number % 3 == 0]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    common = {"source": name_of, "licence": lambda number: ("CC-BY-4.0", "", "MIT")[number % 3 - (number == 5)], "sources": NAMES}
    spans = made.corpus(folder / "spans", LENGTHS + 1, framed=True, **common)
    pairs = made.corpus(folder / "pairs", LENGTHS + 1, inputs=[1], **common)
    plain = made.corpus(folder / "plain", LENGTHS, **common)
    return dict.fromkeys(TASKS, plain) | {"span_corruption": spans, "seq2seq": pairs}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("epochs", [0.37, 1, 2.61])
def test_the_audit_is_what_the_loader_delivered(corpora, kind, epochs):
    corpus, task = corpora[kind], TASKS[kind]
    steps = max(1, int(epochs * stream.build(corpus, "train", task).size.rows / BATCH))
    log = [made.documents(batch, len(LENGTHS)).sum(0) for _, batch in loader.batches(corpus, "train", task, batch_size=BATCH, seed=SEED, start_step=0,
                                                                                   stop_step=steps)]
    found = audit.seen(corpus, task, SEED, steps * BATCH)
    np.testing.assert_array_equal(found.tokens, np.sum(log, axis=0))
    for document in range(len(LENGTHS)):
        visits = audit.visits(corpus, task, SEED, steps * BATCH, BATCH, document)
        assert visits == [(step, tokens[document]) for step, tokens in enumerate(log, 1) if tokens[document]]
        assert audit.tokens_of(corpus, task, document) == found.once[document] or kind == "part of the sources"
    if epochs == 1 and task.mixture == Mixture() and stream.build(corpus, "train", task).size.rows % BATCH == 0:
        assert set(found.times[found.once > 0]) == {1.0}
    if epochs == 0.37:
        assert (found.tokens == 0).any()


def test_the_table_adds_up(corpora):
    corpus, task = corpora["mixture"], TASKS["mixture"]
    found = audit.seen(corpus, task, SEED, 100)
    head, *lines = audit.summary(corpus, found).splitlines()
    assert head.split()[0] == "source" and [line.split()[0] for line in lines] == ["web", "books", "all"]
    cells = [[int(cell.replace(",", "")) for cell in line.split()[1:6]] for line in lines]
    np.testing.assert_array_equal(np.sum(cells[:2], axis=0), cells[2])
    for (documents, seen, unseen, none, _), mine in zip(cells, (np.arange(60) % 3 > 0, np.arange(60) % 3 == 0, np.ones(60, bool))):
        assert documents == mine.sum() == seen + unseen + none and seen == (found.tokens[mine] > 0).sum() and none == (LENGTHS[mine] == 1).sum()
    licences = dict(re.findall(r"(MIT|CC-BY-4.0|unknown): (\d+)", lines[2]))
    assert sum(map(int, licences.values())) == cells[2][1] and len(licences) == 3
    most = audit.most_seen(corpus, found, 5)
    assert [times for _, times in most] == sorted(found.times, reverse=True)[:5] and most[0][1] > 1


def test_ids_and_their_neighbours(corpora):
    corpus = corpora["next_token"]
    assert audit.find(corpus, "train/17.txt:1") == ("train", 17) and audit.find(corpus, "test/1.txt:1") == ("test", 1)
    for wrong, near in (("train/170.txt:1", "train/17.txt:1"), ("trian/17.txt:1", "train/17.txt:1"), ("9.txt", "train/9.txt:1")):
        with pytest.raises(ValueError, match=f"has the id {re.escape(repr(wrong))}; near it: .*{re.escape(near)}"):
            audit.find(corpus, wrong)
    with pytest.raises(ValueError, match="no document of .* has the id '§§§'$"):
        audit.find(corpus, "§§§")


def test_the_ledger_knows_its_corpus(tmp_path):
    one = made.corpus(tmp_path / "one", [40, 30, 20], source=name_of, sources=NAMES)
    saved = ledger.entry(one, 5, SEED, BATCH, [{"origin": "hf:x"}])
    assert saved["rows"] == 20 and saved["history"] == [{"origin": "hf:x"}] and saved["manifest"] == one.fingerprint
    assert audit.check(one, saved, rows.Task(LENGTH)) == []
    other = made.corpus(tmp_path / "other", [40, 30, 21], source=name_of, sources=NAMES)
    with pytest.raises(ValueError, match=f"fingerprint {other.fingerprint[:12]}.* is not the corpus .*fingerprint {one.fingerprint[:12]}"):
        audit.check(other, saved, rows.Task(LENGTH))
    with pytest.raises(ValueError, match="an older jaxlm"):
        audit.check(one, {"step": 5, "dir": "", "manifest": one.fingerprint}, rows.Task(LENGTH))
    saved["sources"] = "others"
    assert "other sources" in audit.check(one, saved, rows.Task(LENGTH))[0]
    with pytest.raises(ValueError, match="its mixture is another one"):
        audit.check(one, saved, rows.Task(LENGTH, mixture=MIXED))


def test_history_is_passed_on(tmp_path):
    one = made.corpus(tmp_path / "one", [40])
    first = ledger.entry(one, 5, SEED, BATCH, ledger.inherited("hf:x", None))
    second = ledger.inherited("runs/a", first)
    assert [(entry["origin"], entry.get("rows")) for entry in second] == [("hf:x", None), ("runs/a", 20)] and "history" not in second[1]
    imported = {"step": 0, "dir": "", "manifest": "", "history": [{"origin": "m.gguf"}]}
    assert ledger.inherited("runs/imported", imported) == [{"origin": "m.gguf"}]


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_many_documents_take_seconds(packing):
    """Two million documents; only what the audit asks of a corpus."""
    lengths = np.random.default_rng(0).integers(2, 400, 2_000_000).astype(np.int32)
    split = collections.namedtuple("Split", "tokens sources inputs")(lengths, np.zeros(len(lengths), np.int32), None)
    corpus = collections.namedtuple("Corpus", "splits sources folder")({"train": split}, [""], "")
    begin = time.process_time()
    found = audit.seen(corpus, rows.Task(512, packing=packing), 0, 1_000_000)
    assert found.tokens.sum() <= 512 * 1_000_000 and time.process_time() - begin < 30
