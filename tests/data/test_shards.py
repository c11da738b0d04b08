import json
import random
import re
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from array_record.python import array_record_module

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import prepare, records, shards


@pytest.fixture
def copy(corpus, tmp_path):
    return shutil.copytree(corpus.folder, tmp_path / "copy")


def read_all(corpus):
    return {(split, i): corpus.read(split, i).tolist() for split, index in corpus.splits.items() for i in range(len(index.tokens))}


@pytest.fixture(scope="module")
def tokens(corpus):
    return read_all(corpus)


def flip(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_one_flipped_bit_is_never_other_tokens(corpus, tmp_path, tokens):
    rng, noticed_when_read = random.Random(0), 0
    for n in range(60):
        folder = shutil.copytree(corpus.folder, tmp_path / str(n))
        shard = sorted(folder.glob("*.array_record"))[n % 4]
        size = shard.stat().st_size
        # the file's header, the records, the footer, anywhere
        position = (rng.randrange(128), rng.randrange(size // 4), size - 1 - rng.randrange(200), rng.randrange(size))[n // 4 % 4]
        flip(shard, position, rng.randrange(8))
        try:
            assert read_all(shards.open_corpus(folder)) == tokens, f"silent: byte {position} of {shard.name}"
        except ValueError as error:
            noticed_when_read += 1
            assert re.search(rf"{shard.name}, record \d+ is damaged", str(error)) and "\n" not in str(error)
        with pytest.raises(ValueError, match=f"1 of .* files are missing or damaged: .*{shard.name}"):
            shards.verify(folder)
        shutil.rmtree(folder)
    assert noticed_when_read >= 10  # the rest lies in padding and in copies of the index that are not used


def test_a_flipped_bit_elsewhere_is_noticed_on_opening(corpus, tmp_path, tokens):
    rng = random.Random(1)
    for_people = {"report.json", "report.html", "timings.json"}
    names = [path.name for path in corpus.folder.iterdir() if not path.name.endswith(".array_record") and path.name not in for_people]
    for name in names * 3:
        folder = shutil.copytree(corpus.folder, tmp_path / "flipped")
        flip(folder / name, rng.randrange((folder / name).stat().st_size), rng.randrange(8))
        with pytest.raises(ValueError, match=name):
            opened = shards.open_corpus(folder)
            for split in opened.splits:  # where the documents came from is read when it is asked for
                opened.document_id(split, 0)
        with pytest.raises(ValueError, match=name):
            shards.verify(folder)
        shutil.rmtree(folder)
    indexes = {f"{kind}-{split}.npz" for kind in ("ids", "lengths") for split in prepare.SPLITS}
    assert set(names) == {"manifest.json", "tokenizer.json", "features.json", "dataset_info.json"} | indexes


def test_a_cut_or_missing_shard_is_named(copy):
    shard = copy / "train-00001.array_record"
    data = shard.read_bytes()
    for cut in (1, 1000, len(data)):
        shard.write_bytes(data[:-cut])
        with pytest.raises(ValueError, match=f"{shard} has {len(data) - cut} bytes instead of {len(data)}: it is cut off or damaged"):
            shards.open_corpus(copy)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing"):
        shards.open_corpus(copy)
    with pytest.raises(ValueError, match="train-00001.array_record"):
        shards.verify(copy)


def test_a_shard_cut_off_while_it_is_in_use(copy):
    corpus = shards.open_corpus(copy)
    (copy / "train-00000.array_record").write_bytes(b"")
    with pytest.raises(ValueError, match="train-00000.array_record, record 0 is damaged"):
        corpus.read("train", 0)


@pytest.fixture
def equal(tmp_path, write_jsonl):
    """Documents of one length, two to a shard, so that only what a record says of itself tells them apart."""
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(10, 20)])
    data = DataConfig(source=(source,), validation=0, test=0, shard_bytes=48)
    return prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "equal", log=lambda line: None)


def test_exchanged_shards_are_noticed(equal):
    a, b = equal.folder / "train-00000.array_record", equal.folder / "train-00001.array_record"
    assert a.stat().st_size == b.stat().st_size
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(ValueError, match=r"train-00000.array_record, record 0 is damaged \(it holds another document than"):
        shards.open_corpus(equal.folder).read("train", 0)
    with pytest.raises(ValueError, match="2 of .* files are missing or damaged"):
        shards.verify(equal.folder)


def test_a_record_written_again_with_other_tokens_is_noticed(equal):
    path = str(equal.folder / "train-00000.array_record")
    records = array_record_module.ArrayRecordReader(path).read_all()
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for record in records:
        writer.write(record[:-2] + b"\1\0")
    writer.close()
    with pytest.raises(ValueError, match=r"train-00000.array_record, record 1 is damaged \(its checksum is wrong\)"):
        shards.open_corpus(equal.folder).read("train", 1)


def test_the_tokenizer_of_another_corpus_is_refused(copy, tmp_path, data_config):
    for vocab in (300, 301):
        prepare.prepare(data_config, TokenizerConfig(kind="bpe", vocab_size=vocab), tmp_path / str(vocab), log=lambda line: None)
    shutil.copy(tmp_path / "300" / "tokenizer.model", tmp_path / "301" / "tokenizer.model")
    with pytest.raises(ValueError, match="301/tokenizer.model"):
        shards.open_corpus(tmp_path / "301")
    for name in ("lengths-train.npz", "train-00000.array_record", "manifest.json"):
        mixed = shutil.copytree(tmp_path / "300", tmp_path / f"mixed {name}")
        shutil.copy(copy / name, mixed / name)
        with pytest.raises(ValueError, match=str(mixed)):
            read_all(shards.open_corpus(mixed))


def test_no_manifest_an_old_one_or_no_json(copy, tmp_path):
    with pytest.raises(ValueError, match="holds no prepared corpus .* jaxlm prepare --config=... --out="):
        shards.open_corpus(tmp_path)
    manifest = copy / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format": 0}))
    with pytest.raises(ValueError, match="manifest.json has format 0, this jaxlm reads format 2"):
        shards.open_corpus(copy)
    for broken in ("", "[]", "{}", json.dumps(content)[:-20], json.dumps(content | {"jaxlm": "9.9"})):
        manifest.write_text(broken)
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            shards.open_corpus(copy)


def test_the_fingerprint_is_that_of_the_tokens(corpus, copy, data_config, tmp_path):
    assert shards.open_corpus(copy).fingerprint == corpus.fingerprint
    other = prepare.prepare(data_config, TokenizerConfig(kind="bpe", vocab_size=300), tmp_path / "bpe", log=lambda line: None)
    assert other.fingerprint != corpus.fingerprint


def test_many_threads_read_the_same(corpus, tokens):
    keys = list(tokens) * 5
    random.Random(0).shuffle(keys)
    fresh = shards.open_corpus(corpus.folder)
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda key: fresh.read(*key).tolist() == tokens[key], keys))


def test_more_shards_than_open_files(corpus, tokens, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)
    few = shards.open_corpus(corpus.folder)
    assert read_all(few) == tokens and few._shard.cache_info().currsize == 2


def test_ids_out_of_the_vocabulary_are_our_bug(tmp_path):
    import numpy as np
    writer = shards.ShardWriter(tmp_path, "train", 300, 1000)
    for bad in ([300], [-1], []):
        with pytest.raises(AssertionError):
            writer.add("x", np.array(bad, np.int64), 1)


def test_records_lie_where_the_index_says_whatever_their_size(tmp_path):
    rng, written = random.Random(0), []
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a"), shards._WRITER)
    for size in (1, 65_512, 65_400, 65_536, 3, 200_000, *(rng.choice((20, 300, 3000, 9000)) for _ in range(300))):
        written.append(rng.randbytes(size))
        writer.write(written[-1])
    writer.close()
    begins, sizes = records.places(tmp_path / "a", [zlib.crc32(record) for record in written])
    with open(tmp_path / "a", "rb") as file:
        assert [records.read(file.fileno(), *place) for place in zip(begins, sizes)] == written
    with pytest.raises(OSError, match="a: record 1 is not there as it was written"):
        records.places(tmp_path / "a", [zlib.crc32(record) for record in (written[0], written[0])])
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:500_000])
    with pytest.raises(OSError, match=r"a: \d+ of 306 records were written"):
        records.places(tmp_path / "a", [zlib.crc32(record) for record in written])


@pytest.fixture(scope="module")
def named(tmp_path_factory, write_jsonl):
    """Two named sources, one with licences of its own, and a document of several records."""
    folder = tmp_path_factory.mktemp("named")
    lines = [{"text": f"web {i} " * (i % 7 + 1), "license": "CC0-1.0" if i % 3 else None} for i in range(60)]
    (folder / "web.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    books = write_jsonl(folder / "books.jsonl", [f"book {i} " * (2000 if i == 4 else 3) for i in range(30)])
    source = f"web={folder}/web.jsonl", f"books={books}", f"{folder}/web.jsonl"
    data = DataConfig(source=source, licence_key="license", licences=(("web", "MIT"), ("books", "PD")),
                      validation=0.2, test=0.1, shard_bytes=3000)
    return prepare.prepare(data, TokenizerConfig(kind="bytes"), folder / "data", log=lambda line: None)


def test_each_document_keeps_its_source_and_licence(named):
    assert named.sources == ["web", "books", named.sources[2]]
    for split, index in named.splits.items():
        sums = {name: {"documents": 0, "tokens": 0, "text_bytes": 0, "licences": {}} for name in named.sources}
        for i in range(len(index.tokens)):
            path, _, line = named.document_id(split, i).rpartition(":")
            name = named.sources[index.sources[i]]
            assert path.endswith(f"{name}.jsonl")
            assert named.licence(split, i) == ("PD" if name == "books" else "CC0-1.0" if (int(line) - 1) % 3 else "MIT")
            found = sums[name]
            for key, value in (("documents", 1), ("tokens", int(index.tokens[i])), ("text_bytes", int(index.text_bytes[i]))):
                found[key] += value
            found["licences"][named.licence(split, i)] = found["licences"].get(named.licence(split, i), 0) + 1
        assert named.manifest["splits"][split]["sources"] == sums and sums["web"]["documents"] > 2


def test_tfds_reads_the_folder_without_tensorflow(named):
    code = """
import json, sys
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(sys.argv[1])
found = []
for split in builder.info.splits:
    source = builder.as_data_source(split=split)
    assert len(source) == builder.info.splits[split].num_examples
    for e in source:
        found.append([split, *(int(e[key]) for key in ("document", "start", "text_bytes")), e["id"].decode(), e["source"].decode(),
                      str(e["tokens"].dtype), e["tokens"].tolist()])
assert "tensorflow" not in sys.modules
print(json.dumps(found))
"""
    ran = subprocess.run([sys.executable, "-c", code, str(named.folder)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = []
    for split, index in named.splits.items():
        for i, length in enumerate(index.tokens.tolist()):
            for start in range(0, length, shards.RECORD_TOKENS):
                tokens = named.read(split, i, start, min(start + shards.RECORD_TOKENS, length)).tolist()
                expected.append([split, i, start, int(index.text_bytes[i]), named.document_id(split, i), named.sources[index.sources[i]], "uint16", tokens])
    found = json.loads(ran.stdout)
    assert sorted(found) == sorted(expected) and any(start for _, _, start, *_ in found)
    assert [example for example in found if example[0] == "train"] == [example for example in expected if example[0] == "train"]


def test_a_manifest_of_the_old_format_is_refused_in_one_line(copy):
    manifest = copy / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match="manifest.json has format 1, this jaxlm reads format 2: prepare the corpus again"):
        shards.open_corpus(copy)
