"""Published models by name. Each entry states only sizes and conventions; the parameter counts are checked by a test against the papers."""

from jaxlm.config import TransformerConfig

_GPT2 = dict(vocab_size=50257, context=1024, norm="layer", positions="learned", activation="gelu_tanh", gated=False, tied=True, bias=True)
_LLAMA = dict(vocab_size=32000, context=2048, norm="rms", positions="rotary", activation="silu", gated=True, tied=False, bias=False)

PRESETS: dict[str, TransformerConfig] = {
    # Radford et al. 2019; the released checkpoints.
    "gpt2_124m": TransformerConfig(**_GPT2, layers=12, width=768, heads=12),
    "gpt2_medium": TransformerConfig(**_GPT2, layers=24, width=1024, heads=16),
    "gpt2_large": TransformerConfig(**_GPT2, layers=36, width=1280, heads=20),
    "gpt2_xl": TransformerConfig(**_GPT2, layers=48, width=1600, heads=25),
    # A Llama of the size that fits one small accelerator, and TinyLlama's shape (Zhang et al. 2024).
    "llama_150m": TransformerConfig(**_LLAMA, layers=16, width=768, heads=12, kv_heads=4, feedforward=2048),
    "llama_1b": TransformerConfig(**_LLAMA, layers=22, width=2048, heads=32, kv_heads=4, feedforward=5632),
    # Touvron et al. 2023 (Llama 2) and Dubey et al. 2024 (Llama 3).
    "llama_7b": TransformerConfig(**(_LLAMA | dict(context=4096)), layers=32, width=4096, heads=32, feedforward=11008),
    "llama_8b": TransformerConfig(**(_LLAMA | dict(vocab_size=128256, context=8192)), layers=32, width=4096, heads=32, kv_heads=8, feedforward=14336,
                                  rope_theta=500_000.0),
}
