"""Llama-3 8B
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import PRESETS


def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(PRESETS["llama_8b"]) | dict(dtype="bfloat16", remat="full"))
    c.tokenizer = ConfigDict(dict(kind="bpe", vocab_size=128256))
    c.data = ConfigDict(dict(validation=0.0001, test=0.0001, sequence_length=8192, batch_size=256, threads=8))
    c.optim = ConfigDict(dict(name="adamw", lr=3e-4, warmup="2000 steps", end_lr_ratio=0.1))
    c.train = ConfigDict(dict(steps="160e9 tokens", log_every="20 steps", eval_every="1000 steps", eval_documents=1000))
    c.objective = ConfigDict(dict(z_loss=1e-4, chunk_rows=65536))
    c.checkpoint = ConfigDict(dict(every="500 steps", keep_every="5000 steps"))
    return c
