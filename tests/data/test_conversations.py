"""Chats and preferences from their records to rows: exactly what the assistant says counts, nothing is attended to across chats, mistakes are named."""

import json

import numpy as np
import pytest

from jaxlm import config
from jaxlm.data import conversations, loader, prepare, rows, tokenizer

TURNS = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</{{ m.role[0] }}>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def corpus(tmp_path, records, form, length=64, template=TURNS, name="data", **more):
    (tmp_path / "t.jinja").write_text(template)
    (tmp_path / "records.json").write_text(records if isinstance(records, str) else json.dumps(records))
    cfg = config.build({
        "data": {"source": (str(tmp_path / "records.json"),), "format": form, "chat_template": str(tmp_path / "t.jinja"), "sequence_length": length,
                 "batch_size": 2, "validation": 0.2, "test": 0.0, "threads": 0, **more},
        "tokenizer": {"kind": "bytes"}, "objective": {"name": {"chat": "sft"}.get(form, form)}})
    found = prepare.prepare(cfg.data, cfg.tokenizer, tmp_path / name, log=lambda line: None)
    tok = tokenizer.load(found.tokenizer_path)
    return cfg, found, tok, rows.build(cfg, tok, found)


def pieces(tok, batch):
    """Of each segment of each row the text of its tokens and that of its learned targets."""
    out = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            at = batch["segments"][row] == segment
            assert np.array_equal(batch["positions"][row][at], np.arange(at.sum()))
            learned = at & (batch["weights"][row] > 0)
            out.append((tok.decode([*batch["tokens"][row][at], batch["targets"][row][at][-1]]), tok.decode(batch["targets"][row][learned])))
    return out


def test_chats_of_all_kinds(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}, {"role": "user", "content": "and?"},
                             {"role": "assistant", "content": "no"}]} for i in range(10)]
    records += [{"conversations": [{"from": "human", "value": f"h{i}"}, {"from": "gpt", "value": f"g{i}"}]} for i in range(10)]
    records += [{"instruction": f"i{i}", "input": "x" * (i % 2), "output": f"o{i}"} for i in range(10)]
    cfg, found, tok, task = corpus(tmp_path, records, "chat")
    expected = {}
    for record in records:
        [messages] = conversations.sides(conversations.canonical(record, "chat"))
        text = "".join(f"<{m['role'][0]}>{m['content']}</{m['role'][0]}>" for m in messages)
        expected[text] = "".join(f"{m['content']}</a>" for m in messages if m["role"] == "assistant")
    count = len(found.splits["train"].tokens)
    size = loader.epoch_size(found, "train", task, 2)
    steps = -(-size.rows // 2)
    batches = loader.batches(found, "train", task, batch_size=2, seed=0, start_step=0, stop_step=steps, threads=0)
    seen = [piece for _, batch in batches for piece in pieces(tok, batch)]
    assert all(expected[text] == said for text, said in seen) and len({text for text, _ in seen}) == count
    held = [piece for batch in loader.evaluation_batches(found, "validation", task, batch_size=2, overlap=0.5, threads=0) for piece in pieces(tok, batch)]
    assert sorted(text for text, _ in held) == sorted(set(expected) - {text for text, _ in seen}) and all(expected[text] == said for text, said in held)
    documents = np.arange(len(found.splits["validation"].tokens))
    assert rows.evaluation_targets(task, found.splits["validation"], documents).sum() == sum(len(said) for _, said in held)
    assert found.manifest["chat_template"] == TURNS and rows.notes(task, found.splits["train"]) == []


def test_long_chats_lose_their_end(tmp_path):
    records = [{"instruction": "i" * (5 * i + 1), "output": f"o{i}" * 3} for i in range(12)]
    cfg, found, tok, task = corpus(tmp_path, records, "chat", length=40)
    batch = rows.fill(task, [[piece] for piece in _first_pieces(task, found)], found, "train", 0)
    assert all(len(text) <= 41 and said for text, said in pieces(tok, batch))
    [note] = rows.notes(task, found.splits["train"])
    left = len(found.splits["train"].tokens) - len(pieces(tok, batch))
    assert left > 0 and f"of {left} nothing is left" in note
    with pytest.raises(ValueError, match="nothing that an assistant says is left in rows of data.sequence_length=4 tokens"):
        rows.build(config.build({"data": {"sequence_length": 4}, "objective": {"name": "sft"}}), tok, found)


def _first_pieces(task, found):
    from jaxlm.data.pack import Piece
    return [Piece(*piece) for piece in rows._items(task, found.splits["train"], None)[0].tolist()]


def test_preferences(tmp_path):
    records = [{"instruction": f"i{i}", "input": "", "output": "x", "chosen": f"good{i}", "rejected": f"bad{i}" * (1 + i % 3)} for i in range(20)]
    records += [{"prompt": [{"role": "user", "content": f"p{i}"}], "chosen": [{"role": "assistant", "content": "yes"}], "rejected": "no"} for i in range(5)]
    cfg, found, tok, task = corpus(tmp_path, records, "preference", length=128)
    size = loader.epoch_size(found, "train", task, 2)
    seen = set()
    for _, batch in loader.batches(found, "train", task, batch_size=2, seed=0, start_step=0, stop_step=-(-size.rows // 2), threads=0):
        for row in range(2):
            parts = pieces(tok, {key: leaf[row:row + 1] for key, leaf in batch.items()})
            assert len(parts) % 2 == 0 and len(parts) // 2 <= config.PAIRS
            for (text, good), (other, bad) in zip(parts[::2], parts[1::2]):
                assert (good.startswith("good") or good == "yes</a>") and (bad.startswith("bad") or bad == "no</a>")
                assert text.removesuffix(good) == other.removesuffix(bad) and text.startswith("<u>")
                seen.add(text)
    assert len(seen) == len(found.splits["train"].tokens)


@pytest.mark.parametrize("record, form, words", [
    ({"text": "hi"}, "chat", "it needs 'messages', 'conversations' or 'instruction'"), ({"instruction": "x", "output": " "}, "chat", "'output' is empty"),
    ({"messages": [{"role": "user", "content": "x"}]}, "chat", "the assistant says nothing"), ({"messages": "hi"}, "chat", "not a list of messages"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "chat", "known: human"), ({"instruction": "x"}, "chat", "'output' is missing"),
    ({"prompt": "x", "chosen": "y"}, "preference", "no 'rejected'"), ({"chosen": "y", "rejected": "z"}, "preference", "no 'prompt'"),
    ({"prompt": "x", "chosen": "y", "rejected": "y"}, "preference", "are the same"),
    ({"prompt": "x", "chosen": [{"role": "user", "content": "y"}], "rejected": "z"}, "preference", "must end with a message of the assistant"),
])
def test_bad_records(tmp_path, record, form, words):
    with pytest.raises(ValueError, match=words) as caught:
        conversations.canonical(record, form)
    assert "\n" not in str(caught.value)


def test_faults_name_the_place(tmp_path):
    good = {"instruction": "x", "output": "y"}
    with pytest.raises(ValueError, match=r"records.json, item 2: 'output' is missing"):
        corpus(tmp_path, [good, {"instruction": "x"}], "chat", name="a")
    with pytest.raises(ValueError, match=r"records.json, line 2: no chat"):
        corpus(tmp_path, json.dumps(good) + '\n{"text": "x"}\n', "chat", name="b")
    with pytest.raises(ValueError, match="came without a chat template"):
        corpus(tmp_path, [good], "chat", name="c", chat_template="", validation=0.0)
    cfg, found, tok, _ = corpus(tmp_path, [good | {"output": f"y{i}"} for i in range(9)], "chat", name="d")
    with pytest.raises(ValueError, match="was prepared with data.format=chat, and objective.name=next_token needs data.format=text"):
        rows.build(config.build({}), tok, found)
    with pytest.raises(ValueError, match="learns from data.format=chat, not preference"):
        config.build({"data": {"format": "preference"}, "objective": {"name": "sft"}})
    with pytest.raises(ValueError, match="would tear messages apart"):
        config.build({"data": {"format": "chat"}, "objective": {"name": "sft"}, "clean": {"repair": True}})
