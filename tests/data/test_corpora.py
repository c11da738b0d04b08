import dataclasses
import gzip
import json
import os
import random
import re
import tracemalloc

import numpy as np
import pytest

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import corpora, prepare, python_docs, readers


def read(*source, key="text", **options):
    data = DataConfig(source=tuple(map(str, source)), text_key=key, **options)
    return [document for file in corpora.files(data) for document in corpora.read(file, data)]


def texts(*source, key="text", **options):
    return [document.text for document in read(*source, key=key, **options)]


LINES = ["one", "two\nlines \r\n", "", "é 😀 \u2581", "nul \0"]
JSONL = "".join(json.dumps({"text": text, "n": 1}) + "\n\n" for text in LINES).encode()


def write_zst(path, data, frames=1):
    zstandard = pytest.importorskip("zstandard")
    step = -(-len(data) // frames)
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(data[i:i + step]) for i in range(0, len(data), step)))


def write_parquet(path, column, kind=None, name="text"):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": list(range(len(column))), name: pyarrow.array(column, kind)}), path)


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSONL[:50]) + gzip.compress(JSONL[50:]))
    write_zst(tmp_path / "c.jsonl.zst", JSONL, frames=3)
    write_parquet(tmp_path / "d.parquet", LINES)
    (tmp_path / "e.JSONL").write_bytes(b"\xef\xbb\xbf" + JSONL)  # a byte order mark
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.JSONL"):
        assert texts(tmp_path / name) == LINES, name
    (tmp_path / "f.txt").write_bytes(b"\xef\xbb\xbfone \r\n two\n")
    assert texts(tmp_path / "f.txt") == ["one \r\n two\n"]
    assert [document.id for document in read(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:{line}" for line in (1, 3, 5, 7, 9)]


def test_large_text_is_divided_and_nothing_is_lost(tmp_path):
    paragraphs = "".join(("word " * (i % 37) + "é\r\n") * (i % 11) + "\r\n" * (i % 3) for i in range(2000))
    for name, text in {"paragraphs": paragraphs, "one line": "some words " * 300_000, "no spaces": "語" * 200_000, "blank": "\n" * 200_000,
                       "late": "x" * 3_000_000 + "\n\n" + "tail"}.items():
        (tmp_path / "big.txt").write_text(text, newline="")
        pieces = read(tmp_path / "big.txt")
        assert "".join(piece.text for piece in pieces) == text, name
        assert all(4096 <= len(piece.text) <= 16384 for piece in pieces[:-1]), name
        assert len({piece.id for piece in pieces}) == len(pieces) > 5
        if name == "paragraphs":
            assert sum(piece.text.endswith("\r\n\r\n") for piece in pieces[:-1]) > 0.9 * len(pieces)
        if name == "one line":
            assert all(piece.text.endswith(" ") for piece in pieces[:-1])
    (tmp_path / "small.txt").write_text("a\n\nb\n" * 13_000)  # 65,000 bytes: one document
    assert len(read(tmp_path / "small.txt")) == 1


def test_pieces_do_not_depend_on_the_blocks_they_are_read_in():
    text = "".join("line of text\n" * (i % 700) + "\n \n\n" for i in range(60))
    whole = list(readers.pieces(iter([text])))
    assert list(readers.pieces(text[i:i + 997] for i in range(0, len(text), 997))) == whole


def test_folders_globs_and_files_named_twice(tmp_path, monkeypatch):
    for name in ("b/x.txt", "a.txt", "b/c/y.jsonl", "b/readme.md", ".hidden/z.txt", "b/.z.txt", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.txt" else '{"text": "%s"}' % name if name.endswith("jsonl") else name)
    assert texts(tmp_path) == ["a.txt", "b/c/y.jsonl", "b/x.txt", ""]
    assert texts(tmp_path / "*") == ["a.txt", "b/c/y.jsonl", "b/x.txt", ""]
    assert texts(tmp_path / "**/*.txt") == ["a.txt", "b/x.txt", ""]
    assert texts(tmp_path / "b/x.txt", tmp_path) == ["b/x.txt", "a.txt", "b/c/y.jsonl", ""]
    monkeypatch.chdir(tmp_path)
    assert [document.id for document in read("a.txt", "./a.txt", "b")] == ["a.txt:1", "b/c/y.jsonl:1", "b/x.txt:1"]


HALF = '{"text": "\\ud800"}'


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", None, "data.source='{path}' does not exist"),
    ("a*.txt", None, "data.source='{path}' matches no file that ends in .txt"),
    ("a.pdf", b"x", "{path} cannot be read as text: its name must end in .txt .jsonl"),
    ("a.txt", b"", "{path} is empty"),
    ("a.txt", b"one\ntwo\0\n", "{path}, line 2: a NUL byte"),
    ("a.txt", b"a\n" * 50_000 + b"\0", "{path}, line 50001: a NUL byte"),
    ("a.txt", "text".encode("utf-16-le"), "{path}, line 1: a NUL byte: the file is binary or UTF-16"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "{path}, line 2: not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "{path}, line 3: not JSON"),
    ("a.jsonl", b"[" * 100_000, "{path}, line 1: not JSON"),
    ("a.jsonl", b'["text"]', "{path}, line 1: a JSON list, but an object with the key 'text' is needed"),
    ("a.jsonl", b'{"body": "a", "id": 1}', "{path}, line 1: no key 'text'; its keys: 'body', 'id'; set data.text_key"),
    ("a.jsonl", b'{"text": null}', "{path}, line 1: 'text' is null, not text"),
    ("a.jsonl", HALF.encode(), "{path}, line 1: 'text' has half of a surrogate pair"),
    ("a.jsonl", b"\x89PNG\0\0", "{path}, line 1: a NUL byte"),
    ("a.jsonl.gz", JSONL, "{path} cannot be decompressed after line 0"),
    ("a.jsonl.gz", gzip.compress(JSONL * 9000)[:-2000], "{path} ends in the middle of its compressed data, after line"),
    ("a.jsonl.gz", gzip.compress(JSONL)[:30] + b"\xff\xff\xff" + gzip.compress(JSONL)[33:], "{path} cannot be decompressed after line"),
    ("a.jsonl.zst", JSONL, "{path} cannot be decompressed after line 0"),
    ("a.parquet", JSONL, "{path} cannot be read as Parquet after row 0"),
])
def test_bad_input_is_named_in_one_line(tmp_path, name, data, message):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_half_a_zst_file_is_noticed(tmp_path):
    for frames in (1, 2):
        write_zst(tmp_path / "a.jsonl.zst", JSONL * 9000, frames)
        data = (tmp_path / "a.jsonl.zst").read_bytes()
        (tmp_path / "a.jsonl.zst").write_bytes(data[:-5])
        with pytest.raises(ValueError, match="a.jsonl.zst ends in the middle of its compressed data, after line"):
            read(tmp_path / "a.jsonl.zst")


def test_bad_parquet_columns_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x"], name="body")
    with pytest.raises(ValueError, match="no column 'text'; its columns: 'id', 'body'; set data.text_key"):
        read(path)
    assert texts(path, key="body") == ["x"]
    with pytest.raises(ValueError, match="column 'id' holds int64, not text"):
        read(path, key="id")
    write_parquet(path, ["x", None])
    with pytest.raises(ValueError, match="row 2: 'text' is null"):
        read(path)


def test_a_folder_without_text_and_no_source_at_all(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ValueError, match="holds no file that ends in .txt"):
        read(tmp_path)
    with pytest.raises(ValueError, match="data.source is empty"):
        read()


def test_a_missing_extra_is_one_line(tmp_path, monkeypatch):
    for name, package in (("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")):
        (tmp_path / name).write_bytes(b"x")
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ValueError, match=re.escape(f"needs {package}: pip install 'jaxlm[data]'")):
            read(tmp_path / name)


def test_python_docs():
    found = python_docs.texts()
    assert 1.5e6 < sum(len(text.encode()) for _, text in found) < 4e6
    by_id = dict(found)
    assert len(set(by_id.values())) == len(by_id) == len(found) and list(by_id) == sorted(by_id)
    assert [document.id for document in read("python_docs")] == [f"python_docs:{name}" for name in by_id]
    assert by_id["json/decoder.py"].startswith(
        "json.decoder\n\nImplementation of JSONDecoder\n\nJSONDecodeError\n\nSubclass of ValueError")
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in by_id)


def test_python_docs_without_topics_and_with_files_that_do_not_parse(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text(
        '"""First."""\ndef f():\n  """Second."""\n  def g():\n    """Third \\udc80."""\nclass C:\n  """Fourth."""\n')
    (tmp_path / "copy.py").write_text('"""Same."""')
    (tmp_path / "bad.py").write_text("def (")
    (tmp_path / "binary.py").write_bytes(b"\0\xff")
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data", None)
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    found = python_docs.texts.__wrapped__()
    assert [text for _, text in found] == ["copy\n\nSame.", "good\n\nFirst.\n\nf\n\nSecond.\n\ng\n\nThird ?.\n\nC\n\nFourth."]
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(ValueError, match="has neither pydoc_data nor the standard library's source"):
        python_docs.texts.__wrapped__()


# --- tables -------------------------------------------------------------------------------------------------------------------------------


def test_csv_with_quotes_commas_line_ends_and_long_cells(tmp_path):
    cells = ["one", 'a "quoted", cell', "two\nlines\r\n\r\nand more", "", "é 😀", "x" * 300_000]
    quoted = "".join('{},"{}"\r\n'.format(i, cell.replace('"', '""')) for i, cell in enumerate(cells))
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + ("id,text\r\n" + quoted + "\r\n9,last").encode())
    found = read(tmp_path / "a.csv")
    assert [document.text for document in found] == cells + ["last"]
    assert [document.id.rpartition(":")[2] for document in found] == ["2", "3", "4", "8", "9", "10", "12"]
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert texts(tmp_path / "b.csv.gz") == cells + ["last"]
    (tmp_path / "c.tsv").write_text('n\ttext\n1\t"half a quote, no end\n2\tb "c" d\n')
    assert texts(tmp_path / "c.tsv") == ['"half a quote, no end', 'b "c" d']


@pytest.mark.parametrize("name, data, message", [
    ("a.csv", b"id,body\n1,x\n", "a.csv, line 1: no column 'text'; its columns: 'id', 'body'; set data.text_key"),
    ("a.csv", b"text,text\n1,x\n", "a.csv, line 1: more than one column 'text'"),
    ("a.csv", b"id,text\n1,x\n2\n", "a.csv, line 3: 1 cells, but the first line names 2 columns"),
    ("a.csv", b'text\nfine\n"never closed\nx\n', "a.csv, line 3: not CSV (unexpected end of data); is a quote not closed?"),
    ("a.csv", b'text\n"a" b\n', "a.csv, line 2: not CSV"),
    ("a.csv", b"text\nx\ncaf\xe9\n", "a.csv, line 3: not UTF-8 (byte 0xe9"),
    ("a.csv", b"text\nx\n\0\n", "a.csv, line 3: a NUL byte"),
    ("a.csv.gz", gzip.compress(b"text\n" + b"word\n" * 90_000)[:-50], "a.csv.gz ends in the middle of its compressed data, after line"),
    ("a.tsv", b"text\tb\nx\n", "a.tsv, line 2: 1 cells"),
    ("a.html", b"\x89PNG\0\0", "a.html: a NUL byte: the file is binary, not HTML"),
    ("a.arrow", b"no arrow file", "a.arrow cannot be read as Arrow after row 0"),
    ("a.json", b'[{"text": "x"}]', "a.json, line 1: a JSON list, but an object with the key 'text' is needed"),
    ("a.txt.gz", gzip.compress(b"text\n" * 90_000)[:-50], "a.txt.gz ends in the middle of its compressed data: copy it again"),
])
def test_bad_tables_and_pages_are_named_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert read(tmp_path / name, on_error="skip")[-1].reason.startswith(str(tmp_path / name))


# --- text in other encodings ----------------------------------------------------------------------------------------------------------------


def test_text_that_is_not_utf8_stays_bytes_where_it_must(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert texts(tmp_path / "a.txt") == ["café".encode("latin-1")]
    plain, accents = "plain words and more of them.\n\n" * 60_000, "déjà vu, où ça.\n\n" * 2_000
    data = (plain + accents).encode("latin-1")
    (tmp_path / "b.txt").write_bytes(data)
    found = texts(tmp_path / "b.txt")
    assert b"".join(text if isinstance(text, bytes) else text.encode() for text in found) == data
    assert all(isinstance(text, bytes) == (b"\xe9" in (text if isinstance(text, bytes) else text.encode())) for text in found)
    (tmp_path / "c.txt").write_bytes((plain + accents).encode())
    (tmp_path / "d.txt").write_bytes((plain + accents).encode("utf-16"))
    assert texts(tmp_path / "d.txt") == texts(tmp_path / "c.txt") and "".join(texts(tmp_path / "c.txt")) == plain + accents
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress((tmp_path / "c.txt").read_bytes()))
    assert texts(tmp_path / "e.txt.gz") == texts(tmp_path / "c.txt")
    (tmp_path / "f.txt").write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=f"f.txt, line {data.count(10) + 1}: a NUL byte"):
        read(tmp_path / "f.txt")


# --- names, ids, licences, what is left out --------------------------------------------------------------------------------------------------


def test_sources_have_names_and_licences(tmp_path, monkeypatch):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text('{"text": "a", "license": "MIT"}\n{"text": "b", "license": null}\n{"text": "c"}\n')
    (tmp_path / "x=y.txt").write_text("d")
    (tmp_path / "e.html").write_bytes(b"<p>\xe9")
    found = read(f"web={tmp_path}/web", tmp_path / "x=y.txt", f"pages={tmp_path}/*.html", f"again={tmp_path}/web/a.jsonl",
                 licence_key="license", licences=(("web", "CC0"), ("pages", "CC-BY")))
    name = str(tmp_path / "x=y.txt")
    assert [(d.source, d.text, d.licence, d.html) for d in found] == [
        ("web", "a", "MIT", False), ("web", "b", "CC0", False), ("web", "c", "CC0", False), (name, "d", "", False), ("pages", b"<p>\xe9", "CC-BY", True)]
    (tmp_path / "lang=en").mkdir()
    (tmp_path / "lang=en" / "a.txt").write_text("f")
    monkeypatch.chdir(tmp_path)
    assert [(d.source, d.text) for d in read("lang=en", "lang=e[n]/*.txt", "x=y.txt")] == [("lang=en", "f"), ("x=y.txt", "d")]
    data = DataConfig(source=(f"web={tmp_path}/web", f"{tmp_path}/e.html"))
    assert corpora.sources(data) == ("web", f"{tmp_path}/e.html")
    assert [(file.source, file.size) for file in corpora.files(data)] == [("web", 77), (f"{tmp_path}/e.html", 4)]
    with pytest.raises(ValueError, match="data.licences names the source 'wbe', which data.source does not have: did you mean 'web'"):
        read(f"web={tmp_path}/web", licences=(("wbe", "CC0"),))


def test_ids_of_their_own_and_an_id_that_is_there_twice(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": "x"}\n{"text": "b", "id": 7}\n')
    (tmp_path / "b.csv").write_text("id,text\ny,c\n\nx,d\n")
    write_parquet(tmp_path / "c.parquet", ["e", "f"])
    assert [document.id for document in read(tmp_path, id_key="id")] == ["x", "7", "y", "x", "0", "1"]
    data = DataConfig(source=(str(tmp_path),), id_key="id")
    hashes = np.array([corpora.id_hash(document.id) for document in corpora.documents(data)], np.uint64)
    message = f"two documents have the id 'x': {tmp_path}/a.jsonl:1 and {tmp_path}/b.csv:4; the values of data.id_key='id' must differ"
    with pytest.raises(ValueError, match=re.escape(message)):
        corpora.check_ids(hashes, data)
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "out", log=lambda line: None)
    corpora.check_ids(np.unique(hashes), data)
    corpora.check_ids(np.append(hashes[[0, 1, 2]], hashes[0]), DataConfig(source=(f"{tmp_path}/a.jsonl",), id_key="id"))  # equal hashes of different ids
    for line in ('{"text": "a"}', '{"text": "a", "id": null}', '{"text": "a", "id": ["x"]}'):
        (tmp_path / "d.jsonl").write_text(line)
        with pytest.raises(ValueError, match="d.jsonl, line 1: (no|a useless) id 'id'; set data.id_key"):
            read(tmp_path / "d.jsonl", id_key="id")
    with pytest.raises(ValueError, match="c.parquet: no column 'name'; its columns: 'id', 'text'; set data.id_key"):
        read(tmp_path / "c.parquet", id_key="name")


def test_what_is_left_out_of_folders_is_counted(tmp_path):
    for name in ("a.txt", "b.pdf", "c/d.PDF", "c/e.json", "c/f.jsonl", ".g/h.pdf", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    data = DataConfig(source=(f"mine={tmp_path}",))
    assert [file.path.rpartition("/")[2] for file in corpora.files(data)] == ["a.txt", "f.jsonl"]
    assert corpora.left_out(data) == {".pdf": 2, ".json": 1, "": 1}
    assert texts(tmp_path / "c/e.json") == texts(tmp_path / "c/*.json") == ["x"]


def test_skip_goes_on_after_what_cannot_be_read_and_stop_does_not(tmp_path):
    lines = [b'{"text": "a"}', b"no json", b'{"text": 1}', b'{"text": "caf\xe9"}', b'{"text": "b"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\x7fELF\0")
    write_parquet(tmp_path / "c.parquet", ["c", None, "d"])
    write_parquet(tmp_path / "d.parquet", ["x"], name="body")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "e"}\n' * 90_000)[:-40])
    (tmp_path / "f.csv").write_text('text\nf\n"g" h\ni,j\nk\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: not JSON"):
        read(tmp_path)
    found = read(tmp_path, on_error="skip")
    assert [d.text for d in found if isinstance(d, corpora.Document) and d.text != "e"] == ["a", "b", "c", "d", "f", "k"]
    assert sum(isinstance(d, corpora.Document) and d.text == "e" for d in found) > 80_000
    skipped = [d for d in found if isinstance(d, corpora.Skipped)]
    assert [d.id.rpartition("/")[2] for d in skipped] == [
        "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "b.txt", "c.parquet:2", "d.parquet", "e.jsonl.gz", "f.csv:3", "f.csv:4"]
    assert all(d.source == str(tmp_path) and "\n" not in d.reason and d.id.split(":")[0] in d.reason for d in skipped)


def test_a_file_that_is_gone_or_must_not_be_read_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    data = DataConfig(source=(str(tmp_path),))
    file, = corpora.files(data)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match="a.jsonl cannot be read: No such file or directory"):
        list(corpora.read(file, data))
    skipped, = corpora.read(file, dataclasses.replace(data, on_error="skip"))
    assert skipped.reason.endswith("a.jsonl cannot be read: No such file or directory")


# --- what does not fit in memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.html"])
def test_two_gigabytes_in_one_line_are_refused_in_bounded_memory(tmp_path, name):
    path, begin = tmp_path / name, b"text\nfine\n" if "csv" in name else b'{"text": "fine"}\n'
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(begin) + gzip.compress(b"x" * (1 << 24)) * 128)
    else:
        path.write_bytes(begin)
        os.truncate(path, 2 << 30)  # takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{name}(, line {begin.count(10) + 1})?: longer than 67,108,864 bytes, the most that one document may have"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * readers.LONGEST
    finally:
        tracemalloc.stop()


def test_after_a_line_that_is_too_long_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 1000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (5, 987, 988, 5_000_000, 7)))
    (tmp_path / "b.csv").write_text('text\n"' + "many\n" * 500 + '"\nshort\n' + "y" * 2000 + "\nlast\n")
    write_parquet(tmp_path / "c.parquet", ["x" * 2000, "z"])
    found = read(tmp_path, on_error="skip")
    assert [len(d.text) if isinstance(d, corpora.Document) else d.id[-3:] for d in found][:5] == [5, 987, "l:3", "l:4", 7]
    assert [d.text for d in found if isinstance(d, corpora.Document)][-2:] == ["xxxxxxx", "z"]
    assert "b.csv, line 2: not CSV (a row longer than 1,000 bytes, the most that one document may have); is a quote" in found[-3].reason
    (tmp_path / "b.csv").write_text("a,b,c,text\n" + ",".join(['"' + "many\n" * 50 + '"'] * 3) + ',x\n1,2,3,next\n"caf\n')
    with open(tmp_path / "b.csv", "ab") as file:
        file.write(b'\xe9\n",2,3,bad\n1,2,3,after\n')
    found = read(tmp_path / "b.csv", on_error="skip")
    assert [d.text if isinstance(d, corpora.Document) else d.id.split(":")[1] for d in found] == ["x", "next", "155", "after"]


# --- Hugging Face datasets --------------------------------------------------------------------------------------------------------------------


def save_to_disk(folder, *parts, splits=None):
    """As `datasets` does: an Arrow stream for each part, and state.json (folders of datasets 5.2 itself were read with the same code)."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, column in zip(names, parts):
        table = pyarrow.table({"text": column, "n": list(range(len(column)))})
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")


def test_folders_of_hugging_face_datasets(tmp_path):
    save_to_disk(tmp_path / "one", ["a", "b", "c"], ["d"])
    (tmp_path / "one" / "cache-123.arrow").write_bytes(b"not listed, not read")
    assert [d.id for d in read(f"hf={tmp_path}/one")] == [f"{tmp_path}/one/data-0000{i}-of-00002.arrow:{row}" for i, row in ((0, 1), (0, 2), (0, 3), (1, 1))]
    assert texts(tmp_path / "one") == texts(tmp_path) == ["a", "b", "c", "d"]
    save_to_disk(tmp_path / "two" / "train", ["e"])
    save_to_disk(tmp_path / "two" / "test", ["f"])
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts(tmp_path / "two") == ["e"] and texts(tmp_path / "two" / "test") == ["f"] and texts(tmp_path) == ["a", "b", "c", "d", "e"]
    with pytest.raises(ValueError, match="no column 'body'; its columns: 'text', 'n'; set data.text_key"):
        texts(tmp_path / "two", key="body")
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/two has no split 'train'; name one of its splits: {tmp_path}/two/test")):
        texts(tmp_path / "two")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="data-00001-of-00002.arrow is missing, which .*state.json lists"):
        texts(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="one/state.json does not describe a data set as datasets' save_to_disk writes it"):
        texts(tmp_path / "one")


def test_damaged_arrow_files_are_one_line(tmp_path):
    save_to_disk(tmp_path / "one", ["word " * 50, "b", "c" * 999] * 20)
    path = tmp_path / "one" / "data-00000-of-00001.arrow"
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(data[:rng.randrange(len(data))] if rng.random() < 0.3 else data)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256) if damaged else 0
        path.write_bytes(damaged)
        try:
            texts(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
