"""The header of a GGUF file: metadata and the list of tensors. Pure Python, every count and offset checked against the file's size before use.

Layout (ggml/docs/gguf.md): magic, version, number of tensors, number of entries; the entries (key, type, value); for each tensor its
name, dimensions (the fastest first), type and offset; then, from the next multiple of the alignment, the data.
"""

import mmap
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9
_MOST_ITEMS = 1 << 24  # of one array; the largest published vocabulary has some 2^18


class Tensor(NamedTuple):
    """A tensor of a GGUF file: where it lies."""

    shape: tuple[int, ...]  # the slowest first, as in numpy
    type: int  # ggml's number
    offset: int  # in the file, bytes
    nbytes: int


class Header(NamedTuple):
    """What a GGUF file says before its tensors."""

    metadata: dict[str, Any]  # numbers, texts, and arrays: numpy for numbers, lists for texts
    tensors: dict[str, Tensor]


class _Cursor:
    def __init__(self, data: mmap.mmap | bytes, path: pathlib.Path):
        self.data, self.path, self.at = data, path, 0

    def need(self, size: int, what: str) -> int:
        """Steps over `size` bytes and returns where they begin."""
        if size > len(self.data) - self.at:
            raise ValueError(f"{self.path} is truncated or damaged: {what} of {size:,} bytes at {self.at:,} goes beyond its {len(self.data):,} bytes")
        self.at += size
        return self.at - size

    def number(self, code: str, what: str):
        return struct.unpack_from("<" + code, self.data, self.need(struct.calcsize("<" + code), what))[0]

    def text(self, what: str) -> str:
        size = self.number("Q", what)
        start = self.need(size, what)
        try:
            return self.data[start:start + size].decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is damaged: {what} at {start:,} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self.text(f"the value of {key}")
        if kind in _NUMBERS:
            return self.numbers(kind, 1, key)[0].item()
        if kind != _ARRAY:
            raise ValueError(f"{self.path} is damaged: the value of {key} is of type {kind}, which does not exist")
        kind, count = self.number("I", key), self.number("Q", key)
        if count > _MOST_ITEMS:
            raise ValueError(f"{self.path}: {key} claims {count:,} items, more than the {_MOST_ITEMS:,} that are believable")
        if kind in _NUMBERS:
            return self.numbers(kind, count, key)
        if kind != _TEXT:
            raise ValueError(f"{self.path}: {key} is an array of type {kind}, neither numbers nor texts")
        return [self.text(f"{key}[{i}]") for i in range(count)]

    def numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        dtype = np.dtype(_NUMBERS[kind])
        start = self.need(count * dtype.itemsize, f"the value of {key}")
        return np.frombuffer(self.data[start:start + count * dtype.itemsize], dtype)


def read(path: pathlib.Path, sizes: Mapping[int, tuple[int, int]]) -> Header:
    """Reads and checks a header; the tensors' data is not touched.

    Args:
      sizes: ggml type -> elements and bytes of a block.

    Raises:
      ValueError: one line: not a GGUF file, or one that is truncated, damaged or absurd.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.stat().st_size < 24:
        raise ValueError(f"{path} is not a GGUF file: it has {path.stat().st_size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        if data[:4] != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it begins with {data[:4]!r}")
        cursor.at = 4
        version, tensors, entries = cursor.number("I", "version"), cursor.number("Q", "count"), cursor.number("Q", "count")
        if version not in (2, 3):
            raise ValueError(f"{path} is GGUF of version {version if version < 1 << 16 else 'big-endian'}; known: 2 and 3, little-endian")
        for count, least, what in ((entries, 13, "entries of metadata"), (tensors, 24, "tensors")):
            if count * least > len(data):
                raise ValueError(f"{path} is damaged: it claims {count:,} {what}, more than its {len(data):,} bytes can hold")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.text("a key")
            if key in metadata:
                raise ValueError(f"{path} is damaged: the key {key} is there twice")
            metadata[key] = cursor.value(cursor.number("I", key), key)
        return Header(metadata, _tensors(cursor, tensors, metadata.get("general.alignment", 32), sizes))


def _tensors(cursor: _Cursor, count: int, alignment: Any, sizes: Mapping[int, tuple[int, int]]) -> dict[str, Tensor]:
    path, found = cursor.path, {}
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment % 8:
        raise ValueError(f"{path}: general.alignment={alignment!r} must be a multiple of 8 up to 65536")
    for _ in range(count):
        name = cursor.text("a tensor's name")
        dimensions = cursor.number("I", name)
        if name in found or not 1 <= dimensions <= 4:
            raise ValueError(f"{path} is damaged: the tensor {name} is there twice or has {dimensions} dimensions")
        shape = tuple(cursor.number("Q", name) for _ in range(dimensions))[::-1]
        kind, offset = cursor.number("I", name), cursor.number("Q", name)
        if kind not in sizes:
            raise ValueError(f"{path}: the tensor {name} is of the ggml type {kind}, which cannot be read here")
        elements, block = 1, sizes[kind]
        for size in shape:
            elements *= size
        if elements == 0 or shape[-1] % block[0]:
            raise ValueError(f"{path} is damaged: the tensor {name} has the shape {list(shape)}, whose rows are not blocks of {block[0]}")
        found[name] = Tensor(shape, kind, offset, elements // block[0] * block[1])
    start = -(-cursor.at // alignment) * alignment
    for name, tensor in found.items():
        if tensor.offset % alignment or start + tensor.offset + tensor.nbytes > len(cursor.data):
            raise ValueError(f"{path} is truncated or damaged: the tensor {name} of {tensor.nbytes:,} bytes at {start + tensor.offset:,} is not aligned "
                             f"or goes beyond its {len(cursor.data):,} bytes")
        found[name] = tensor._replace(offset=start + tensor.offset)
    return found
