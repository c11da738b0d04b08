"""What a search may choose: values of config keys, read from a line or a TOML file. Nothing in them is run as a program.

    optim.lr=log(1e-4,1e-2); data.batch_size=8,16,32; optim.warmup=uniform(1%,10%)

A key has values between commas, each written as after `--config.KEY=`, or a range: `log(low,high)` even in the logarithm, `uniform(low,high)` even. A third
number in a range says how many points of it a grid has.
"""

import itertools
import math
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxlm import config as configs
from jaxlm.config import LABELLED, Config, Duration

# Keys on which the figure depends that trials are compared by, or when it is taken: chosen by a search they would make it choose the easier question.
_MEASURE = re.compile(r"checkpoint\.metric|objective\.name|eval\..*|audit\..*|train\.eval_.*|clean\..*|filter\..*|dedup\..*|data\.(dir|source|.*_keys?|"
                      r"format|chat_template|licences|on_error|validation|test|shard_bytes)")
_TOKENS = re.compile(r"tokenizer\..*|train\.init_from")  # keys that change what a token is, so that figures of a token differ in what they count
_PER_TOKEN = ("loss", "perplexity", "accuracy")
_RANGE = re.compile(r"(log|uniform)\((.*)\)", re.S)
_NUMBER = re.compile(r"\s*([+-]?[0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([a-z%]*)\s*")


class Choice(NamedTuple):
    """One of several values."""
    values: tuple[str, ...]  # each as after --config.KEY=

    def text(self, value: str) -> str:
        """The value as after --config.KEY=."""
        return value

    def points(self, key: str) -> list[str]:
        """The values of a grid."""
        return list(self.values)

    def __str__(self) -> str:
        return ", ".join(self.values)


class Range(NamedTuple):
    """A number from `low` to `high`, both included."""
    low: float
    high: float
    log: bool
    whole: bool  # whole numbers only
    unit: str = ""  # of a duration: "%", "steps", "tokens", "epochs"
    count: int = 0  # points of a grid; 0: not said

    def text(self, value: float) -> str:
        """The value as after --config.KEY=."""
        return f"{int(value)}{' ' * (self.unit != '%' and bool(self.unit))}{self.unit}" if self.whole else f"{float(value)!r}{self._suffix}"

    def points(self, key: str) -> list[float]:
        """The values of a grid.

        Raises:
          ValueError: one line: nobody said how many.
        """
        if not self.count:
            raise ValueError(f"--sampler=grid needs the number of points of {key}: write {self._replace(count=5)}, or list the values")
        to, back = (math.log, math.exp) if self.log else (float, float)
        step = (to(self.high) - to(self.low)) / max(self.count - 1, 1)
        inner = [back(to(self.low) + step * i) for i in range(1, self.count - 1)]
        found = [self.low, *inner, *[self.high] * (self.count > 1)]
        return list(dict.fromkeys(round(x) for x in found)) if self.whole else [float(f"{x:.6g}") for x in found]

    @property
    def _suffix(self) -> str:
        return self.unit if self.unit in ("", "%") else f" {self.unit}"

    def __str__(self) -> str:
        number = lambda x: f"{int(x) if self.whole else x:g}{self._suffix}"
        return f"{'log' if self.log else 'uniform'}({number(self.low)}, {number(self.high)}{f', {self.count}' if self.count else ''})"


Space = dict[str, Choice | Range]


def read(given: str, config: Config) -> Space:
    """The space of a line, or of the TOML file that the line names.

    Raises:
      ValueError: one line: a key that does not exist or must not be chosen, a value of another type, a range that is none.
    """
    pairs = _file(pathlib.Path(given)) if given.strip().endswith(".toml") else _line(given)
    space: Space = {}
    for key, text in pairs:
        if key in space:
            raise ValueError(f"--space names {key} twice")
        hint = configs.kind(key)
        if _MEASURE.fullmatch(key):
            raise ValueError(f"--space: {key} changes what trials are measured by, so their figures could not be compared: set --config.{key} for all of them")
        if _TOKENS.fullmatch(key) and config.checkpoint.metric in _PER_TOKEN and config.objective.name not in LABELLED:
            raise ValueError(f"--space: {key} changes what a token is, so checkpoint.metric={config.checkpoint.metric} could not be compared between trials: "
                             "set --config.checkpoint.metric=bits_per_byte")
        match = _RANGE.fullmatch(text)
        space[key] = _range(key, text, match, hint) if match else Choice(tuple(_split(text, ",")))
        if isinstance(space[key], Choice):
            for value in space[key].values:
                configs.parse(key, value)
            if len(set(space[key].values)) < len(space[key].values):
                raise ValueError(f"--space: {key}={text} has a value twice")
    if not space:
        raise ValueError("--space is empty: name keys and values, such as --space='optim.lr=log(1e-4,1e-2); data.batch_size=8,16'")
    return space


def grid(space: Space) -> list[dict[str, Any]]:
    """All combinations of the points of each key.

    Raises:
      ValueError: one line: a range without a number of points.
    """
    points = {key: values.points(key) for key, values in space.items()}
    return [dict(zip(points, combination)) for combination in itertools.product(*points.values())]


def overrides(space: Space, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A trial's values as `--config.key=text`."""
    return [(key, space[key].text(value)) for key, value in values.items()]


def shares_corpus(space: Space) -> bool:
    """Whether all trials learn from one prepared corpus."""
    return not any(_TOKENS.fullmatch(key) for key in space)


def _line(given: str) -> list[tuple[str, str]]:
    pairs = []
    for part in _split(given, ";"):
        key, equals, text = (side.strip() for side in part.partition("="))
        if not (key and equals and text):
            raise ValueError(f"--space: {part!r} is no KEY=VALUES; write for example optim.lr=log(1e-4,1e-2) or data.batch_size=8,16,32, with ; between keys")
        pairs.append((key, text))
    return pairs


def _file(path: pathlib.Path) -> list[tuple[str, str]]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--space={path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--space={path} is not TOML: {error}") from None
    pairs = []
    for part, values in tree.items():
        # Keys may be quoted whole ("optim.lr" = ...) or written under their part ([optim], lr = ...).
        for key, value in (((f"{part}.{key}", value) for key, value in values.items()) if isinstance(values, dict) else [(part, values)]):
            pairs.append((key, ",".join(_toml(item) for item in value) if isinstance(value, list) else _toml(value)))
    return pairs


def _toml(value: Any) -> str:
    return value if isinstance(value, str) else repr(tuple(value)) if isinstance(value, list) else str(value)


def _split(text: str, by: str) -> list[str]:
    """The pieces between separators that stand in no bracket and no quotes; empty ones are left out."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == by and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]


def _range(key: str, text: str, match: re.Match, hint: Any) -> Range:
    if hint not in (int, float, Duration):
        raise ValueError(f"--space: {key} is no number, so it has no range {text}: list its values, {key}=A,B,C")
    parts = [_NUMBER.fullmatch(part) for part in match[2].split(",")]
    if len(parts) not in (2, 3) or not all(parts) or len(parts) == 3 and (parts[2][2] or not parts[2][1].isdigit() or int(parts[2][1]) < 1):
        raise ValueError(f"--space: {key}={text} is no range: write {match[1]}(LOW,HIGH), or {match[1]}(LOW,HIGH,POINTS) for a grid of so many points")
    low, high = (float(part[1].replace("_", "")) for part in parts[:2])
    units = {part[2].rstrip("s") for part in parts[:2]}
    if hint is Duration and len(units) > 1 or hint is not Duration and units != {""}:
        raise ValueError(f"--space: {key}={text}: " + ("both ends need one unit, such as uniform(1%,10%)" if hint is Duration else "this key has no unit"))
    for part in parts[:2]:
        configs.parse(key, part[0].strip())
    whole = hint is int or hint is Duration and units <= {"", "step"} and low == int(low) and high == int(high)
    if not low < high or match[1] == "log" and low <= 0:
        raise ValueError(f"--space: {key}={text} must go from low to high" + ", both above 0" * (match[1] == "log"))
    return Range(low, high, match[1] == "log", whole, parts[1][2], int(parts[2][1]) if len(parts) == 3 else 0)
