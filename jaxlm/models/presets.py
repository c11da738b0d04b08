"""Published models by name. Each entry states only sizes and conventions. Import of the released weights reads these from their config.json instead.

Each parameter count is checked twice: tests/models/test_decoder.py holds it against the published figure (papers, model cards, headers of the released
safetensors), and tests/interop/test_torch.py against what transformers makes of the same config.json on torch's meta device. Counted are the weights of
the class that the family exports to (with the masked-token head: BERT, RoBERTa, DistilBERT; with the pooler: MiniLM); tied matrices count once.
"""

import math

from jaxlm.config import TransformerConfig

_GPT2 = dict(vocab_size=50257, context=1024, norm="layer", positions="learned", activation="gelu_tanh", gated=False, tied=True, bias=True)
_LLAMA = dict(vocab_size=32000, context=2048, norm="rms", positions="rotary", activation="silu", gated=True, tied=False, bias=False)

_LLAMA3 = _LLAMA | dict(vocab_size=128256, context=8192, rope_theta=500_000.0)
_LLAMA31 = _LLAMA3 | dict(context=131072, rope_scaling="llama3", rope_factor=8.0)
_NEOX = dict(vocab_size=50304, context=2048, norm="layer", positions="rotary", rotary_fraction=0.25, activation="gelu", gated=False, tied=False, bias=True,
             parallel_residual=True)
_MISTRAL = _LLAMA | dict(context=32768, layers=32, width=4096, heads=32, kv_heads=8, feedforward=14336)
_QWEN2 = _LLAMA | dict(vocab_size=152064, context=32768, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True)
_QWEN2_SMALL = _QWEN2 | dict(vocab_size=151936, tied=True)
_QWEN3 = _LLAMA | dict(vocab_size=151936, context=40960, norm_eps=1e-6, rope_theta=1e6, qk_norm="head", head_size=128)
_QWEN3_SMALL = _QWEN3 | dict(tied=True)
_QWEN3_MOE = _QWEN3 | dict(experts=128, experts_per_token=8)
_OLMO2 = _LLAMA | dict(vocab_size=100352, context=4096, norm_eps=1e-6, rope_theta=500_000.0, norm_position="branch", qk_norm="full")
_GEMMA = _LLAMA | dict(vocab_size=256000, context=8192, norm_eps=1e-6, norm_offset=True, activation="gelu_tanh", tied=True, head_size=256)
_GEMMA2 = _GEMMA | dict(norm_position="sandwich", query_scale=256.0, windows=(4096, 0), attention_softcap=50.0, final_softcap=30.0)
_GEMMA3 = _GEMMA | dict(vocab_size=262144, context=32768, norm_position="sandwich", query_scale=256.0, windows=(512,) * 5 + (0,), qk_norm="head", rope_theta=1e6,
                        rope_local_theta=10_000.0)
_GEMMA3_LONG = _GEMMA3 | dict(vocab_size=262208, context=131072, windows=(1024,) * 5 + (0,), rope_scaling="linear", rope_factor=8.0)

_T5 = dict(vocab_size=32128, context=512, norm="rms", norm_eps=1e-6, positions="relative", query_scale=1.0, bias=False)


_BERT = dict(kind="encoder", causal=False, vocab_size=30522, context=512, norm="layer", norm_eps=1e-12, norm_position="post", positions="learned",
             activation="gelu", gated=False, tied=True, bias=True, token_types=2)
_ROBERTA = _BERT | dict(vocab_size=50265, norm_eps=1e-5, token_types=1, position_offset=2)


def _sized(convention: dict, layers: int, width: int, heads: int, kv_heads: int, feedforward: int, **more) -> TransformerConfig:
    return TransformerConfig(**(convention | dict(layers=layers, width=width, heads=heads, kv_heads=kv_heads, feedforward=feedforward) | more))


def _neox(layers: int, width: int, heads: int, **more) -> TransformerConfig:
    return TransformerConfig(**(_NEOX | dict(layers=layers, width=width, heads=heads) | more))


def _gemma(convention: dict, layers: int, width: int, heads: int, kv_heads: int, feedforward: int, **more) -> TransformerConfig:
    return _sized(convention, layers, width, heads, kv_heads, feedforward, embedding_scale=math.sqrt(width), **more)


def _t5(layers: int, width: int, heads: int, head_size: int, feedforward: int) -> TransformerConfig:
    return TransformerConfig(**_T5, encoder_layers=layers, layers=layers, width=width, heads=heads, head_size=head_size, feedforward=feedforward,
                             tied=True, logit_scale=width ** -0.5, activation="relu", gated=False)


def _t5_v1_1(layers: int, width: int, heads: int, feedforward: int) -> TransformerConfig:
    return TransformerConfig(**_T5, encoder_layers=layers, layers=layers, width=width, heads=heads, head_size=64, feedforward=feedforward,
                             tied=False, activation="gelu_tanh", gated=True)


PRESETS: dict[str, TransformerConfig] = {
    # Devlin et al. 2019 (uncased), Liu et al. 2019, Sanh et al. 2019, with the masked-token head.
    "bert_base": TransformerConfig(**_BERT, layers=12, width=768, heads=12),
    "bert_large": TransformerConfig(**_BERT, layers=24, width=1024, heads=16),
    "roberta_base": TransformerConfig(**_ROBERTA, layers=12, width=768, heads=12),
    "roberta_large": TransformerConfig(**_ROBERTA, layers=24, width=1024, heads=16),
    "distilbert": TransformerConfig(**(_BERT | dict(token_types=0)), layers=6, width=768, heads=12),
    # Wang et al. 2020; of six layers is all-MiniLM-L6-v2, the sentence encoder. Without a masked-token head.
    "minilm_l6": TransformerConfig(**_BERT, layers=6, width=384, heads=12, output="pooled"),
    "minilm_l12": TransformerConfig(**_BERT, layers=12, width=384, heads=12, output="pooled"),
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
    # Touvron et al. 2023, Llama 1 (7B is llama_7b with a context of 2048) and 2.
    "llama1_7b": _sized(_LLAMA | dict(norm_eps=1e-6), 32, 4096, 32, 32, 11008),
    "llama1_13b": _sized(_LLAMA | dict(norm_eps=1e-6), 40, 5120, 40, 40, 13824),
    "llama1_30b": _sized(_LLAMA | dict(norm_eps=1e-6), 60, 6656, 52, 52, 17920),
    "llama1_65b": _sized(_LLAMA | dict(norm_eps=1e-6), 80, 8192, 64, 64, 22016),
    "llama2_13b": _sized(_LLAMA | dict(context=4096), 40, 5120, 40, 40, 13824),
    "llama2_70b": _sized(_LLAMA | dict(context=4096), 80, 8192, 64, 8, 28672),
    # Dubey et al. 2024 (Llama 3 and 3.1) and the 3.2 model cards.
    "llama3_70b": _sized(_LLAMA3, 80, 8192, 64, 8, 28672),
    "llama3.1_8b": _sized(_LLAMA31, 32, 4096, 32, 8, 14336),
    "llama3.1_70b": _sized(_LLAMA31, 80, 8192, 64, 8, 28672),
    "llama3.1_405b": _sized(_LLAMA31, 126, 16384, 128, 8, 53248),
    "llama3.2_1b": _sized(_LLAMA31 | dict(rope_factor=32.0, tied=True), 16, 2048, 32, 8, 8192),
    "llama3.2_3b": _sized(_LLAMA31 | dict(rope_factor=32.0, tied=True), 28, 3072, 24, 8, 8192),
    # Black et al. 2022 (GPT-NeoX-20B) and Biderman et al. 2023 (Pythia).
    "neox_20b": _neox(44, 6144, 64, vocab_size=50432),
    "pythia_70m": _neox(6, 512, 8),
    "pythia_160m": _neox(12, 768, 12),
    "pythia_410m": _neox(24, 1024, 16),
    "pythia_1b": _neox(16, 2048, 8),
    "pythia_1.4b": _neox(24, 2048, 16),
    "pythia_2.8b": _neox(32, 2560, 32),
    "pythia_6.9b": _neox(32, 4096, 32, vocab_size=50432),
    "pythia_12b": _neox(36, 5120, 40, vocab_size=50688),
    # Jiang et al. 2023 and 2024.
    "mistral_7b": TransformerConfig(**_MISTRAL, windows=(4096,)),
    "mixtral_8x7b": TransformerConfig(**_MISTRAL, rope_theta=1e6, experts=8, experts_per_token=2),
    # Yang et al. 2024 (Qwen 2 and 2.5): 2.5 has the sizes of 2, and three more.
    "qwen2_0.5b": _sized(_QWEN2_SMALL, 24, 896, 14, 2, 4864),
    "qwen2_1.5b": _sized(_QWEN2_SMALL, 28, 1536, 12, 2, 8960),
    "qwen2_7b": _sized(_QWEN2, 28, 3584, 28, 4, 18944),
    "qwen2_72b": _sized(_QWEN2, 80, 8192, 64, 8, 29568),
    "qwen2.5_0.5b": _sized(_QWEN2_SMALL, 24, 896, 14, 2, 4864),
    "qwen2.5_1.5b": _sized(_QWEN2_SMALL, 28, 1536, 12, 2, 8960),
    "qwen2.5_7b": _sized(_QWEN2, 28, 3584, 28, 4, 18944),
    "qwen2.5_72b": _sized(_QWEN2, 80, 8192, 64, 8, 29568),
    "qwen2.5_3b": _sized(_QWEN2_SMALL, 36, 2048, 16, 2, 11008),
    "qwen2.5_14b": _sized(_QWEN2, 48, 5120, 40, 8, 13824),
    "qwen2.5_32b": _sized(_QWEN2, 64, 5120, 40, 8, 27648),
    # Yang et al. 2025 (Qwen 3).
    "qwen3_0.6b": _sized(_QWEN3_SMALL, 28, 1024, 16, 8, 3072),
    "qwen3_1.7b": _sized(_QWEN3_SMALL, 28, 2048, 16, 8, 6144),
    "qwen3_4b": _sized(_QWEN3_SMALL, 36, 2560, 32, 8, 9728),
    "qwen3_8b": _sized(_QWEN3, 36, 4096, 32, 8, 12288),
    "qwen3_14b": _sized(_QWEN3, 40, 5120, 40, 8, 17408),
    "qwen3_32b": _sized(_QWEN3, 64, 5120, 64, 8, 25600),
    "qwen3_30b_a3b": _sized(_QWEN3_MOE, 48, 2048, 32, 4, 6144, expert_feedforward=768),
    "qwen3_235b_a22b": _sized(_QWEN3_MOE, 94, 4096, 64, 4, 12288, expert_feedforward=1536),
    # OLMo Team 2024 (OLMo 2).
    "olmo2_1b": _sized(_OLMO2, 16, 2048, 16, 16, 8192),
    "olmo2_7b": _sized(_OLMO2, 32, 4096, 32, 32, 11008),
    "olmo2_13b": _sized(_OLMO2, 40, 5120, 40, 40, 13824),
    "olmo2_32b": _sized(_OLMO2, 64, 5120, 40, 8, 27648),
    # Gemma Team 2024, 2024 and 2025 (of Gemma 3 the text model, without the vision encoder).
    "gemma_2b": _gemma(_GEMMA, 18, 2048, 8, 1, 16384),
    "gemma_7b": _gemma(_GEMMA, 28, 3072, 16, 16, 24576),
    "gemma2_2b": _gemma(_GEMMA2, 26, 2304, 8, 4, 9216),
    "gemma2_9b": _gemma(_GEMMA2, 42, 3584, 16, 8, 14336),
    "gemma2_27b": _gemma(_GEMMA2, 46, 4608, 32, 16, 36864, head_size=128, query_scale=144.0),
    "gemma3_270m": _gemma(_GEMMA3, 18, 640, 4, 1, 2048),
    "gemma3_1b": _gemma(_GEMMA3, 26, 1152, 4, 1, 6912),
    "gemma3_4b": _gemma(_GEMMA3_LONG, 34, 2560, 8, 4, 10240),
    "gemma3_12b": _gemma(_GEMMA3_LONG, 48, 3840, 16, 8, 15360),
    "gemma3_27b": _gemma(_GEMMA3_LONG, 62, 5376, 32, 16, 21504, head_size=128, query_scale=168.0),
    # Raffel et al. 2020 (T5, and the released T5 1.1); as many encoder as decoder layers.
    "t5_small": _t5(6, 512, 8, 64, 2048),
    "t5_base": _t5(12, 768, 12, 64, 3072),
    "t5_large": _t5(24, 1024, 16, 64, 4096),
    "t5_3b": _t5(24, 1024, 32, 128, 16384),
    "t5_11b": _t5(24, 1024, 128, 128, 65536),
    "t5_v1_1_small": _t5_v1_1(8, 512, 6, 1024),
    "t5_v1_1_base": _t5_v1_1(12, 768, 12, 2048),
    "t5_v1_1_large": _t5_v1_1(24, 1024, 16, 2816),
    "t5_v1_1_xl": _t5_v1_1(24, 2048, 32, 5120),
    "t5_v1_1_xxl": _t5_v1_1(24, 4096, 64, 10240),
}
