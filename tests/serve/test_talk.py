"""The chat in the terminal: what is remembered, what the commands do."""

import io
import json

from jaxlm.generate import Settings
from jaxlm.serve import talk
from jaxlm.serve.engine import Engine
from tests.serve import live


def test_a_chat_remembers_and_obeys(tmp_path):
    model, params = live.model(live.DECODER)
    engine, seen = Engine(model, params, live.DECODER, live.BYTES, live.LIMITS), []
    chatml = talk.chatting(live.BYTES, "chatml")
    encode = lambda messages: seen.append(list(messages)) or chatml(messages)

    def run(*lines):
        given, out = iter(lines), io.StringIO()

        def ask(prompt):
            try:
                return next(given)
            except StopIteration:
                raise EOFError from None

        seen.clear()
        talk.talk(engine, encode, Settings(temperature=0.0), 8, "Be kind.", out, ask)
        return out.getvalue()

    out = run("Hi", "More", "/again", "/undo", "/set temperature=1.5", "Ha", f"/save {tmp_path}/chat.jsonl", "/new", "Hi", "/exit", "never")
    roles = [[message["role"][0] for message in messages] for messages in seen]
    assert roles == [["s", "u"], ["s", "u", "a", "u"], ["s", "u", "a", "u"], ["s", "u", "a", "u"], ["s", "u"]]
    assert seen[3][-1]["content"] == "Ha" and seen[1][2] == seen[3][2] and seen[1][2]["content"] in out
    kept = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert kept[:-1] == seen[3] and kept[-1]["role"] == "assistant"
    out = run("/help", "/set heat=3", "/save", "x" * 600, "y" * 150, "z" * 150, "w" * 150)
    assert "/again" in out and "/set heat=3: write /set NAME=VALUE" in out and "prompt has" in out and "the beginning of the chat is forgotten" in out
    engine.close()
