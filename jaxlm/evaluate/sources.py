"""Reads the records of a task from local files or TensorFlow Datasets, and holds them to their sha256."""

import csv
import gzip
import hashlib
import io
import json
import pathlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.data import tfds
from jaxlm.evaluate import definition
from jaxlm.evaluate.definition import Item, Source, Task

_MOST = 1 << 28  # bytes of a file that is unpacked
SUMS = "sha256.json"  # beside the files: what was noted on their first use


class Read(NamedTuple):
    """A task's items, and where they come from."""
    items: list[Item]
    examples: list[Item]
    origin: dict[str, Any]  # for the result: where from, sha256, and who vouches for it
    judge: str = ""  # path of Task.judge


def read(task: Task, folders: Sequence[pathlib.Path], tfds_dir: str = "", shots: int = 0) -> Read:
    """The items of a task from the first of its sources that is here.

    Args:
      folders: where its files may lie, besides the folder of its own TOML file.
      tfds_dir: where TFDS keeps its data sets; "": as TFDS does.
      shots: examples that are wanted; 0: none is read.

    Raises:
      ValueError: one line: nothing is here, a file is not the one that was recorded, or its content (see `definition.items`).
    """
    places = [pathlib.Path(task.where).parent, *folders]
    judge = _judge(task, places)
    missing = []
    for source in task.sources:
        if source.tfds:
            name, _, split = source.tfds.partition(":")
            try:
                records = tfds.examples(f"tfds:{source.tfds}", tfds_dir)
            except ValueError as error:
                missing.append(str(error))
                continue
            shown = definition.items(task, source, tfds.examples(f"tfds:{name}:{source.examples}", tfds_dir), f"tfds:{name}:{source.examples}") if (
                shots and source.examples) else []
            origin = {"tfds": source.tfds, "checked": "by TFDS when it was fetched"} | _judge_origin(judge)
            return Read(definition.items(task, source, records, f"tfds:{source.tfds}"), shown, origin, judge)
        path = next((folder / source.file for folder in places if (folder / source.file).is_file()), None)
        if path is None:
            missing.append(f"{source.file} is not in {' or '.join(map(str, places[1:] if task.where == str(definition.CATALOGUE) else places)) or 'a folder'}")
            continue
        data = path.read_bytes()
        origin = {"file": path.name, **_checked(path, data, source.sha256)} | _judge_origin(judge)
        shown = []
        if shots and source.examples:
            beside = path.with_name(source.examples)
            if not beside.is_file():
                raise ValueError(f"task {task.name}: the examples {beside} are missing, which --shots={shots} needs; get them: {task.get}")
            shown = definition.items(task, source, records_of(beside, beside.read_bytes(), source), str(beside))
        records = records_of(path, data, source)
        if source.beside:
            records, origin = _beside(task, source, path, records, origin)
        return Read(definition.items(task, source, records, str(path)), shown, origin, judge)
    raise ValueError(f"task {task.name}: its data are not here ({'; '.join(missing)}). Get them: {task.get}; then --task_data=FOLDER")


def _beside(task: Task, source: Source, path: pathlib.Path, records: list, origin: dict[str, Any]) -> tuple[list, dict[str, Any]]:
    """Records with those of the second file in them."""
    other = path.with_name(source.beside)
    if not other.is_file():
        raise ValueError(f"task {task.name}: {other} is missing, which belongs to {path.name}; get it: {task.get}")
    data = other.read_bytes()
    seconds = records_of(other, data, source)
    if len(seconds) != len(records):
        raise ValueError(f"task {task.name}: {path} has {len(records)} items and {other} has {len(seconds)}: each must have its pair")
    return [dict(one) | {"beside": second} for one, second in zip(records, seconds)], origin | {
        "beside": other.name, "beside_sha256": hashlib.sha256(data).hexdigest()}


def _judge(task: Task, places: Sequence[pathlib.Path]) -> str:
    """Where a task's judge lies; "" for a task without one."""
    name, _, label = task.judge.partition(":")
    if not name:
        return ""
    path = next((folder / name for folder in [*places, pathlib.Path()] if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"task {task.name}: its judge {name} is not in {' or '.join(map(str, places))}: put a file of words there, one a line, or name the "
                         "workdir of a classifier, FOLDER:CLASS")
    if path.is_dir() and not label:
        raise ValueError(f"task {task.name}: judge={task.judge!r} is a folder: write which class of that classifier counts, {name}:CLASS")
    return f"{path}:{label}" if label else str(path)


def _judge_origin(judge: str) -> dict[str, str]:
    """What decides its verdicts: a list's own sum, a classifier's place."""
    path = pathlib.Path(judge)
    return {} if not judge else {"judge": f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else judge}


def _checked(path: pathlib.Path, data: bytes, recorded: str) -> dict[str, str]:
    """Compares with the recorded sum, or with that of the first use, which is noted."""
    found = hashlib.sha256(data).hexdigest()
    sums = path.with_name(SUMS)
    try:
        noted = json.loads(sums.read_text())
    except (OSError, ValueError):
        noted = {}
    expected = recorded or noted.get(path.name, "")
    if expected and expected != found:
        raise ValueError(f"{path} is another file than the one on record (sha256 {found[:16]}..., not {expected[:16]}...): figures would not compare; get that "
                         f"one, or {'define your own task' if recorded else f'remove its line from {sums}'}")
    if recorded:
        return {"sha256": found, "checked": "against the task's definition"}
    if expected:
        return {"sha256": found, "checked": "the same as on first use"}
    try:
        sums.write_text(json.dumps(noted | {path.name: found}, indent=1, sort_keys=True) + "\n")
    except OSError:  # a read-only folder
        return {"sha256": found, "checked": "no: nothing on record, and it cannot be noted beside the file"}
    return {"sha256": found, "checked": "no: first use, noted"}


def records_of(path: pathlib.Path, data: bytes, source: Source = Source()) -> list[Mapping[str, Any]]:
    """A file's records: objects of JSON or JSON lines, rows of a table by their column's names, or blocks of lines by "0", "1", ...

    Raises:
      ValueError: one line with the place.
    """
    if path.suffix == ".gz":
        try:
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_MOST + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}") from None
        if len(data) > _MOST:
            raise ValueError(f"{path} has more than {_MOST:,} bytes when it is unpacked, which a task's data do not have: unpack it yourself if it is meant")
    name = path.name.removesuffix(".gz")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    if source.split:
        return [{"text": part} for part in re.split(source.split, text) if part.strip()]
    if lines := source.lines:
        rows = text.split("\n")[:None if text and not text.endswith("\n") else -1]
        if len(rows) % lines:
            raise ValueError(f"{path} has {len(rows)} lines, and an item is {lines} lines")
        return [{str(k): rows[i + k].removesuffix("\r") for k in range(lines)} for i in range(0, len(rows), lines)]
    if name.endswith((".csv", ".tsv")):
        how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name.endswith(".tsv") else {}
        rows = csv.DictReader(io.StringIO(text), **how)
        try:
            return [{key: value for key, value in row.items() if key is not None and value is not None} for row in rows]
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    if name.endswith(".txt"):
        return [{"text": text}] if text.strip() else []
    return _json(path, text)


def _json(path: pathlib.Path, text: str) -> list[Mapping[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            found = list(enumerate(json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    else:
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    found.append((f"line {number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error}); give one object a line, or a list of objects") from None
    for place, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {place if isinstance(place, str) else f'item {place}'}: a JSON {type(record).__name__} instead of an object")
    return [record for _, record in found]
