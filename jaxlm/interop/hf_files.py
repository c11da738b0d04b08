"""Directories of safetensors: read tensor by tensor, every header checked before anything is believed; written shard by shard. Home of safetensors.

Nothing here executes what a file says: pickled weights (.bin, .pt) are refused.
"""

import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_JSON_BYTES = 64 * 2**20  # of config.json or an index; the largest published ones have some 10 MB
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F64": np.dtype(np.float64),
           "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "U8": np.dtype(np.uint8), "BOOL": np.dtype(bool)}
_CODES = {dtype.name: code for code, dtype in _DTYPES.items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Tensor(NamedTuple):
    """A tensor of a safetensors file: where it lies."""

    path: pathlib.Path
    dtype: str  # as in the header: "F32", "BF16" ...
    shape: tuple[int, ...]
    offset: int  # of its bytes in the file


class Files(NamedTuple):
    """The tensors of a directory by name; nothing is read yet."""
    folder: pathlib.Path
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32 or bfloat16 (float16 and float64 become float32), mapped from the file where that is possible."""
        tensor = self.tensors[name]
        dtype = _DTYPES[tensor.dtype]
        count = math.prod(tensor.shape)
        array = np.memmap(tensor.path, dtype, "r", tensor.offset, (count,)) if count else np.zeros(0, dtype)
        array = np.asarray(array).reshape(tensor.shape)
        return array if array.dtype in (np.float32, ml_dtypes.bfloat16) else array.astype(np.float32)


def finite(array: np.ndarray, where: str) -> np.ndarray:
    """`array` as it is.

    Raises:
      ValueError: one line: `where` it holds a value that is not finite.
    """
    if array.dtype.kind in "fV" and not np.isfinite(array).all():
        raise ValueError(f"{where} holds {array[~np.isfinite(array)][0]}: weights must be finite; take an earlier checkpoint, or download it again")
    return array


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: one line, when it is missing or not one.
    """
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than the {_JSON_BYTES:,} that are believable")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} holds no {path.name}: give a directory as save_pretrained of transformers writes it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}: download it again")
    return content


def open_files(folder: pathlib.Path) -> Files:
    """Reads and checks the headers of model.safetensors, or of the shards that the index names.

    Raises:
      ValueError: one line: nothing to read, pickled weights only, a missing, truncated or damaged file, or an index that names a file outside
        the directory.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory: give one with config.json and model.safetensors")
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map of names to files: download it again")
        paths = {file: _inside(folder, file) for file in sorted(set(weight_map.values()))}
    else:
        weight_map, paths = None, {"model.safetensors": folder / "model.safetensors"}
        if not paths["model.safetensors"].is_file():
            raise ValueError(_nothing(folder))
    missing = [file for file, path in paths.items() if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}{f' and {len(missing) - 1} more files' * (len(missing) > 1)}, which {INDEX} names: download it again")
    tensors: dict[str, Tensor] = {}
    for file, path in paths.items():
        for name, tensor in header(path).items():
            if name in tensors:
                raise ValueError(f"{path}: {name} is also in {tensors[name].path.name}: only one file may hold it")
            if weight_map is not None and weight_map.get(name) != file:
                raise ValueError(f"{path} holds {name}, which {INDEX} does not say: download both again")
            tensors[name] = tensor
    absent = sorted(set(weight_map or ()) - set(tensors))
    if absent:
        raise ValueError(f"{folder}: {INDEX} names {absent[0]}, but {weight_map[absent[0]]} does not hold it: download both again")
    return Files(folder, tensors)


def _inside(folder: pathlib.Path, file: str) -> pathlib.Path:
    if pathlib.PurePath(file).name != file or "\\" in file or file in ("", ".", ".."):
        raise ValueError(f"{folder / INDEX} names the file {file!r}, which is not a plain name inside the directory: do not trust this directory")
    return folder / file


def _nothing(folder: pathlib.Path) -> str:
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        return (f"{folder} holds {pickled[0]} but no safetensors: a pickle runs any code it likes when it is read, so it is refused; "
                "convert it where you trust it (transformers: save_pretrained writes safetensors)")
    return f"{folder} holds neither model.safetensors nor {INDEX}: give a directory as save_pretrained of transformers writes it"


def header(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one file. The safetensors package refuses absurd header sizes, overlaps, holes and offsets beyond the end of the file."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(size))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({str(error).rstrip('.')}): download it again") from None
    tensors = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} is of type {entry['dtype']}; known: {', '.join(_DTYPES)}; quantised checkpoints must be converted before")
        tensors[name] = Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
    return tensors


def write_files(folder: pathlib.Path, names: Mapping[str, tuple[tuple[int, ...], np.dtype]], tensors: Iterator[tuple[str, np.ndarray]],
                shard_bytes: int = SHARD_BYTES) -> list[pathlib.Path]:
    """Writes model.safetensors, or shards with an index when it would be larger than `shard_bytes`; one tensor at a time.

    Written by hand, since the format is a header and the bytes: the package wants a whole shard in memory, and its interface has changed often.

    Args:
      names: what is to be written, in order: name -> shape and dtype (float32 or bfloat16).
      tensors: the same, in the same order.
    """
    shards: list[list[str]] = [[]]
    used = 0
    size = lambda name: math.prod(names[name][0]) * names[name][1].itemsize
    for name in names:
        if shards[-1] and used + size(name) > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size(name)
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        ends = list(itertools.accumulate(map(size, shard)))
        header = {"__metadata__": {"format": "pt"}} | {name: {"dtype": _CODES[names[name][1].name], "shape": names[name][0],
                                                              "data_offsets": [end - size(name), end]} for name, end in zip(shard, ends)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in shard:
                given, array = next(tensors)
                assert given == name and array.shape == names[name][0] and array.dtype == names[name][1], (given, name, array.shape, array.dtype)
                out.write(np.ascontiguousarray(array).tobytes())
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {"metadata": {"total_size": sum(map(size, names))}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / file for file in files]
