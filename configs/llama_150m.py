"""A Llama of 150 M parameters, trained on 20 tokens per parameter (Hoffmann et al. 2022): the smallest one worth talking to.

    jaxlm train --config=llama_150m --workdir=runs/llama_150m --config.data.source='text/*.jsonl.zst'

Predicted, not run here: 3 B tokens are 2.9e18 FLOP, about 2 hours on a v5e-4 or 2.5 hours on one H100 at 40 % of their peak.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import PRESETS


def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(PRESETS["llama_150m"]) | dict(dtype="bfloat16"))
    c.tokenizer = ConfigDict(dict(kind="bpe", vocab_size=32000))
    c.data = ConfigDict(dict(validation=0.001, test=0.001, sequence_length=2048, batch_size=128, threads=4))
    c.optim = ConfigDict(dict(name="adamw", lr=1e-3, warmup="2%", end_lr_ratio=0.1))
    c.train = ConfigDict(dict(steps="3e9 tokens", log_every="50 steps", eval_every="5%", eval_documents=1000))
    c.objective = ConfigDict(dict(z_loss=1e-4, chunk_rows=32768))
    c.checkpoint = ConfigDict(dict(every="2%"))
    return c
