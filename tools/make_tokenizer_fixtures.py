"""Makes the tiny tokenizers in tests/data/fixtures/tokenizers, each a folder as Hugging Face has it, with the ids of hard texts by transformers.

  python -m venv /tmp/fixtures && /tmp/fixtures/bin/pip install -e . transformers tokenizers sentencepiece
  /tmp/fixtures/bin/python tools/make_tokenizer_fixtures.py

The tests need neither transformers nor this script. Made with tokenizers 0.23.3 and transformers 5.23.0.
"""

import json
import os
import pathlib
import random
import shutil

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

os.environ["HF_HUB_OFFLINE"] = "1"
FOLDER = pathlib.Path(__file__).parents[1] / "tests" / "data" / "fixtures" / "tokenizers"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HARD = ["Hello world", "Hello world 12345  it's  fine\n\n  x", " leading and trailing  ", "", " ", "\n", "\t\ttabs", "I can't, we'll: don't!", "naïve café — “x” ½ ﬁ",
        "你好,世界 안녕", "🙂👩‍👩 flags", "def f(x):\n    return x**2  # y\n", "3.14159 0x1F 1e-10", "مرحبا שלום", "<s> </s> <pad> [CLS] <|im_end|> <0x41>", "a\u00a0b\u200bc",
        "ALLCAPS CamelCase", "the the the quick brown fox", "x" * 60, "\x00\x7f"]


def words(count: int) -> list[str]:
    rng = random.Random(0)
    pool = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randrange(2, 7))) for _ in range(80)] + ["Hello", "world", "the", "quick", "it's", "1234", "def f(x):"]
    return [" ".join(rng.choices(pool, k=20)) for _ in range(count)]


def write(name: str, files: dict, tokenizer: Tokenizer | None = None) -> pathlib.Path:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if tokenizer is not None:
        files = {"tokenizer.json": json.loads(tokenizer.to_str()), **files}
    for file, content in files.items():
        data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) + "\n").encode()
        (folder / file).write_bytes(data)
    return folder


def reference(folder: pathlib.Path, **options) -> None:
    """Ids by transformers, with special tokens in texts taken for what they are called."""
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder, **options)
    cases = [{"text": text, "ids": tok(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]} for text in HARD]
    (folder / "reference.json").write_text(json.dumps({"size": len(tok), "cases": cases}) + "\n")


def byte_level() -> None:
    """Chat tokens, a digit splitter, and truncation and padding as sentence encoders have them."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(words(200), trainers.BpeTrainer(vocab_size=330, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.add_tokens([AddedToken("<tool>", normalized=False)])
    tok.enable_truncation(8)
    tok.enable_padding(length=8)
    folder = write("byte_level", {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>", "pad_token": {
            "__type": "AddedToken", "content": "<|endoftext|>"}, "chat_template": "old", "clean_up_tokenization_spaces": False},
        "special_tokens_map.json": {"eos_token": "<|im_end|>"}, "chat_template.jinja": TEMPLATE}, tok)
    reference(folder)


def legacy() -> None:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(words(200), trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                                            special_tokens=["<|endoftext|>"]))
    model = json.loads(tok.to_str())["model"]
    merges = "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"])
    folder = write("byte_level_legacy", {"vocab.json": model["vocab"], "merges.txt": merges, "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}})
    reference(folder)


def word_piece() -> None:
    for name, lower in (("word_piece", True), ("word_piece_cased", False)):
        tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tok.normalizer = normalizers.BertNormalizer(lowercase=lower)
        tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tok.train_from_iterator(words(200) + [".,!?'“”—:()#*&é"], trainers.WordPieceTrainer(
            vocab_size=260, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
        pieces = sorted(tok.get_vocab().items(), key=lambda item: item[1])
        folder = write(name, {"vocab.txt": "".join(piece + "\n" for piece, _ in pieces),
                              "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}})
        reference(folder)


def unigram() -> None:
    """As T5's and XLNet's tokenizer.json: a space before the text, the end of text after it."""
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(" ", " ")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tok.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tok.train_from_iterator(words(200), trainers.UnigramTrainer(vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tok.add_special_tokens(["<extra_id_1>", "<extra_id_0>"])
    folder = write("unigram", {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}}, tok)
    reference(folder)


def sentence_piece() -> None:
    """As Llama 2's folder: tokenizer.model, a token added by tokenizer_config.json, no tokenizer.json."""
    prefix = str(FOLDER / "model")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words(200)), model_prefix=prefix, vocab_size=400, model_type="bpe", byte_fallback=True,
                                             normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, num_threads=1)
    model = pathlib.Path(prefix + ".model").read_bytes()
    for suffix in (".model", ".vocab"):
        pathlib.Path(prefix + suffix).unlink()
    token = lambda text, special=True: {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}
    folder = write("sentencepiece", {"tokenizer.model": model, "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False,
        "added_tokens_decoder": {"0": token("<unk>"), "1": token("<s>"), "2": token("</s>"), "400": token("<|im_end|>")}, "chat_template": TEMPLATE}})
    reference(folder)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for make in (byte_level, legacy, word_piece, unigram, sentence_piece):
        make()
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>8} {path.relative_to(FOLDER)}")
