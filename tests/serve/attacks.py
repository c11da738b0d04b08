"""Attacks on a listening server over raw sockets, and what an honest client meets while they go on and after them."""

import asyncio
import contextlib
import json
import math
import os
import pathlib
import random
import resource
import statistics
import time
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import httpx

SECRET, KEY = "a-prompt-that-nobody-may-read-in-a-log", "the-key-that-nobody-may-read-in-a-log"


class Row(NamedTuple):
    """One line of the table."""

    attack: str
    sent: str
    came: str  # statuses and what else came back
    during: float  # seconds that the slowest honest request took while it went on
    after: float  # seconds of the first honest request after it
    memory: int  # bytes that the server has more after it
    descriptors: int  # that it has more


class Place(NamedTuple):
    host: str
    port: int
    process: int  # 0: this one


def honest(place: Place) -> float:
    """Seconds that a completion takes; without end where it is refused or does not come."""
    begun = time.monotonic()
    try:
        answer = httpx.post(f"http://{place.host}:{place.port}/v1/completions", json={"prompt": SECRET[:8], "max_tokens": 2}, timeout=60,
                            headers={"authorization": f"Bearer {KEY}"})
    except httpx.HTTPError:
        return math.inf
    return time.monotonic() - begun if answer.status_code == 200 else math.inf


def resident(place: Place) -> int:
    return int(pathlib.Path(f"/proc/{place.process or 'self'}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(place: Place) -> int:
    return len(os.listdir(f"/proc/{place.process or 'self'}/fd"))


def request(path: str, body: bytes = b"", *fields: str, method: str = "POST", length: object = None, key: str = KEY) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"authorization: Bearer {key}", "content-type: application/json",
             f"content-length: {len(body) if length is None else length}", *fields]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


def body(**more: object) -> bytes:
    return json.dumps({"prompt": SECRET, "max_tokens": 300, "ignore_eos": True, **more}).encode()


async def say(place: Place, *parts: bytes, pause: float = 0.0, wait: float = 20.0, read: int = 1 << 16) -> str:
    """Sends the parts on a connection of its own; the status that came, or how it ended."""
    try:
        reader, writer = await asyncio.open_connection(place.host, place.port)
    except OSError as error:
        return type(error).__name__
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        answer = await asyncio.wait_for(reader.read(read), wait)
        return answer.split(b" ", 2)[1][:3].decode("latin-1") if answer.startswith(b"HTTP/") else "closed"
    except TimeoutError:
        return "silence"
    except (ConnectionError, OSError):
        return "closed"
    finally:
        writer.transport.abort()


async def many(count: int, one: Callable[[int], Awaitable[str]], together: int = 200) -> str:
    """Runs `one` for each number, some at a time; what came, counted."""
    gate = asyncio.Semaphore(together)

    async def run(number: int) -> str:
        async with gate:
            return await one(number)

    found = Counter(await asyncio.gather(*map(run, range(count))))
    return ", ".join(f"{times} x {what}" for what, times in sorted(found.items()))


async def slow_heads(place: Place, count: int, seconds: float) -> str:
    """Connections that send a byte of their head now and then (Slowloris)."""
    async def one(number: int) -> str:
        return await say(place, b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n", *[b"x"] * int(seconds), pause=1.0, wait=0.2)
    return await many(count, one, together=count)


async def slow_bodies(place: Place, count: int, seconds: float) -> str:
    async def one(number: int) -> str:
        return await say(place, request("/v1/completions", b'{"prompt', length=5000), *[b"x"] * int(seconds), pause=1.0, wait=0.2)
    return await many(count, one, together=count)


async def slow_readers(place: Place, count: int, seconds: float) -> str:
    """Streams that are asked for and not read."""
    async def one(number: int) -> str:
        return await say(place, request("/v1/completions", body(stream=True, logprobs=20, max_tokens=100)), pause=seconds, wait=5, read=100)
    return await many(count, one, together=count)


async def connections(place: Place, count: int, seconds: float) -> str:
    """As many connections as there can be that send nothing."""
    writers, refused = [], Counter()
    for start in range(0, count, 500):
        found = await asyncio.gather(*(asyncio.wait_for(asyncio.open_connection(place.host, place.port), 30) for _ in range(min(500, count - start))),
                                     return_exceptions=True)
        writers += [one[1] for one in found if not isinstance(one, BaseException)]
        refused.update(type(one).__name__ for one in found if isinstance(one, BaseException))
    await asyncio.sleep(seconds)
    opened = len(writers)
    for writer in writers:
        writer.transport.abort()
    return f"{opened} opened, {dict(refused) or 'none'} refused"


async def large_bodies(place: Place, count: int, size: int) -> str:
    """Bodies of `size` bytes: announced, in chunks without an end, and announced as small."""
    block = b"x" * (1 << 16)

    async def one(number: int) -> str:
        if number % 3 == 0:
            return await say(place, request("/v1/completions", length=size), *[block] * (size >> 16))
        chunks = [b"10000\r\n" + block + b"\r\n"] * (size >> 16)
        if number % 3 == 1:
            return await say(place, request("/v1/completions").replace(b"content-length: 0", b"transfer-encoding: chunked"), *chunks)
        return await say(place, request("/v1/completions", length=10), *[block] * (size >> 16))
    return await many(count, one, together=6)


async def header_floods(place: Place, count: int) -> str:
    fields = [[f"x-{i}: {'y' * 100}" for i in range(5000)], ["x: " + "y" * 1_000_000], ["cookie: a=b"] * 300, ["x" * 20_000 + ": y"], ["x:"] * 100_000]

    async def one(number: int) -> str:
        return await say(place, request("/v1/completions", b"{}", *fields[number % len(fields)]))
    return await many(count, one, together=20)


PATHS = ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/v1//models", "/v1/models/..%2f..%2fetc", "/v1/models/%00", "http://evil.example/v1/models", "*",
         "/" + "a" * 8000, "/v1/models/%0d%0ax: y", "/v1/completions/../models", "\\..\\x", "/?" + "a=b&" * 500, "/v1/models/" + "%f0%9f%99%82" * 50, "/%", "/v1/%zz",
         "/health/../v1/models", "/page.html", "/static/../app.py", "/v1/models/%1b[2J%0aINFO fake")


async def paths(place: Place, count: int) -> str:
    async def one(number: int) -> str:
        return await say(place, request(PATHS[number % len(PATHS)], method=("GET", "POST", "HEAD", "OPTIONS", "DELETE")[number // len(PATHS) % 5], key="wrong"))
    return await many(count, one, together=20)


async def hosts(place: Place, count: int) -> str:
    """Names of hosts that hold a path which needs no key."""
    names = ("a/health?", "a/?", "a/ping#", "a/health#", "localhost/health?", "[::1]/ping?", "a@b/ping?", "")

    async def one(number: int) -> str:
        return await say(place, request("/v1/completions", body(), key="wrong").replace(b"host: localhost", f"host: {names[number % len(names)]}".encode()))
    return await many(count, one, together=20)


MALFORMED = (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 5000, b"\r\n" * 3000,
             b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
             b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n",
             b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
             b"GET / HTTP/1.1\r\nhost : a\r\n\r\n", b"GET / HTTP/1.1\nhost: a\n\n", b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n", b"GET / HTTP/1.1\r\nx: \0\r\n\r\n",
             b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: eA==\r\n\r\n",
             b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n", b"GET / HTTP/1.1\r\n x: folded\r\n\r\n")


async def malformed(place: Place, count: int) -> str:
    draw = random.Random(0)
    noise = [draw.randbytes(300) for _ in range(count)]

    async def one(number: int) -> str:
        data = MALFORMED[number % len(MALFORMED)]
        at = draw.randrange(len(data))
        return await say(place, data if number < len(MALFORMED) else noise[number] if number % 3 else data[:at] + noise[number][:9] + data[at:], wait=2)
    return await many(count, one, together=50)


async def pipelined(place: Place, count: int) -> str:
    """A hundred requests in one packet, good and bad."""
    async def one(number: int) -> str:
        each = [request("/v1/models", method="GET"), request("/v1/completions", b"{}"), request("/v1/completions", body(max_tokens=1))]
        return await say(place, b"".join(each[i % 3] for i in range(100)), wait=10)
    return await many(count, one, together=10)


async def disconnects(place: Place, count: int) -> str:
    """Clients that go in the middle of what they asked for."""
    async def one(number: int) -> str:
        return await say(place, request("/v1/completions", body(stream=number % 2 == 0)), wait=random.Random(number).random() * 0.2, read=10)
    return await many(count, one, together=30)


async def keys(place: Place, count: int) -> str:
    """Wrong keys that are right up to a place: whether the time tells where. Statuses, and medians of the time with the least and the most that is right."""
    guesses = {right: KEY[:right] + "#" * (len(KEY) - right) for right in (0, len(KEY) // 2, len(KEY) - 1)}
    times, seen = {right: [] for right in guesses}, Counter()
    reader, writer = await asyncio.open_connection(place.host, place.port)
    for number in range(count):
        right = list(guesses)[number % 3]
        begun = time.perf_counter()
        writer.write(request("/v1/models", method="GET", key=guesses[right]))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
        await reader.readexactly(length)
        times[right].append(time.perf_counter() - begun)
        seen[head.split(b" ")[1].decode()] += 1
    writer.transport.abort()
    medians = ", ".join(f"{right} right: {statistics.median(some) * 1e6:.0f} us" for right, some in times.items())
    return f"{', '.join(f'{n} x {status}' for status, n in seen.items())}; median {medians}"


def attacks(scale: float, most: int) -> dict[str, tuple[str, Callable[[Place], Awaitable[str]]]]:
    """Name -> what is sent, and how. `scale`: of counts and seconds; `most`: connections."""
    n = lambda count: max(3, int(count * scale))
    seconds = 30 * scale
    return {
        "slow heads": (f"{n(800)} connections, a byte a second, {seconds:.0f} s", lambda p: slow_heads(p, n(800), seconds)),
        "slow bodies": (f"{n(800)} bodies, a byte a second, {seconds:.0f} s", lambda p: slow_bodies(p, n(800), seconds)),
        "slow readers": (f"{n(100)} streams that nobody reads, {seconds:.0f} s", lambda p: slow_readers(p, n(100), seconds)),
        "connections": (f"{most} connections that say nothing, {seconds / 2:.0f} s", lambda p: connections(p, most, seconds / 2)),
        "large bodies": (f"{n(12)} bodies of {max(2, int(100 * scale))} MB", lambda p: large_bodies(p, n(12), max(2, int(100 * scale)) * 10**6)),
        "header floods": (f"{n(100)} heads of up to 1 MB", lambda p: header_floods(p, n(100))),
        "paths": (f"{n(500)} paths, key wrong", lambda p: paths(p, n(500))), "hosts": (f"{n(80)} names of hosts, key wrong", lambda p: hosts(p, n(80))),
        "malformed": (f"{n(1000)} requests that are none", lambda p: malformed(p, n(1000))),
        "pipelined": (f"{n(30)} x 100 requests at once", lambda p: pipelined(p, n(30))),
        "disconnects": (f"{n(300)} clients that go", lambda p: disconnects(p, n(300))),
        "wrong keys": (f"{n(1500)} keys", lambda p: keys(p, n(1500))),
    }


def run(place: Place, name: str, sent: str, attack: Callable[[Place], Awaitable[str]], settle: float = 40.0) -> Row:
    """One attack with an honest client beside it, and after it until descriptors are back (or `settle` seconds have gone)."""
    honest(place)
    memory, base = resident(place), descriptors(place)
    waits: list[float] = []

    async def beside() -> str:
        going = asyncio.ensure_future(attack(place))
        while not going.done():
            waits.append(await asyncio.to_thread(honest, place))
            await asyncio.wait({going}, timeout=0.5)
        return await going

    came = asyncio.run(beside())
    after = honest(place)
    end = time.monotonic() + settle
    while descriptors(place) > base + 2 and time.monotonic() < end:
        time.sleep(0.2)
    return Row(name, sent, came, max(waits), after, resident(place) - memory, descriptors(place) - base)


def warm(place: Place) -> None:
    """Lets the server compile what the attacks ask for: rows alone and together, as many as 1 to 40, with log-probabilities and without."""
    for rows in (1, 2, 4, 8, 16, 40):
        asyncio.run(many(rows, lambda number: say(place, request("/v1/completions", body(max_tokens=20, logprobs=(None, 20)[number % 2])), wait=300), together=rows))
    assert honest(place) < 60, "the server does not answer before it is attacked"


def raise_descriptors() -> int:
    """As many open files as this process may have; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def place_of(address: str, process: int = 0) -> Place:
    parsed = urllib.parse.urlparse(address)
    return Place(parsed.hostname, parsed.port, process)
