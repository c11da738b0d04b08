"""Prefers one answer to another: direct preference optimisation (Rafailov et al. 2023), with adapters.

    jaxlm train --config=dpo --workdir=runs/dpo --config.data.source=pairs.jsonl      (train.init_from: runs/chat)
    jaxlm train --config=dpo:full ...                all weights; the reference is a second, frozen copy

A record is {"prompt", "chosen", "rejected"} (text, or lists of messages), or {"instruction", "input", "chosen", "rejected"}. The reference is the model that
training begins with: with adapters it is the same weights without them. Begin with a model that has learned to answer (sft_chat, sft_lora). Half of a row
belongs to each answer with its prompt. objective.preference_loss=ipo, preference_smoothing and preference_per_token are in jaxlm/config.py.
"""

from ml_collections import ConfigDict


def get_config(kind=None):
    if kind not in (None, "full"):
        raise ValueError(f"dpo:{kind} is not known; allowed: dpo, dpo:full")
    c = ConfigDict()
    c.data = ConfigDict(dict(format="preference", sequence_length=1024, batch_size=4, validation=0.1, test=0.1))
    c.objective = ConfigDict(dict(name="preference", preference_beta=0.1, chunk_rows=1024))
    c.optim = ConfigDict(dict(lr=5e-5, warmup="10%", end_lr_ratio=0.1, weight_decay=0.0, b2=0.999))
    c.model = ConfigDict(dict(remat="dots"))
    if kind == "full":
        c.optim.update(lr=1e-6, frozen_dtype="bfloat16")
    else:
        c.lora = ConfigDict(dict(rank=16, alpha=32.0))
    c.train = ConfigDict(dict(init_from="runs/chat", steps="1 epoch", eval_every="50%"))
    c.checkpoint = ConfigDict(dict(every="50%"))
    return c
