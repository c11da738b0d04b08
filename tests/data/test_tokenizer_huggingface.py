"""Tokenizers of Hugging Face: read, carried in one file, written back. The fixtures' ids are by transformers (tools/make_tokenizer_fixtures.py)."""

import json
import pathlib
import random
import shutil
import sys

import pytest

pytest.importorskip("tokenizers")

from jaxlm.config import TokenizerConfig
from jaxlm.data import tokenizer, tokenizer_json

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "tokenizers"
PUBLISHED = pathlib.Path("/work/shared/data/tokenizers")
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())
TRAINING = [" ".join(random.Random(i).choices("the quick brown fox jumps over lazy dogs and émigrés".split(), k=30)) + "\n\tdone  now\n" for i in range(200)]
HARD = ["", " ", "  leading", "trailing  ", "\t\ttabs", "a\r\nb\rc\n\n\n", "\0", "a\0b", "😀👩‍👩‍👧🏽", "e\u0301 \u00e9 ﬁ", "مرحبا שלום", "\ufeffbom", "\ufffd", "<0x41>", "<unk>", "x" * 500]


def cases(name):
    return json.loads((FIXTURES / name / "reference.json").read_text())


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tok(name):
    return tokenizer.load(FIXTURES / name)


def test_ids_are_those_of_transformers(name, tok):
    reference = cases(name)
    assert tok.vocab_size == reference["size"]
    texts = [case["text"] for case in reference["cases"]]
    compared = 0
    for text, ids, case in zip(texts, tok.encode_batch(texts, special=True), reference["cases"]):
        if name == "sentencepiece" and text.startswith(" "):  # where transformers differs from SentencePiece: it adds no space before one
            assert tok._processor.encode(text) == ids.tolist() != case["ids"]
        else:
            assert ids.tolist() == case["ids"], text
            compared += 1
    assert compared >= 18


def test_special_tokens_in_a_text_are_text_unless_asked(name, tok):
    text = "a" + "".join(tok.special_tokens)
    assert not set(tok.special_tokens.values()).intersection(set(tok.encode(text)) - {unknown(tok)})
    assert set(tok.special_tokens.values()) <= set(tok.encode(text, special=True))
    assert {tok.bos, tok.eos, tok.pad} <= set(tok.special_tokens.values())
    assert tok.decode([tok.bos, tok.eos, tok.pad, tok.vocab_size, tok.vocab_size + 60, -1]) == ""
    assert tok.pieces([tok.eos]) == [next(text for text, i in tok.special_tokens.items() if i == tok.eos)]


def unknown(tok):
    return next((tok.special_tokens[text] for text in ("<unk>", "[UNK]") if text in tok.special_tokens), None)


def test_streaming_is_decoding(name, tok):
    rng = random.Random(1)
    ids = [rng.randrange(tok.vocab_size + 3) for _ in range(3000)]  # what an untrained model writes
    decode = tok.stream_decoder()
    parts = [decode([i]) for i in ids] + [decode([], final=True)]
    assert "".join(parts) == tok.decode(ids)
    if name in ("byte_level", "byte_level_legacy", "sentencepiece"):
        text = "h\u00e9 😀 語 end"
        decode = tok.stream_decoder()
        parts = [decode([i]) for i in tok.encode(text)]
        assert "".join(parts) == text and "\ufffd" not in "".join(parts) and decode([], final=True) == ""


def test_decoding_gives_text_back(name, tok):
    if name in ("byte_level", "byte_level_legacy", "sentencepiece"):
        for text in HARD:
            assert tok.decode(tok.encode(text)) == text
    else:
        assert tok.decode(tok.encode("hello world, the quick".lower())) == "hello world, the quick".replace(",", "," if "word" in name else "")
    if "word" not in name:  # as the tokenizers package decodes
        if tok.kind == "huggingface":
            ids = tok.encode("Hello world it's  fine")
            assert tok.decode(ids) == tok._parsing.decode(ids)


def test_word_piece_decodes_as_the_package_does():
    tok = tokenizer.load(FIXTURES / "word_piece")
    for case in cases("word_piece")["cases"]:
        ids = [i for i in case["ids"]]
        assert tok.decode(ids) == tok._parsing.decode(ids), case


def test_one_file_carries_everything(name, tok, tmp_path):
    path = tok.save(tmp_path)
    assert path.name.startswith("tokenizer.") and list(tmp_path.glob("tokenizer.*")) == [path]
    for again in (tokenizer.from_bytes(tok.model), tokenizer.load(path), tokenizer.load(tmp_path)):
        assert again == tok and again.fingerprint == tok.fingerprint and again.files == tok.files
        assert again.encode("Hello <|im_end|>") == tok.encode("Hello <|im_end|>")
    assert tokenizer.load(FIXTURES / name).fingerprint == tok.fingerprint


def test_written_files_are_those_that_came(name, tok, tmp_path):
    written = {path.name for path in tok.write_huggingface(tmp_path)}
    assert "tokenizer.json" in written and "tokenizer_config.json" in written
    for path in (FIXTURES / name).iterdir():
        if path.name != "reference.json":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    again = tokenizer.load(tmp_path)
    assert (again.bos, again.eos, again.pad, again.vocab_size, again.adds_bos) == (tok.bos, tok.eos, tok.pad, tok.vocab_size, tok.adds_bos)
    for text in [*HARD, *TRAINING[:3]]:
        assert again.encode(text) == tok.encode(text), text


def test_chat_template_and_added_tokens_are_carried():
    tok = tokenizer.load(FIXTURES / "byte_level")
    assert "<|im_start|>" in tok.chat_template and tokenizer.from_bytes(tok.model).chat_template == tok.chat_template
    assert (tok.pieces([tok.bos]), tok.pieces([tok.eos]), tok.pieces([tok.pad])) == (["<|im_end|>"], ["<|im_end|>"], ["<|endoftext|>"])
    assert not tok.adds_bos and tok.pieces(tok.encode("a<tool>b")).count("<tool>") == 1
    assert len(tok.encode("one two three four five six seven eight nine ten")) > 8  # its file says: cut at 8, and pad to 8
    assert len(tok.encode("a")) == 1
    llama = tokenizer.load(FIXTURES / "sentencepiece")
    assert llama.kind == "sentencepiece" and llama.adds_bos and llama.special_tokens["<|im_end|>"] == 400 and "im_start" in llama.chat_template


def test_a_named_template_of_several_is_the_default_one(tmp_path):
    shutil.copy(FIXTURES / "byte_level" / "tokenizer.json", tmp_path)
    config = {"eos_token": "<|im_end|>", "chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer.load(tmp_path).chat_template == "D"


def test_framing_of_families_without_bos():
    assert [(t.bos, t.eos, t.pad, t.adds_bos) for t in map(tokenizer.load, (FIXTURES / n for n in ("byte_level_legacy", "word_piece", "unigram")))] == [
        (0, 0, 0, False), (2, 3, 0, True), (1, 1, 0, False)]


def test_tokens_without_a_row_in_the_embedding(tmp_path):
    tree = json.loads((FIXTURES / "byte_level" / "tokenizer.json").read_text())
    tree["added_tokens"].append(tree["added_tokens"][0] | {"id": 331, "content": "<image>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tok = tokenizer.load(tmp_path, vocab_size=331)
    assert tok.vocab_size == 331 == tokenizer.from_bytes(tok.model).vocab_size and tokenizer.load(tmp_path).vocab_size == 332
    assert "<image>" not in tok.special_tokens and max(tok.encode("<image>", special=True)) < 331
    with pytest.raises(ValueError, match="it has 331 tokens, but the model's embedding has 330 rows"):
        tokenizer.load(tmp_path, vocab_size=330)


def test_added_tokens_after_special_ones_keep_their_ids():
    vocab = {character: byte for byte, character in enumerate(tokenizer_json.byte_characters())}
    for splitter in ("qwen2", "llama-bpe"):
        tree = tokenizer_json.byte_level(vocab, [], splitter=splitter, special={"<|endoftext|>": 256, "<|im_end|>": 258}, added={"<tool_call>": 257, "<think>": 259})
        tok = tokenizer.from_bytes(json.dumps(tree).encode())
        assert tok.encode("a<think>b<|im_end|><tool_call>")[:2] == [vocab["a"], 259] and tok.encode("<tool_call>") == [257]
        assert tok.encode("<|im_end|><tool_call>", special=True) == [258, 257] and tok.decode([259, 258, 257]) == "<think><tool_call>"


@pytest.mark.parametrize("kind", ["unigram", "bpe", "bytes"])
def test_own_tokenizers_as_hugging_face_has_them(kind, tmp_path):
    tok = tokenizer.train([*TRAINING, *["1 < 4 > 0 x"] * 90], TokenizerConfig(kind=kind, vocab_size=316, special_tokens=("<|user|>",)))
    assert {path.name for path in tok.write_huggingface(tmp_path)} == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *(() if kind == "bytes" else ("tokenizer.model",))}
    other = tokenizer.load(tmp_path)
    assert other.kind == "huggingface" and (other.bos, other.eos, other.pad, other.vocab_size) == (tok.bos, tok.eos, tok.pad, tok.vocab_size)
    assert other.adds_bos and other._processor.encode("the").ids == [tok.bos, *tok.encode("the")]
    for text in [*HARD, *TRAINING[:20], "<|user|>hi<|user|>", "the  quick\n\n\nbrown\u2047"]:
        assert other.encode(text) == tok.encode(text), text
        assert other.decode(tok.encode(text)) == text


def test_a_model_that_adds_and_squeezes_spaces_as_hugging_face_has_it(tmp_path):
    import sentencepiece
    for name, options in {"t5": dict(bos_id=-1, eos_id=1, pad_id=0, unk_id=2), "llama": dict(model_type="bpe", byte_fallback=True)}.items():
        prefix = str(tmp_path / name)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TRAINING), model_prefix=prefix, vocab_size=300, hard_vocab_limit=False,
                                                 minloglevel=2, **options)
        tok = tokenizer.load(prefix + ".model")
        out = tmp_path / ("out_" + name)
        out.mkdir()
        tok.write_huggingface(out)
        other = tokenizer.load(out)
        for text in [text for text in (*HARD, *TRAINING[:20], "  two  spaces ", "ﬁ ½") if "<" not in text]:
            assert other.encode(text) == tok.encode(text), (name, text)
        assert (other.bos, other.eos, other.adds_bos) == (tok.bos, tok.eos, tok.adds_bos)


def test_sentinels_of_t5(tmp_path):
    import sentencepiece
    prefix = str(tmp_path / "spiece")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TRAINING), model_prefix=prefix, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
                                             bos_id=-1, eos_id=1, pad_id=0, unk_id=2)
    plain = tokenizer.load(prefix + ".model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}')
    tok = tokenizer.load(tmp_path)
    assert tok.vocab_size == plain.vocab_size + 100 and tok.special_tokens["<extra_id_0>"] == tok.vocab_size - 1
    assert tok.encode("the quick") == plain.encode("the quick")
    assert tokenizer.from_bytes(tok.model).special_tokens == tok.special_tokens


@pytest.mark.parametrize("content, message", [
    ('{"version": "1.0", "model": {}}', "it has no vocabulary"),
    ('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "its vocabulary is empty"),
    ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"</s>": 99999999999}, "merges": []}}', "an id that is not a whole number below 2\\^24"),
    ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "an id that is not a whole number"),
    ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "it has no end-of-text token"),
    ('{"version": "1.0", "model": {"type": "Nonsense", "vocab": {"</s>": 0}}}', "is not a tokenizer that can be used"),
    ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"</s>": 0}, "merges": [["a", "b"]]}}', "is not a tokenizer that can be used"),
    ('{"version": "1.0", "decoder": {"type": "CTC"}, "model": {"type": "BPE", "vocab": {"</s>": 0}, "merges": []}}', "decodes by CTC"),
    ('{"version": "1.0", "added_tokens": 7, "model": {"type": "BPE", "vocab": {"</s>": 0}, "merges": []}}', "is not a tokenizer|has no vocabulary"),
    ("[" * 100_000, "is not JSON|is not a SentencePiece model"), ('{"a":' * 100_000, "is not JSON"),
    ('[1, 2]', "is not a SentencePiece model|holds a list"), ('{"kind": "words"}', "neither Hugging Face's tokenizer.json nor"),
    ('{"files": {"tokenizer.model": {"base64": "%%%"}}}', "neither Hugging Face's tokenizer.json nor"),
    ('{"files": {}}', "holds none of the files of a tokenizer"), ('{"model": []', "is not JSON"),
])
def test_files_that_are_no_tokenizer(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match=message) as caught:
            tokenizer.load(path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_truncated_files_are_refused(tmp_path, name):
    shutil.copytree(FIXTURES / name, tmp_path / "t")
    victim = next(p for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt") if (p := tmp_path / "t" / n).is_file())
    if victim.name == "vocab.txt":
        victim.write_bytes(b"\xff\xfe")
    else:
        victim.write_bytes(victim.read_bytes()[:-200])
    with pytest.raises(ValueError) as caught:
        tokenizer.load(tmp_path / "t")
    assert "\n" not in str(caught.value)


def test_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer; looked for tokenizer.json, tokenizer.model, spiece.model, vocab.json with merges.txt, vocab.txt"):
        tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="merges.txt: there is no such tokenizer file"):
        tokenizer.load(tmp_path / "vocab.json")


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "_LIMIT", 1000)
    (tmp_path / "tokenizer.json").write_bytes(b"{" * 1001)
    with pytest.raises(ValueError, match="has 1,001 bytes, more than the 1,000 that a tokenizer's file may have"):
        tokenizer.load(tmp_path)


def test_legacy_files_of_a_class_that_cuts_otherwise_are_refused(tmp_path):
    shutil.copytree(FIXTURES / "byte_level_legacy", tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ValueError, match="vocab.json and merges.txt of a CLIPTokenizer are not known here"):
        tokenizer.load(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2TokenizerFast"}')
    tree = tokenizer.load(tmp_path / "t").tree()
    assert tokenizer_json.splitter_of(tree) == "qwen2"


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the package tokenizers: pip install 'jaxlm\[hf\]'"):
        tokenizer.load(FIXTURES / "byte_level")


@pytest.mark.parametrize("splitter", [*tokenizer_json.SPLITTERS])
def test_splitters_run_and_are_recognised(splitter):
    vocab = {character: byte for byte, character in enumerate(tokenizer_json.byte_characters())}
    tree = tokenizer_json.byte_level(vocab, [], splitter=splitter, special={"</s>": 256})
    tok = tokenizer.from_bytes(json.dumps(tree).encode())
    assert tokenizer_json.splitter_of(tok.tree()) == splitter
    assert tok.decode(tok.encode("It's 12345\n\n  x")) == "It's 12345\n\n  x"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the shared data folder is not here")
@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "t5"])
def test_published_tokenizers(name):
    tok = tokenizer.load(PUBLISHED / name)
    for case in json.loads((PUBLISHED / name / "reference.json").read_text())["cases"]:
        ids = tok.encode(case["text"], special="bert" in name)
        assert ([tok.bos, *ids, tok.eos] if "bert" in name else ids) == case["ids"]
        if "bert" not in name:
            assert tok.decode(case["ids"]) == case["decoded"]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the shared data folder is not here")
@pytest.mark.parametrize("name, files", [("gpt2", ("vocab.json", "merges.txt")), ("bert-base-uncased", ("vocab.txt",))])
def test_published_legacy_files(name, files, tmp_path):
    for file in files:
        shutil.copy(PUBLISHED / name / file, tmp_path)
    legacy, whole = tokenizer.load(tmp_path), tokenizer.load(PUBLISHED / name)
    assert (legacy.bos, legacy.eos, legacy.vocab_size) == (whole.bos, whole.eos, whole.vocab_size)
    for case in json.loads((PUBLISHED / name / "reference.json").read_text())["cases"]:
        assert legacy.encode(case["text"]) == whole.encode(case["text"])


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "model.safetensors", "a\\b", "", ".."])
def test_a_file_that_a_checkpoint_should_not_hold_is_refused(name):
    """Export would write it beside the model's own files, or outside of the directory."""
    held = json.loads(tokenizer.load(FIXTURES / "byte_level").model)
    held["files"][name] = "{}"
    with pytest.raises(ValueError, match="which is none of a tokenizer's") as caught:
        tokenizer.from_bytes(json.dumps(held).encode())
    assert "\n" not in str(caught.value)
