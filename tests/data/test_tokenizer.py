import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from jaxlm.config import TokenizerConfig
from jaxlm.data import tokenizer

SPECIAL = ("<|user|>", "<|end|>")
CONFIGS = {
    "bytes": TokenizerConfig(kind="bytes"),
    "unigram": TokenizerConfig(kind="unigram", vocab_size=320, special_tokens=SPECIAL),
    "bpe": TokenizerConfig(kind="bpe", vocab_size=320, special_tokens=SPECIAL),
}
WORDS = ["".join(random.Random(i).choices("abcdefghijklmnoprstuvwy", k=2 + i % 7)) for i in range(300)]
TRAINING = [" ".join(random.Random(i).choices(WORDS, k=40)) + "\n\tindented  twice the mat\n" for i in range(200)]
HARD = [
    "", " ", "  leading", "trailing  ", "\t\ttabs", "a\r\nb\rc\n\n\n", " \n ", "\0", "a\0b", "\x85\u2028\u2029\x1c",
    "\U0010ffff\uffff\x7f\x80",
    "😀👩‍👩‍👧🏽", "e\u0301 \u00e9 ﬁ Ⅳ ① ½", "مرحبا שלום", "\ufeffbom", "\ufffd", "\u2581",
    " \u2581\u2581 a\u2581b\u2581 \n\u2581", "\u2585 \u2047 ⁇  ⁇ ",
    "<s></s><unk><pad><0x41><0xFF>", "<|user|>hi<|end|>", "<|user|", "x" * 5000, "\u2581" * 300, " " * 300]


@pytest.fixture(scope="module", params=CONFIGS)
def tok(request):
    return tokenizer.train(TRAINING, CONFIGS[request.param])


def test_decoding_gives_every_text_back(tok):
    rng = random.Random(0)
    characters = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    soup = ["".join(map(chr, rng.choices(characters, k=rng.randrange(20)) + rng.choices(range(128), k=20))) for _ in range(300)]
    texts = HARD + soup + TRAINING[:4] + ["".join(map(chr, characters[:0x30000]))]
    encoded = tok.encode_batch(texts)
    for text, ids in zip(texts, encoded):
        assert tok.decode(ids) == text
        assert ids.dtype == np.int32 and ids.tolist() == tok.encode(text)
        assert not {tok.bos, tok.eos, tok.pad}.intersection(ids.tolist())
        assert not len(ids) or 0 <= ids.min() and ids.max() < tok.vocab_size


def test_special_tokens_do_not_show_and_ids_out_of_range_neither(tok):
    assert len({tok.bos, tok.eos, tok.pad}) == 3
    assert tok.decode([tok.bos, *tok.encode("a b"), tok.eos, tok.pad, tok.vocab_size, tok.vocab_size + 60, -1]) == "a b"


def test_streaming_decodes_whole_characters_only(tok):
    text = "h\u00e9 😀 語 end"
    decode = tok.stream_decoder()
    parts = [decode([i]) for i in tok.encode(text)]
    assert "".join(parts) == text and "\ufffd" not in "".join(parts) and decode([], final=True) == ""
    half = tok.encode("😀")[:2]
    assert decode(half) == "" and decode([], final=True) == "\ufffd"
    rng = random.Random(1)
    ids = [rng.randrange(tok.vocab_size) for _ in range(2000)]  # what an untrained model writes
    decode = tok.stream_decoder()
    assert "".join(decode([i]) for i in ids) + decode([], final=True) == tok.decode(ids)


def test_a_tokenizer_is_its_bytes(tok, tmp_path):
    path = tok.save(tmp_path)
    for again in (tokenizer.from_bytes(tok.model), tokenizer.load(path), tokenizer.load(tmp_path)):
        assert again == tok and again.fingerprint == tok.fingerprint
        assert again.encode("the mat") == tok.encode("the mat")


def test_pieces_are_readable(tok):
    assert "".join(tok.pieces(tok.encode("the mat"))) == "the mat"
    assert tok.pieces([tok.bos, tok.eos, tok.pad]) == ["<s>", "</s>", "<pad>"]
    assert tok.pieces(tok.encode("é")) == ["<0xC3>", "<0xA9>"]


def test_a_surrogate_is_one_line(tok):
    with pytest.raises(ValueError, match=r"no UTF-8 form: character 1 \('\\udcff'\)"):
        tok.encode("a\udcff")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sizes_newlines_and_special_symbols(kind):
    tok = tokenizer.train(iter(TRAINING), CONFIGS[kind])
    assert tok.vocab_size == 320
    assert tok.pieces(tok.encode("the\n\nmat")).count("\n") == 2
    assert not any("\n" in piece and piece != "\n" for piece in tok.pieces(range(320)))
    assert tok.pieces(tok.encode("a<|user|>b")).count("<|user|>") == 1
    assert len(tok.encode(TRAINING[0])) < 0.9 * len(TRAINING[0])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_is_the_same_in_another_process_and_quiet(kind):
    code = f"""if True:
        from jaxlm.config import TokenizerConfig
        from jaxlm.data import tokenizer
        import os, sys
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
        print(tokenizer.train(sys.stdin.read().split("|"), TokenizerConfig(kind={kind!r}, vocab_size=320)).fingerprint)"""
    result = subprocess.run([sys.executable, "-c", code], input="|".join(TRAINING), capture_output=True, text=True, check=True)
    assert result.stdout.strip() == tokenizer.train(TRAINING, TokenizerConfig(kind=kind, vocab_size=320)).fingerprint
    assert result.stderr == ""


def test_only_the_first_bytes_are_trained_on():
    def texts():
        yield from TRAINING
        raise AssertionError("read too far")

    size = sum(len(text) for text in TRAINING) // 2
    tokenizer.train(texts(), TokenizerConfig(kind="bpe", vocab_size=320, train_bytes=size))
    with pytest.raises(AssertionError, match="read too far"):
        tokenizer.train(texts(), TokenizerConfig(kind="bpe", vocab_size=320))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_too_large_a_vocabulary_names_one_that_works(kind):
    with pytest.raises(ValueError, match="tokenizer.vocab_size=50000 is too large for .* set tokenizer.vocab_size=") as caught:
        tokenizer.train(TRAINING, TokenizerConfig(kind=kind, vocab_size=50000))
    largest = int(str(caught.value).split("vocab_size=")[2].split()[0])
    assert tokenizer.train(TRAINING, TokenizerConfig(kind=kind, vocab_size=largest)).vocab_size == largest
    with pytest.raises(ValueError, match="set tokenizer.kind=bytes or give more text"):
        tokenizer.train(["ab"], TokenizerConfig(kind=kind))


def test_too_small_a_vocabulary_names_one_that_works():
    text = ["".join(chr(c) for c in range(0x4E00, 0x4E00 + 500))] * 20
    with pytest.raises(ValueError, match="too small for the characters of this text: set tokenizer.vocab_size=") as caught:
        tokenizer.train(text, TokenizerConfig(kind="bpe", vocab_size=300))
    least = int(str(caught.value).split("vocab_size=")[2].split()[0])
    assert tokenizer.train(text, TokenizerConfig(kind="bpe", vocab_size=least)).vocab_size == least


@pytest.mark.parametrize("token", ["", "\n", "<s>", "a b", "\u2581x"])
def test_impossible_special_tokens(token):
    with pytest.raises(ValueError, match="tokenizer.special_tokens: "):
        tokenizer.train(TRAINING, TokenizerConfig(vocab_size=320, special_tokens=(token,)))


def test_no_text_and_errors_of_the_reader():
    with pytest.raises(ValueError, match="there is no text to train a tokenizer on"):
        tokenizer.train(["", "\n"], TokenizerConfig())

    def broken():
        yield "text"
        raise ValueError("a.txt, line 2: not UTF-8")

    with pytest.raises(ValueError, match="^a.txt, line 2: not UTF-8$"):
        tokenizer.train(broken(), TokenizerConfig())


@pytest.mark.parametrize("data, message", [
    (b"\x89PNG" * 100, "is not a SentencePiece model"), (b"", "is not a SentencePiece model"),
    (b'{"version": "1.0", "model": {}}', "is not a tokenizer that can be used: it has no vocabulary"),
    (b'{"kind": "words"}', "is JSON, but neither Hugging Face's tokenizer.json nor"),
])
def test_files_that_are_no_tokenizer(tmp_path, data, message):
    path = tmp_path / "x.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"x.model {message}"):
        tokenizer.load(path)
    with pytest.raises(ValueError, match="holds no tokenizer; looked for tokenizer.json, "):
        tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no such tokenizer file"):
        tokenizer.load(tmp_path / "y.model")


def test_a_model_from_elsewhere_that_adds_a_space_and_has_no_bos(tmp_path):
    import sentencepiece
    prefix = str(tmp_path / "t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING), model_prefix=prefix, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        bos_id=-1, eos_id=1, pad_id=0, unk_id=2)
    tok = tokenizer.load(prefix + ".model")
    assert (tok.bos, tok.eos, tok.pad) == (1, 1, 0)
    assert tok.decode(tok.encode("the mat twice")) == "the mat twice"
    decode = tok.stream_decoder()
    assert "".join(decode([i]) for i in tok.encode("the mat")) == "the mat"
    assert tok.decode(tok.encode("the Ω")) == "the  \u2047 "


def test_an_older_protobuf_is_no_matter_until_it_is_needed(monkeypatch):
    """Apache Beam wants one that sentencepiece's own description of its files refuses."""
    model = tokenizer.train(TRAINING[:50], CONFIGS["bpe"]).model
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    assert tokenizer.from_bytes(model).encode("the mat")[-1] >= 0
    with pytest.raises(ValueError, match="do not go together here .*pip install -U protobuf"):
        tokenizer._proto(model)
