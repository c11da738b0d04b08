import gzip
import random
import re
import zlib

import pytest

from jaxlm.config import DataConfig
from jaxlm.data import corpora, readers


def answer(i, body=None, *, media="text/html", fields="", status="200 OK"):
    body = f"<html><body>page {i} {'word ' * (i % 60)}</body></html>".encode() if body is None else body
    http = f"HTTP/1.1 {status}\r\nContent-Type: {media}\r\n{fields}\r\n".encode() + body
    return record(i, http, "response", "application/http; msgtype=response")


def record(i, content, kind, media):
    head = (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://a.org/{i}\r\nWARC-Record-ID: <urn:uuid:{i}>\r\n"
            f"Content-Type: {media}\r\nContent-Length: {len(content)}")
    return head.encode() + b"\r\n\r\n" + content + b"\r\n\r\n"


def read(path, data=None):
    if data is not None:
        path.write_bytes(data)
    cfg = DataConfig(source=(str(path),))
    found = list(corpora.read(*corpora.files(cfg), cfg))
    return [d for d in found if isinstance(d, corpora.Document)], [d.reason for d in found if isinstance(d, corpora.Skipped)]


RECORDS = [answer(i) for i in range(200)]
ZIPPED = b"".join(map(gzip.compress, RECORDS))


def test_plain_and_packed_archives_give_the_same_pages(tmp_path):
    plain, skipped = read(tmp_path / "a.warc", b"".join(RECORDS))
    assert skipped == [] and len(plain) == 200
    page = b"<html><body>page 7 " + b"word " * 7 + b"</body></html>"
    assert plain[7] == corpora.Document("http://a.org/7 <urn:uuid:7>", str(tmp_path / "a.warc"), page, "", True)
    for data in (ZIPPED, gzip.compress(b"".join(RECORDS)), b"".join(RECORDS)):
        pages, skipped = read(tmp_path / "b.warc.gz", data)
        assert skipped == [] and [page[2:] for page in pages] == [page[2:] for page in plain]


def test_what_is_a_page_and_what_is_not(tmp_path):
    pages, skipped = read(tmp_path / "a.warc", b"".join([
        record(0, b"software: x\r\n", "warcinfo", "application/warc-fields"),
        record(1, b"GET / HTTP/1.1\r\n\r\n", "request", "application/http; msgtype=request"),
        answer(2, b"gone", status="404 Not Found"), answer(3, b"\x89PNG", media="image/png"),
        answer(4, "caf\xe9".encode("latin-1"), media="text/plain; charset=ISO-8859-1"), answer(5, "é".encode(), media="text/plain"),
        answer(6, "<p>é".encode("cp1251", "replace"), media='text/html; charset="windows-1251"'), answer(7, b"<p>\xe9", media="text/html; charset=utf-8"),
        record(8, "WET é".encode(), "conversion", "text/plain"), record(9, b"<p>x", "resource", "text/html"),
        answer(10, gzip.compress(b"<p>zip"), fields="Content-Encoding: gzip\r\n"), answer(11, b"<p>unzipped", fields="Content-Encoding: gzip\r\n"),
        answer(12, zlib.compress(b"<p>deflate"), fields="Content-Encoding: deflate\r\n"),
        answer(13, b"4\r\n<p>c\r\n3;x=y\r\nhun\r\n0\r\n\r\n", fields="Transfer-Encoding: chunked\r\n"),
        answer(14, b"<p>not chunked", fields="Transfer-Encoding: chunked\r\n"), answer(15, b"<p>x", media="application/xhtml+xml"),
        answer(16, b"WARC/1.0 is a format", media="text/plain"),
    ]))
    assert skipped == []
    assert {int(page.id.split("/")[3].split()[0]): (page.text, page.html) for page in pages} == {
        4: ("café", False), 5: ("é", False), 6: ("<p>?", True), 7: (b"<p>\xe9", True), 8: ("WET é", False), 9: (b"<p>x", True), 10: (b"<p>zip", True),
        11: (b"<p>unzipped", True),
        12: (b"<p>deflate", True), 13: (b"<p>chun", True), 14: (b"<p>not chunked", True), 15: (b"<p>x", True), 16: ("WARC/1.0 is a format", False)}


def bad_length(data, length):
    return re.sub(rb"Content-Length: \d+", b"Content-Length: " + length, data, count=1)


@pytest.mark.parametrize("broken, reason", [
    (bad_length(answer(500), b"many"), "Content-Length is 'many', not a number"),
    (bad_length(answer(500), b"20"), "it does not end after Content-Length 20"),
    (bad_length(answer(500), b"150"), "it does not end after Content-Length 150"),
    (bad_length(answer(500), b"99999999999"), "99,999,999,999 bytes, and the most that one document may have"),
    (b"garbage\r\n" * 50, "no WARC record begins where the one before it ends"),
    (b"WARC/1.0\r\nWARC-Type: response\r\n" + b"x" * 100_000 + b"\r\n\r\n", "its head has no end"),
    (record(500, b"no http", "response", "application/http"), "no HTTP answer in it"),
    (answer(500, b"\x1f\x8b\x08nozip", fields="Content-Encoding: gzip\r\n"), "Content-Encoding gzip: Error"),
    (answer(500, b"\0\1\2", fields="Content-Encoding: br\r\n"), "Content-Encoding 'br' is not known here"),
])
def test_a_broken_record_costs_itself_and_is_counted(tmp_path, broken, reason):
    pages, skipped = read(tmp_path / "a.warc", b"".join([*RECORDS[:2], broken, *RECORDS[2:5]]))
    lost = 3 if b"9999" in broken else 0  # its length says that it goes on to the end of the file
    assert len(pages) == 5 - lost and len(skipped) == 1
    assert skipped[0].startswith(f"{tmp_path}/a.warc, record 3: ") and (reason in skipped[0] or lost)


def test_damage_is_never_another_page_and_costs_little(tmp_path):
    rng, whole = random.Random(0), {page.id: page.text for page in read(tmp_path / "a.warc.gz", ZIPPED)[0]}
    lost = 0
    for _ in range(100):
        data = bytearray(ZIPPED)
        for _ in range(rng.choice((1, 4))):
            position, size = rng.randrange(len(data)), rng.choice((1, 30))
            data[position:position + size] = rng.randbytes(size)
        pages, skipped = read(tmp_path / "b.warc.gz", bytes(data))
        assert all(whole[page.id] == page.text for page in pages)
        assert len(pages) == 200 or skipped
        lost += 200 - len(pages)
    assert lost / 100 < 8


def test_an_archive_that_is_cut_off(tmp_path):
    whole = {page.text for page in read(tmp_path / "a.warc.gz", ZIPPED)[0]}
    for cut in (1, 9, 60, len(gzip.compress(RECORDS[-1])) - 1):
        pages, skipped = read(tmp_path / "a.warc.gz", ZIPPED[:-cut])
        assert len(pages) in ((200,) if cut < 9 else (199, 200)) and {page.text for page in pages} <= whole, cut
        assert len(skipped) == 1 and "its compressed data is damaged or cut off" in skipped[0], cut
    pages, skipped = read(tmp_path / "b.warc", b"".join(RECORDS)[:-50])
    assert len(pages) == 199 and skipped == [f"{tmp_path}/b.warc, record 200: the file ends in the middle of it"]
    pages, skipped = read(tmp_path / "c.warc", b"no archive at all")
    assert pages == [] and len(skipped) == 1
    half = gzip.compress(b"".join(RECORDS))
    pages, skipped = read(tmp_path / "d.warc.gz", half[:len(half) // 2])
    assert 50 < len(pages) < 150 and len(skipped) == 1


def test_records_that_are_too_long_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 2000)
    bomb = answer(1, gzip.compress(b"<p>" + b"x" * 1_000_000), fields="Content-Encoding: gzip\r\n")
    pages, skipped = read(tmp_path / "a.warc", answer(0, b"<p>" + b"x" * 9000) + bomb + RECORDS[2])
    assert len(pages) == 1 and len(skipped) == 2 and "and the most that one document may have is 2,000" in skipped[0] and "when unpacked" in skipped[1]
