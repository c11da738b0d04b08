"""The sandbox in which chat templates run. A template is a program that comes with a checkpoint, of anybody's making: it gets at nothing but its arguments and
changes nothing, and what it does is bounded. Home of jinja2: pip install 'jaxlm[chat]'.

Jinja's own sandbox bounds neither memory nor time. Here loops, calls, filters, sums and literals are counted: `STEPS` turns and calls, `LONGEST` characters or
entries in one value (those of lists within lists too, so that ten lists of ten of each other are what they would be spelled out), `MADE` in all values of a
run together, and where none of these stops it, `SECONDS`.
"""

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

STEPS = 100_000
LONGEST = 4 << 20  # characters, or entries
MADE = 16 * LONGEST
SECONDS = 10.0

# Filters that only grow texts or lists, or are not pure.
_NO_USE = ("center", "format", "wordwrap", "xmlattr", "urlize", "pprint", "filesizeformat", "random", "sum", "batch", "slice")
_GROWING = ("ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map", "translate", "encode")  # methods of texts


class State(threading.local):
    """What a template has written in its present run (of each thread), and how much it has done."""

    def begin(self) -> None:
        """A new run: nothing written, nothing counted."""
        self.pieces, self.steps, self.made, self.inside, self.end = [], 0, 0, False, time.monotonic() + SECONDS

    def write(self, text: str) -> None:
        """Text with what `{% generation %}` has marked: between the characters U+FDD0 and U+FDD1, which are no characters of any text."""
        for number, part in enumerate(re.split("([\ufdd0\ufdd1])", text)):
            if number % 2:
                self.inside = part == "\ufdd0"
            elif part:
                self.pieces.append((part, self.inside))

    def step(self, count: int = 1) -> None:
        """Counts turns of a loop, or calls."""
        self.steps += count
        if self.steps > STEPS:
            raise ValueError(f"it counts more than {STEPS:,} times")
        self.late()

    def late(self) -> None:
        """Refuses what takes too long."""
        if time.monotonic() > self.end:
            raise ValueError(f"it takes more than {SECONDS:g} seconds")

    def make(self, value: Any) -> Any:
        """The value, which the template has made."""
        self.made += fits(size(value))
        fits(self.made // (MADE // LONGEST))
        return value


def size(value: Any) -> int:
    """Characters and entries of a value when it is spelled out; counting ends above `LONGEST`."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return LONGEST + 1 if value.bit_length() > 4096 else 0
    found, open_ = 0, [value] if isinstance(value, (list, tuple, dict)) else []
    while open_ and found <= LONGEST:
        inner = open_.pop()
        found += len(inner)
        if found > LONGEST:
            break
        for entry in (*inner, *inner.values()) if isinstance(inner, dict) else inner:
            if isinstance(entry, str):
                found += len(entry)
            elif isinstance(entry, (list, tuple, dict)):
                found += 1
                open_.append(entry)
    return found


def fits(count: int) -> int:
    """`count`, which must not be above `LONGEST`."""
    if count > LONGEST:
        raise ValueError(f"it makes a value of more than {LONGEST:,} characters or entries")
    return count


def run(text: str, **values: Any) -> list[tuple[str, bool]]:
    """What a template writes, in pieces, and of each whether it stands between `{% generation %}` and `{% endgeneration %}`.

    Raises:
      ValueError: one line without the template's name: it is not Jinja, it refuses, does wrong or does too much.
    """
    try:
        import jinja2
    except ImportError:
        raise ValueError("cannot be run, which needs the package jinja2: pip install 'jaxlm[chat]'") from None
    try:
        found, state = _program(text)
        state.begin()
        written = 0
        for part in found.generate(**values):
            state.write(part)
            written += len(part)
            if written > LONGEST:
                raise ValueError(f"it writes more than {LONGEST:,} characters")
        return state.pieces
    except (jinja2.TemplateSyntaxError, SyntaxError) as error:  # Python's own: what Jinja made of it cannot be compiled
        raise ValueError(f"is not Jinja: {_line(error.msg if isinstance(error, SyntaxError) else error.message)} (line {error.lineno})") from None
    except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, NameError, AssertionError, RecursionError,
            MemoryError) as error:
        raise ValueError(f"cannot write this chat: {_line(str(error)) or type(error).__name__}") from None


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


@functools.lru_cache(8)
def _program(text: str):
    """The compiled template and its state. Variables and filters are those of transformers' `apply_chat_template`."""
    import jinja2
    from jinja2 import ext, sandbox

    state = State()
    state.begin()  # constants are worked out when a template is compiled

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def _parse(self, *args):
            return _visitor().visit(super()._parse(*args))

        def call_binop(self, context, operator, left, right):
            state.late()
            if operator == "**" or operator == "%" and isinstance(left, str):
                raise ValueError(f"a chat template has no use for {operator}")
            if operator == "*" and isinstance(left, (str, list, tuple)) | isinstance(right, (str, list, tuple)):
                repeated, times = (left, right) if isinstance(left, (str, list, tuple)) else (right, left)
                fits(size(repeated) * times)
            return state.make(super().call_binop(context, operator, left, right))

        def is_safe_attribute(self, obj, attr, value):
            return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in _GROWING)

        def wrap_str_format(self, value):
            return None  # "{:>99999999999}".format(1): the attribute is refused as others are

        def call(self, context, f, *args, **kwargs):
            state.step()
            if isinstance(f, jinja2.runtime.LoopContext):
                args = (counted(args[0]), *args[1:])
            owner, name = getattr(f, "__self__", None), getattr(f, "__name__", "")
            if isinstance(owner, str) and name == "join" and args:
                args = (_joinable(owner, args[0]),)
            if isinstance(owner, str) and name == "replace" and len(args) > 1:
                replaced(owner, *args)
            return state.make(super().call(context, f, *map(weighed, args), **kwargs))

    def weighed(value: Any) -> Any:
        fits(size(value))
        return value

    def counted(values: Any, cost: int = 0) -> Iterable:
        """What a loop goes through, each turn counted with the characters that it writes as they stand in the template."""
        return _Counted(state, values, cost)

    def replaced(text: str, old: str, new: str, count: int | None = None) -> str:
        if len(str(new)) * (len(text) + 1) > LONGEST:
            fits(text.count(str(old)) * len(str(new)))
        return text.replace(str(old), str(new), -1 if count is None else count)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def bounded(work: Callable) -> Callable:
        @functools.wraps(work)
        def filtered(*args, **kwargs):
            state.late()
            for value in (*args, *kwargs.values()):
                weighed(value)
            return state.make(work(*args, **kwargs))
        return filtered

    def at(number: Any, most: int) -> Any:
        if isinstance(number, int) and number > most or isinstance(number, str) and len(number) > most:
            raise ValueError(f"it asks for {str(number)[:20]} where at most {most} are believable")
        return number

    def generation(parser):
        from jinja2 import nodes
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = lambda character: nodes.Output([nodes.TemplateData(character)]).set_lineno(line)
        return [mark("\ufdd0"), *body, mark("\ufdd1")]

    def joined(values, d="", attribute=None) -> str:
        values = values if attribute is None else map(jinja2.filters.make_attrgetter(environment, attribute), values)
        return str(d).join(map(str, _joinable(str(d), values)))

    marks = type("Generation", (ext.Extension,), {"tags": {"generation"}, "parse": lambda self, parser: generation(parser)})
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[marks, ext.loopcontrols], finalize=lambda value: state.make(value))
    theirs = dict(environment.filters)
    ours = {
        "joined": lambda parts: "".join(map(str, parts)), "join": joined, "weighed": weighed, "replace": lambda text, *rest: replaced(str(text), *rest),
        "indent": lambda text, width=4, first=False, blank=False: theirs["indent"](text, at(width, 64), first, blank),
        "tojson": lambda value, ensure_ascii=False, indent=None, **options: json.dumps(value, ensure_ascii=ensure_ascii, indent=at(indent, 64))}
    environment.filters = {name: bounded(work) for name, work in (theirs | ours).items() if name not in _NO_USE}
    environment.filters["counted"] = counted
    # Jinja's own range ends at 100,000: filters such as list and unique take all of one before they can be asked how much it is.
    environment.globals = {name: value for name, value in environment.globals.items() if name in ("dict", "namespace", "cycler", "joiner", "range")} | {
        "raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(at(str(form), 100))}
    return environment.from_string(text), state


def _joinable(separator: str, values: Iterable) -> list:
    """The values as a list that can be joined."""
    found = []
    for value in values:
        found.append(value)
        fits(len(found) * max(1, len(separator)))
    return found


class _Counted:
    """Values that are counted while a loop goes through them."""

    def __init__(self, state: State, values: Any, cost: int):
        self.state, self.values, self.cost = state, values, cost

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self):
        for value in self.values:
            self.state.step()
            self.state.made += self.cost
            fits(self.state.made // (MADE // LONGEST))
            yield value


@functools.cache
def _visitor():
    """Puts filters that count around what Jinja would do unseen: `a ~ b`, lists and dicts that are written out, what loops go through."""
    from jinja2 import nodes, visitor

    def around(node, name: str, *arguments):
        return nodes.Filter(node, name, [nodes.Const(value) for value in arguments], [], None, None).set_lineno(node.lineno)

    class Counts(visitor.NodeTransformer):
        def visit_Concat(self, node, *args, **kwargs):
            self.generic_visit(node, *args, **kwargs)
            return around(nodes.List(node.nodes).set_lineno(node.lineno), "joined")

        def visit_List(self, node, *args, **kwargs):
            self.generic_visit(node, *args, **kwargs)
            return around(node, "weighed") if node.items else node

        def visit_Dict(self, node, *args, **kwargs):
            self.generic_visit(node, *args, **kwargs)
            return around(node, "weighed") if node.items else node

        def visit_Tuple(self, node, *args, **kwargs):
            self.generic_visit(node, *args, **kwargs)
            return around(node, "weighed") if node.items and node.ctx == "load" else node

        def visit_For(self, node, *args, **kwargs):
            cost = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            self.generic_visit(node, *args, **kwargs)
            node.iter = around(node.iter, "counted", cost)
            return node

    return Counts()
