"""Mixtral 8x7B (Jiang et al. 2024) from scratch, 47 B parameters of which a token passes 13 B, fully sharded, on 20 tokens per active parameter.

    jaxlm train --config=mixtral_8x7b --workdir=gs://bucket/mixtral --config.data.dir=/data/tokens      on each host of a TPU pod

Predicted, not run here: 260 B tokens are 2.0e22 FLOP, about 16 days on a v5p-64 at 230 TFLOP/s a chip.

    jaxlm fit --config=mixtral_8x7b --topology=v5p:4x4x4,v6e:8x16
    jaxlm fit --config=mixtral_8x7b --topology=v5e:16x16 --config.mesh.tensor=4 --config.train.microbatches=4

Compiled ahead of time (2026-11-22, libtpu 0.0.42.1, `--quick`), GiB on each device (arguments and temporaries with the gaps
between them: more than its peak, which `jaxlm fit` now shows) of what a program may take, and seconds to compile on a busy machine:
v5p:4x4x4 48.3 of 95.74 in 162 s; v6e:8x16 26.9 of 31.25 in 150 s; v5e:16x16 10.4 of 15.75 in 87 s.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import PRESETS


def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(PRESETS["mixtral_8x7b"]) | dict(dtype="bfloat16", remat="full"))
    c.tokenizer = ConfigDict(dict(kind="bpe", vocab_size=32000))
    c.data = ConfigDict(dict(validation=0.0001, test=0.0001, sequence_length=4096, batch_size=512, threads=8))
    c.optim = ConfigDict(dict(name="adamw", lr=3e-4, warmup="2000 steps", end_lr_ratio=0.1))
    c.train = ConfigDict(dict(steps="260e9 tokens", log_every="20 steps", eval_every="1000 steps", eval_documents=1000))
    c.objective = ConfigDict(dict(z_loss=1e-4, chunk_rows=65536))
    c.checkpoint = ConfigDict(dict(every="500 steps", keep_every="5000 steps"))
    return c
