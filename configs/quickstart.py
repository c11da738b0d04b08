"""A small Llama-like decoder that learns the English inside Python: no data, no account, no network.

    jaxlm train --config=quickstart --workdir=runs/quickstart             5.2 M parameters, under 5 minutes on 2 CPU cores
    jaxlm train --config=quickstart:long --workdir=runs/long              about 15 minutes

The corpus is `pydoc_data.topics` and the docstrings of the standard library, 2.3 MB; 5 % of the documents are held out as a test. The
result is printed in bits per byte beside gzip (2.8) and xz (1.85), which are given the training text first.
"""

from ml_collections import ConfigDict


def get_config(size=None):
    if size not in (None, "long"):
        raise ValueError(f"quickstart:{size} is not known; allowed: quickstart, quickstart:long")
    c = ConfigDict()
    c.data = ConfigDict(dict(source=("python_docs",), validation=0.02, test=0.05, sequence_length=256, batch_size=8))
    c.tokenizer = ConfigDict(dict(kind="unigram", vocab_size=4096))
    c.model = ConfigDict(dict(context=256, layers=4, width=256, heads=4))
    c.optim = ConfigDict(dict(name="muon", lr=5e-3, warmup="2%", end_lr_ratio=0.05))
    c.train = ConfigDict(dict(steps="350 steps", eval_every="50%", eval_documents=20))
    c.checkpoint = ConfigDict(dict(every="25%"))
    if size == "long":
        c.model.update(dropout=0.1)
        c.train.update(steps="1600 steps", eval_every="10%")
    return c
