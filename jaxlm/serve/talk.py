"""A chat in the terminal: history, answers as they come, a few commands.

The engine keeps the keys and values of what was said, so a turn feeds only what is new.
"""

import contextlib
import dataclasses
import json
import pathlib
import queue
import readline  # noqa: F401  (lines can be edited and recalled)
from collections.abc import Callable
from typing import TextIO

from jaxlm.data import chat
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate import Settings
from jaxlm.serve.engine import Ask, Engine

Chat = Callable[[list[dict]], tuple[list[int], frozenset[int], tuple[str, ...]]]  # messages -> the prompt's ids, and the tokens and texts that end the answer

HELP = """/again  another answer    /undo  forget the last exchange    /new  begin again    /system TEXT  say who the assistant is (begins again)
/set temperature=0.5  or top_p, top_k, min_p, repetition_penalty, seed    /save FILE  add the chat to a .jsonl that jaxlm train reads    /exit  or Ctrl-D
Ctrl-C stops an answer."""


def chatting(tokenizer: Tokenizer, template: str = "") -> Chat:
    """How this tokenizer's model is talked to; `template` as `chat.template` takes it.

    Raises:
      ValueError: one line, there is no such template.
    """
    found = chat.template(template, tokenizer)
    end = found.end_of_turn.strip()
    special = tokenizer.special_tokens.get(end)
    ends = (frozenset(), (end,) if end else ()) if special is None else (frozenset({special}), ())
    return lambda messages: (found.encode(tokenizer, messages, generate=True).tolist(), *ends)


def talk(engine: Engine, encode: Chat, settings: Settings, max_tokens: int, system: str, out: TextIO, ask: Callable[[str], str] = input) -> None:
    """Talks until the user ends it.

    Args:
      max_tokens: longest answer.
      system: what the assistant is told first; empty: nothing.
      ask: reads a line after a prompt; EOFError ends the chat.
    """
    begin = lambda text: [{"role": "system", "content": text}] if text else []
    messages = begin(system)
    while True:
        try:
            line = ask("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            out.write("\n")
            return
        command, _, rest = line.partition(" ")
        said = [i for i, message in enumerate(messages) if message["role"] == "user"]
        try:
            if command == "/exit":
                return
            if command == "/new":
                messages = begin(system)
            elif command == "/system":
                system, messages = rest, begin(rest)
            elif command == "/undo" and said:
                del messages[said[-1]:]
            elif command == "/set":
                settings = _changed(settings, rest)
            elif command == "/save" and rest:
                _save(pathlib.Path(rest).expanduser(), messages)
            elif command == "/again" and said:
                settings = dataclasses.replace(settings, seed=(settings.seed + 1) % 2**32)
                messages = _turn(engine, encode, settings, max_tokens, messages[:said[-1] + 1], out)
            elif command.startswith("/"):
                out.write(HELP + "\n")
            elif line:
                messages = _turn(engine, encode, settings, max_tokens, [*messages, {"role": "user", "content": line}], out)
        except (ValueError, OSError) as error:
            out.write(f"jaxlm: {error}\n")


def _turn(engine: Engine, encode: Chat, settings: Settings, max_tokens: int, messages: list[dict], out: TextIO) -> list[dict]:
    """Prints the answer as it comes; returns the chat with it. The oldest exchanges are forgotten when the model's context is too short."""
    first = int(messages[0]["role"] == "system")
    while len((ids_ends := encode(messages))[0]) + max_tokens > engine.context and len(messages) > first + 1:
        messages = messages[:first] + messages[first + 2:]
        out.write("(the beginning of the chat is forgotten: the model's context is full)\n")
    ids, stop_ids, stop = ids_ends
    heard: queue.Queue = queue.Queue()
    asked = Ask(ids, max(1, min(max_tokens, engine.context - len(ids))), settings, stop=stop, stop_ids=stop_ids | {engine.tokenizer.eos})
    rows, text, piece = engine.submit([asked], [heard.put]), "", None
    while piece is None or not piece.finish:
        try:
            piece = heard.get()
        except KeyboardInterrupt:
            engine.cancel(rows)
            continue
        with contextlib.suppress(KeyboardInterrupt):
            out.write(piece.text)
            out.flush()
        text += piece.text
    out.write("\n" if piece.finish != "error" else f"\njaxlm: {engine.stats.error}\n")
    return [*messages, {"role": "assistant", "content": text}]


def _changed(settings: Settings, text: str) -> Settings:
    name, equals, value = text.partition("=")
    kinds = {field.name: type(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    if not equals or name.strip() not in kinds:
        raise ValueError(f"/set {text}: write /set NAME=VALUE with one of {', '.join(kinds)}")
    return dataclasses.replace(settings, **{name.strip(): kinds[name.strip()](value)})


def _save(path: pathlib.Path, messages: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
