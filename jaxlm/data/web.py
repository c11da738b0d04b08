"""Web pages: HTML files, and WARC archives (ISO 28500) of what a crawler was answered. Pages stay bytes here; the worker that cleans them decodes them.

A reader of our own, because an archive of billions of pages always holds broken ones: a damaged record costs itself and is counted, the next is found again.
"""

import codecs
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from jaxlm.data import readers
from jaxlm.data.readers import Fault, Keys, Record

_BLOCK = 128 << 10  # bytes read at a time; many gzip members are in one block, and what is left of it is copied for each
_HEAD = 64 << 10  # the longest head of a record, in bytes
_GZIP = b"\x1f\x8b\x08"
_MARK, _END = b"WARC/1.", b"\r\n\r\n"
_BEGIN = re.compile(rb"\n" + re.escape(_MARK))
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,200}\r?\n")
_HTML = ("text/html", "application/xhtml+xml")
_PLAIN = ("text/plain",)


class Broken(Fault):
    """A record of an archive that cannot be read: never a reason to stop."""


class _Head(NamedTuple):
    first: str  # the line before the fields
    fields: dict[str, str]  # names in lower case


class _Damage(Exception):
    """What is wrong with the record that is being read."""


def page(path: str, keys: Keys) -> Iterator[Record | Fault]:
    """An HTML file as one document."""
    with open(path, "rb") as file:
        data = file.read(readers.LONGEST + 1)
    if len(data) > readers.LONGEST:
        raise Fault(f"{path}: longer than {readers.LONGEST:,} bytes, the most that one document may have")
    if b"\0" in data[:4096] and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Fault(f"{path}: a NUL byte: the file is binary, not HTML")
    yield Record(1, data, html=True)


def warc(path: str, keys: Keys) -> Iterator[Record | Fault]:
    """Answers with status 2xx, resources and conversions (WET) of type text/html or text/plain, packed or not; the id is the address and the record's id.

    A page whose answer names the character set that it is in is decoded here, because the page itself need not name it.

    Yields:
      Broken for each record, or run of them, that is damaged, cut off, too long, or packed in a way that cannot be undone.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == _GZIP[:2]
        file.seek(0)
        source = _Source(_gunzipped(file) if packed else iter(lambda: file.read(_BLOCK), b""))
        number = 0
        while source.seek_record():
            number += 1
            try:
                head, body = _record(source)
                record = _document(number, head, body) if body is not None else None
            except _Damage as damage:
                yield Broken(f"{path}, record {number}: {damage}", number)
                continue
            if record:
                yield record


def _record(source: "_Source") -> tuple[_Head, bytes | None]:
    """The next record; None in place of a body that is not wanted."""
    raw = source.head()
    head = _parse_head(raw)
    length = head.fields.get("content-length", "")
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise source.losing(len(raw), f"Content-Length is {length[:20]!r}, not a number")
    if not _wanted(head):
        source.skip(len(raw) + int(length))
        return head, None
    if int(length) > readers.LONGEST:
        source.skip(len(raw) + int(length))
        raise _Damage(f"{int(length):,} bytes, and the most that one document may have is {readers.LONGEST:,}")
    return head, source.body(len(raw), int(length))


def _wanted(head: _Head) -> bool:
    kind, content = head.fields.get("warc-type", ""), _media(head)
    return kind == "response" and content == "application/http" or kind in ("resource", "conversion") and content in _HTML + _PLAIN


def _document(number: int, head: _Head, body: bytes) -> Record | None:
    media, charset = _media(head), _charset(head)
    if head.fields["warc-type"] == "response":
        raw, mark, body = body.partition(b"\r\n\r\n")
        if not mark or not raw.startswith(b"HTTP/"):
            raise _Damage("no HTTP answer in it")
        answer = _parse_head(raw)
        media, charset = _media(answer), _charset(answer)
        if answer.first.split(" ", 1)[-1][:1] != "2" or media not in _HTML + _PLAIN:
            return None
        body = _unpacked(answer, body)
    name = f"{head.fields.get('warc-target-uri', '').strip('<>')} {head.fields.get('warc-record-id', number)}".strip()
    return Record(number, _text(body, charset, media in _HTML), name, html=media in _HTML)


def _text(body: bytes, charset: str, html: bool) -> str | bytes:
    try:
        return body.decode(charset or "utf-8") if charset or not html else body  # a page says itself what it is in
    except (UnicodeDecodeError, LookupError):
        return body


def _unpacked(answer: _Head, body: bytes) -> bytes:
    if "chunked" in answer.fields.get("transfer-encoding", "").lower():
        body = _joined(body)
    coding = answer.fields.get("content-encoding", "").strip().lower()
    if coding in ("gzip", "x-gzip", "deflate"):
        unzip = zlib.decompressobj(47 if coding != "deflate" or body[:1] == b"\x78" else -15)
        if coding != "deflate" and body[:2] != _GZIP[:2]:
            return body  # unpacked by the crawler
        try:
            plain = unzip.decompress(body, readers.LONGEST)
        except zlib.error as error:
            raise _Damage(f"Content-Encoding {coding}: {error}") from None
        if unzip.unconsumed_tail:
            raise _Damage(f"more than {readers.LONGEST:,} bytes when unpacked, the most that one document may have")
        return plain
    if coding not in ("", "identity") and not _looks_plain(body):
        raise _Damage(f"Content-Encoding {coding[:20]!r} is not known here (gzip and deflate are)")
    return body


def _looks_plain(body: bytes) -> bool:
    return b"<" in body[:1024] and b"\0" not in body[:1024]


def _joined(body: bytes) -> bytes:
    """Undoes chunked transfer (RFC 9112, 7.1); what is not chunked stays as it is: some crawlers undo it and keep the field."""
    parts, position = [], 0
    while match := _CHUNK.match(body, position):
        size = int(match[1], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[match.end():match.end() + size])
        position = match.end() + size + 2
    return b"".join(parts) if parts and position >= len(body) else body


def _parse_head(raw: bytes) -> _Head:
    first, *lines = raw.decode("utf-8", "replace").splitlines()
    fields = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip().lower(), value.strip())
    return _Head(first, fields)


def _media(head: _Head) -> str:
    return head.fields.get("content-type", "").partition(";")[0].strip().lower()


def _charset(head: _Head) -> str:
    match = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", head.fields.get("content-type", ""), re.IGNORECASE)
    try:
        return codecs.lookup(match[1]).name if match else ""
    except LookupError:
        return ""


class _Source:
    """The bytes of an archive, with a way back to the next record after damage. `None` among the blocks stands for damage."""

    def __init__(self, blocks: Iterator[bytes | None]):
        self._blocks, self._buffer, self._lost, self._pending = blocks, bytearray(), False, None

    def seek_record(self) -> bool:
        """Goes to where a record should begin, or, after damage, to where the next one does; False at the end."""
        while True:
            was_lost = self._lost
            try:
                if was_lost:
                    while not (match := _BEGIN.search(self._buffer)):
                        del self._buffer[:-len(_MARK)]
                        if not self._more():
                            return False
                    del self._buffer[:match.end() - len(_MARK)]
                    self._lost = False
                while not self._buffer.strip(b"\r\n"):
                    self._buffer.clear()
                    if not self._more():
                        return False
                del self._buffer[:len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))]
                return True
            except _Damage as damage:
                if not was_lost:  # else it was told of already
                    self._pending = damage
                    return True

    def head(self) -> bytes:
        """The bytes of the record's head, left where they are."""
        if self._pending:
            damage, self._pending = self._pending, None
            raise damage
        self._need(len(_MARK))
        if not self._buffer.startswith(_MARK):
            raise self.losing(0, "no WARC record begins where the one before it ends")
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _HEAD or not self._more():
                break
        if not 0 < end <= _HEAD:
            raise self.losing(len(_MARK), "its head has no end")
        return bytes(self._buffer[:end + 4])

    def body(self, start: int, length: int) -> bytes:
        """Takes the record. Two line ends must follow, or another record, or nothing: else its length is wrong."""
        end = start + length
        self._need(end)
        while len(self._buffer) < end + len(_END) and self._more():
            pass
        if not self._buffer.startswith(_END, end):
            while len(rest := bytes(self._buffer[end:end + 64]).lstrip(b"\r\n")) < len(_MARK) and self._more():
                pass
            if not _MARK.startswith(rest[:len(_MARK)]):
                raise self.losing(start, f"it does not end after Content-Length {length}")
        body = bytes(self._buffer[start:end])
        del self._buffer[:end]
        return body

    def skip(self, count: int) -> None:
        while count > len(self._buffer):
            count -= len(self._buffer)
            self._buffer.clear()
            if not self._more():
                raise _Damage("the file ends in the middle of it")
        del self._buffer[:count]

    def losing(self, count: int, reason: str) -> _Damage:
        """Gives up the record: the next one is looked for `count` bytes after its beginning."""
        self._buffer[:count] = b"\n"  # it may begin right there
        self._lost = True
        return _Damage(reason)

    def _need(self, count: int) -> None:
        while len(self._buffer) < count:
            if not self._more():
                raise self.losing(min(len(_MARK), len(self._buffer)), "the file ends in the middle of it")

    def _more(self) -> bool:
        block = next(self._blocks, b"")
        if block is None:
            self._buffer[:], self._lost = b"\n", True  # a record may begin with the next member
            raise _Damage("its compressed data is damaged or cut off")
        self._buffer += block
        return bool(block)


def _gunzipped(file: BinaryIO) -> Iterator[bytes | None]:
    """The plain bytes of member after member, never an empty block; None for damage, after which it goes on with the next member that can be found."""
    member, data, whole, held = None, b"", True, b""
    while data or (data := file.read(_BLOCK)):
        member = member or zlib.decompressobj(31)
        try:
            plain = member.decompress(data, 4 * _BLOCK)
        except zlib.error:
            if whole:
                yield None
            member, whole, held = None, False, b""  # what is held may be of the same damage
            while (begin := data.find(_GZIP, 1)) < 0 and (more := file.read(_BLOCK)):
                data = b"\0" + data[-2:] + more
            data = data[begin:] if begin >= 0 else b""
            continue
        data = member.unconsumed_tail
        if plain and held:
            yield held
        held = plain or held
        if member.eof:
            data, member = member.unused_data, None
            if held:
                yield held
            whole, held = True, b""
    if held:
        yield held
    if member is not None:
        yield None
