"""Chats as text and as tokens: templates (ChatML, Llama 3, Gemma, or any Jinja text), and which of the tokens an assistant said.

A template is a program that comes with a checkpoint: it runs in a sandbox of which sandbox.py says what is bounded.

A special token that is spelled out in a message is text, so that no message can end its turn or speak for another; those of the template itself are tokens.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data import sandbox
from jaxlm.data.tokenizer import Tokenizer

FILE = "chat_template.jinja"
ROLES = ("system", "user", "assistant", "tool")

_LARGEST = 1 << 18  # characters of a template; the longest published ones have some 20,000

# The formats of OpenAI's ChatML, of Llama 3 (Dubey et al. 2024, model card) and of Gemma (model card: no system turn, it opens the first user's).
BUILT_IN = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% set ns = namespace(before='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
             "{% set ns.before = m['content'] | trim + '\\n\\n' %}{% else %}"
             "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + ns.before + m['content'] | trim + '<end_of_turn>\\n' }}"
             "{% set ns.before = '' %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
}


@dataclass(frozen=True)
class Template:
    """A chat template. Messages are dicts with `role` and `content`, both text."""

    jinja: str
    tokens: tuple[tuple[str, str], ...] = ()  # what the template may name: ("bos_token", "<s>") ...
    name: str = "the chat template"

    def render(self, messages: Sequence[Mapping[str, Any]], generate: bool = False) -> str:
        """The chat as text; `generate`: up to where the assistant begins to speak.

        Raises:
          ValueError: one line: messages that are none, or what the template refuses or does wrong.
        """
        return "".join(text for text, _ in self._run(messages, generate))

    def spans(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        """The same text in pieces, and of each whether the assistant said it: what a model learns to say, with what ends the turn.

        They begin where `render(..., generate=True)` ends. A template that marks them (`{% generation %}`, as in transformers) is believed; of any other the
        text of every assistant's turn is what comes to the text before it.

        Raises:
          ValueError: one line: also, no assistant speaks, or the template writes nothing of that, or earlier turns differently when others follow.
        """
        if not any(message.get("role") == "assistant" for message in checked(messages)):
            raise ValueError("a chat without a turn of the assistant has nothing to learn from: its roles are "
                             f"{', '.join(str(message['role']) for message in messages)}")
        marked = re.search(r"\{%-?\s*generation\b", self.jinja)
        found = _joined(self._run(messages, False)) if marked else self._told(messages)
        if not any(said for _, said in found) and any(message["content"].strip() for message in messages if message["role"] == "assistant"):
            raise ValueError(f"{self.name} writes nothing of what the assistant says: mend it, or set data.chat_template=chatml, llama3 or gemma")
        return found

    def _told(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        """The spans of a template that does not mark them."""
        whole, pieces, done = self.render(messages), [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.render(messages[:number], generate=True), self.render(messages[:number + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(f"{self.name} writes turn {number + 1} in another way when others follow, or after another beginning than it generates from, so "
                                 "what the assistant says cannot be told from the rest: mark it in the template with {% generation %} ... {% endgeneration %}, "
                                 "or set data.chat_template=chatml, llama3 or gemma")
            said = after[len(before):]
            kept = said.rstrip()
            if kept != message["content"].rstrip():  # else white space is all that ends the turn
                said = kept
            pieces += [(whole[done:len(before)], False), (said, True)]
            done = len(before) + len(said)
        return _joined([*pieces, (whole[done:], False)])

    @functools.cached_property
    def end_of_turn(self) -> str:
        """What ends an assistant's turn, "<|im_end|>" for example: where generation stops."""
        content = "Yes."
        said = [text for text, learned in self.spans([{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": content}]) if learned]
        return said[-1].rpartition(content)[2]

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], generate: bool = False) -> np.ndarray:
        """Token ids of `render`, int32; special tokens in the messages are spelled out."""
        return np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in self._tokens(tokenizer, messages, lambda m: [(self.render(m, generate), False)]))])

    def encode_spans(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the chat, int32 `[n]`, and whether the assistant said each, bool `[n]`. Each span is encoded by itself, as a prompt and what is generated
        after it are."""
        parts = self._tokens(tokenizer, messages, self.spans)
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in parts)])
        return ids, np.concatenate([np.zeros(0, bool), *(np.full(len(ids), said) for ids, said in parts)])

    def _tokens(self, tokenizer: Tokenizer, messages, spans) -> list[tuple[np.ndarray, bool]]:
        """Ids of each span. Special tokens that messages spell out pass through the template as single characters that no message holds."""
        found = sorted((text for text in tokenizer.special_tokens if text), key=len, reverse=True)
        contents = "".join(message["content"] for message in checked(messages))
        present = [text for text in found if text in contents]
        if not present:
            texts = [(text, said, True) for text, said in spans(messages)]
        else:
            free = (chr(code) for code in range(0x10F000, 0x10FFFE) if chr(code) not in contents)
            stand_in = dict(zip(present, free))
            pattern = re.compile("|".join(map(re.escape, present)))
            hidden = [{**message, "content": pattern.sub(lambda match: stand_in[match[0]], message["content"])} for message in messages]
            back = {character: text for text, character in stand_in.items()}
            cut = re.compile(f"([{''.join(back)}])")
            texts = [(back.get(part, part), said, part not in back) for text, said in spans(hidden) for part in cut.split(text) if part]
        ids = iter(tokenizer.encode_batch([text for text, _, special in texts if special], special=True))
        return [(next(ids) if special else np.array(tokenizer.encode(text), np.int32), said) for text, said, special in texts]

    def _run(self, messages: Sequence[Mapping[str, Any]], generate: bool) -> list[tuple[str, bool]]:
        chat = [dict(message) for message in checked(messages)]
        try:
            return sandbox.run(self.jinja, messages=chat, add_generation_prompt=generate, **dict(self.tokens))
        except ValueError as error:
            raise ValueError(f"{self.name} {error}") from None


def template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """A template by its name ("chatml", "llama3", "gemma"), its Jinja text, or the path of a .jinja file; "": the one that came with the tokenizer.

    Args:
      tokenizer: whose template it may be, and whose special tokens a template may name.

    Raises:
      ValueError: one line: none of these, or there is no template to take.
    """
    tokens = ()
    if tokenizer is not None:
        named = {i: text for text, i in tokenizer.special_tokens.items()}
        tokens = tuple((key, named.get(i, "")) for key, i in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos), ("pad_token", tokenizer.pad)))
    if name in BUILT_IN:
        return Template(BUILT_IN[name], tokens, f"the chat template {name}")
    if "{{" in name or "{%" in name:
        return _bounded(Template(name, tokens))
    if not name:
        if tokenizer is None or not tokenizer.chat_template:
            raise ValueError("the tokenizer came without a chat template: set data.chat_template=chatml, llama3 or gemma, or to a .jinja file")
        return _bounded(Template(tokenizer.chat_template, tokens, "the chat template of the checkpoint"))
    path = Path(name).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        raise ValueError(f"data.chat_template={name!r} is no template: allowed are {', '.join(BUILT_IN)}, the path of a .jinja file, or nothing for the "
                         "checkpoint's own")
    return _bounded(Template(path.read_text(encoding="utf-8"), tokens, str(path)))


def _bounded(found: Template) -> Template:
    if len(found.jinja) > _LARGEST:
        raise ValueError(f"{found.name} has {len(found.jinja):,} characters, more than the {_LARGEST:,} that are believable")
    return found


def checked(messages: Any) -> Sequence[Mapping[str, Any]]:
    """`messages` as they are.

    Raises:
      ValueError: one line: not a list of messages with a known role and text.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"a chat is a list of messages, not {json.dumps(messages, default=str)[:60]}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, Mapping) else message
            raise ValueError(f"message {number} has the role {json.dumps(role, default=str)[:40]}; known: {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} ({message['role']}) has no text as its content: {json.dumps(message.get('content'), default=str)[:40]}")
    return messages


def _joined(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Without empty pieces, and neighbours of one kind as one."""
    out: list[tuple[str, bool]] = []
    for text, said in pieces:
        if not text:
            continue
        if out and out[-1][1] == said:
            out[-1] = (out[-1][0] + text, said)
        else:
            out.append((text, said))
    return out
