"""GPT-2 124M (Radford et al. 2019) from scratch, with nanoGPT's published hyper-parameters.

    jaxlm train --config=gpt2_124m --workdir=runs/gpt2 --config.data.source='openwebtext/*.jsonl.zst'
    jaxlm train --config=gpt2_124m --workdir=runs/gpt2 --config.data.source='text/*.txt' --config.data.batch_size=32 --config.train.steps='1 epoch'

Predicted, not run here: 300 B tokens are 2.6e20 FLOP, about 4 days on 8 A100 at 40 % of their peak. Published for this recipe on
OpenWebText: validation loss 2.85 (nanoGPT); the released weights score 3.12 there without fine-tuning.
The tokenizer is a SentencePiece BPE of GPT-2's size, trained on your text, so losses per token compare only within one tokenizer; bits per byte always do.

    jaxlm fit --config=gpt2_124m --topology=v5e:2x4,v5p:2x2x1,v6e:2x2

Compiled ahead of time (2026-11-22, libtpu 0.0.42.1, `--quick`), GiB on each device (arguments and temporaries with the gaps
between them: more than its peak, which `jaxlm fit` now shows) of what a program may take, and seconds to compile on a busy machine:
v5e:2x4 5.6 of 15.75 in 35 s; v6e:2x2 11.6 of 31.25 in 44 s; v5p:2x2x1 12.0 of 95.74 in 62 s.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import PRESETS


def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(PRESETS["gpt2_124m"]) | dict(dtype="bfloat16", remat="full"))
    c.tokenizer = ConfigDict(dict(kind="bpe", vocab_size=50257))
    c.data = ConfigDict(dict(validation=0.0005, test=0.0005, sequence_length=1024, batch_size=480, threads=4))
    c.optim = ConfigDict(dict(name="adamw", lr=6e-4, warmup="2000 steps", end_lr_ratio=0.1, weight_decay=0.1, b2=0.95))
    c.train = ConfigDict(dict(steps="600_000 steps", microbatches=2, log_every="100 steps", eval_every="1000 steps", eval_documents=1000))
    c.objective = ConfigDict(dict(chunk_rows=32768))
    c.checkpoint = ConfigDict(dict(every="1000 steps", keep_every="50_000 steps"))
    return c
