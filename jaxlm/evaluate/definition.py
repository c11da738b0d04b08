"""What a task is: a table of a TOML file, of ours (`catalogue.toml`) or of the user's, in the same form. This module reads and checks such tables.

  [my_questions]
  kind = "choice"                            what is asked: see KINDS
  prompt = "Question: {question}\\nAnswer:"   names in braces are fields of an item
  continuation = " {choice}"                 what is scored, or what an example's answer looks like; this is the default of "choice", else " {target}"
  metrics = ["acc", "acc_norm"]              see `answers.METRICS`; the first is the one that is compared
  licence = "CC-BY-4.0"
  get = "https://..."                        where the data are
  [[my_questions.from]]                      the first of these that is here is read; with `fields`, how an item's fields follow from a record
  file = "questions.jsonl"                   beside the TOML file or in --task_data; .jsonl .json .csv .tsv [.gz], blocks of lines = N lines, or a text
  sha256 = "..."                             without it, that of the first use is noted and holds from then on
  examples = "training.jsonl"                where --shots come from, in the same form

An item's own fields are `choices` (texts) and `target` (number of the right choice, its letter, or its text; of the other kinds the text, or several that
are right) of "choice", `target` of "cloze" and "generate" (not for the metric toxic), `text` of "loss", `more` and `less` (the text that says the stereotype
and the one that does not) of "pair". `group` is optional: figures are also given for each. The metrics about bias of "choice" need BIAS_FIELDS. A field is
named by its place in the record, "question.stem" or "choices.*.text"; [a, b] makes a list of several; {at = "text", find = "(.*) end", all = false, replace =
[["from", "to"]]} takes the first group of a regular expression's first match (all = true: of every match, a list) and replaces.
"""

import dataclasses
import difflib
import hashlib
import json
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

CATALOGUE = pathlib.Path(__file__).with_name("catalogue.toml")

# Kind -> what it is, the fields that an item must have, and its metrics.
KINDS = {
    "choice": ("the likeliest of some continuations", ("choices", "target"), ("acc", "acc_norm", "acc_bytes", "acc_pmi",
               "acc_ambiguous", "acc_disambiguated", "bias_ambiguous", "bias_disambiguated")),
    "cloze": ("a continuation, whether the model would say it, and how likely it is", ("target",), ("acc", "perplexity")),
    "generate": ("the model's own answer, compared with what is right", ("target",),
                 ("exact_match", "normalised_match", "f1", "bleu", "chrf", "rouge_l", "toxic")),
    "pair": ("which of two texts that differ in a group is likelier", ("more", "less"), ("stereotyped", "log_ratio", "effect_size")),
    "loss": ("how likely whole texts are", ("text",), ("bits_per_byte", "byte_perplexity", "word_perplexity")),
}
# Of questions as in BBQ: the groups that each choice names (a list of texts a choice; "unknown" among them for the one that does not say), those that the
# stereotype is about, "neg" or "nonneg" (the stereotyped group is the expected answer, or the other one), and "ambig" or "disambig".
BIAS_FIELDS = ("groups", "stereotyped", "polarity", "condition")
_NAME = re.compile(r"[\w.-]+")
_HOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Source:
    """One place where a task's items may lie, and how a record becomes fields."""
    file: str = ""
    beside: str = ""  # a second file of the same form, whose item N is the field "beside" of item N
    tfds: str = ""  # "NAME[/CONFIG]:SPLIT" of TensorFlow Datasets
    lines: int = 0  # an item is so many lines of a text file, which are its fields "0", "1", ...; 0: JSON, CSV or TSV
    split: str = ""  # a text file is divided where this regular expression matches; each part that is not blank is an item, its field "text"
    sha256: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)  # empty: the record's own keys
    prompt: str = ""  # another one for this form of the data
    first: int = 0  # number of the first choice, where targets are numbers
    examples: str = ""  # a file, or a split of the TFDS data set


@dataclass(frozen=True)
class Task:
    """See the module's text; `where` is the TOML file."""
    name: str
    where: str
    kind: Literal["choice", "cloze", "generate", "loss", "pair"]
    metrics: tuple[str, ...]
    licence: str
    get: str
    sources: tuple[Source, ...]
    prompt: str = ""
    continuation: str = ""
    choices: tuple[str, ...] = ()  # the same for all items
    shots: int = 0  # examples before each prompt
    max_tokens: int = 0  # generate
    stop: tuple[str, ...] = ()  # generate: texts that end an answer
    answer: str = ""  # generate: a regular expression; its last match (first group, if any) in an output, and in a target, is what exact_match compares
    judge: str = ""  # toxic: a file of words, one a line, or the folder of a run with labels, "FOLDER:CLASS"; as a task's files are found

    def fingerprint(self) -> str:
        """sha256 of what decides the scores."""
        parts = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("where", "licence", "get")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Item(NamedTuple):
    """One question of a task."""
    number: int
    contexts: tuple[str, ...]  # what stands before each continuation; of "generate" the one prompt; of "loss" none
    continuations: tuple[str, ...]  # of "loss" the text itself
    choices: tuple[str, ...]  # texts of the choices, whose lengths normalise
    right: int  # number of the right choice; -1 for other kinds
    references: tuple[str, ...]  # generate: answers that are right
    about: Mapping[str, Any] = {}  # "group", and of BBQ's questions "condition", "biased" (the choice that says the stereotype, -1: none) and "unknown"


def find(names: Sequence[str]) -> list[Task]:
    """The tasks of these names: of the catalogue, "FILE.toml" for all tasks of a file, or "FILE.toml:NAME".

    Raises:
      ValueError: one line: no such task (with the nearest names), or what is wrong with the file.
    """
    found: dict[str, Task] = {}
    for given in names:
        path, _, name = given.partition(".toml")
        if path != given:
            tasks = load(pathlib.Path(f"{path}.toml").expanduser())
            wanted = [_named(tasks, name.removeprefix(":"), f"{path}.toml")] if name.removeprefix(":") else list(tasks.values())
        else:
            wanted = [_named(load(CATALOGUE), given, "the catalogue")]
        for task in wanted:
            if task.name in found and found[task.name] != task:
                raise ValueError(f"two different tasks are called {task.name}, in {found[task.name].where} and {task.where}: rename one, or evaluate "
                                 "them apart")
            found[task.name] = task
    return list(found.values())


def _named(tasks: Mapping[str, Task], name: str, where: str) -> Task:
    if name in tasks:
        return tasks[name]
    near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.4)
    raise ValueError(f"there is no task {name!r} in {where}" + (f"; did you mean {' or '.join(near)}?" if near else "") +
                     f" It has {', '.join(sorted(tasks))}; your own: give its .toml file")


def load(path: pathlib.Path) -> dict[str, Task]:
    """All tasks of a TOML file.

    Raises:
      ValueError: one line that names the file, the task and the key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"task file {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"task file {path} is not TOML: {error}") from None
    if not tables:
        raise ValueError(f"task file {path} defines no task: write a table [NAME]; see jaxlm/evaluate/definition.py")
    return {name: _task(path, name, table) for name, table in tables.items()}


def _task(path: pathlib.Path, name: str, table: Any) -> Task:
    where = f"task {name} in {path}"
    _need(isinstance(table, dict) and bool(_NAME.fullmatch(name)), f"{where}: a task is a table [NAME] of keys")
    _need("kind" in table, f"{where}: no key 'kind'; one of {', '.join(KINDS)}")
    kind = table["kind"]
    _need(kind in KINDS, f"{where}: kind={kind!r} is not known; one of {', '.join(KINDS)}")
    needed = ["metrics", "licence", "get", "from", *(["prompt"] if kind not in ("loss", "pair") else []), *(["max_tokens"] if kind == "generate" else [])]
    known = {f.name: f for f in dataclasses.fields(Task)} | {"from": None}
    for key in table:
        _need(key in known and key not in ("name", "where", "sources"), f"{where}: the key {key!r} does not exist{_near(key, known)}")
    for key in needed:
        _need(key in table, f"{where}: no key {key!r}, which a task of kind {kind!r} needs")
    metrics = table["metrics"]
    _need(isinstance(metrics, list) and bool(metrics), f"{where}: metrics must be a list such as {list(KINDS[kind][2])}")
    for metric in metrics:
        _need(metric in KINDS[kind][2], f"{where}: metric {metric!r} does not go with kind={kind}; its metrics: {', '.join(KINDS[kind][2])}")
    _need("toxic" not in metrics or "judge" in table, f"{where}: no key 'judge', which the metric toxic needs: a file of words or the workdir of a classifier")
    _need(isinstance(table["from"], list) and bool(table["from"]), f"{where}: 'from' must be one or more tables [[{name}.from]]")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "from"}
    values.setdefault("continuation", " {choice}" if kind == "choice" else " {target}")
    for key, value in values.items():
        default = getattr(Task, key, "" if key in ("kind", "licence", "get", "metrics") else None)
        expected = tuple if key in ("metrics", "choices", "stop") else type(default)
        _need(type(value) is expected and (expected is not tuple or all(isinstance(part, str) for part in value)),
              f"{where}: {key}={value!r} must be {'a list of texts' if expected is tuple else 'a whole number' if expected is int else 'text'}")
    for key in ("shots", "max_tokens"):
        _need(values.get(key, 1) >= (key == "max_tokens"), f"{where}: {key}={values.get(key)} is too small")
    for pattern in filter(None, [values.get("answer")]):
        _pattern(where, "answer", pattern)
    sources = tuple(_source(f"{where}, from {i}", kind, values, entry) for i, entry in enumerate(table["from"], 1))
    return Task(name=name, where=str(path), sources=sources, **values)


def _source(where: str, kind: str, task: Mapping[str, Any], table: Any) -> Source:
    known = {f.name: f for f in dataclasses.fields(Source)}
    _need(isinstance(table, dict), f"{where}: must be a table")
    for key, value in table.items():
        _need(key in known, f"{where}: the key {key!r} does not exist{_near(key, known)}")
        kind_of = dict if key == "fields" else type(getattr(Source, key))
        _need(type(value) is kind_of, f"{where}: {key}={value!r} must be {'a table' if kind_of is dict else 'a whole number' if kind_of is int else 'text'}")
    _need(("file" in table) != ("tfds" in table), f"{where}: give either 'file' or 'tfds'")
    _need(table.get("lines", 1) > 0, f"{where}: lines={table.get('lines')} must be positive")
    _pattern(where, "split", table.get("split", ""))
    fields = table.get("fields", {})
    for name, spec in fields.items():
        for part in spec if isinstance(spec, list) else [spec]:
            _check_field(f"{where}, field {name}", part)
    if fields:
        needed = {*needs(kind, task["metrics"]), *_HOLE.findall(table.get("prompt") or task.get("prompt", "")),
                  *_HOLE.findall(task["continuation"] * (kind in ("choice", "cloze")))}
        for name in sorted(needed - {"choice"} - ({"choices"} if task.get("choices") else set()) - set(fields)):
            _need(False, f"{where}: no field {name!r}, which the task's prompt or kind needs; its fields: {', '.join(fields)}")
    return Source(**table)


def needs(kind: str, metrics: Sequence[str]) -> tuple[str, ...]:
    """The fields that each item of a task must have."""
    found = tuple(name for name in KINDS[kind][1] if not (kind == "generate" and tuple(metrics) == ("toxic",)))
    return found + BIAS_FIELDS * any(metric.endswith("ambiguous") or metric.endswith("disambiguated") for metric in metrics)


def _check_field(where: str, spec: Any) -> None:
    if isinstance(spec, str):
        return
    _need(isinstance(spec, dict) and "at" in spec and set(spec) <= {"at", "find", "all", "replace"},
          f"{where}: must be a place in the record, a list of places, or {{at, find, all, replace}}")
    for pattern in [*([spec["find"]] if "find" in spec else []), *(pair[0] for pair in spec.get("replace", []))]:
        _pattern(where, "find", pattern)


def _pattern(where: str, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{where}: {key}={str(pattern)[:100]!r} is not a regular expression: {error}") from None


def _near(key: str, known) -> str:
    near = difflib.get_close_matches(key, [name for name in known if name not in ("name", "where", "sources")], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


# --- records to items ---


def items(task: Task, source: Source, records: Sequence[Mapping[str, Any]], where: str) -> list[Item]:
    """The items of a task's records, numbered from 0.

    Raises:
      ValueError: one line that names the file and the item: a field is missing, or the target is not among the choices; or there are no items.
    """
    _need(len(records) > 0, f"{where} holds no item of task {task.name}")
    return [_item(task, source, record, number, f"{where}, item {number}") for number, record in enumerate(records)]


def _item(task: Task, source: Source, record: Mapping[str, Any], number: int, where: str) -> Item:
    fields = {name: _value(record, spec, where) for name, spec in source.fields.items()} if source.fields else dict(record)
    if task.choices:
        fields["choices"] = list(task.choices)
    for name in needs(task.kind, task.metrics):
        _need(name in fields, f"{where}: no field {name!r}; its fields: {', '.join(fields)}")
    about = {"group": str(fields["group"])} if isinstance(fields.get("group"), (str, int)) else {}
    prompt = source.prompt or task.prompt
    if task.kind == "pair":
        texts = tuple(_text(fields[name], where, name) for name in ("more", "less"))
        _need(texts[0] != texts[1] and all(text.strip() for text in texts), f"{where}: 'more' and 'less' must be two different texts")
        return Item(number, ("", ""), texts, (), 0, (), about)
    if task.kind == "loss":
        return Item(number, (), (_text(fields["text"], where, "text"),), (), -1, ())
    if task.kind == "choice":
        choices = tuple(_text(choice, where, "choices") for choice in fields["choices"])
        _need(len(choices) > 1, f"{where}: {len(choices)} choices; at least 2 are needed")
        right = _target(fields["target"], choices, fields.get("labels"), source.first, where)
        filled = [fields | {"choice": choice} for choice in choices]
        continuations = tuple(_fill(task.continuation, values, where) for values in filled)
        for choice, continuation in zip(choices, continuations):
            _need(bool(continuation.strip()), f"{where}: the choice {choice!r} is empty")
        about |= _biased(fields, where) if "condition" in needs(task.kind, task.metrics) else {}
        return Item(number, tuple(_fill(prompt, values, where) for values in filled), continuations, choices, right, (), about)
    context = _fill(prompt, fields, where)
    if "target" not in needs(task.kind, task.metrics):
        return Item(number, (context,), (), (), -1, (), about)
    target = fields["target"]
    references = tuple(_text(one, where, "target") for one in (target if isinstance(target, (list, tuple)) else [target]))
    _need(bool(references), f"{where}: no target")
    continuation = _fill(task.continuation, fields | {"target": references[0]}, where)
    _need(bool(continuation.strip()), f"{where}: the target is empty")
    return Item(number, (context,), (continuation,), (), -1, references if task.kind == "generate" else (), about)


def _biased(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Which choice of a question as in BBQ says the stereotype (Parrish et al. 2022). A group is told by any of its names or their parts: "F-Black" by "Black",
    "lowSES" by "low SES". Where not exactly one choice names a stereotyped group none is known to, and the item counts for accuracy alone."""
    groups, stereotyped = fields["groups"], fields["stereotyped"]
    stereotyped = [stereotyped] if isinstance(stereotyped, str) else stereotyped
    _need(isinstance(groups, list) and len(groups) == len(fields["choices"]), f"{where}: 'groups' must be a list with the groups of each choice")
    _need(fields["condition"] in ("ambig", "disambig") and fields["polarity"] in ("neg", "nonneg"),
          f"{where}: condition={fields['condition']!r} and polarity={fields['polarity']!r} must be ambig or disambig, and neg or nonneg")
    plain = lambda name: re.sub(r"\W+", "", str(name).lower())
    names = [{plain(part) for name in ([group] if isinstance(group, str) else group) for part in [str(name), *str(name).split("-")]} for group in groups]
    unknown = next((i for i, some in enumerate(names) if "unknown" in some), -1)
    told = [i for i, some in enumerate(names) if some & {plain(name) for name in stereotyped} and i != unknown]
    others = [i for i in range(len(names)) if i != unknown and i not in told]
    biased = -1 if len(told) != 1 or len(others) != 1 else told[0] if fields["polarity"] == "neg" else others[0]
    return {"condition": fields["condition"], "biased": biased, "unknown": unknown}


def _value(record: Any, spec: Any, where: str) -> Any:
    if isinstance(spec, list):
        return [_value(record, part, where) for part in spec]
    if isinstance(spec, str):
        return _at(record, spec.split("."), spec, where)
    value = _value(record, spec["at"], where)
    if "find" in spec:
        found = [match[1 if match.re.groups else 0] for match in re.finditer(spec["find"], _text(value, where, spec["at"]))]
        _need(bool(found), f"{where}: {spec['at']!r} does not match {spec['find']!r}: {str(value)[:60]!r}")
        value = found if spec.get("all") else found[0]
    for pattern, new in spec.get("replace", []):
        value = [re.sub(pattern, new, part) for part in value] if isinstance(value, list) else re.sub(pattern, new, _text(value, where, spec["at"]))
    return value


def _at(value: Any, path: list[str], whole: str, where: str) -> Any:
    for depth, key in enumerate(path):
        if key == "*" and isinstance(value, list):
            return [_at(one, path[depth + 1:], whole, where) for one in value]
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            there = ", ".join(map(repr, list(value)[:10])) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise ValueError(f"{where}: no field {whole!r}; there: {there}")
    return value


def _text(value: Any, where: str, name: str) -> str:
    _need(isinstance(value, (str, int, float)) and not isinstance(value, bool), f"{where}: {name!r} is {str(value)[:40]!r}, not text")
    return str(value)


def _fill(template: str, fields: Mapping[str, Any], where: str) -> str:
    def one(match: re.Match) -> str:
        _need(match[1] in fields, f"{where}: no field {match[1]!r}, which the prompt needs; its fields: {', '.join(fields)}")
        return _text(fields[match[1]], where, match[1])

    return _HOLE.sub(one, template)


def _target(target: Any, choices: Sequence[str], labels: Any, first: int, where: str) -> int:
    """The number of the right choice, from 0."""
    if isinstance(labels, (list, tuple)) and target in labels:
        return list(labels).index(target)
    if isinstance(target, str) and not target.strip().lstrip("-").isdigit():
        if target in choices:
            return list(choices).index(target)
        letter = target.strip().upper()
        if len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(choices):
            return ord(letter) - ord("A")
        raise ValueError(f"{where}: the target {target[:40]!r} is none of the {len(choices)} choices, their numbers or letters")
    _need(isinstance(target, (str, int)), f"{where}: the target {target!r} is not the number, letter or text of a choice")
    index = int(target) - first
    _need(0 <= index < len(choices), f"{where}: the target is choice {int(target)}, and there are {len(choices)} choices, numbered from {first}")
    return index


def with_examples(task: Task, asked: Sequence[Item], examples: Sequence[Item], shots: int) -> list[Item]:
    """The items with the first `shots` examples, prompts with their right answers, before each prompt, a blank line between.

    Raises:
      ValueError: one line: there are too few examples.
    """
    if not shots:
        return list(asked)
    _need(task.kind not in ("loss", "pair") and "target" in needs(task.kind, task.metrics),
          f"task {task.name} asks for nothing, so examples mean nothing to it: leave --shots out")
    _need(len(examples) >= shots, f"task {task.name} has {len(examples)} examples and --shots={shots} needs more: give 'examples' in its [[{task.name}.from]]")
    shown = "".join(f"{one.contexts[max(one.right, 0)]}{one.continuations[max(one.right, 0)]}\n\n" for one in examples[:shots])
    return [one._replace(contexts=tuple(shown + context for context in one.contexts)) for one in asked]
