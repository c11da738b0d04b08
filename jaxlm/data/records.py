"""One record of a shard, and where it lies: a part of one document, as a tf.train.Example that TensorFlow Datasets reads, with a checksum of our own.

The protocol buffer is written by hand, its fields in an order that lets ours be found without parsing: the checksum first, at a fixed place, then the
document's number and where the part starts, and the token ids last, so that they are the record's tail. The layout is that of protobuf's wire format
(https://protobuf.dev/programming-guides/encoding) for tensorflow/core/example/{example,feature}.proto; every value is a bytes_list of one.

ArrayRecord needs 15 microseconds to find and unpack a record, the kernel needs 1.2 to read its bytes. So records are stored unpacked and the index keeps
their places: those in the Riegeli format (google/riegeli, doc/riegeli_records_file_format.md), on which ArrayRecord files are built, but for the headers
that interrupt it at every 64 KiB.
"""

import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FEATURES = "features.json"
INFO = "dataset_info.json"

def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _feature(name: str, value: bytes) -> bytes:
    """An entry of the map `Features.feature`: a name and a Feature with a bytes_list."""
    return _field(1, _field(1, name.encode()) + _field(2, _field(1, _field(1, value))))


_CRC = len(_feature("crc", bytes(4))) - 4  # where the checksum begins, counted from the first feature
_DOCUMENT = len(_feature("document", bytes(8))) - 8  # likewise, counted from the end of the checksum
_BETWEEN = _feature("start", bytes(8))[:-8]  # the document's number and the start


def _place(document: int, start: int) -> bytes:
    return document.to_bytes(8, "little") + _BETWEEN + start.to_bytes(8, "little")


_PLACE = slice(4 + _DOCUMENT, 4 + _DOCUMENT + len(_place(0, 0)))  # counted from the checksum's beginning


def encode(tokens: np.ndarray, document: int, start: int, text_bytes: int, document_id: str, source: str) -> bytes:
    """A record of `tokens` (uint16 or uint32), the document's [start, start + len).

    Args:
      document: its number in the split.
      text_bytes: size of the document's whole text as UTF-8.
    """
    number = lambda value: value.to_bytes(8, "little")
    body = b"".join((_feature("document", number(document)), _feature("start", number(start)), _feature("text_bytes", number(text_bytes)),
                     _feature("source", source.encode("utf-8", "replace")), _feature("id", document_id.encode("utf-8", "replace")),
                     _feature("tokens", tokens.tobytes())))
    return _field(1, _feature("crc", zlib.crc32(body).to_bytes(4, "little")) + body)


def decode(record: bytes, document: int, start: int, count: int, dtype: np.dtype) -> np.ndarray | str:
    """The `count` tokens of a record that should hold those of `document` from `start` on, or, in a few words, what is wrong with it."""
    size = count * dtype.itemsize
    head = _tail_head(size)
    crc = 2 + _CRC
    while record[crc - _CRC - 1:crc - _CRC] >= b"\x80" and crc < 8 + _CRC:  # the length of what follows takes a byte or more
        crc += 1
    if len(record) < crc + 4 + size or zlib.crc32(memoryview(record)[crc + 4:]) != int.from_bytes(record[crc:crc + 4], "little"):
        return "its checksum is wrong"
    if record[crc + _PLACE.start:crc + _PLACE.stop] != _place(document, start) or not record.startswith(head, len(record) - size - len(head)):
        return "it holds another document than the index says"
    return np.frombuffer(record, dtype, count, len(record) - size)


@functools.lru_cache(1 << 16)
def _tail_head(size: int) -> bytes:
    """What stands before the token ids."""
    return b"\x0a" + _varint(size)


_BLOCK, _BLOCK_HEAD, _CHUNK_HEAD = 1 << 16, 24, 40  # bytes


def places(path: Path, checksums: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where the records of an ArrayRecord file (one in each chunk, not compressed) begin, not counting block headers, and their sizes in bytes.

    Args:
      checksums: the crc32 of each record, in their order.

    Raises:
      OSError: the records are not there as they were written.
    """
    raw = np.fromfile(path, np.uint8)
    data = raw[:len(raw) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)[:, _BLOCK_HEAD:].tobytes() + raw[len(raw) // _BLOCK * _BLOCK:][_BLOCK_HEAD:].tobytes()
    view, position, begins, sizes = memoryview(data), 0, [], []
    while len(begins) < len(checksums):
        head = view[position:position + _CHUNK_HEAD]
        end, size = position + _CHUNK_HEAD + int.from_bytes(head[8:16], "little"), int.from_bytes(head[32:40], "little")
        if len(head) < _CHUNK_HEAD or end > len(view):
            raise OSError(f"{path}: {len(begins)} of {len(checksums)} records were written")
        if head[24:25] == b"r":  # records; the file begins with a chunk of another type
            if size > end - position - _CHUNK_HEAD or zlib.crc32(view[end - size:end]) != checksums[len(begins)]:
                raise OSError(f"{path}: record {len(begins)} is not there as it was written")
            begins.append(end - size)
            sizes.append(size)
        position = end
    return begins, sizes


def read(file: int, begin: int, size: int) -> bytes:
    """The `size` bytes of a record that begins at `begin` (see `places`) in the open file of number `file`; fewer where the file is cut off."""
    room = _BLOCK - _BLOCK_HEAD
    block, last = begin // room, (begin + size - 1) // room
    offset = begin + (block + 1) * _BLOCK_HEAD
    data = os.pread(file, size + (last - block) * _BLOCK_HEAD, offset)
    for number in range(block + 1, last + 1):  # all but the current block's header: those read before it are gone already
        cut = number * _BLOCK - offset - (number - block - 1) * _BLOCK_HEAD
        data = data[:cut] + data[cut + _BLOCK_HEAD:]
    return data


def descriptions(name: str, dtype: np.dtype, splits: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """The files that make the folder a TFDS data set, for `tfds.builder_from_directory`, by name.

    Args:
      name: of the data set.
      dtype: of the tokens.
      splits: of the manifest.
    """
    base = "tensorflow_datasets.core.features."
    tensor = lambda kind, dimensions: {"pythonClassName": f"{base}tensor_feature.Tensor", "tensor": {
        "shape": {"dimensions": dimensions}, "dtype": kind, "encoding": "bytes"}}
    text = {"pythonClassName": f"{base}text_feature.Text", "text": {}}
    features = {"pythonClassName": f"{base}features_dict.FeaturesDict", "featuresDict": {"features": {
        "crc": tensor("uint32", []), "document": tensor("int64", []), "start": tensor("int64", []), "text_bytes": tensor("int64", []),
        "source": text, "id": text, "tokens": tensor(dtype.name, ["-1"])}}}
    info = {
        "name": name, "version": "1.0.0", "fileFormat": "array_record", "moduleName": "jaxlm.data.shards",
        "description": "Token ids of documents, prepared by jaxlm. An example is a document, or a part of one from its token `start` on.",
        "splits": [{"name": split, "numBytes": str(sum(shard["size"] for shard in part["shards"])), "filepathTemplate": "{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}",
                    "shardLengths": [str(shard["records"]) for shard in part["shards"]]} for split, part in splits.items() if part["shards"]],
    }
    return {file: (json.dumps(content, indent=1) + "\n").encode() for file, content in ((FEATURES, features), (INFO, info))}
