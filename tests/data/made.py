"""Corpora whose tokens say which document they are of: each token of training document d is FIRST + d."""

import numpy as np

from jaxlm.data import shards

FIRST = 16  # below: 0 first token, 1 end, 2 .. 15 sentinels


def corpus(folder, lengths, *, framed=False, inputs=None, source=lambda number: "", licence=lambda number: "", sources=("",), held_out=2):
    """A prepared corpus of training documents with `lengths` tokens; `framed` ones begin with 0 and end with 1."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"of no use")
    size, splits = FIRST + len(lengths), {}
    for split in ("train", "validation", "test"):
        writer = shards.ShardWriter(folder, split, size, 1 << 14, sources)
        for number, length in enumerate(lengths if split == "train" else [5] * held_out):
            tokens = np.full(length, FIRST + number if split == "train" else FIRST)
            if framed:
                tokens[0], tokens[-1] = 0, 1
            writer.add(f"{split}/{number}.txt:1", tokens, int(length), source(number), licence(number), 0 if inputs is None else inputs[number % len(inputs)])
        splits[split] = writer.close()
    tokenizer = shards.file_entry(folder / "tokenizer.model") | {"kind": "bytes", "vocab_size": size, "bos": 0, "eos": 1, "pad": 0}
    shards.write_manifest(folder, {"made_from": {}, "source": {"files": 0, "bytes": 0}, "tokenizer": tokenizer, "splits": splits})
    return shards.open_corpus(folder)


def documents(batch, count):
    """How many tokens of each training document every row holds, wherever the model reads or says them: int64 [rows, count]."""
    out = np.zeros((len(batch["tokens"]), count), np.int64)
    sides = [np.where(batch["weights"] > 0, batch["targets"], 0)]
    if "encoder_tokens" in batch:
        sides.append(np.where(batch["encoder_segments"] > 0, batch["encoder_tokens"], 0))
    for side in sides:
        row, column = np.nonzero(side >= FIRST)
        np.add.at(out, (row, side[row, column] - FIRST), 1)
    return out
