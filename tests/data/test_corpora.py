import gzip
import json
import re

import pytest

from jaxlm.config import DataConfig
from jaxlm.data import corpora, python_docs, readers


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
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(column))), name: pyarrow.array(column, kind)}), path)


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
    assert corpora.size_on_disk(DataConfig(source=(str(tmp_path), "python_docs"))) == {"files": 4, "bytes": 5 + 7 + 23}


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
