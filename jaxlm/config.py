"""Every configuration key of jaxlm, its default, its meaning and its unit: this file is the reference.

A recipe (`configs/*.py`) returns an `ml_collections.ConfigDict` that names only what differs from the defaults below; the command line
overrides it (`--config.optim.lr=3e-4`); `build` turns the result into one frozen dataclass per part and refuses, in one line, a key that
does not exist, a value of the wrong type or a value that cannot work. The same tree, as JSON, lies in every checkpoint, so evaluation and
generation never need the recipe again.

Config files are Python programs: run only those you trust.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# A length of training: "2000 steps", "3 epochs", "1e9 tokens", "5%" of the run, or a bare number of steps. "0" means never or none.
Duration = typing.NewType("Duration", str)

PAIRS = 16  # of preferences in one row: what an objective keeps apart
Rules = tuple[tuple[str, bool], ...]

LABELLED = ("classify", "multi_label", "regress", "token_classify")  # objectives that need data.label_key


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class TokenizerConfig:
    """What turns text into tokens."""

    kind: Literal["unigram", "bpe", "bytes"] = "unigram"  # SentencePiece unigram or BPE with byte fallback, or plain UTF-8 bytes
    vocab_size: int = 8192  # pieces to learn, special tokens included; ignored by "bytes" (259)
    path: str = ""  # a tokenizer to use as it is: its file, or the folder that holds it (docs/interop.md); empty: train one on the training split
    special_tokens: tuple[str, ...] = ()  # extra symbols that are never split
    sentinels: int = 0  # train the tokenizer with so many of <extra_id_0>, <extra_id_1>, ... for objective.name=span_corruption (T5: 100); part of vocab_size
    train_bytes: int = 100_000_000  # the most text, in bytes, that the tokenizer is trained on

    def __post_init__(self):
        _need(self.kind == "bytes" or self.path or self.vocab_size >= 300,
              f"tokenizer.vocab_size={self.vocab_size} is too small: 256 byte pieces and the special tokens need at least 300")
        _need(self.sentinels >= 0, f"tokenizer.sentinels={self.sentinels} must not be negative")
        _need(not self.sentinels or self.kind != "bytes" or self.path, "tokenizer.kind=bytes has no room for tokenizer.sentinels: set "
              "tokenizer.kind=unigram or bpe")
        _need(self.train_bytes > 0, f"tokenizer.train_bytes={self.train_bytes} must be positive")


@dataclass(frozen=True)
class DataConfig:
    """Which texts, how they are split and how they become batches."""

    source: tuple[str, ...] = ()  # files, folders, globs (.txt .jsonl .json .csv .tsv [.gz .zst], .html .warc[.gz] .parquet .arrow), folders of Hugging Face
    # `datasets`, tfds:NAME[/CONFIG][:SPLIT], or "python_docs", the text in every CPython; each may have a name: "web=crawl/"
    text_key: str = "text"  # the field (JSON) or column (tables) that holds the text
    input_key: str = ""  # objective.name=seq2seq: the field or column that the encoder reads; text_key is then what the decoder says. With label_key: the
    # first text of a pair, text_key being the second
    label_key: str = ""  # the field or column that holds each text's label, for objective.name=classify, multi_label (a list, or "a|b"), regress (a number) and
    # token_classify (a list of tags, or tags between spaces, one for each word of text_key)
    slice_keys: tuple[str, ...] = ()  # with label_key: more fields or columns, by whose values jaxlm eval --report divides its figures
    format: Literal["text", "chat", "preference"] = "text"  # chat: records are conversations (`messages`, ShareGPT's `conversations`, or `instruction`, `input`
    # and `output`); preference: a prompt with a chosen and a rejected answer (docs/finetuning.md); text_key is then not used
    chat_template: str = ""  # of chats: chatml, llama3, gemma or the path of a .jinja file; empty: the tokenizer's own
    id_key: str = ""  # the field or column that holds each document's id, different for all; empty: "path:line"
    licence_key: str = ""  # the field or column that holds each document's licence
    licences: tuple[tuple[str, str], ...] = ()  # of whole sources: (("web", "CC-BY-4.0"), ...), by their names in data.source
    on_error: Literal["stop", "skip"] = "stop"  # at what cannot be read: stop with its name and line, or skip, count and report it
    tfds_dir: str = ""  # where TFDS keeps its data sets; empty: $TFDS_DATA_DIR, or ~/tensorflow_datasets
    dir: str = ""  # prepared shards; empty: <workdir>/data, prepared on the first run
    validation: float = 0.03  # share of documents, by hash of their text; with label_key the same share of each label. Labelled sources that are named train,
    # validation and test ("test=b.csv") are these splits
    test: float = 0.05  # likewise
    shard_bytes: int = 64 * 2**20  # tokens of one shard file, in bytes, before compression
    sequence_length: int = 512  # tokens in one row of a batch; of an encoder-decoder: of the encoder's row
    target_length: int = 0  # tokens in the decoder's row of an encoder-decoder; 0: what span_corruption needs to fill the encoder's row, of seq2seq as many
    packing: Literal["stream", "best_fit"] = "stream"  # rows are cut from documents laid end to end, or filled with whole documents, some padding
    # left (fine-tuning); encoder-decoders always fill. Documents in a row never attend to each other
    # A mixture of the named sources of data.source, by one of the three; without them all documents are shuffled together:
    weights: tuple[tuple[str, float], ...] = ()  # shares of the rows: (("web", 0.7), ("books", 0.3)); a source that is not named is left out
    temperature: float = 0.0  # shares proportional to tokens^(1 / this): 1 leaves them as they are, a larger one evens them out; 0: off
    epochs: tuple[tuple[str, float], ...] = ()  # (("books", 3), ...): how often a source is passed while those that are not named are passed once
    batch_size: int = 8  # rows of one optimiser step, over all devices, hosts and microbatches
    seed: int = 0  # order of documents and rows
    threads: int = 1  # reader threads of one process
    workers: int = 0  # processes that prepare the corpus; 0: one for each core
    prefetch: int = 4  # batches read ahead

    def __post_init__(self):
        _need(0 <= self.validation and 0 <= self.test and self.validation + self.test < 1,
              f"data.validation={self.validation} and data.test={self.test} must be shares that leave something to train on")
        for key in ("shard_bytes", "sequence_length", "batch_size", "prefetch"):
            _need(getattr(self, key) > 0, f"data.{key}={getattr(self, key)} must be positive")
        for key in ("threads", "workers", "target_length"):
            _need(getattr(self, key) >= 0, f"data.{key}={getattr(self, key)} must not be negative")
        _need(0 <= self.temperature < math.inf, f"data.temperature={self.temperature} must be positive, or 0 for none")
        for key in ("weights", "epochs"):
            pairs = getattr(self, key)
            for name, value in pairs:
                _need(0 < value < math.inf, f"data.{key}: {name!r} has {value:g}, which must be positive" + "; to leave a source out, do not name it" *
                      (key == "weights"))
            _need(len(dict(pairs)) == len(pairs), f"data.{key} names a source twice")
        asked = [f"data.{key}" for key in ("weights", "temperature", "epochs") if getattr(self, key)]
        _need(len(asked) <= 1, f"{' and '.join(asked)} are given: a mixture follows from one of them")


@dataclass(frozen=True)
class DedupConfig:
    """Which repetitions are dropped from a corpus."""

    exact: bool = True  # documents whose text, as cleaned, occurred before are dropped
    line_length: int = 0  # lines of at least so many characters that occurred before, in any document, are dropped; 0: off
    near: float = 0.0  # near-duplicates are dropped: documents whose word shingles overlap (Jaccard) by at least this share; the longest stays; 0: off
    shingle: int = 5  # words in a row that count as one shingle
    permutations: int = 128  # MinHash values of a document: the similarity is known to sqrt(s (1 - s) / this)

    def __post_init__(self):
        _need(0 <= self.near <= 1, f"dedup.near={self.near} is a share: give a number from 0 (off) to 1, for example 0.8")
        _need(self.line_length >= 0, f"dedup.line_length={self.line_length} must not be negative")
        _need(1 <= self.shingle <= 100, f"dedup.shingle={self.shingle} must be in [1, 100]")
        _need(8 <= self.permutations <= 1024, f"dedup.permutations={self.permutations} must be in [8, 1024]")


@dataclass(frozen=True)
class CleanConfig:
    """What is done to each document by itself, in this order; `FilterConfig` comes between language and personal data. All but `extract` is off by default."""
    extract: Literal["resiliparse", "trafilatura"] = "resiliparse"  # finds the main content of HTML pages (docs/data.md compares them)
    repair: bool = False  # undo mojibake, "Ã©" for "é", with ftfy
    normalise: bool = False  # Unicode NFC; no control, zero-width and private characters; one kind of line end and space; no trailing space
    languages: tuple[str, ...] = ()  # keep documents in these languages, ISO codes of fastText's lid.176; ("*",): tell the language, keep all
    language_confidence: float = 0.65  # the least probability of the language (FineWeb)
    pii: tuple[Literal["email", "phone", "ip", "card", "iban", "key"], ...] = ()  # personal data and secrets to replace with <EMAIL>, <PHONE> ...
    word_list: str = ""  # a text file of words and phrases, one a line, for filter.listed_words
    decontaminate: tuple[tuple[str, str], ...] = ()  # evaluation sets, (name, "path.jsonl:field"), not to be trained on
    decontaminate_words: int = 13  # length of the word n-grams that are compared (GPT-3); shorter items are compared whole
    decontaminate_overlap: float = 0.0  # share of an item's n-grams in one document that removes it; 0: a single one

    def __post_init__(self):
        _need(0 <= self.language_confidence <= 1, f"clean.language_confidence={self.language_confidence} must be in [0, 1]")
        _need(self.decontaminate_words >= 5, f"clean.decontaminate_words={self.decontaminate_words} is too few to tell texts apart: at least 5, usually 13")
        _need(0 <= self.decontaminate_overlap <= 1, f"clean.decontaminate_overlap={self.decontaminate_overlap} must be in [0, 1]")
        for name, path in self.decontaminate:
            _need(bool(re.fullmatch(r"[\w.-]+", name)) and bool(re.fullmatch(r".+:[^:]+", path)), f"clean.decontaminate has {(name, path)!r}: write a name of "
                  "letters, digits, '_', '-' and '.', and 'path.jsonl:field'")


@dataclass(frozen=True)
class FilterConfig:
    """Rules of quality: one key each, its threshold, and 0 for off. "min" and "max" are the last values that pass. A word is what stands between white space.

    Gopher: Rae et al. 2021 (arXiv:2112.11446, table A1). C4: Raffel et al. 2020 (arXiv:1910.10683, section 2.2). FineWeb: Penedo et al. 2024
    (arXiv:2406.17557, section 3.6). Their thresholds stand in the comments; those without a source are ours.
    """
    drop_open_lines: bool = False  # remove lines that do not end in . ! ? or a closing quotation mark (C4)
    drop_short_lines: int = 0  # remove lines of fewer words (C4: 5)
    drop_javascript_lines: bool = False  # remove lines with the word "javascript" (C4)
    min_characters: int = 0  # length of the document as cleaned
    max_characters: int = 0  # likewise
    min_words: int = 0  # words of the document; Gopher: 50
    max_words: int = 0  # likewise; Gopher: 100,000
    min_mean_word_length: float = 0.0  # characters; Gopher: 3
    max_mean_word_length: float = 0.0  # likewise; Gopher: 10
    max_symbols_per_word: float = 0.0  # "#" and ellipses; Gopher: 0.1
    max_bullet_lines: float = 0.0  # share of lines that begin with a bullet; Gopher: 0.9
    max_ellipsis_lines: float = 0.0  # share of lines that end in an ellipsis; Gopher: 0.3
    min_alphabetic_words: float = 0.0  # share of words with a letter; Gopher: 0.8
    min_stop_words: int = 0  # different ones of the, be, to, of, and, that, have, with: English only; Gopher: 2
    max_duplicate_lines: float = 0.0  # share of lines that came before in the document; Gopher: 0.3
    max_duplicate_line_characters: float = 0.0  # the same in characters; Gopher: 0.2
    max_duplicate_paragraphs: float = 0.0  # the same of paragraphs; Gopher: 0.3
    max_duplicate_paragraph_characters: float = 0.0  # of paragraphs in characters; Gopher: 0.2
    max_top_2gram: float = 0.0  # share of the characters that lie in the commonest pair of words; Gopher: 0.20
    max_top_3gram: float = 0.0  # of three words; Gopher: 0.18
    max_top_4gram: float = 0.0  # of four words; Gopher: 0.16
    max_duplicate_5grams: float = 0.0  # share of the characters that lie in five words that came before; Gopher: 0.15
    max_duplicate_6grams: float = 0.0  # likewise of six words; Gopher: 0.14
    max_duplicate_7grams: float = 0.0  # likewise of seven words; Gopher: 0.13
    max_duplicate_8grams: float = 0.0  # likewise of eight words; Gopher: 0.12
    max_duplicate_9grams: float = 0.0  # likewise of nine words; Gopher: 0.11
    max_duplicate_10grams: float = 0.0  # likewise of ten words; Gopher: 0.10
    min_sentences: int = 0  # sentences of the document; C4: 3
    lorem_ipsum: int = 0  # remove a document with so many "lorem ipsum" (C4: 1)
    curly_brackets: int = 0  # remove a document with so many "{" (C4: 1)
    listed_words: int = 0  # remove a document with so many entries of clean.word_list (C4: 1)
    min_closed_lines: float = 0.0  # share of lines that end in a sentence mark; FineWeb: 0.12
    max_short_lines: float = 0.0  # share of lines of at most 30 characters; FineWeb: 0.67
    max_newlines_per_word: float = 0.0  # line ends over words; FineWeb: 0.3
    max_digits: float = 0.0  # share of the characters that are digits
    max_symbols: float = 0.0  # share of the characters that are neither letters, digits nor white space
    max_uppercase: float = 0.0  # share of the letters that are capitals

    def __post_init__(self):
        for key in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, key)
            _need(value >= 0, f"filter.{key}={value} must not be negative; 0 is off")


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer: its sizes, and what its blocks are made of."""

    kind: Literal["decoder", "encoder"] = "decoder"  # an encoder (BERT) sees all of its segment and norms its embeddings; set causal=false for it
    output: Literal["tokens", "hidden", "pooled", "sequence_labels", "token_labels"] = "tokens"  # encoder: tokens behind masks, states as they are,
    # one vector of a sequence (from its first token), or labels of a sequence or of each token; a decoder has labels too, of a sequence from its last token.
    # Objectives with labels set output and labels by themselves
    labels: int = 0  # classes of sequence_labels and token_labels
    label_names: tuple[str, ...] = ()  # what the classes are called, in their order; empty: LABEL_0, LABEL_1 ...
    pooler_activation: Literal["tanh", "relu"] = "tanh"  # between the pooler's and the classifier's matrix; DistilBERT: relu
    token_types: int = 0  # encoder: kinds of tokens (BERT: first and second sentence) that have an embedding; 0: none
    position_offset: int = 0  # learned positions: rows of the table before that of position 0 (RoBERTa: 2), besides the context's
    vocab_size: int = 0  # rows of the embedding; 0: the tokenizer's size rounded up to a multiple of 64
    context: int = 512  # longest sequence the model may see, in tokens
    layers: int = 4  # blocks; of an encoder-decoder those of the decoder
    width: int = 256  # size of the residual stream
    heads: int = 4  # query heads
    kv_heads: int = 0  # key and value heads (grouped-query attention); 0: as many as query heads
    head_size: int = 0  # 0: width / heads
    feedforward: int = 0  # inner size of the MLP; 0: 4 x width
    norm: Literal["layer", "rms"] = "rms"  # what scales the residual stream before or after each branch; rms: without taking the mean off
    norm_eps: float = 1e-5  # added to the variance in norms
    norm_position: Literal["pre", "post", "branch", "sandwich"] = "pre"  # x + f(norm x), norm(x + f x) (BERT), x + norm f(x) (OLMo 2), both (Gemma 2)
    norm_offset: bool = False  # norms multiply by 1 + scale, as Gemma's do, and their scales start at 0
    parallel_residual: bool = False  # x + attention(norm x) + mlp(norm x), as in GPT-NeoX; else one after the other
    causal: bool = True  # a token sees no later one; encoders see all of their segment
    positions: Literal["rotary", "learned", "none", "relative"] = "rotary"  # relative: a bias of the scores by distance (T5)
    rotary_fraction: float = 1.0  # leading share of each head that rotary positions turn (GPT-NeoX: 0.25)
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    rope_local_theta: float = 0.0  # base in layers with a window, never scaled (Gemma 3); 0: all layers are alike
    rope_scaling: Literal["none", "linear", "llama3"] = "none"  # a longer context than trained: all wavelengths longer, or only the long ones
    rope_factor: float = 1.0  # of the scaling
    rope_low_frequency: float = 1.0  # llama3: wavelengths above rope_original_context / this are scaled in full
    rope_high_frequency: float = 4.0  # llama3: wavelengths below rope_original_context / this are left as they are
    rope_original_context: int = 8192  # llama3: context before the scaling
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "silu"  # of the MLP; gelu_tanh: GPT-2's approximation
    gated: bool = True  # activation(x W_gate) * (x W_up), as in SwiGLU
    tied: bool = True  # the output projection is the token embedding
    bias: bool = False  # biases in projections and layer norms
    qkv_bias: bool = False  # biases of queries, keys and values alone, as in Qwen 2
    embedding_scale: float = 1.0  # factor on token embeddings; Gemma: sqrt(width)
    dropout: float = 0.0  # on embeddings and on each branch of the residual stream; 0 with train.init_from: as that model had it
    attention_dropout: float = 0.0  # likewise on the attention probabilities (BERT, GPT-2); training then takes the reference kernel
    attention_softcap: float = 0.0  # c * tanh(scores / c) as in Gemma 2; 0: off
    final_softcap: float = 0.0  # the same on the logits
    query_scale: float = 0.0  # attention scores are divided by the root of this; 0: the head size
    qk_norm: Literal["none", "head", "full"] = "none"  # RMS norm of queries and keys: of each head (Qwen 3) or over all heads (OLMo 2)
    windows: tuple[int, ...] = (0,)  # sliding window of each layer in tokens, repeated over the layers; 0: all that came before
    experts: int = 0  # mixture of experts: MLPs of which each token takes a few; 0: one MLP for all tokens
    experts_per_token: int = 2  # how many experts each token passes
    expert_feedforward: int = 0  # inner size of each expert; 0: feedforward
    expert_renormalise: bool = True  # weights of the chosen experts sum to 1 (Mixtral); else they stay shares among all experts
    shared_feedforward: int = 0  # inner size of one more expert that every token passes; 0: none
    shared_gate: bool = False  # the shared expert's output is weighed by a sigmoid gate, as in Qwen 2 MoE
    dense_layers: tuple[int, ...] = ()  # with experts: numbers of the layers that keep one MLP, from 0
    init: Literal["normal", "truncated_normal", "xavier", "kaiming", "lecun", "t5"] = "normal"  # t5: each kind of matrix has its own std
    init_std: float = 0.02  # of "normal" and "truncated_normal"
    init_depth_scaled: bool = True  # divide the std of projections into the residual stream by sqrt(2 x layers), as GPT-2 does; not under "t5"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are always float32
    remat: Literal["none", "full", "dots"] = "none"  # keep all activations, only the layers' inputs, or these and matrix products
    attention: Literal["auto", "reference", "blocked", "xla", "cudnn", "splash"] = "auto"  # kernel; cudnn: NVIDIA GPUs, splash: TPUs
    sequence_attention: Literal["ring", "all_to_all"] = "ring"  # with mesh.sequence: keys go round the devices, or tokens are exchanged for heads
    pipeline_microbatches: int = 0  # with mesh.stage: parts in which a batch (a part of train.microbatches) passes; 0: up to 4 for each stage
    pipeline_repeats: int = 1  # with mesh.stage: groups of layers of a stage, which a part passes in turn: a smaller bubble for more traffic
    encoder_layers: int = 0  # layers of an encoder whose output the decoder's layers attend to (T5); 0: no encoder
    decoder_start: int = 0  # with an encoder: id with which the decoder begins (T5: padding)
    relative_buckets: int = 32  # relative positions: distances told apart, half of them exactly, the rest in logarithmic steps
    relative_distance: int = 128  # relative positions: distances from here on are one
    embedding_noise: float = 0.0  # in training, noise on the token embeddings: uniform within this / sqrt(tokens of a row x width); NEFTune: 5; 0: off
    logit_scale: float = 1.0  # factor on the hidden states before the output projection; T5 with a tied embedding: width^-0.5
    mup_width: int = 0  # maximal update parametrisation (docs/search.md): the width that optim.lr was found for, from which it carries over to this one; 0: off
    mup_head_size: int = 0  # with mup_width: the head size of that model; 0: the same, wider models having more heads

    def __post_init__(self):
        for key in ("context", "layers", "width", "heads"):
            _need(getattr(self, key) > 0, f"model.{key}={getattr(self, key)} must be positive")
        _need(self.pipeline_repeats > 0, f"model.pipeline_repeats={self.pipeline_repeats} must be positive")
        for key in ("vocab_size", "kv_heads", "head_size", "feedforward", "labels", "token_types", "position_offset", "pipeline_microbatches"):
            _need(getattr(self, key) >= 0, f"model.{key}={getattr(self, key)} must not be negative")
        _need(self.kind == "decoder" or not self.causal, "model.kind=encoder sees the tokens on both sides: set model.causal=false")
        _need(self.kind == "encoder" or self.output not in ("hidden", "pooled"), f"model.output={self.output} is an encoder's: set "
              "model.kind=encoder, or leave it out")
        _need(not self.encoder_layers or self.output == "tokens", f"model.output={self.output} is not an encoder-decoder's: leave it out")
        _need(self.kind == "encoder" or not self.token_types, f"model.token_types={self.token_types} are an encoder's: set model.kind=encoder, or leave them out")
        _need(self.positions == "learned" or not self.position_offset, f"model.position_offset={self.position_offset} goes with model.positions=learned")
        _need((self.labels > 0) == self.output.endswith("_labels"), f"model.labels={self.labels} does not go with model.output={self.output}: labels are the "
              "number of classes of sequence_labels and token_labels")
        if self.head_size == 0:
            _need(self.width % self.heads == 0, f"model.heads={self.heads} must divide model.width={self.width}: "
                  f"try {_nearest_divisor(self.width, self.heads)}, or set model.head_size")
        _need(self.heads % (self.kv_heads or self.heads) == 0, f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}: "
              f"try {_nearest_divisor(self.heads, self.kv_heads or 1)}")
        head_size = self.head_size or self.width // self.heads
        _need(self.positions != "rotary" or head_size % 2 == 0, f"rotary positions need an even head size, not {head_size}: "
              "change model.width, model.heads or model.head_size")
        for key in ("dropout", "attention_dropout"):
            _need(0 <= getattr(self, key) < 1, f"model.{key}={getattr(self, key)} must be in [0, 1)")
        _need(not self.label_names or len(set(self.label_names)) == len(self.label_names) == self.labels, f"model.label_names={self.label_names} must be "
              f"model.labels={self.labels} different names, or none")
        _need(bool(self.windows) and all(w >= 0 for w in self.windows), f"model.windows={self.windows} must be one or more sizes >= 0")
        _need(0 < self.rotary_fraction <= 1 and int(head_size * self.rotary_fraction) % 2 == 0 and int(head_size * self.rotary_fraction) > 0,
              f"model.rotary_fraction={self.rotary_fraction} must be in (0, 1] and leave an even part of the head size {head_size}")
        for key in ("rope_theta", "rope_factor", "rope_low_frequency", "rope_original_context", "embedding_scale", "norm_eps"):
            _need(getattr(self, key) > 0, f"model.{key}={getattr(self, key)} must be positive")
        for key in ("rope_local_theta", "query_scale", "attention_softcap", "final_softcap", "experts", "expert_feedforward", "shared_feedforward"):
            _need(getattr(self, key) >= 0, f"model.{key}={getattr(self, key)} must not be negative")
        _need(self.rope_high_frequency > self.rope_low_frequency, f"model.rope_high_frequency={self.rope_high_frequency} must be above "
              f"model.rope_low_frequency={self.rope_low_frequency}")
        _need(not self.parallel_residual or self.norm_position == "pre", f"model.parallel_residual needs model.norm_position=pre, not {self.norm_position}")
        _need(not self.experts or 0 < self.experts_per_token <= self.experts, f"model.experts_per_token={self.experts_per_token} must be in "
              f"[1, model.experts={self.experts}]")
        _need(all(0 <= i < self.layers for i in self.dense_layers) and len(set(self.dense_layers)) == len(self.dense_layers),
              f"model.dense_layers={self.dense_layers} must be different numbers in [0, {self.layers})")
        _need(self.experts > 0 or not (self.dense_layers or self.shared_feedforward), "model.dense_layers and model.shared_feedforward go with "
              "model.experts: set that too, or leave them out")
        _need(not self.shared_gate or self.shared_feedforward > 0, "model.shared_gate weighs a shared expert: set model.shared_feedforward too")
        _need(not self.experts or (self.gated and not self.bias), "model.experts are gated and have no biases: set model.gated=true and model.bias=false")
        _need(self.encoder_layers >= 0 and self.decoder_start >= 0, f"model.encoder_layers={self.encoder_layers} and model.decoder_start={self.decoder_start} "
              "must not be negative")
        _need((self.encoder_layers > 0) == (self.positions == "relative"), f"model.positions={self.positions} and model.encoder_layers={self.encoder_layers}: "
              "an encoder-decoder needs relative positions, and they need one")
        _need(not self.encoder_layers or (self.causal and self.norm_position == "pre" and self.qk_norm == "none" and not (
            self.bias or self.qkv_bias or self.parallel_residual or self.experts)), "model.encoder_layers goes with causal=true, norm_position=pre and "
              "qk_norm=none, and without biases, parallel_residual and experts")
        _need(self.relative_buckets >= 4 and self.relative_buckets % 4 == 0 and self.relative_distance > self.relative_buckets // 2,
              f"model.relative_buckets={self.relative_buckets} must be a multiple of 4, and model.relative_distance={self.relative_distance} above half of it")
        _need(self.embedding_noise >= 0, f"model.embedding_noise={self.embedding_noise} must not be negative; 0 is off")
        _need(not self.embedding_noise or self.kind == "decoder" and not self.encoder_layers, "model.embedding_noise is for decoders: leave it out")
        _need(self.logit_scale > 0, f"model.logit_scale={self.logit_scale} must be positive")
        _need(self.mup_width >= 0 and self.mup_head_size >= 0, f"model.mup_width={self.mup_width} and model.mup_head_size={self.mup_head_size} must not be negative")
        _need(self.mup_width > 0 or not self.mup_head_size, f"model.mup_head_size={self.mup_head_size} goes with model.mup_width: set that too")
        _need(not self.mup_width or self.kind == "decoder" and not self.encoder_layers, "model.mup_width is for decoders: leave it out")
        _need(not self.mup_width or self.init in ("normal", "truncated_normal"), f"model.mup_width says how the width changes model.init_std, which "
              f"model.init={self.init} has no use for: set model.init=normal")

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with a mixture of experts."""
        return tuple(i for i in range(self.layers) if i not in self.dense_layers) if self.experts else ()

    @property
    def drops(self) -> bool:
        """Whether training draws random numbers."""
        return self.dropout > 0 or self.attention_dropout > 0 or self.embedding_noise > 0

    @property
    def wider(self) -> float:
        """How many times as wide the model is as the one that its hyper-parameters were found for; 1 without mup_width."""
        return self.width / self.mup_width if self.mup_width else 1.0

    @property
    def score_scale(self) -> float:
        """Factor on attention scores: 1 / sqrt(head size), or as under muP they shrink with 1 / head size (Yang et al. 2022, definition 4.1)."""
        head = self.head_size or self.width // self.heads
        return (self.query_scale or head) ** -0.5 * math.sqrt((self.mup_head_size or head) / head)

    @property
    def hidden_scale(self) -> float:
        """Factor on hidden states before the output projection: under muP a tied one, which starts and learns like an embedding, shrinks here."""
        return self.logit_scale / (self.wider if self.tied else 1.0)

    def filled(self) -> "TransformerConfig":
        """The same model with every 0-means-default size written out."""
        return dataclasses.replace(
            self, kv_heads=self.kv_heads or self.heads, head_size=self.head_size or self.width // self.heads,
            feedforward=self.feedforward or 4 * self.width, expert_feedforward=self.expert_feedforward or self.feedforward or 4 * self.width)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted and how the loss counts it."""

    name: Literal["next_token", "masked_token", "span_corruption", "seq2seq", "sft", "preference", "classify", "multi_label", "regress",
                  "token_classify"] = "next_token"  # of decoders; of encoders (BERT), with another mask in each step (RoBERTa); of encoder-decoders: hidden
    # spans of documents (T5), and pairs of data.input_key and data.text_key; of decoders: what the assistant says in chats (data.format=chat), and which of
    # two answers is better (data.format=preference); of encoders and decoders with data.label_key: one class of a text, any number of them, a number, a
    # class of each word
    class_weights: tuple[tuple[str, float], ...] = ()  # classify, token_classify, multi_label (of texts that have the class): factors of the
    # loss, (("spam", 5.0), ...); of classes not named 1
    class_balance: float = 0.0  # likewise: the loss of a class is multiplied by (an even share / its share in training)^this; 1 makes all classes count alike
    mask_rate: float = 0.15  # masked_token: share of the tokens to be told
    mask_random: float = 0.1  # of these, share that is replaced by any token; in BERT 80 % are masked, 10 % random, 10 % kept
    mask_keep: float = 0.1  # of these, share that is left as it is
    mask_whole_words: bool = False  # a word's pieces are told together (Cui et al. 2019)
    span_rate: float = 0.15  # span_corruption: share of a text's tokens that is hidden
    span_length: float = 3.0  # span_corruption: mean length of a hidden span in tokens
    preference_loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO (Rafailov et al. 2023), or IPO (Azar et al. 2023): the squared distance to 1 / (2 beta)
    preference_beta: float = 0.1  # how strongly the model is held to the reference, which is what training began with
    preference_smoothing: float = 0.0  # sigmoid: share of the pairs believed to be the wrong way round (conservative DPO)
    preference_per_token: bool = False  # log-probabilities are divided by the length of the answer
    teacher: str = ""  # distillation: a workdir, hf:DIR or gguf:FILE with the same vocabulary, of any size; next_token, sft and masked_token
    teacher_kl: float = 0.5  # weight of the Kullback-Leibler divergence from the teacher's distribution, times temperature^2 (Hinton et al. 2015)
    teacher_hard: float = 0.5  # weight of the objective's own loss, on the true tokens
    teacher_cosine: float = 0.0  # weight of 1 - cosine between the last hidden states, which must be of one width (Sanh et al. 2019)
    teacher_temperature: float = 2.0  # both distributions are softened by it
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps the logits from drifting (PaLM uses 1e-4)
    chunk_rows: int = 0  # about so many tokens' logits exist at one time, the rest is recomputed in the backward pass; 0: all
    moe_balance: float = 0.01  # mixture of experts: weight of the loss that spreads tokens over the experts (Switch, Mixtral)
    moe_z: float = 0.001  # mixture of experts: weight of log(Z)^2 of the router (ST-MoE)

    def __post_init__(self):
        for key in ("z_loss", "moe_balance", "moe_z", "teacher_kl", "teacher_hard", "teacher_cosine"):
            _need(getattr(self, key) >= 0, f"objective.{key}={getattr(self, key)} must not be negative")
        for key in ("mask_rate", "span_rate"):
            _need(0 < getattr(self, key) < 1, f"objective.{key}={getattr(self, key)} must be in (0, 1)")
        _need(0 <= self.preference_smoothing < 0.5, f"objective.preference_smoothing={self.preference_smoothing} must be in [0, 0.5)")
        _need(not self.preference_smoothing or self.preference_loss == "sigmoid", "objective.preference_smoothing goes with objective.preference_loss=sigmoid")
        _need(self.preference_beta > 0, f"objective.preference_beta={self.preference_beta} must be positive")
        _need(self.teacher_temperature > 0, f"objective.teacher_temperature={self.teacher_temperature} must be positive")
        _need(not self.teacher or self.name in ("next_token", "sft", "masked_token"), f"objective.teacher does not go with objective.name={self.name}: distil "
              "with next_token, sft or masked_token")
        _need(not self.teacher or self.teacher_kl + self.teacher_hard + self.teacher_cosine > 0, "objective.teacher_kl, teacher_hard and teacher_cosine are "
              "all 0: nothing is learned")
        _need(self.span_length >= 1, f"objective.span_length={self.span_length} must be at least 1 token")
        _need(self.mask_random >= 0 and self.mask_keep >= 0 and self.mask_random + self.mask_keep <= 1, f"objective.mask_random={self.mask_random} and "
              f"objective.mask_keep={self.mask_keep} must be shares of one whole; the rest is masked")
        _need(self.chunk_rows >= 0, f"objective.chunk_rows={self.chunk_rows} must not be negative")
        _need(0 <= self.class_balance <= 1, f"objective.class_balance={self.class_balance} must be in [0, 1]")
        _need(all(0 < weight < math.inf for _, weight in self.class_weights), f"objective.class_weights={self.class_weights} must be positive")
        weighed = bool(self.class_weights or self.class_balance)
        _need(not weighed or self.name in LABELLED and self.name != "regress", "objective.class_weights and objective.class_balance go with "
              f"objective.name=classify, multi_label and token_classify, not {self.name}: leave them out")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis of the mesh; -1 takes what is left."""

    slice: int = 1  # groups of devices with a slow network between them (TPU slices, GPU nodes): copies of the model, only gradients cross
    data: int = 1  # copies of the model, each with its share of the batch
    fsdp: int = -1  # likewise, with parameters and optimiser state split too; -1: the devices that are left (one axis may say so)
    stage: int = 1  # pipeline: the layers in so many parts, one after the other; see model.pipeline_*
    sequence: int = 1  # each row's tokens split, so that a context longer than one device holds trains; see model.sequence_attention
    tensor: int = 1  # each matrix split by heads, feed-forward or vocabulary
    expert: int = 1  # mixture of experts: the experts split; the rows of the batch too

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        _need(all(n == -1 or n > 0 for n in sizes.values()), f"mesh={sizes}: each axis must be positive, or -1 for the devices left over")
        _need(list(sizes.values()).count(-1) <= 1, f"mesh={sizes}: only one axis may be -1")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule and which parameters they reach."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"  # the optimiser; muon: of the layers' matrices, AdamW of the rest
    lr: float = 1e-3  # the peak
    schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "wsd", "step", "inverse_sqrt"] = "cosine"  # of the learning rate after the warm-up
    warmup: Duration = Duration("2%")  # from 0 to lr, linearly; part of train.steps
    end_lr_ratio: float = 0.1  # lr at the end over lr at the peak (linear, cosine, cosine_restarts, wsd)
    restarts: int = 1  # cosine_restarts: how often the cosine starts again
    decay: Duration = Duration("20%")  # wsd: length of the final linear decay
    step_every: Duration = Duration("30%")  # step: distance of the drops after warm-up
    step_ratio: float = 0.1  # step: each drop multiplies lr by this
    weight_decay: float = 0.1  # in each step a decaying weight loses this times the learning rate of itself
    decay_rules: Rules = ()  # (path regex, decays or not), strict; empty: every weight with two or more dimensions of its own decays
    trainable: Rules = ()  # (path regex, trained or frozen), strict; empty: everything is trained, with lora.rank the adapters and a head for labels
    frozen_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"  # how frozen matrices are kept: int8 and nf4 those of the layers, blockwise, and
    # the others in bfloat16; with lora.rank nf4 is QLoRA
    clip: float = 1.0  # global norm of the gradient; 0: off
    b1: float = 0.9  # first-moment decay (adamw, lion), momentum (sgd); of muon's AdamW part
    b2: float = 0.95  # second-moment decay (adamw, lion); likewise
    eps: float = 1e-8  # added to the root of the second moment
    state_dtype: Literal["float32", "bfloat16", "int8"] = "float32"  # of the matrices' moments: a half and 0.27 of the memory; see moments.py
    layer_decay: float = 1.0  # the rate of each layer is this times that of the one above it, of the embedding that of the first; 1: all alike
    frozen_layers: int = 0  # so many of the first layers, and the embedding, are left as they are
    ema: float = 0.0  # decay of an exponential moving average of the parameters, used by eval and generate; 0: off

    def __post_init__(self):
        for key in ("lr", "eps"):
            _need(getattr(self, key) > 0, f"optim.{key}={getattr(self, key)} must be positive")
        for key in ("b1", "b2", "ema"):
            _need(0 <= getattr(self, key) < 1, f"optim.{key}={getattr(self, key)} must be in [0, 1)")
        for key in ("weight_decay", "clip", "end_lr_ratio"):
            _need(getattr(self, key) >= 0, f"optim.{key}={getattr(self, key)} must not be negative")
        _need(0 < self.layer_decay <= 1, f"optim.layer_decay={self.layer_decay} must be in (0, 1]")
        _need(self.frozen_layers >= 0, f"optim.frozen_layers={self.frozen_layers} must not be negative")
        _need(self.restarts >= 0, f"optim.restarts={self.restarts} must not be negative")


@dataclass(frozen=True)
class LoraConfig:
    """Small matrices beside the frozen ones of the model that `train.init_from` names (Hu et al. 2021); checkpoints hold only them."""
    rank: int = 0  # inner size of each adapter; 0: no adapters
    alpha: float = 16.0  # the product is multiplied by alpha / rank
    targets: tuple[str, ...] = ()  # path regexes of the matrices that get one, such as "layers/attn/[qv]"; empty: all of attention and MLPs
    dropout: float = 0.0  # share of an adapter's inputs that is dropped in a step
    rslora: bool = False  # alpha / sqrt(rank) instead, which keeps its size at higher ranks (Kalajdzievski 2023)
    dora: bool = False  # the length of each output's weights is learned beside their direction (Liu et al. 2024)
    init_from: str = ""  # an adapter to begin with: the workdir of a run with adapters, or a directory of PEFT; empty: adapters that change nothing

    def __post_init__(self):
        _need(self.rank >= 0, f"lora.rank={self.rank} must not be negative; 0 is off")
        _need(self.alpha > 0, f"lora.alpha={self.alpha} must be positive")
        _need(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must be in [0, 1)")
        off = [f"lora.{key}" for key in ("targets", "dropout", "rslora", "dora", "init_from") if getattr(self, key)]
        _need(self.rank > 0 or not off, f"{' and '.join(off)} go with adapters: set lora.rank too")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved and kept."""

    every: Duration = Duration("10%")  # a checkpoint is written every so often, and at the end
    keep_last: int = 2  # so many of the newest checkpoints stay
    keep_best: int = 1  # the k with the lowest validation loss, or the best checkpoint.metric
    metric: str = "loss"  # what is best on the validation split: "loss", or a figure that jaxlm eval prints, such as "accuracy", "f1_macro", "mcc"
    keep_every: Duration = Duration("0")  # and every m-th for good
    on_error: Literal["stop", "go_on"] = "stop"  # when a checkpoint or a line of the log cannot be written (full disk, quota, permission): end the run, or say so
    # and try again when the next one is due; the last checkpoint of a run must succeed

    def __post_init__(self):
        _need(self.keep_last >= 1, f"checkpoint.keep_last={self.keep_last} must be at least 1")
        _need(self.keep_best >= 0, f"checkpoint.keep_best={self.keep_best} must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """How long a run is, where it begins, and what it does on the way."""

    steps: Duration = Duration("1000 steps")  # length of the run; what is there of it already counts
    seed: int = 0  # of the initial parameters and of dropout
    init_from: str = ""  # "hf:DIR", a Hugging Face directory, or a workdir: its model, parameters and tokenizer are the beginning; empty: from nothing
    init_layers: tuple[int, ...] = ()  # of init_from take these layers only, numbered from 0, as model.layers layers; (0, 2, 4, ...) begins a smaller model
    microbatches: int = 1  # the batch is computed in so many parts, one after the other; the result is the same
    log_every: Duration = Duration("10 steps")  # distance of the lines of metrics.jsonl and TensorBoard
    eval_every: Duration = Duration("10%")  # distance of the evaluations on the validation split
    patience: int = 0  # the run ends after so many evaluations in a row without a better checkpoint.metric; 0: never
    eval_documents: int = 200  # validation documents of the evaluations during training; 0: all
    bad_steps: int = 10  # stop after so many non-finite losses or gradients in a row; each is skipped and counted
    spike: float = 0.0  # a step whose loss or gradient norm lies so many robust deviations above the median of the last 128 is a spike: it is counted and named
    # with its documents in bad_steps.jsonl; 6 is a good value, 0: off
    on_spike: Literal["warn", "skip"] = "warn"  # the update of a spike is made all the same, or skipped as one that is not finite, and counts for bad_steps
    watchdog_seconds: float = 1800.0  # end the process when no step, restore or compile finishes for so long; 0: off
    peer_seconds: float = 20.0  # of several processes: end all when one has not been heard of for so long
    sample_prompt: str = ""  # text continued at each evaluation; empty: the beginning of a validation document
    layer_norms: bool = False  # log the norms of gradient and update of each parameter, by layer: grad_norm/layers/3/attn/q
    profile: Duration = Duration("0")  # at this step begins a trace of five steps for XProf, in WORKDIR/plugins/profile; 0: none
    writers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()  # where the figures go besides metrics.jsonl and TensorBoard (docs/monitoring.md)
    webhook: str = ""  # a URL (https), or env:NAME of the variable that holds it, that is told when the run ends or fails; empty: none

    def __post_init__(self):
        _need(not self.webhook or bool(re.match(r"https://.|env:\w+$|http://(localhost|127\.0\.0\.1|\[::1\])[:/]", self.webhook)),
              "train.webhook must be an https URL, or env:NAME of the environment variable that holds one")
        for key in ("microbatches", "bad_steps"):
            _need(getattr(self, key) > 0, f"train.{key}={getattr(self, key)} must be positive")
        _need(self.peer_seconds >= 1, f"train.peer_seconds={self.peer_seconds} must be at least 1")
        for key in ("eval_documents", "watchdog_seconds", "patience", "spike"):
            _need(getattr(self, key) >= 0, f"train.{key}={getattr(self, key)} must not be negative")


@dataclass(frozen=True)
class EvalConfig:
    """How evaluation is batched and its intervals are made."""

    batch_size: int = 0  # rows of one batch; 0: data.batch_size
    overlap: float = 0.5  # share of a window that a document longer than the context sees again as context, in [0, 1)
    bootstrap: int = 1000  # resamples of the documents behind each confidence interval
    outputs: int = 100  # seq2seq: pairs whose greedy output is compared with the target (exact match); 0: none

    def __post_init__(self):
        _need(self.batch_size >= 0, f"eval.batch_size={self.batch_size} must not be negative")
        _need(0 <= self.overlap < 1, f"eval.overlap={self.overlap} must be in [0, 1)")
        _need(self.bootstrap > 0, f"eval.bootstrap={self.bootstrap} must be positive")
        _need(self.outputs >= 0, f"eval.outputs={self.outputs} must not be negative")


@dataclass(frozen=True)
class AuditConfig:
    """What `jaxlm eval --audit` asks, and how much bias a release may have."""
    tasks: tuple[str, ...] = ()  # of models that continue text or fill in: tasks with metrics about bias, names of the catalogue or FILE.toml
    swaps: tuple[str, ...] = ()  # of models with labels: words swapped in the run's own texts, lists of evaluate/swaps.toml or FILE.toml
    limits: tuple[tuple[str, float], ...] = ()  # (("crows_pairs/stereotyped", 0.1), ...): the largest distance from an unbiased model's figure


@dataclass(frozen=True)
class EnergyConfig:
    """What a run's electricity, CO2 and cost are reckoned with (docs/monitoring.md)."""
    region: str = "world"  # whose electricity: world, an ISO code of three letters (FRA, USA, ... jaxlm/train/grid.py), or grams of CO2 per kWh: "35"
    watts: float = 0.0  # what one device draws while it trains, of CPUs the machine; 0: measured where a meter can be read, else modelled as a range
    price_per_hour: float = 0.0  # dollars for an hour of one device, of CPUs the machine; 0: the list price where it is known (jaxlm/chips.py), else no cost

    def __post_init__(self):
        for key in ("watts", "price_per_hour"):
            _need(0 <= getattr(self, key) < math.inf, f"energy.{key}={getattr(self, key)} must be positive, or 0 for what is known of the device")


@dataclass(frozen=True)
class Config:
    """All parts; `load` makes one of a recipe and overrides."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)

    def __post_init__(self):
        rows, parts = self.data.batch_size, self.train.microbatches
        _need(rows % parts == 0, f"train.microbatches={parts} must divide data.batch_size={rows}: try {_nearest_divisor(rows, parts)}")
        _need(not self.filter.listed_words or self.clean.word_list, "filter.listed_words counts the words of a file of yours: set clean.word_list too")
        # With init_from the model's context is known only when that is read (train/initial.py).
        _need(self.train.init_from or self.data.sequence_length <= self.model.context, f"data.sequence_length={self.data.sequence_length} is longer than "
              f"model.context={self.model.context}: make the first smaller or the second larger")
        _need(not self.model.mup_width or self.optim.name == "adamw", f"model.mup_width has rules for optim.name=adamw, not {self.optim.name}: set that, or leave "
              "it out")
        form = {"sft": "chat", "preference": "preference"}.get(self.objective.name, "text")
        _need(self.data.format == form or self.data.format == "text" and not self.data.source, f"objective.name={self.objective.name} "
              f"learns from data.format={form}, not {self.data.format}")
        edits = [name for name, part in (("clean", self.clean), ("filter", self.filter)) if part != type(part)()] + ["dedup.line_length"] * bool(
            self.dedup.line_length)
        _need(self.data.format == "text" or not edits, f"data.format={self.data.format}: {' and '.join(edits)} would tear messages apart: leave them out")
        _need(not self.train.init_layers or self.train.init_from, "train.init_layers are layers of another model: set train.init_from")
        pairs, source = self.objective.name == "seq2seq", bool(self.data.source)
        labelled = self.objective.name in LABELLED
        _need(labelled or not (self.data.label_key or self.data.slice_keys), "data.label_key and data.slice_keys go with "
              f"objective.name={', '.join(LABELLED)}, not {self.objective.name}: set one of these, or leave the keys out")
        _need(not labelled or not source or bool(self.data.label_key), f"objective.name={self.objective.name} needs data.label_key: the field (JSONL) or "
              "column (CSV, Parquet) with the labels")
        _need(not self.lora.rank or not self.optim.frozen_layers, "with lora.rank all layers are frozen, and adapters lie in all of them: leave "
              "optim.frozen_layers out")
        _need(not labelled or not self.model.encoder_layers, f"objective.name={self.objective.name} trains encoders and decoders, not an encoder-decoder")
        _need(self.objective.name != "token_classify" or not (self.clean.normalise or self.clean.repair or self.clean.pii or self.data.input_key),
              "objective.name=token_classify has a tag for each word, which data.input_key, clean.repair, clean.normalise and clean.pii would move: "
              "leave them out")
        _need(not labelled or not self.dedup.line_length, "dedup.line_length takes lines out of texts that have labels: set it to 0")
        _need(pairs or labelled or not self.data.input_key, f"data.input_key={self.data.input_key!r} goes with objective.name=seq2seq or "
              f"with labels, not {self.objective.name}: "
              "set that, or leave the key out")
        _need(not pairs or not source or bool(self.data.input_key), "objective.name=seq2seq needs data.input_key: the field (JSONL) or column (Parquet) that "
              "the encoder reads; data.text_key is what the decoder says")
        _need(not self.data.input_key or not self.dedup.line_length, f"dedup.line_length={self.dedup.line_length} takes lines out of documents, which would "
              "tear the two sides of a pair apart (data.input_key): set it to 0")


def load(name: str, overrides: Iterable[tuple[str, str]] = ()) -> Config:
    """Reads a recipe and applies command-line overrides.

    Args:
      name: path of a config file or name of a packaged recipe, each with an optional argument after a colon: "quickstart:long".
      overrides: pairs of dotted key and text, for example `("optim.lr", "3e-4")`; text is read as the key's type.

    Returns:
      The checked configuration.

    Raises:
      ValueError: one line for an unknown file, key, type or impossible value.
    """
    from ml_collections import ConfigDict

    path, argument = find(name)
    spec = importlib.util.spec_from_file_location(f"jaxlm_recipe_{path.stem}", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        recipe = module.get_config(argument) if argument is not None else module.get_config()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        raise ValueError(f"{path} could not be read as a config: {type(error).__name__}: {error}") from error
    _need(isinstance(recipe, ConfigDict), f"{path}: get_config() must return an ml_collections.ConfigDict, not {type(recipe).__name__}")
    tree = recipe.to_dict()
    for key, text in overrides:
        _override(tree, key, text)
    return build(tree)


def find(name: str) -> tuple[pathlib.Path, str | None]:
    """Path of the recipe and its argument for `path[.py][:argument]` or `name[:argument]`."""
    text, _, argument = name.partition(":")
    given = pathlib.Path(text)
    if given.suffix == ".py" and given.is_file():
        return given, argument or None
    folder = recipes_folder()
    packaged = folder / f"{given.stem}.py"
    if packaged.is_file() and text in (given.stem, f"configs/{given.stem}.py"):
        return packaged, argument or None
    known = sorted(p.stem for p in folder.glob("[a-z]*.py"))
    guess = difflib.get_close_matches(given.stem, known, n=1)
    hint = f"did you mean {guess[0]!r}? " if guess else ""
    raise ValueError(f"--config={name}: no such file or recipe; {hint}packaged recipes: {', '.join(known)}")


def recipes_folder() -> pathlib.Path:
    """Where the recipes lie: inside the package when installed from a wheel, beside it in a checkout."""
    package = pathlib.Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def keys() -> dict[str, Any]:
    """Every dotted key with its default, in order."""
    return {f"{part}.{key}": value for part, values in to_dict(Config()).items() for key, value in values.items()}


def build(tree: Mapping[str, Any]) -> Config:
    """The frozen configuration of a nested mapping that names only what differs from the defaults.

    Raises:
      ValueError: one line, for an unknown key, a wrong type or an impossible value.
    """
    parts = typing.get_type_hints(Config)
    built = {}
    for part, values in tree.items():
        if part not in parts:
            raise ValueError(_unknown(part))
        _need(isinstance(values, Mapping), f"config.{part} holds keys of its own ({', '.join(typing.get_type_hints(parts[part]))}), "
              f"it cannot be {values!r}")
        hints = typing.get_type_hints(parts[part])
        for key in values:
            if key not in hints:
                raise ValueError(_unknown(f"{part}.{key}"))
        built[part] = parts[part](**{key: _coerce(f"{part}.{key}", value, hints[key]) for key, value in values.items()})
    return Config(**built)


def override(config: Config, overrides: Iterable[tuple[str, str]]) -> Config:
    """`config` with keys set as `--config.key=text` sets them.

    Raises:
      ValueError: as `load`.
    """
    tree = to_dict(config)
    for key, text in overrides:
        _override(tree, key, text)
    return build(tree)


def kind(key: str) -> Any:
    """The annotated type of a dotted key.

    Raises:
      ValueError: one line, with the nearest right name.
    """
    part, _, name = key.partition(".")
    parts = typing.get_type_hints(Config)
    hint = typing.get_type_hints(parts[part]).get(name) if part in parts else None
    if hint is None:
        raise ValueError(_unknown(key))
    return hint


def parse(key: str, text: str) -> Any:
    """The value that `--config.key=text` gives a key by itself, whatever the others are.

    Raises:
      ValueError: one line: an unknown key, or a value of another type.
    """
    tree: dict = {}
    _override(tree, key, text)
    part, _, name = key.partition(".")
    return _coerce(key, tree[part][name], kind(key))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """All keys as nested dicts."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    """All keys as JSON text, which `from_json` reads back."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The inverse of `to_json`; JSON lists become tuples."""
    return build(json.loads(text))


def to_recipe(config: Config, text: str) -> str:
    """A config file that `load` turns into `config`: the keys that are not at their defaults, under `text` as its docstring."""
    text = text.replace("\\", "/").replace('"', "'")
    default, lines = to_dict(Config()), []
    for part, values in to_dict(config).items():
        if changed := {key: value for key, value in values.items() if value != default[part][key]}:
            lines.append(f"    c.{part} = ConfigDict(dict({', '.join(f'{key}={value!r}' for key, value in changed.items())}))")
    return "\n".join([f'"""{text}"""', "", "from ml_collections import ConfigDict", "", "", "def get_config():", "    c = ConfigDict()", *lines, "    return c", ""])


def read(path: pathlib.Path) -> Config:
    """The config.json of a workdir.

    Raises:
      ValueError: one line that names the file, when it cannot be read.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}): bring back the config.json in the files/ of a checkpoint beside it") from None


def difference(old: Config, new: Config) -> list[str]:
    """One line per key whose value differs: `optim.lr: 0.001 -> 0.003`."""
    a, b = to_dict(old), to_dict(new)
    return [f"{part}.{key}: {a[part][key]!r} -> {b[part][key]!r}" for part in a for key in a[part] if a[part][key] != b[part][key]]


_DURATION = re.compile(r"^\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*(%|steps?|tokens?|epochs?)?\s*$")


def steps_of(key: str, duration: str, *, tokens_per_step: int, tokens_per_epoch: int | None = None, total: int | None = None) -> int:
    """A duration in optimiser steps, rounded up to a whole one, so that whatever is not nothing lasts at least a step.

    Args:
      key: the config key, for the error message.
      duration: "2000 steps", "1e9 tokens", "3 epochs", "5%" or a bare number of steps.
      tokens_per_step: tokens of one global batch.
      tokens_per_epoch: tokens of the training split; None where epochs make no sense.
      total: steps of the run; None where a percentage makes no sense.
    """
    number, unit = _split_duration(key, duration)
    if unit == "%":
        if total is None:
            raise ValueError(f"{key}={duration!r}: a share of the run cannot define the run itself; use steps, tokens or epochs")
        return math.ceil(number / 100 * total - 1e-9)
    if unit == "epoch":
        if tokens_per_epoch is None:
            raise ValueError(f"{key}={duration!r}: epochs are not known here; use steps or tokens")
        return math.ceil(number * tokens_per_epoch / tokens_per_step - 1e-9)
    if unit == "token":
        return math.ceil(number / tokens_per_step - 1e-9)
    return math.ceil(number)


def _split_duration(key: str, duration: str) -> tuple[float, str]:
    match = _DURATION.match(duration)
    if match is None:
        raise ValueError(f"{key}={duration!r} is not a duration: write '2000 steps', '3 epochs', '1e9 tokens', '5%' or a number of steps")
    return float(match[1].replace("_", "")), (match[2] or "step").rstrip("s")


def _override(tree: dict, key: str, text: str) -> None:
    part, _, name = key.partition(".")
    hint = kind(key)
    tree.setdefault(part, {})[name] = text if hint in (str, Duration) or typing.get_origin(hint) is Literal else _literal(key, text, hint)


def _literal(key: str, text: str, hint) -> Any:
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if typing.get_origin(hint) is tuple and not isinstance(value, (tuple, list)):
        # `a,b` and a single value are lists too; a comma inside is read by literal_eval unless the items are bare words.
        value = tuple(item.strip() for item in text.split(",") if item.strip()) if isinstance(value, str) else (value,)
    return value


def _coerce(key: str, value: Any, hint) -> Any:
    """`value` as the annotated type, or one line that says what is allowed."""
    if hint is Duration:
        text = f"{value} steps" if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        _need(isinstance(text, str), f"config.{key}={value!r} is not a duration: write '2000 steps', '3 epochs', '1e9 tokens' or '5%'")
        _split_duration(f"config.{key}", text)
        return Duration(text)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            guess = difflib.get_close_matches(str(value), arguments, n=1)
            raise ValueError(f"config.{key}={value!r} is not known{f'; did you mean {guess[0]!r}?' if guess else ';'} "
                             f"allowed: {', '.join(arguments)}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            value = (value,)
        if arguments[-1] is Ellipsis:
            return tuple(_coerce(key, item, arguments[0]) for item in value)
        _need(len(value) == len(arguments), f"config.{key}: {value!r} must have {len(arguments)} items")
        return tuple(_coerce(key, item, kind) for item, kind in zip(value, arguments))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value == int(value):  # 1e6 is how people write a million
        return int(value)
    if type(value) is not hint:
        raise ValueError(f"config.{key}={value!r} is {_article(type(value).__name__)}; it must be {_article(hint.__name__)}")
    return value


def _article(name: str) -> str:
    return {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "nothing"}.get(name, f"a {name}")


def _unknown(key: str) -> str:
    known = list(keys())
    leaf = key.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf]  # the right name in the wrong part
    guess = elsewhere[:1] or difflib.get_close_matches(key, [*known, *Config.__dataclass_fields__], n=1, cutoff=0.5)
    part = key.partition(".")[0]
    inside = [k.partition(".")[2] for k in known if k.startswith(part + ".")] or [f.name for f in dataclasses.fields(Config)]
    return (f"config.{key} does not exist; " + (f"did you mean config.{guess[0]}? " if guess else "")
            + f"known{f' in {part}' if part in Config.__dataclass_fields__ else ' parts'}: {', '.join(inside)}")


def _nearest_divisor(number: int, wanted: int) -> int:
    return next(n for distance in range(number + wanted) for n in (wanted - distance, wanted + distance) if 0 < n <= number and number % n == 0)
