"""Data sets of TensorFlow Datasets (TFDS) as sources, without TensorFlow. Home of tensorflow_datasets.

A source is "tfds:NAME[/CONFIG][:SPLIT]", with the split "train" if none is given, or a slice of one such as "train[:10%]".
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm.data import readers
from jaxlm.data.readers import Fault, Keys, Record

PREFIX = "tfds:"
_SOURCE = re.compile(r"tfds:(?P<name>[\w/.+-]+)(?::(?P<split>\w+(?:\[[^\]]*\])?(?:\+\w+(?:\[[^\]]*\])?)*))?")


def expand(given: str, folder: str) -> list[str]:
    """The source with its split written out; a split of several shards as one source a shard, in their order.

    Args:
      given: "tfds:NAME[/CONFIG][:SPLIT]".
      folder: where TFDS keeps its data; "": $TFDS_DATA_DIR, or ~/tensorflow_datasets.

    Raises:
      ValueError: one line: not of that form, no such data set or split, or not prepared there.
    """
    match = _SOURCE.fullmatch(given)
    if not match:
        raise ValueError(f"data.source={given!r} is not of the form tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG:SPLIT")
    name, split = match["name"], match["split"] or "train"
    builder = _builder(name, folder)
    splits = builder.info.splits
    if splits and (wanted := re.split(r"[\[+]", split)[0]) not in splits:
        raise ValueError(f"data.source={given!r}: {name} has no split {wanted!r}; its splits: {', '.join(splits)}")
    _examples(builder, name, split, folder)
    shards = splits[split].num_shards if split in splits else 1
    return [f"{PREFIX}{name}:{split}[{i}shard:{i + 1}shard]" for i in range(shards)] if shards > 1 else [f"{PREFIX}{name}:{split}"]


def records(source: str, keys: Keys, folder: str) -> Iterator[Record | Fault]:
    """The examples of a source from `expand`, numbered from 1. One example alone (tiny_shakespeare) is divided as a text file is."""
    name, split = _SOURCE.fullmatch(source).group("name", "split")
    builder = _builder(name, folder)
    features = builder.info.features
    for key, option in ((keys.text, "text_key"), (keys.input, "input_key"), (keys.id, "id_key"), (keys.licence, "licence_key"), (keys.label, "label_key"),
                        *((key, "slice_keys") for key in keys.fields)):
        if key and key not in features:
            raise Fault(f"{source}: no feature {key!r}; its features: {', '.join(map(repr, sorted(features)))}; set data.{option}")
    examples = _examples(builder, name, split, folder)
    for row in range(1, len(examples) + 1):
        try:
            example = examples[row - 1]
        except Exception as error:  # whatever array_record and the decoders raise
            raise Fault(f"{source}, row {row} cannot be read: {' '.join(str(error).split())[:200]}") from None
        try:
            where = f"{source}, row {row}"
            values = {key: _name(features[key], example[key]) if key == keys.label else _text(where, row, example, key) for key in keys.names}
            text, own, licence = readers.joined(where, row, values, keys), values.get(keys.id, ""), values.get(keys.licence, "")
        except Fault as fault:
            yield fault
            continue
        if len(examples) > 1 or keys.input or keys.label:
            yield Record(row, text, own, licence, **readers.labelled(values, keys))
        else:
            yield from (Record(number, piece, f"{own}:{number}" if own else "", licence) for number, piece in enumerate(readers.pieces(iter([text])), 1))


def _name(feature, value):
    """A label as its feature names it; numbers and texts as they are, lists of them as lists."""
    feature, name = getattr(feature, "feature", feature), getattr(getattr(feature, "feature", feature), "int2str", None)
    if np.ndim(value):
        return [_name(feature, item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return name(int(value)) if name and int(value) >= 0 else value if isinstance(value, str) else np.asarray(value).item()


def examples(source: str, folder: str) -> list[dict[str, Any]]:
    """All examples of "tfds:NAME[/CONFIG][:SPLIT]" as plain values: texts, numbers, lists and dicts.

    Raises:
      ValueError: as `expand`; or an example cannot be read.
    """
    found = []
    for part in expand(source, folder):
        name, split = _SOURCE.fullmatch(part).group("name", "split")
        data = _examples(_builder(name, folder), name, split, folder)
        for row in range(len(data)):
            try:
                found.append(_plain(data[row]))
            except Exception as error:  # whatever array_record and the decoders raise
                raise ValueError(f"{part}, row {row + 1} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)) or isinstance(value, np.ndarray) and value.ndim:
        return [_plain(part) for part in value]
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
    return value.decode() if isinstance(value, bytes) else value


def _text(where: str, row: int, example, key: str) -> str:
    value = example[key]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise Fault(f"{where}: {key!r} is not UTF-8 ({error.reason})", row) from None
    if isinstance(value, str) or np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iu":
        return str(value)
    raise Fault(f"{where}: {key!r} is {str(value)[:40]!r}, not text", row)


def _builder(name: str, folder: str):
    import tensorflow_datasets as tfds
    try:
        return tfds.builder(name, data_dir=folder or None, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        raise ValueError(_missing(name, folder, "is neither prepared in {} nor known without TensorFlow")) from None
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"tfds:{name} cannot be opened: {' '.join(str(error).split())[:200]}") from None


def _examples(builder, name: str, split: str, folder: str):
    try:
        return builder.as_data_source(split=split)
    except (NotImplementedError, AssertionError, FileNotFoundError):
        raise ValueError(_missing(name, folder, "is not prepared in {} as array_record files")) from None
    except ValueError as error:
        raise ValueError(f"tfds:{name}:{split}: {' '.join(str(error).split())[:200]}") from None


def _missing(name: str, folder: str, what: str) -> str:
    import tensorflow_datasets as tfds
    where = folder or tfds.core.constants.DATA_DIR
    return (f"tfds:{name} {what.format(where)}: get it once with `tfds build {name} --file_format=array_record --data_dir={where}` "
            "(pip install tensorflow tensorflow_datasets), or set data.tfds_dir")
