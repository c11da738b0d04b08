"""T5 1.1 small (Raffel et al. 2020; 77 M parameters) from nothing: hidden spans of documents first, pairs of texts afterwards.

    jaxlm train --config=t5_small --workdir=runs/t5 --config.data.source='text/*.jsonl.zst'
    jaxlm train --config=t5_small:pairs --workdir=runs/pairs --config.train.init_from=runs/t5 --config.data.source=pairs.jsonl

where pairs.jsonl has the fields input and target (config.data.input_key and config.data.text_key say other names).

The schedule is the paper's (Adafactor, inverse square root after 10,000 steps of warm-up), with 65,536 steps of 128 rows of 512 + 114 tokens. Predicted, not
run here: 5.3 B tokens are 8.9e17 FLOP, some 40 minutes on one H100 at 40 % of its peak. Instead of the first command a released checkpoint will do:
--config.train.init_from=hf:t5-v1_1-small.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxlm.models.presets import PRESETS


def get_config(stage=None):
    if stage not in (None, "pairs"):
        raise ValueError(f"t5_small:{stage} is not known; allowed: t5_small, t5_small:pairs")
    c = ConfigDict()
    c.tokenizer = ConfigDict(dict(kind="unigram", vocab_size=32100, sentinels=100))
    c.model = ConfigDict(dataclasses.asdict(PRESETS["t5_v1_1_small"]) | dict(dtype="bfloat16", init="t5"))
    c.data = ConfigDict(dict(validation=0.001, test=0.001, sequence_length=512, batch_size=128, threads=4))
    c.objective = ConfigDict(dict(name="span_corruption"))
    c.optim = ConfigDict(dict(name="adafactor", lr=1e-2, schedule="inverse_sqrt", warmup="10000 steps", weight_decay=0.0))
    c.train = ConfigDict(dict(steps="65536 steps", log_every="50 steps", eval_every="5%", eval_documents=1000))
    c.checkpoint = ConfigDict(dict(every="2%"))
    if stage == "pairs":
        c.tokenizer = ConfigDict()
        c.data.update(validation=0.05, test=0.05, target_length=128, input_key="input", text_key="target")
        c.objective.name = "seq2seq"
        c.model.dropout = 0.1
        c.optim.update(lr=1e-3, schedule="constant", warmup="0")
        c.train.update(steps="10 epochs", eval_every="1 epoch")
    return c
