import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxlm import cli
from jaxlm.config import DataConfig, DedupConfig, TokenizerConfig
from jaxlm.data import prepare, shards, tokenizer

BYTES = TokenizerConfig(kind="bytes")


def quiet(line):
    pass


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != prepare.TIMINGS}


def all_texts(corpus):
    tok = tokenizer.load(corpus.folder)
    found = {split: [corpus.read(split, i).tolist() for i in range(len(index.tokens))] for split, index in corpus.splits.items()}
    assert all(ids[0] == tok.bos and ids[-1] == tok.eos for split in found.values() for ids in split)
    return {split: [tok.decode(ids) for ids in documents] for split, documents in found.items()}


def test_every_document_is_there_once_with_its_counts_and_id(corpus, texts):
    found = all_texts(corpus)
    assert sorted(sum(found.values(), [])) == sorted(texts)
    assert all(len(documents) > 3 for documents in found.values())
    assert len(corpus.manifest["splits"]["train"]["shards"]) > 3
    for name, documents in found.items():
        index, entry = corpus.splits[name], corpus.manifest["splits"][name]
        sizes = [len(text.encode()) for text in documents]
        assert index.text_bytes.tolist() == sizes and index.tokens.tolist() == [size + 2 for size in sizes]
        assert (entry["documents"], entry["text_bytes"], entry["tokens"]) == (len(sizes), sum(sizes), sum(sizes) + 2 * len(sizes))
        for i, text in enumerate(documents):
            path, _, line = corpus.document_id(name, i).rpartition(":")
            assert texts[int(line) - 1] == text and path.endswith("texts.jsonl")


def test_a_document_goes_where_its_text_says(corpus, tmp_path, texts, data_config, write_jsonl):
    before = {text: split for split, found in all_texts(corpus).items() for text in found}
    source = write_jsonl(tmp_path / "other.jsonl", ["new", *reversed(texts), texts[5], texts[5]])
    after = all_texts(prepare.prepare(dataclasses.replace(data_config, source=(source,)), BYTES, tmp_path / "data", log=quiet))
    assert all(before[text] == split for split, found in after.items() for text in found if text != "new")
    assert after[before[texts[5]]].count(texts[5]) == 1
    every = prepare.prepare(dataclasses.replace(data_config, source=(source,)), BYTES, tmp_path / "every", dedup=DedupConfig(exact=False), log=quiet)
    assert all_texts(every)[before[texts[5]]].count(texts[5]) == 3
    for text, split in before.items():  # the rule itself: it must never change, or old and new corpora leak into each other
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        assert split == ("test" if share < 0.1 else "validation" if share < 0.2 else "train")


@pytest.mark.parametrize("kind", ["bytes", "unigram"])
def test_the_same_bytes_each_time(tmp_path, data_config, kind):
    cfg = TokenizerConfig(kind=kind, vocab_size=310)
    for name in ("a", "b"):
        prepare.prepare(data_config, cfg, tmp_path / name, log=quiet)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a == b and len(a) > 10
    one_shard = prepare.prepare(dataclasses.replace(data_config, shard_bytes=2**30), cfg, tmp_path / "c", log=quiet)
    assert all_texts(one_shard) == all_texts(shards.open_corpus(tmp_path / "a"))


def test_the_tokenizer_sees_the_training_split_only_and_a_fair_sample(tmp_path, monkeypatch, write_jsonl):
    seen = []
    monkeypatch.setattr(tokenizer, "train", lambda texts, cfg: seen.append(list(texts)) or tokenizer.from_bytes(b'{"kind": "bytes"}'))
    texts = [" ".join(f"word{i * j % 97}" for j in range(i % 50 + 1)) + f" {i}" for i in range(400)]
    data = DataConfig(source=(write_jsonl(tmp_path / "a.jsonl", texts),), validation=0.2, test=0.2)
    share = lambda text: int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    train = [text for text in texts if share(text) >= 0.4]
    prepare.make_tokenizer(data, TokenizerConfig(), tmp_path / "1", log=quiet)
    assert seen[-1] == train and 100 < len(train) < 300
    prepare.make_tokenizer(data, TokenizerConfig(train_bytes=sum(len(text.encode()) for text in train) // 3), tmp_path / "2", log=quiet)
    places = [train.index(text) for text in seen[-1]]
    assert len(places) < len(train) / 2 and places == sorted(places) and min(places) < len(train) / 5 and max(places) > len(train) * 4 / 5


def test_long_documents_take_several_records_and_are_read_in_part(tmp_path, write_jsonl):
    text = "".join(map(str, range(5000)))
    source = write_jsonl(tmp_path / "a.jsonl", ["short", text, "x" * (shards.RECORD_TOKENS - 2), "y" * (shards.RECORD_TOKENS - 1), "end"])
    corpus = prepare.prepare(DataConfig(source=(source,), validation=0, test=0), BYTES, tmp_path / "data", log=quiet)
    assert [shard["records"] for shard in corpus.manifest["splits"]["train"]["shards"]] == [1 + 5 + 1 + 2 + 1]
    whole = corpus.read("train", 1)
    assert bytes(whole[1:-1].tolist()).decode() == text
    record = shards.RECORD_TOKENS
    end = len(whole)
    for start, stop in ((0, 1), (0, record), (record - 1, record + 1), (record, record + 1), (5, 3 * record + 7), (end - 1, end)):
        part = corpus.read("train", 1, start, stop)
        assert part.dtype == np.int32 and part.tolist() == whole[start:stop].tolist()


def test_large_vocabularies_take_four_bytes():
    assert shards.token_dtype(65_536) == np.uint16 and shards.token_dtype(65_537) == np.uint32


def test_blank_documents_are_dropped_and_counted(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "", " \n\t", "b"])
    lines = []
    corpus = prepare.prepare(DataConfig(source=(source,), validation=0, test=0), BYTES, tmp_path / "data", log=lines.append)
    assert all_texts(corpus) == {"train": ["a", "b"], "validation": [], "test": []}
    assert corpus.manifest["empty_documents_dropped"] == 2 and "dropped: 2 empty documents" in "\n".join(lines)
    source = write_jsonl(tmp_path / "b.jsonl", ["", " "])
    for cfg in (BYTES, TokenizerConfig()):
        with pytest.raises(ValueError, match="holds no text: every document is empty"):
            prepare.prepare(DataConfig(source=(source,)), cfg, tmp_path / "none", log=quiet)
    assert not (tmp_path / "none").exists()


def test_nothing_to_train_on(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    for cfg in (BYTES, TokenizerConfig()):
        with pytest.raises(ValueError, match=r"no training document: all 1 fell to validation \(\d\) and test \(\d\)"):
            prepare.prepare(DataConfig(source=(source,), validation=0.5, test=0.4999), cfg, tmp_path / "data", log=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_bad_input_leaves_no_folder(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: 'text' is 3, not text"):
        prepare.prepare(DataConfig(source=(str(tmp_path / "a.jsonl"),)), BYTES, tmp_path / "data", log=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_prepared_folder_is_used_again_or_refused(corpus, data_config, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(corpus.folder, folder)
    lines = []
    again = prepare.prepare(data_config, BYTES, folder, log=lines.append)
    assert again.fingerprint == corpus.fingerprint and lines == [f"using the corpus prepared in {folder}"]
    changed = dataclasses.replace(data_config, validation=0.2, text_key="body", batch_size=64, sequence_length=16)
    with pytest.raises(ValueError, match=r"was prepared from another config \(data.text_key: 'text' -> 'body'; "
                       r"data.validation: 0.1 -> 0.2\): choose another data.dir, or delete it"):
        prepare.prepare(changed, BYTES, folder, log=quiet)
    with pytest.raises(ValueError, match=r"\(tokenizer.kind: 'bytes' -> 'bpe'; tokenizer.vocab_size: 8192 -> 300\)"):
        prepare.prepare(data_config, TokenizerConfig(kind="bpe", vocab_size=300), folder, log=quiet)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    older = {key: value for key, value in manifest["made_from"].items() if key not in ("data.slice_keys", "data.format")}  # of a version without these keys
    assert len(older) == len(manifest["made_from"]) - 2
    manifest["made_from"] = older
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": shards._canonical_sha256(manifest)}))
    prepare.prepare(data_config, BYTES, folder, log=quiet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("precious")
    with pytest.raises(ValueError, match="other is there already and holds no prepared corpus"):
        prepare.prepare(data_config, BYTES, tmp_path / "other", log=quiet)
    assert (tmp_path / "other" / "file").read_text() == "precious"


def test_a_changed_source_is_noted_and_a_missing_one_is_no_error(tmp_path, write_jsonl):
    data = DataConfig(source=(write_jsonl(tmp_path / "a.jsonl", ["a", "b"]),), validation=0, test=0)
    corpus = prepare.prepare(data, BYTES, tmp_path / "data", log=quiet)
    write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c"])
    lines = []
    assert prepare.prepare(data, BYTES, tmp_path / "data", log=lines.append).fingerprint == corpus.fingerprint
    assert "note: the source has changed since then (1 files, 28 bytes -> 1 files, 42 bytes)" in lines[-1]
    (tmp_path / "a.jsonl").unlink()
    prepare.prepare(data, BYTES, tmp_path / "data", log=quiet)


def test_a_tokenizer_from_a_file(tmp_path, data_config):
    first = prepare.prepare(data_config, TokenizerConfig(kind="bpe", vocab_size=300), tmp_path / "a", log=quiet)
    model = tmp_path / "mine.model"
    shutil.copy(first.tokenizer_path, model)
    cfg = TokenizerConfig(path=str(model))
    second = prepare.prepare(data_config, cfg, tmp_path / "b", log=quiet)
    assert second.fingerprint == first.fingerprint and second.vocab_size == 300
    third = prepare.prepare(data_config, TokenizerConfig(kind="bpe", vocab_size=301), tmp_path / "c", log=quiet)
    shutil.copy(third.tokenizer_path, model)
    with pytest.raises(ValueError, match="tokenizer.path: .*mine.model has changed"):
        prepare.prepare(data_config, cfg, tmp_path / "b", log=quiet)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path, write_jsonl):
    data = DataConfig(source=(write_jsonl(tmp_path / "a.jsonl", [str(np.random.default_rng(i).bytes(2000)) for i in range(200)]),))
    code = f"""if True:
        import resource
        from jaxlm.config import DataConfig, TokenizerConfig
        from jaxlm.data import prepare
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            prepare.prepare({data!r}, TokenizerConfig(kind="bytes"), {str(tmp_path / 'data')!r}, log=lambda line: None)
        except OSError as error:
            print(error)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"writing \S+ failed: ", result.stdout) and "File too large" in result.stdout, result
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_verbs(tmp_path, source, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"data": {"source": (source,)}, "tokenizer": {"kind": "bpe", "vocab_size": 400}}
    (tmp_path / "recipe.py").write_text(f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({recipe})\n")

    def jaxlm(*arguments, code=0):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        out, err = capfd.readouterr()
        assert exit.value.code == code, (out, err)
        return out if code == 0 else err

    out = jaxlm("prepare", "--config=recipe.py", "--config.data.test=0.1", "--out=data")
    assert "bytes/token" in out and "next: jaxlm train --config=recipe.py --config.data.test=0.1 --config.data.dir=data" in out
    assert "using the corpus prepared in data" in jaxlm("prepare", "--config=recipe.py", "--config.data.test=0.1", "--config.data.dir=data")
    assert "data was prepared from another config (data.test: 0.1 -> 0.05)" in jaxlm("prepare", "--config=recipe.py", "--out=data", code=2)
    assert "data is whole" in jaxlm("prepare", "--verify", "--out=data")
    assert "data holds" not in jaxlm("prepare", "--verify", "--out=data")
    assert "nothere holds no prepared corpus" in jaxlm("prepare", "--verify", "--out=nothere", code=2)
    assert "--out=FOLDER is needed" in jaxlm("prepare", "--config=recipe.py", code=2)
    assert "--config=... is needed" in jaxlm("prepare", "--out=data", code=2)
    out = jaxlm("tokenizer", "--config=recipe.py", "--config.data.test=0.1", "--out=tok")
    assert (tmp_path / "tok" / "tokenizer.model").read_bytes() == (tmp_path / "data" / "tokenizer.model").read_bytes()
    for model in ("tok", "data", "tok/tokenizer.model"):
        out = jaxlm("tokenizer", f"--model={model}", "--text=the of\n語")
        assert "'\\n'" in out and "'<0x" not in out.split("'\\n'")[0] and "10 bytes" in out and "decodes to the same text" in out
    assert "give --config=... and --out=FOLDER to train" in jaxlm("tokenizer", "--model=tok", code=2)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["tokenizer"]["vocab_size"] == 400 and manifest["splits"]["test"]["documents"] > 0
    assert manifest["source"] == {"files": 1, "bytes": os.path.getsize(source)}


def test_files_that_are_not_read_are_named(tmp_path):
    source = tmp_path / "pile"
    source.mkdir()
    for name in ("a.txt", "b.png", "c.png", "README"):
        (source / name).write_text("Some words. " * 20)
    said = []
    prepare.prepare(DataConfig(source=(str(source),), validation=0.0, test=0.0), TokenizerConfig(kind="bytes"), tmp_path / "out", log=said.append)
    assert "left out: 3 files of kinds that are not read: 2 .png, 1 without a suffix" in said
