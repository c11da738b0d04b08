"""Llama-2 70B (Touvron et al. 2023) from scratch, fully sharded, on 20 tokens per parameter.

    jaxlm train --config=llama_70b --workdir=gs://bucket/llama_70b --config.data.dir=/data/tokens      on each host of a TPU pod

Predicted, not run here: 1.4 T tokens are 5.8e23 FLOP, about 230 days on a v5p-128 at 230 TFLOP/s a chip: take more chips.

    jaxlm fit --config=llama_70b --topology=v5p:4x4x8,v6e:16x16
    jaxlm fit --config=llama_70b --topology=v5e:16x16 --config.mesh.tensor=8 --config.train.microbatches=32

Compiled ahead of time (2026-11-22, libtpu 0.0.42.1, `--quick`), GiB on each device (arguments and temporaries with the gaps
between them: more than its peak, which `jaxlm fit` now shows) of what a program may take, and seconds to compile on a busy machine:
v5p:4x4x8 37.0 of 95.74 in 27 s; v6e:16x16 18.7 of 31.25 in 34 s; v5e:16x16 12.6 of 15.75 in 14 s (with mesh.tensor=4 17.0: too much).
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import PRESETS


def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(PRESETS["llama2_70b"]) | dict(dtype="bfloat16", remat="full"))
    c.tokenizer = ConfigDict(dict(kind="bpe", vocab_size=32000))
    c.data = ConfigDict(dict(validation=0.0001, test=0.0001, sequence_length=4096, batch_size=1024, threads=8))
    c.optim = ConfigDict(dict(name="adamw", lr=1.5e-4, warmup="2000 steps", end_lr_ratio=0.1))
    c.train = ConfigDict(dict(steps="1400e9 tokens", microbatches=4, log_every="20 steps", eval_every="1000 steps", eval_documents=1000))
    c.objective = ConfigDict(dict(z_loss=1e-4, chunk_rows=65536))
    c.checkpoint = ConfigDict(dict(every="500 steps", keep_every="5000 steps"))
    return c
