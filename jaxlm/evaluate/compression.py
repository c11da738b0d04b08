"""What general compressors make of the same held-out text once they have read the training text: the floor a language model must beat."""

import gzip
import lzma

from jaxlm.data.shards import Corpus
from jaxlm.data.tokenizer import Tokenizer

LIMIT = 64 * 2**20  # bytes of training text; xz -9e looks no further back


def bits_per_byte(corpus: Corpus, tokenizer: Tokenizer, split: str) -> dict[str, float]:
    """Bits per byte of the documents of `split`, by compressor: what compressed training and held-out text cost beyond the training text alone."""
    before, after = _text(corpus, tokenizer, "train"), _text(corpus, tokenizer, split)
    pack = {"gzip -9": lambda data: len(gzip.compress(data, 9)), "xz -9e": lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8 * (size(before + after) - size(before)) / len(after) for name, size in pack.items()}


def table(corpus: Corpus, tokenizer: Tokenizer, split: str, model_bits: float) -> str:
    """The comparison as lines to print; one line that says why where the corpus is too large."""
    if int(corpus.splits["train"].text_bytes.sum()) > LIMIT:
        return f"(no comparison with gzip and xz: the training text is larger than {LIMIT >> 20} MiB)"
    rows = sorted([*bits_per_byte(corpus, tokenizer, split).items(), ("this model", model_bits)], key=lambda row: -row[1])
    return "Bits per byte, each given the training text first (lower is better):\n" + "\n".join(
        f"  {name:<11} {bits:.3f}  {'#' * round(bits * 16)}" for name, bits in rows)


def _text(corpus: Corpus, tokenizer: Tokenizer, split: str) -> bytes:
    documents = (tokenizer.decode(corpus.read(split, i)[1:-1].tolist()) for i in range(len(corpus.splits[split].tokens)))
    return "\n".join(documents).encode()
