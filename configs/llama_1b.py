"""A Llama of 1.1 B parameters (TinyLlama's shape, Zhang et al. 2024), fully sharded.

    jaxlm train --config=llama_1b --workdir=gs://bucket/llama_1b --config.data.dir=/data/tokens      on each host of a TPU pod

Predicted, not run here: 22 B tokens (20 per parameter) are 1.6e20 FLOP, about 14 hours on a v5e-16 at 100 TFLOP/s a chip. Parameters and
AdamW's state are 13 GB in float32, split over all chips.

    jaxlm fit --config=llama_1b --topology=v5e:4x4,v5p:2x2x2,v6e:2x4

Compiled ahead of time (2026-11-22, libtpu 0.0.42.1, `--quick`), GiB on each device (arguments and temporaries with the gaps
between them: more than its peak, which `jaxlm fit` now shows) of what a program may take, and seconds to compile on a busy machine:
v5e:4x4 11.3 of 15.75 in 41 s; v5p:2x2x2 22.8 of 95.74 in 105 s; v6e:2x4 17.5 of 31.25 in 20 s.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import PRESETS


def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(PRESETS["llama_1b"]) | dict(dtype="bfloat16", remat="full"))
    c.tokenizer = ConfigDict(dict(kind="bpe", vocab_size=32000))
    c.data = ConfigDict(dict(validation=0.0005, test=0.0005, sequence_length=2048, batch_size=256, threads=8))
    c.optim = ConfigDict(dict(name="adamw", lr=4e-4, warmup="2000 steps", end_lr_ratio=0.1))
    c.train = ConfigDict(dict(steps="22e9 tokens", microbatches=4, log_every="50 steps", eval_every="1000 steps", eval_documents=1000))
    c.objective = ConfigDict(dict(z_loss=1e-4, chunk_rows=65536))
    c.checkpoint = ConfigDict(dict(every="1000 steps", keep_every="10_000 steps"))
    return c
