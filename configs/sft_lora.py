"""The same with adapters: only small matrices beside the frozen weights are trained and saved (LoRA), and with `:qlora` the frozen ones lie in 4 bits.

    jaxlm train --config=sft_lora --workdir=runs/lora --config.data.source=chats.jsonl --config.train.init_from=gguf:SmolLM2-135M-Instruct.Q4_1.gguf
    jaxlm train --config=sft_lora:qlora ...          NF4 base
    jaxlm generate --workdir=runs/lora --prompt=...                         with the adapters merged
    jaxlm export --workdir=runs/lora --to=exports/lora                      likewise, as a Hugging Face directory
    jaxlm export --workdir=runs/lora --to=exports/adapter --adapter         for PEFT

Adapters of rank 16 on all projections of attention and MLPs. Frozen weights have no gradients and no optimiser state; docs/finetuning.md has the figures.
"""

from ml_collections import ConfigDict


def get_config(kind=None):
    if kind not in (None, "qlora"):
        raise ValueError(f"sft_lora:{kind} is not known; allowed: sft_lora, sft_lora:qlora")
    c = ConfigDict()
    c.data = ConfigDict(dict(format="chat", sequence_length=512, batch_size=8, validation=0.05, test=0.05))
    c.objective = ConfigDict(dict(name="sft", chunk_rows=1024))
    c.lora = ConfigDict(dict(rank=16, alpha=32.0, dropout=0.05))
    c.optim = ConfigDict(dict(lr=2e-4, warmup="3%", end_lr_ratio=0.1, weight_decay=0.0, b2=0.999))
    c.model = ConfigDict(dict(remat="dots"))
    if kind == "qlora":
        c.optim.frozen_dtype = "nf4"
    c.train = ConfigDict(dict(steps="2 epochs", eval_every="25%"))
    c.checkpoint = ConfigDict(dict(every="25%"))
    return c
