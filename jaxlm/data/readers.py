"""One file after another as records: text, JSON lines, CSV, Parquet, Arrow. Whatever cannot be read is named, with its line, in one line.

A fault of one record is yielded, so that the reader can go on; a fault that ends the file is raised. No record is larger than `LONGEST`, so memory is
bounded whatever the file holds. Home of zstandard and pyarrow.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from jaxlm.data import conversations

LONGEST = 64 << 20  # the largest record, in bytes: a line, a page, a cell
PAIR = "\x1e"  # between the input and the target of a pair, which go through preparation as one text (the record separator of ASCII)

_BLOCK = 1 << 20  # bytes read at a time
_PACKED = 4 << 10  # bytes of Zstandard unpacked at a time: 4 may become 128 Ki, so these never more than 128 MiB
_WHOLE = 64 << 10  # the largest text, in bytes, that is one document
_PIECE = (4 << 10, 16 << 10)  # characters of the documents that a larger one is divided into
_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")


class Keys(NamedTuple):
    """Names of the fields (JSON) or columns (tables) to read; "": not asked for."""

    text: str
    id: str = ""
    licence: str = ""
    input: str = ""  # what an encoder reads; `text` is then what the decoder says
    form: str = ""  # chat or preference: the record is one, see conversations.py
    label: str = ""
    fields: tuple[str, ...] = ()  # kept beside a labelled text

    @property
    def names(self) -> list[str]:
        """All that are asked for."""
        return [name for name in (self.text, self.id, self.licence, self.input, self.label, *self.fields) if name]


class Record(NamedTuple):
    """One record of a file, whatever its format."""

    place: int | str  # line, row or piece, counted from 1; a WARC record's address and id
    text: str | bytes  # bytes: an HTML page, or text that is not UTF-8; of a pair the input, `PAIR` and the target
    id: str = ""  # of its own, where the file gives one
    licence: str = ""
    html: bool = False
    label: str = ""  # as JSON; "" where none was asked for
    fields: str = ""  # likewise: an object


class Fault(ValueError):
    """One line about a record, or a file, that cannot be read."""

    def __init__(self, message: str, place: int | str = 0):
        super().__init__(message)
        self.place = place  # of the record; 0: the file


# --- text ---------------------------------------------------------------------------------------------------------------------------------


def text(path: str, keys: Keys) -> Iterator[Record | Fault]:
    """A text file: one document, or, above 64 KiB, documents of 4 to 16 Ki characters, cut at blank lines, none lost.

    UTF-8, or UTF-16 with its byte order mark. Where it is neither, the documents that cannot be decoded stay bytes.
    """
    with opened(path) as (file, _):
        first, rest = file.read(_WHOLE + 1), []
        blocks = itertools.chain([first], iter(lambda: file.read(_BLOCK), b""))
        if len(first) <= _WHOLE:
            characters = "".join(_characters(path, blocks, rest))
            yield Record(1, first if rest else characters)
            return
        number = 0
        for number, piece in enumerate(pieces(_characters(path, blocks, rest)), 1):
            yield Record(number, piece)
        if rest:  # cut as if each byte were a character
            undecoded = (block.decode("latin-1") for block in itertools.chain(rest, _counted(path, blocks, rest[0].count(b"\n"))))
            for number, piece in enumerate(pieces(undecoded), number + 1):
                yield Record(number, _decoded(piece.encode("latin-1")))


def _characters(path: str, blocks: Iterator[bytes], rest: list[bytes]) -> Iterator[str]:
    """Decodes block by block, line ends as they are, without a byte order mark; ends before what is not UTF-8, which goes to `rest`."""
    first = next(blocks)
    wide = first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")()
    line = 0
    for block in itertools.chain([first], blocks, [b""]):
        pending = decoder.getstate()[0]
        try:
            characters = decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            if b"\0" in block:
                raise _binary(path, line + block[:block.index(b"\0")].count(b"\n") + 1) from None
            rest.append(pending + block)
            return
        if "\0" in characters:
            raise _binary(path, line + characters[:characters.index("\0")].count("\n") + 1)
        line += characters.count("\n")
        yield characters


def _counted(path: str, blocks: Iterator[bytes], line: int) -> Iterator[bytes]:
    for block in blocks:
        if b"\0" in block:
            raise _binary(path, line + block[:block.index(b"\0")].count(b"\n") + 1)
        line += block.count(b"\n")
        yield block


def _decoded(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def pieces(blocks: Iterator[str]) -> Iterator[str]:
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


# --- lines --------------------------------------------------------------------------------------------------------------------------------


def json_lines(path: str, keys: Keys) -> Iterator[Record | Fault]:
    """A JSON object a line; blank lines are passed over. A file of chats or preferences may also be one JSON list of objects."""
    if keys.form and (records := _json_list(path)) is not None:
        for number, record in enumerate(records, 1):
            try:
                yield _json_record(f"{path}, item {number}", number, json.dumps(record).encode(), keys)
            except Fault as fault:
                yield fault
        return
    for number, line in _lines(path):
        if isinstance(line, Fault):
            yield line
        elif line.strip():
            try:
                yield _json_record(f"{path}, line {number}", number, line, keys)
            except Fault as fault:
                yield fault


def _json_list(path: str) -> list[Any] | None:
    """The items of a file that is one JSON list; None where it is not."""
    with opened(path) as (file, _):
        data = file.read(_BLOCK)
        if not data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return None
        data += file.read(16 * LONGEST)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Fault(f"{path}: not a JSON list ({error}); at most {16 * LONGEST:,} bytes of one are read: above that write one JSON object a line") from None


def _json_record(where: str, number: int, line: bytes, keys: Keys) -> Record:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(where, number, error) from None
    except (ValueError, RecursionError) as error:
        raise Fault(f"{where}: not JSON ({error}); JSON lines hold one JSON object a line", number) from None
    if not isinstance(record, dict):
        raise Fault(f"{where}: a JSON {type(record).__name__}, but an object with the key {keys.text!r} is needed", number)
    if keys.form:
        try:
            text = conversations.canonical(record, keys.form)
        except ValueError as error:
            raise Fault(f"{where}: {error}", number) from None
        keys = keys._replace(text="")
    for key, option in (*_text_keys(keys), *_label_keys(keys)):
        if key not in record:
            found = ", ".join(map(repr, list(record)[:10])) or "none"
            raise Fault(f"{where}: no key {key!r}; its keys: {found}; set data.{option}", number)
    record = _spoken(record, keys)
    for key, _ in _text_keys(keys):
        if not isinstance(record[key], str):
            raise Fault(f"{where}: {key!r} is {json.dumps(record[key])[:40]}, not text", number)
    text = text if keys.form else joined(where, number, record, keys)
    record_id, licence = _id(where, number, record, keys), record.get(keys.licence) if keys.licence else None
    if b"\\u" in line and not all(map(_encodable, (text, record_id, str(licence)))):
        raise Fault(f"{where}: {keys.text!r} has half of a surrogate pair (\\ud800 to \\udfff), not a character", number)
    return Record(number, text, record_id, "" if licence is None else str(licence), **labelled(record, keys))


def _label_keys(keys: Keys) -> list[tuple[str, str]]:
    return [(keys.label, "label_key")] * bool(keys.label) + [(key, "slice_keys") for key in keys.fields]


def _spoken(record: Mapping[str, Any], keys: Keys) -> Mapping[str, Any]:
    """A labelled text that is given as a list of words, as one text."""
    words = record[keys.text] if keys.label else None
    if isinstance(words, list) and all(isinstance(word, str) and word and not any(map(str.isspace, word)) for word in words):
        return {**record, keys.text: " ".join(words)}
    return record


def labelled(record: Mapping[str, Any], keys: Keys) -> dict[str, str]:
    """Label and fields of a record, as JSON; nothing where no label is asked for."""
    if not keys.label:
        return {}
    plain = lambda value: value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)
    return {"label": json.dumps(plain(record[keys.label]), ensure_ascii=False),
            "fields": json.dumps({key: str(record[key]) for key in keys.fields}, ensure_ascii=False)}


def _text_keys(keys: Keys) -> list[tuple[str, str]]:
    return [(key, option) for key, option in ((keys.text, "text_key"), (keys.input, "input_key")) if key]


def joined(where: str, number: int, values: Mapping[str, Any], keys: Keys) -> str:
    """The text, or a pair as one text. An input may be empty, a target must not."""
    if keys.label and not values[keys.text].strip():
        raise Fault(f"{where}: {keys.text!r} is empty: each label needs a text; take the row out, or set data.on_error=skip", number)
    if not keys.input:
        return values[keys.text]
    for key in (keys.input, keys.text):
        if PAIR in values[key]:
            raise Fault(f"{where}: {key!r} holds the character U+001E, which keeps the two sides of a pair apart: take it out", number)
    if not values[keys.text].strip():
        raise Fault(f"{where}: {keys.text!r} is empty: each pair needs a target", number)
    return f"{values[keys.input]}{PAIR}{values[keys.text]}"


def _id(where: str, number: int, record: Mapping[str, Any], keys: Keys) -> str:
    if not keys.id:
        return ""
    value = record.get(keys.id)
    if value is None or value == "" or isinstance(value, (dict, list, bool)):
        what = "no" if keys.id not in record else "a useless"
        raise Fault(f"{where}: {what} id {keys.id!r}; set data.id_key to a field with text or a number, or to ''", number)
    return str(value)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def table(path: str, keys: Keys) -> Iterator[Record | Fault]:
    """A .csv (RFC 4180: quoted cells may hold commas, line ends and doubled quotes) or .tsv (no quotes: a cell holds no tab and no line end).

    The first row names the columns. A row is known by the line on which it begins.
    """
    csv.field_size_limit(LONGEST)  # of this process: the default, 128 KiB, is smaller than many documents
    row = _Row()
    tabs = ".tsv" in path.lower()[-8:]
    lines = _row_lines(path, row)
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
    names = None
    while True:
        started, row.size, row.fault = row.last + 1, 0, None
        where = f"{path}, line {started}"
        try:
            cells = next(rows)
            if row.fault:
                raise row.fault
            if not cells:
                continue
            if names is None:
                names = _columns(where, cells, keys)
                continue
            if len(cells) != len(names):
                raise Fault(f"{where}: {len(cells)} cells, but the first line names {len(names)} columns", started)
            record = dict(zip(names, cells))
            yield Record(started, joined(where, started, record, keys), _id(where, started, record, keys), record.get(keys.licence, ""), **labelled(record, keys))
        except StopIteration:
            return
        except csv.Error as error:
            if row.last > started:  # what is within a cell and what is not cannot be told any more
                raise Fault(f"{where}: not CSV ({error}); is a quote not closed?") from None
            yield row.fault or Fault(f"{where}: not {'TSV' if tabs else 'CSV'} ({error})", started)
        except Fault as fault:
            if names is None:
                raise
            yield fault


class _Row:
    """What csv.reader has taken for the row that it is at."""

    last, size, fault = 0, 0, None  # the last line's number; bytes; what was wrong with one of the lines


def _row_lines(path: str, row: _Row) -> Iterator[str]:
    """Lines for csv.reader, which asks for more within a quoted cell. A faulty one is empty and noted, so that the rest of its row is passed over with it."""
    for row.last, line in _lines(path):
        if isinstance(line, Fault):
            row.fault = line
            yield ""
            continue
        row.size += len(line)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            row.fault, text = _not_utf8(f"{path}, line {row.last}", row.last, error), ""
        if row.size > LONGEST:
            raise csv.Error(f"a row longer than {LONGEST:,} bytes, the most that one document may have")
        yield text


def _columns(where: str, names: list[str], keys: Keys) -> list[str]:
    for name, option in (*_text_keys(keys), *_label_keys(keys), (keys.id, "id_key"), (keys.licence, "licence_key")):
        if name and names.count(name) != 1:
            raise Fault(f"{where}: {'no' if name not in names else 'more than one'} column {name!r}; its columns: "
                        f"{', '.join(map(repr, names[:20]))}; set data.{option}") from None
    return names


def _lines(path: str) -> Iterator[tuple[int, bytes | Fault]]:
    """The lines with their ends, without a byte order mark; for one that is too long, a Fault."""
    with opened(path) as (file, progress):
        for number in itertools.count(1):
            progress.line = number - 1
            line = file.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                yield number, Fault(f"{path}, line {number}: longer than {LONGEST:,} bytes, the most that one document may have", number)
                while line and not line.endswith(b"\n"):
                    line = file.readline(_BLOCK)
                continue
            if b"\0" in line:
                raise _binary(path, number)
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


# --- columns ------------------------------------------------------------------------------------------------------------------------------


def parquet(path: str, keys: Keys) -> Iterator[Record | Fault]:
    """A row is a document; only the columns asked for are read."""
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    def batches(names):
        with parquet.ParquetFile(path) as file:
            names(file.schema_arrow)
            yield from file.iter_batches(batch_size=256, columns=keys.names)

    return _rows(path, keys, batches, pyarrow, "Parquet")


def arrow(path: str, keys: Keys) -> Iterator[Record | Fault]:
    """An Arrow stream, as Hugging Face `datasets` writes, or an Arrow file. A row is a document."""
    pyarrow = _pyarrow(path)
    from pyarrow import ipc

    def batches(check):
        with pyarrow.memory_map(path) as file:
            magic = file.read(6)
            file.seek(0)
            reader = ipc.open_file(file) if magic == b"ARROW1" else ipc.open_stream(file)
            check(reader.schema)
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if magic == b"ARROW1" else reader:
                batch.validate(full=True)  # offsets of a damaged file point anywhere
                yield batch.select(keys.names)

    return _rows(path, keys, batches, pyarrow, "Arrow")


def _pyarrow(path: str):
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path}: reading it needs pyarrow: pip install 'jaxlm[data]'") from None
    return pyarrow


def _rows(path: str, keys: Keys, batches, pyarrow, kind: str) -> Iterator[Record | Fault]:
    types, row, classes = pyarrow.types, 0, []

    def check(schema) -> None:
        _columns(path, schema.names, keys)
        classes.extend(_class_names(schema.metadata, keys.label))
        for key, _ in _text_keys(keys):
            held = schema.field(key).type
            if keys.label and key == keys.text and types.is_list(held):
                continue
            if not (types.is_string(held) or types.is_large_string(held) or types.is_string_view(held)):
                raise Fault(f"{path}: column {key!r} holds {held}, not text")

    try:
        for batch in batches(check):
            texts = [key for key, _ in _text_keys(keys)]
            columns = {name: (_texts if name in texts else _values)(batch.column(batch.schema.get_field_index(name))) for name in keys.names}
            for at in range(batch.num_rows):
                row += 1
                where = f"{path}, row {row}"
                try:
                    values = _spoken({name: column[at] for name, column in columns.items()}, keys)
                    if classes:
                        values = {**values, keys.label: _called(values[keys.label], classes)}
                    for key in texts:
                        _check_cell(where, row, key, values[key])
                    licence = values.get(keys.licence)
                    yield Record(row, joined(where, row, values, keys), _id(where, row, values, keys), "" if licence is None else str(licence),
                                 **labelled(values, keys))
                except Fault as fault:
                    yield fault
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise Fault(f"{path} cannot be read as {kind} after row {row}: {' '.join(str(error).split())}") from None


def _class_names(metadata: Mapping[bytes, bytes] | None, label: str) -> list[str]:
    """Names of the classes that Hugging Face `datasets` writes beside a column of their numbers (ClassLabel), or of lists of them; none if it is no such."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]
        names = (feature[0] if isinstance(feature, list) else feature.get("feature", feature))["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return []


def _called(value: Any, classes: Sequence[str]) -> Any:
    """The name of a class, or of each in a list, by its number; what is no number of a class is left as it is."""
    if isinstance(value, list):
        return [_called(item, classes) for item in value]
    return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else None if value == -1 else value


def _check_cell(where: str, row: int, key: str, value: str | None | UnicodeDecodeError) -> None:
    if value is None or isinstance(value, UnicodeDecodeError):
        raise Fault(f"{where}: {key!r} is null, not text" if value is None else f"{where}: not UTF-8 ({value.reason})", row)
    if len(value) > LONGEST:
        raise Fault(f"{where}: longer than {LONGEST:,} bytes, the most that one document may have", row)


def _texts(column) -> Sequence[str | None | UnicodeDecodeError]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_text(value) for value in column]


def _values(column) -> list[Any]:
    return column.to_pylist()


def _text(value) -> str | UnicodeDecodeError:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


# --- bytes --------------------------------------------------------------------------------------------------------------------------------


class _Damaged(Exception):
    pass


class _Progress:
    line: int | None = None


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, _Progress]]:
    """A file, decompressed as its name says, and a place to note the line, which the fault of damaged data then names."""
    progress = _Progress()
    name = path.lower()
    after = lambda comma: "" if progress.line is None else f"{comma} after line {progress.line}"
    try:
        with gzip.open(path) if name.endswith(".gz") else io.BufferedReader(_ZstdFile(path), _BLOCK) if name.endswith(".zst") else open(path, "rb") as file:
            yield file, progress
    except EOFError:
        raise Fault(f"{path} ends in the middle of its compressed data{after(',')}: copy it again, whole") from None
    except (zlib.error, gzip.BadGzipFile, _Damaged) as error:
        raise Fault(f"{path} cannot be decompressed{after('')} ({error}): it is damaged or not what its name says") from None


class _ZstdFile(io.RawIOBase):
    """Decompresses frame after frame. Unlike zstandard's own reader it notices when the last frame has no end."""

    def __init__(self, path: str):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: reading .zst needs zstandard: pip install 'jaxlm[data]'") from None
        self._file = open(path, "rb", _BLOCK // 8)
        self._codec, self._error = zstandard.ZstdDecompressor(), zstandard.ZstdError
        self._frame, self._compressed, self._plain = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(_PACKED)
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


def _binary(path: str, line: int) -> Fault:
    return Fault(f"{path}, line {line}: a NUL byte: the file is binary or UTF-16, not UTF-8 text")


def _not_utf8(where: str, number: int, error: UnicodeDecodeError) -> Fault:
    return Fault(f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}); "
                 "convert it, for example with iconv -f latin1 -t utf-8", number)
