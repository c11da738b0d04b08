"""Inputs that nobody should send: valid files with bytes, numbers and JSON values changed. All chance comes from the `random.Random` that is given, so that
the same seed gives the same input, and hypothesis can choose (and shrink) what happens."""

import json
import random
from collections.abc import Mapping, Sequence

Files = Mapping[str, bytes]  # name -> content

_NUMBERS = (0, 1, -1, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
_BITS = (b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b'"', b"'", b"{", b"}", b"[", b"]", b"<", b">", b"&", b"\\", b"\\u0000", b"\\ud800",
         b"NaN", b"Infinity", b"1e999", b"-0", b"null", b"\x1b[2J", "\u2028".encode(), "\U0010ffff".encode(), b"../../x", b"/etc/passwd", b"<!--", b"%",
         b"{{", b"{%", b"x" * 5000, b"[" * 3000, b"{\"a\":" * 2000, b"<div>" * 3000, b"9" * 5000)
_ODD = (None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0", "\0", "\ud800", "\x1b[2J",
        "../../x", "/etc/passwd", "x" * 5000, "é\U0001f642", [], [[]], {}, {"x": 1}, [None], [1, "x"], {"": {}}, [0] * 1000, "\n", "-1")


def mutated(draw: random.Random, files: Files, others: Sequence[Files]) -> dict[str, bytes]:
    """One of the files changed in one to a few ways; `others`: what to splice with."""
    names = sorted(files)
    name = names[draw.randrange(len(names))]
    data = files[name]
    changes = (1, 1, 1, 2, 3, 8)[draw.randrange(6)]
    tree = _tree(data) if draw.random() < 0.6 else None
    if tree is not None:
        for _ in range(changes):
            tree = _changed(draw, tree)
        data = json.dumps(tree, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    else:
        donor = others[draw.randrange(len(others))]
        more = donor[sorted(donor)[draw.randrange(len(donor))]]
        for _ in range(changes):
            data = _bytes(draw, data, more)
    return {**files, name: data}


def _tree(data: bytes):
    """The JSON value in `data`, or of its first line (JSON lines); None where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _places(tree, path=()) -> list[tuple]:
    """Paths of all values in a JSON tree, at most some thousand."""
    found, stack = [], [((), tree)]
    while stack and len(found) < 4000:
        path, value = stack.pop()
        found.append(path)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        stack += [((*path, key), inner) for key, inner in list(items)[:400]]
    return found


def _changed(draw: random.Random, tree):
    """The tree with one value, or key, other than it was."""
    places = _places(tree)
    path = places[draw.randrange(len(places))]
    if not path:
        return _ODD[draw.randrange(len(_ODD))] if draw.random() < 0.1 else tree
    tree = json.loads(json.dumps(tree))
    inside = tree
    for key in path[:-1]:
        inside = inside[key]
    key, what = path[-1], draw.randrange(6)
    if what < 3:
        inside[key] = _ODD[draw.randrange(len(_ODD))]
    elif what == 3 and isinstance(inside[key], int) and not isinstance(inside[key], bool):
        inside[key] += (-1, 1, 2, 1000)[draw.randrange(4)]
    elif what == 3 and isinstance(inside[key], str):
        inside[key] = _bytes(draw, inside[key].encode("utf-8", "surrogatepass"), b"x").decode("utf-8", "replace")
    elif what == 4:
        del inside[key]
    elif isinstance(inside, dict):
        inside[str(_ODD[draw.randrange(len(_ODD))])[:40]] = inside.pop(key)
    else:
        inside.extend([inside[key]] * (1, 2, 300)[draw.randrange(3)])
    return tree


def _bytes(draw: random.Random, data: bytes, more: bytes) -> bytes:
    at, what = draw.randrange(len(data) + 1), draw.randrange(10)
    size = min((1, 2, 4, 16, 100, 3000)[draw.randrange(6)], len(data) - at)
    if what == 0 and size:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:]
    if what == 1:
        return data[:at] + draw.randbytes(size) + data[at + size:]
    if what == 2:
        width, number = (1, 2, 4, 8)[draw.randrange(4)], _NUMBERS[draw.randrange(len(_NUMBERS))]
        return data[:at] + (number % 256**width).to_bytes(width, ("little", "big")[draw.randrange(2)]) + data[at + width:]
    if what == 3:
        return data[:at] + data[at + size:]
    if what == 4:
        return data[:at] + data[at:at + size] * (2, 3, 50)[draw.randrange(3)] + data[at + size:]
    if what == 5:
        return data[:at]
    if what == 6:
        begin = draw.randrange(len(more) + 1)
        return data[:at] + more[begin:begin + draw.randrange(1, 2000)] + data[at:]
    if what == 7:  # a number that is spelled out
        digits = [i for i in range(at, min(len(data), at + 2000)) if data[i:i + 1].isdigit()]
        if digits:
            return data[:digits[0]] + str(_NUMBERS[draw.randrange(len(_NUMBERS))]).encode() + data[digits[0] + 1:]
    bit = _BITS[draw.randrange(len(_BITS))]
    return data[:at] + bit + data[at + (size if what == 8 else 0):]
