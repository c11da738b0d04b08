"""Records of chats and of preferences, as people write them, in one form.

A chat is `messages` (a list of {"role", "content"}), ShareGPT's `conversations` (a list of {"from", "value"}), or `instruction` with an `input` that may be
empty and the `output`. A preference has `chosen` and `rejected` answers (text, or messages of which the last is the answer) to a `prompt` (text or messages)
or to an `instruction` with its `input`. What goes on through preparation is JSON:

    {"messages": [...]}        {"prompt": [...], "chosen": "...", "rejected": "..."}
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxlm.data import chat

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant", "system": "system",
             "tool": "tool", "observation": "tool"}

Messages = list[dict[str, str]]


def canonical(record: Mapping[str, Any], form: str) -> str:
    """A record in the one form, as JSON.

    Args:
      form: "chat" or "preference".

    Raises:
      ValueError: one line: fields that are missing, empty or of another kind.
    """
    if form == "chat":
        content: dict[str, Any] = {"messages": _chat(record)}
    else:
        content = _preference(record)
    return json.dumps(content, ensure_ascii=False)


def sides(text: str) -> list[Messages]:
    """The conversations of a canonical record: one of a chat; of a preference that with the chosen and that with the rejected answer."""
    record = json.loads(text)
    if "messages" in record:
        return [record["messages"]]
    return [[*record["prompt"], {"role": "assistant", "content": record[name]}] for name in ("chosen", "rejected")]


def _chat(record: Mapping[str, Any]) -> Messages:
    if "messages" in record:
        messages = _messages(record["messages"], "messages")
    elif "conversations" in record:
        messages = _messages(record["conversations"], "conversations")
    elif "instruction" in record:
        messages = [*_asked(record), {"role": "assistant", "content": _text(record, "output")}]
    else:
        raise ValueError(f"no chat: it needs 'messages', 'conversations' or 'instruction' with 'output', and its keys are {_keys(record)}")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise ValueError("the assistant says nothing in this chat: there is nothing to learn")
    return messages


def _preference(record: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("chosen", "rejected"):
        if key not in record:
            raise ValueError(f"no {key!r}: a preference has a prompt with a chosen and a rejected answer, and its keys are {_keys(record)}")
    answers, before = {}, []
    for key in ("chosen", "rejected"):
        if isinstance(record[key], str):
            answers[key] = _text(record, key)
        else:
            *context, last = _messages(record[key], key)
            if last["role"] != "assistant":
                raise ValueError(f"{key!r} must end with a message of the assistant, not of {last['role']}")
            answers[key], before = last["content"], [*before, context]
    if "prompt" in record:
        prompt = [{"role": "user", "content": _text(record, "prompt")}] if isinstance(record["prompt"], str) else _messages(record["prompt"], "prompt")
    elif "instruction" in record:
        prompt = _asked(record)
    elif len(before) == 2 and before[0] == before[1] and before[0]:
        prompt = before[0]
    else:
        raise ValueError(f"no 'prompt', and 'chosen' and 'rejected' do not begin alike: its keys are {_keys(record)}")
    if answers["chosen"] == answers["rejected"]:
        raise ValueError("the chosen and the rejected answer are the same: take the pair out, or set data.on_error=skip")
    return {"prompt": prompt} | answers


def _asked(record: Mapping[str, Any]) -> Messages:
    more = record.get("input") or ""
    if not isinstance(more, str):
        raise ValueError(f"'input' is {json.dumps(more)[:40]}, not text")
    system = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    return [*system, {"role": "user", "content": _text(record, "instruction") + (f"\n\n{more}" if more.strip() else "")}]


def _messages(value: Any, key: str) -> Messages:
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise ValueError(f"{key!r} is {json.dumps(value)[:40]}, not a list of messages")
    found = []
    for message in value:
        if "from" in message:
            speaker = message["from"]
            if not isinstance(speaker, str) or speaker not in _SPEAKERS:
                raise ValueError(f"{key!r} has a turn from {json.dumps(speaker)[:40]}; known: {', '.join(_SPEAKERS)}")
            message = {"role": _SPEAKERS[speaker], "content": message.get("value")}
        found.append({name: message.get(name) for name in ("role", "content")})
    return [dict(message) for message in chat.checked(found)]


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record.get(key), str) or not record[key].strip():
        raise ValueError(f"{key!r} is " + ("missing" if key not in record else "empty" if record[key] == "" or isinstance(record[key], str) else
                         f"{json.dumps(record[key])[:40]}, not text") + f"; its keys: {_keys(record)}")
    return record[key]


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:10])) or "none"
