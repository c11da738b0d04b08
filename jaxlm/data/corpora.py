"""Raw text: every readable source as one stream of documents. Whatever cannot be read is named, with its line, in one line."""

import ast
import codecs
import functools
import glob
import gzip
import io
import json
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

PYTHON_DOCS = "python_docs"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

_BLOCK = 1 << 20  # bytes read at a time
_WHOLE = 64 << 10  # the largest .txt, in bytes, that is one document
_PIECE = (4 << 10, 16 << 10)  # characters of the documents that a larger one is divided into
_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")


class Document(NamedTuple):
    id: str  # "path:line", "path:row" or "path:piece", counted from 1; unique in its corpus
    source: str  # the file, or "python_docs"
    text: str | bytes  # bytes: an HTML page, or a text file that is not UTF-8
    licence: str = ""
    html: bool = False


def documents(source: tuple[str, ...], text_key: str) -> Iterator[Document]:
    """Reads all sources in the order given; files of a folder or glob in sorted order, a file that is named twice once.

    Args:
      source: files, folders (searched with their subfolders, hidden names left out) or globs (`**` too) of `SUFFIXES`, or "python_docs".
        A .txt file is one document; one above 64 KiB is divided at blank lines into documents of 4 to 16 Ki characters, none lost.
      text_key: the JSON field or Parquet column that holds the text.

    Raises:
      ValueError: one line that names the file, and the line or row, that cannot be read.
    """
    for name in _expand(source):
        yield from python_docs() if name == PYTHON_DOCS else _read(name, text_key)


def size_on_disk(source: tuple[str, ...]) -> dict[str, int]:
    """Number of files and their bytes; "python_docs" counts as none."""
    paths = [name for name in _expand(source) if name != PYTHON_DOCS]
    return {"files": len(paths), "bytes": sum(os.path.getsize(path) for path in paths)}


def _expand(source: tuple[str, ...]) -> list[str]:
    if not source:
        raise ValueError(f"data.source is empty: name files, folders or globs of {' '.join(SUFFIXES)}, or {PYTHON_DOCS!r}")
    names = []
    for given in source:
        path = os.path.expanduser(given)
        if given == PYTHON_DOCS:
            names.append(given)
        elif os.path.isdir(path):
            found = _walk(path)
            if not found:
                raise ValueError(f"{path} holds no file that ends in {' '.join(SUFFIXES)}")
            names += found
        elif os.path.exists(path):
            if not _readable(path):
                raise ValueError(f"{path} cannot be read as text: its name must end in {' '.join(SUFFIXES)}")
            if os.path.getsize(path) == 0:
                raise ValueError(f"{path} is empty")
            names.append(path)
        elif glob.has_magic(path):
            found = [f for p in sorted(glob.glob(path, recursive=True)) for f in (_walk(p) if os.path.isdir(p) else [p]) if _readable(f)]
            if not found:
                raise ValueError(f"data.source={given!r} matches no file that ends in {' '.join(SUFFIXES)}")
            names += found
        else:
            raise ValueError(f"data.source={given!r} does not exist (working folder: {os.getcwd()})")
    unique = {}
    for name in names:
        unique.setdefault(name if name == PYTHON_DOCS else os.path.realpath(name), name)
    return list(unique.values())


def _walk(folder: str) -> list[str]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".") and _readable(name)]
    return sorted(files)


def _readable(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _read(path: str, text_key: str) -> Iterator[Document]:
    if path.lower().endswith(".txt"):
        texts = enumerate(_pieces(_characters(path)) if os.path.getsize(path) > _WHOLE else ["".join(_characters(path))], 1)
    else:
        texts = (_parquet if path.lower().endswith(".parquet") else _jsonl)(path, text_key)
    for number, text in texts:
        yield Document(f"{path}:{number}", path, text)


def _characters(path: str) -> Iterator[str]:
    """The text of a UTF-8 file, block by block, line ends as they are, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, block = 1, b"more"
    with open(path, "rb") as file:
        while block:
            block = file.read(_BLOCK)
            if b"\0" in block:
                raise ValueError(_binary(path, line + block[:block.index(b"\0")].count(b"\n")))
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(_not_utf8(path, line + error.object.count(b"\n", 0, error.start), error)) from None
            line += block.count(b"\n")


def _pieces(blocks: Iterator[str]) -> Iterator[str]:
    """Divides a long text; together the pieces are the text, and where it is cut depends on nothing but the text."""
    text = ""
    for block in blocks:
        text, position = text + block, 0
        while len(text) - position > _PIECE[1]:
            cut = _cut(text, position + _PIECE[0], position + _PIECE[1])
            yield text[position:cut]
            position = cut
        text = text[position:]
    if text:
        yield text


def _cut(text: str, low: int, high: int) -> int:
    """After the first blank line in `text[low:high]`, else after its last line end, else after its last space, else at `high`."""
    blank = _BLANK_LINES.search(text, low, high)
    if blank:
        return blank.end()
    return text.rfind("\n", low, high) + 1 or text.rfind(" ", low, high) + 1 or high


def _jsonl(path: str, text_key: str) -> Iterator[tuple[int, str]]:
    for number, line in _lines(path):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        if b"\0" in line:
            raise ValueError(_binary(path, number))
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(path, number, error)) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); .jsonl holds one JSON object a line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: a JSON {type(record).__name__}, but an object with the key {text_key!r} is needed")
        if text_key not in record:
            keys = ", ".join(map(repr, list(record)[:10])) or "none"
            raise ValueError(f"{path}, line {number}: no key {text_key!r}; its keys: {keys}; set data.text_key")
        text = record[text_key]
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: {text_key!r} is {json.dumps(text)[:40]}, not text")
        if b"\\u" in line and not _encodable(text):
            raise ValueError(f"{path}, line {number}: {text_key!r} has half of a surrogate pair (\\ud800 to \\udfff), not a character")
        yield number, text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Damaged(Exception):
    pass


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except EOFError:
        raise ValueError(f"{path} ends in the middle of its compressed data, after line {number}: copy it again, whole") from None
    except (zlib.error, gzip.BadGzipFile, _Damaged) as error:
        raise ValueError(f"{path} cannot be decompressed after line {number} ({error}): it is damaged or not what its name says") from None


def _open(path: str) -> BinaryIO:
    name = path.lower()
    if name.endswith(".gz"):
        return gzip.open(path)
    return io.BufferedReader(_ZstdFile(path), _BLOCK) if name.endswith(".zst") else open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Decompresses frame after frame. Unlike zstandard's own reader it notices when the last frame has no end."""

    def __init__(self, path: str):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: reading .zst needs zstandard: pip install 'jaxlm[data]'") from None
        self._file = open(path, "rb")
        self._codec, self._error = zstandard.ZstdDecompressor(), zstandard.ZstdError
        self._frame, self._compressed, self._plain = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(_BLOCK // 8)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._frame = self._frame or self._codec.decompressobj()
            try:
                self._plain = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise _Damaged(str(error)) from None
            self._compressed = self._frame.unused_data
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _parquet(path: str, text_key: str) -> Iterator[tuple[int, str]]:
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow: pip install 'jaxlm[data]'") from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                columns = ", ".join(map(repr, schema.names[:20])) or "none"
                raise ValueError(f"{path}: no column {text_key!r}; its columns: {columns}; set data.text_key")
            kind = schema.field(text_key).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise ValueError(f"{path}: column {text_key!r} holds {kind}, not text")
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if text is None:
                        raise ValueError(f"{path}, row {row}: {text_key!r} is null, not text")
                    yield row, text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {row}: not UTF-8 ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet after row {row}: {' '.join(str(error).split())}") from None


def _binary(path: str, line: int) -> str:
    return f"{path}, line {line}: a NUL byte: the file is binary or UTF-16, not UTF-8 text"


def _not_utf8(path: str, line: int, error: UnicodeDecodeError) -> str:
    return (f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}); "
            "convert it, for example with iconv -f latin1 -t utf-8")


@functools.cache
def python_docs() -> tuple[Document, ...]:
    """The text that every CPython carries: the language reference's help topics and the docstrings of the standard library, about 2.3 MB.

    The docstrings are read from the source files with `ast`; nothing is imported but the topics. One document is a topic, or a module with
    all its docstrings ("name, blank line, docstring", in the order of the source). Sorted; exact duplicates are dropped.

    Raises:
      ValueError: this Python has neither topics nor source files.
    """
    texts = {}
    try:
        from pydoc_data import topics
        texts = {f"topics/{name}": text for name, text in topics.topics.items()}
    except ImportError:
        pass
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not {"site-packages", "dist-packages", "test", "tests", "__pycache__"}.intersection(name.parts):
            texts[name.as_posix()] = _docstrings(path, ".".join(name.with_suffix("").parts).removesuffix(".__init__"))
    seen, found = {""}, []
    for name in sorted(texts):
        text = texts[name].encode("utf-8", "replace").decode()  # a docstring may spell half of a surrogate pair
        if text not in seen:
            seen.add(text)
            found.append(Document(f"{PYTHON_DOCS}:{name}", PYTHON_DOCS, text))
    if not found:
        raise ValueError(f"{PYTHON_DOCS}: this Python has neither pydoc_data nor the standard library's source in {library}: "
                         "name text files in data.source")
    return tuple(found)


def _docstrings(path: Path, module: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, kinds)), key=lambda node: getattr(node, "lineno", 0))
    pairs = [(getattr(node, "name", module), ast.get_docstring(node)) for node in nodes]
    return "\n\n".join(f"{name}\n\n{text}" for name, text in pairs if text)
