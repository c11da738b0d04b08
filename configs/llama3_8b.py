"""Llama-3 8B (Dubey et al. 2024) from scratch, fully sharded, on 20 tokens per parameter.

    jaxlm train --config=llama3_8b --workdir=gs://bucket/llama3_8b --config.data.dir=/data/tokens      on each host of a TPU pod

Predicted, not run here: 160 B tokens are 7.7e21 FLOP, about 7 days on a v5e-128 at 100 TFLOP/s a chip.

    jaxlm fit --config=llama3_8b --topology=v5e:8x16,v5p:2x4x4,v6e:8x8

Compiled ahead of time (2026-11-22, libtpu 0.0.42.1, `--quick`), GiB on each device (arguments and temporaries with the gaps
between them: more than its peak, which `jaxlm fit` now shows) of what a program may take, and seconds to compile on a busy machine:
v5e:8x16 12.7 of 15.75 in 17 s; v5p:2x4x4 45.5 of 95.74 in 32 s; v6e:8x8 24.7 of 31.25 in 43 s.
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
