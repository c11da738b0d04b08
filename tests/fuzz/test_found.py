"""What fuzzing and reading the code have found, one case each: it ended in a traceback, or took memory or time without bound."""

import gzip
import io
import json
import time
import zipfile

import numpy as np
import pytest

from jaxlm import cli
from jaxlm.data import chat, readers, shards, tokenizer
from jaxlm.evaluate import definition, sources
from jaxlm.interop import hf_config
from tests.fuzz import targets

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("text", [text for text in targets.HOSTILE if "1000" in text or "9999" in text or "9000" in text])
def test_a_template_neither_grows_nor_takes_time(text):
    begun = time.process_time()
    try:
        assert len(chat.Template(text).render(CHAT)) < 1 << 20
    except ValueError as error:
        assert "\n" not in str(error)
    assert time.process_time() - begun < 3


@pytest.mark.parametrize("text, words", [
    ("{{ '{:>99999999999}'.format(1) }}", "attribute 'format'"), ("{{ ([''] * 100000) | join('x' * 100000) }}", "makes a value of more than"),
    ("{{ 'x' | indent(1000000000) }}", "at most 64 are believable"), ("{{ messages | tojson(indent=1000000000) }}", "at most 64 are believable"),
    ("{% for a in 'x' * 999999 %}{% for b in 'x' * 999999 %}{% endfor %}{% endfor %}", "counts more than 100,000 times"),
    ("{% set a = ['x'] * 2000 %}{% set b = [a, a, a] * 999 %}{{ b ~ '' }}", "makes a value of more than"),
    ("{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}", "makes a value of more than"),
    ("{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}", "writes more than|makes a value of more than"),
    ("{% set y %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endset %}", "makes a value of more than"),
    ("{% set ns = namespace(l=[]) %}{% for i in range(999) %}{% set ns.l = ns.l + ['x' * 999999 ~ i] %}{% endfor %}", "makes a value of more than"),
    ("{% break %}", "is not Jinja"),
])
def test_a_template_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        chat.Template(text).render(CHAT)


def test_a_template_that_only_takes_time_ends(monkeypatch):
    monkeypatch.setattr("jaxlm.data.sandbox.SECONDS", 0.2)
    with pytest.raises(ValueError, match="takes more than 0.2 seconds"):
        chat.Template("{% set x = 'ab' * 1000000 %}{% for i in range(99999) %}{{ 'c' in x }}{% endfor %}").render(CHAT)


def test_what_templates_do_still_works():
    text = ("{% for m in messages if m.role != 'tool' %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %} {{ [1, 2] | join('-') }} "
            "{{ messages | map(attribute='role') | join(' ') }} {{ messages | join('+', attribute='content') }} {{ {'a': [1]} | tojson }} {{ 'a b'.split()[1] }} "
            "{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].content | trim | upper }} {{ 'x' | indent(2, true) }} {{ range(3) | list }} "
            "{% for a, b in {'k': 'v'}.items() %}{{ a ~ '=' ~ b }}{% endfor %} {{ messages[-1]['content'] * 2 }} {{ 7 % 4 }}")
    assert chat.Template(text).render(CHAT) == """1/2,2/2 1-2 user assistant a+b {"a": [1]} b A   x [0, 1, 2] k=v bb 3"""


def test_a_turn_from_what_is_no_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"conversations": [{"from": ["human"], "value": "a"}, {"from": {}, "value": "b"}]}\n')
    [fault] = readers.json_lines(str(tmp_path / "a.jsonl"), readers.Keys("text", form="chat"))
    assert isinstance(fault, readers.Fault) and "has a turn from" in str(fault)


def test_task_data_that_unpack_to_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MOST", 1 << 20)
    path = tmp_path / "q.jsonl.gz"
    with pytest.raises(ValueError, match="more than 1,048,576 bytes when it is unpacked"):
        sources.records_of(path, gzip.compress(b" " * (2 << 20)))
    good = gzip.compress(b'{"a": 1}\n')
    assert sources.records_of(path, good + good) == [{"a": 1}] * 2
    with pytest.raises(ValueError, match="cannot be unpacked"):
        sources.records_of(path, good[:12] + b"\xff" * 9)


@pytest.mark.parametrize("change", [lambda model: model.replace(b"quick", b"qu\xff\xfek"), lambda model: model.replace("语".encode(), b"\xe8\xaf") + b"\n\x03"])
def test_sentencepiece_models_that_are_not_utf8(change):
    model = targets._own("bpe")
    with pytest.raises(ValueError, match="not a SentencePiece model, or a damaged one"):
        tokenizer.from_bytes(model[:60] + b"\xff\xfe" + model[62:] if change(model) == model else change(model))


@pytest.mark.parametrize("added", [{"": 400}, {"a": 400, "\ud800": 401}])
def test_tokens_that_sentencepiece_cannot_have(added):
    with pytest.raises(ValueError, match="adds tokens that|not a table of ids"):
        tokenizer.from_files({"tokenizer.model": targets._own("bpe"), "added_tokens.json": json.dumps(added).encode()})


def test_a_vocabulary_without_end():
    with pytest.raises(ValueError, match="is JSON, but neither"):
        tokenizer.from_bytes(b'{"kind": "huggingface", "vocab_size": Infinity, "files": {"tokenizer.json": "{}"}}')


def test_special_tokens_without_a_text_are_none():
    named = json.dumps({"eos_token": {"id": 3}, "pad_token": {"content": [1]}, "bos_token": "\ud800"}).encode()
    assert tokenizer.from_files({"tokenizer.model": targets._own("bpe"), "special_tokens_map.json": named}).eos == tokenizer.from_bytes(targets._own("bpe")).eos


def test_a_word_piece_vocabulary_without_its_unknown_token():
    words = b"[CLS]\n[SEP]\n[PAD]\na\nb\n"
    with pytest.raises(ValueError, match="Missing .UNK. token"):
        tokenizer.from_files({"vocab.txt": words})


# --- corpora that somebody has made so that their checksums fit ---


@pytest.fixture
def forged(tmp_path):
    """A function that writes a corpus whose manifest went through another function, with checksums that fit."""
    def write(change=lambda manifest: None, **files):
        for name, data in {**targets._corpora()[1], **files}.items():
            (tmp_path / name).write_bytes(data)
        manifest = json.loads((tmp_path / "manifest.json").read_bytes())
        change(manifest)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        targets._sign(tmp_path)
        return tmp_path
    return write


def lengths(**changes):
    """The lengths of the training split, some of them others."""
    found = dict(np.load(io.BytesIO(targets._corpora()[1]["lengths-train.npz"])))
    out = io.BytesIO()
    np.savez(out, **{key: value for key, value in (found | {key: change(found[key]) for key, change in changes.items()}).items() if value is not None})
    return out.getvalue()


@pytest.mark.parametrize("change, words", [
    (lambda m: m["tokenizer"].update(file="../../etc/passwd"), "not a plain name inside the folder: do not trust"),
    (lambda m: m["splits"]["train"]["shards"][0].update(file="/etc/passwd"), "not a plain name inside the folder"),
    (lambda m: m.pop("tfds"), "is not a manifest that jaxlm wrote"), (lambda m: m.update(splits=[]), "is not a manifest"),
    (lambda m: m["splits"].pop("test"), "is not a manifest"), (lambda m: m["tokenizer"].update(vocab_size="x"), "is not a manifest"),
    (lambda m: m["splits"]["train"].update(sources=None), "is not a manifest"), (lambda m: m["splits"]["train"].update(shards=[]), "its records are not those of"),
])
def test_forged_manifests(forged, change, words):
    with pytest.raises(ValueError, match=words):
        shards.open_corpus(forged(change))


@pytest.mark.parametrize("changes, words", [
    (dict(tokens=lambda a: a[:-1]), "do not fit each other"), (dict(tokens=lambda a: -a), "do not fit each other"),
    (dict(record_sizes=lambda a: a + 2**30), "a record beyond its shard"), (dict(record_begins=lambda a: a - 2**40), "a record beyond its shard"),
    (dict(sources=lambda a: a + 9), "a source or licence"), (dict(licences=lambda a: None), "a list is missing"),
    (dict(tokens=lambda a: a.astype(np.float32)), "not a list of whole numbers"), (dict(tokens=lambda a: np.array([{}], object)), "is damaged"),
])
def test_forged_indexes(forged, changes, words):
    with pytest.raises(ValueError, match=words):
        shards.open_corpus(forged(**{"lengths-train.npz": lengths(**changes)}))


def test_an_index_that_unpacks_to_more_than_it_is(forged):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("tokens.npy", bytes(10 << 20))
    with pytest.raises(ValueError, match="would unpack to more than it is"):
        shards.open_corpus(forged(**{"lengths-train.npz": out.getvalue()}))


@pytest.mark.parametrize("change", [
    {"vocab_size": False}, {"hidden_size": 0.5}, {"num_attention_heads": 0, "head_dim": None}, {"num_hidden_layers": 0}, {"vocab_size": 0}, {"rms_norm_eps": []},
    {"tie_word_embeddings": 3}, {"intermediate_size": 1e308}, {"architectures": ["MistralForCausalLM"], "sliding_window": 4, "num_hidden_layers": 0}])
def test_values_in_config_json_that_cannot_be(change):
    content = json.loads((targets.MODELS / "llama" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="download it again"):
        hf_config.read(content | change)


def test_errors_write_no_escape_sequences():
    assert cli.one_line(ValueError("a \x1b[2J\ud800\u202e\n b " + "c" * 9999)).startswith("a \\x1b[2J\\ud800\\u202e b ccc")
    assert len(cli.one_line(ValueError("c" * 9999))) < 2100


def test_zstandard_that_unpacks_to_gigabytes_does_so_bit_by_bit(tmp_path):
    import zstandard
    with open(tmp_path / "a.jsonl.zst", "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        for _ in range(400):
            packed.write(bytes(1 << 20))
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 100_000
    with readers._ZstdFile(str(tmp_path / "a.jsonl.zst")) as file:
        file.read(1)
        assert len(file._plain) <= 128 << 20


@pytest.mark.parametrize("text", ['split = "' + "(" * 3000 + '"', "x = " + "[" * 3000, 'split = "x{99999999999}"', 'split = "x{' + "9" * 5000 + '}"', "x = " + "9" * 5000])
def test_task_files_that_are_nested_without_end(text, tmp_path):
    (tmp_path / "t.toml").write_text(targets.TASK.replace('split = "\\n\\n+"', text))
    with pytest.raises(ValueError, match="is not TOML|is not a regular expression"):
        definition.load(tmp_path / "t.toml")
