"""Llama-2 7B (Touvron et al. 2023) from scratch, fully sharded.

    jaxlm train --config=llama_7b --workdir=gs://bucket/llama_7b --config.data.dir=/data/tokens      on each host of a TPU pod

Predicted, not run here: the paper's 2 T tokens are 8.4e22 FLOP; 20 tokens per parameter (135 B) are 5.7e21 FLOP, about 5 days on a v5e-128 at
100 TFLOP/s a chip. Parameters and AdamW's state are 81 GB in float32, split over all chips.

    jaxlm fit --config=llama_7b --topology=v5e:8x16,v5p:2x4x4,v6e:8x8

Compiled ahead of time (2026-11-22, libtpu 0.0.42.1, `--quick`), GiB on each device (arguments and temporaries with the gaps
between them: more than its peak, which `jaxlm fit` now shows) of what a program may take, and seconds to compile on a busy machine:
v5e:8x16 7.9 of 15.75 in 19 s; v5p:2x4x4 30.5 of 95.74 in 43 s; v6e:8x8 15.7 of 31.25 in 16 s.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import PRESETS


def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(PRESETS["llama_7b"]) | dict(dtype="bfloat16", remat="full"))
    c.tokenizer = ConfigDict(dict(kind="bpe", vocab_size=32000))
    c.data = ConfigDict(dict(validation=0.0001, test=0.0001, sequence_length=4096, batch_size=1024, threads=8))
    c.optim = ConfigDict(dict(name="adamw", lr=3e-4, warmup="2000 steps", end_lr_ratio=0.1))
    c.train = ConfigDict(dict(steps="135e9 tokens", microbatches=4, log_every="20 steps", eval_every="1000 steps", eval_documents=1000))
    c.objective = ConfigDict(dict(z_loss=1e-4, chunk_rows=65536))
    c.checkpoint = ConfigDict(dict(every="500 steps", keep_every="5000 steps"))
    return c
