"""The model in GGUF metadata <-> TransformerConfig.

A family's name says much that its keys do not (activation, norms, biases, which layers have a window), as in llama.cpp. What is written is read
back and compared, so that a model which a family cannot say is refused and never written as another.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.config import TransformerConfig
from jaxlm.interop.hf_config import COMPUTED, believable

ROPE_FACTORS = "rope_freqs.weight"
# llama3's rotary scaling is in the file as the factors that follow from it; these three of its four numbers are the same in all of Llama 3.
_LLAMA3 = {"rope_low_frequency": 1.0, "rope_high_frequency": 4.0, "rope_original_context": 8192}
_LARGE = {"gemma2": 46, "gemma3": 62}  # layers of the 27 B models, whose scores are scaled by width / heads; no key says so

_ROTARY = dict(norm="rms", positions="rotary", gated=True, bias=False)
_GEMMA = dict(_ROTARY, activation="gelu_tanh", norm_offset=True)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(_ROTARY, activation="silu"), "qwen2": dict(_ROTARY, activation="silu", qkv_bias=True),
    "qwen3": dict(_ROTARY, activation="silu", qk_norm="head"), "gemma": _GEMMA, "gemma2": dict(_GEMMA, norm_position="sandwich"),
    "gemma3": dict(_GEMMA, norm_position="sandwich", qk_norm="head"),
    "gpt2": dict(norm="layer", positions="learned", activation="gelu_tanh", gated=False, bias=True),
}


class _Keys:
    """The entries of one family, each checked for its type."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self.metadata, self.architecture = metadata, architecture

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():  # one for each layer
            value = value[0].item()
        if value is None and default is not ...:
            return default
        if value is None:
            raise ValueError(f"it lacks {self.architecture}.{key}, without which the model is not known")
        if type(value) is int and kind is float:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError(f"{self.architecture}.{key} is {str(value)[:60]!r}, not one {'whole ' * (kind is int)}{'text' if kind is str else 'number'}")
        return float(str(np.float32(value))) if kind is float else value  # 1e-05, not 9.99999974e-06


def read(metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], factors: Callable[[], np.ndarray]) -> tuple[str, TransformerConfig]:
    """The family and the model that a file describes.

    Args:
      shapes: of the file's tensors.
      factors: reads the tensor `ROPE_FACTORS`, if it is there.

    Raises:
      ValueError: one line: an unknown family, a missing key, or something that is not computed here.
    """
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ValueError(f"general.architecture={family!r} is not known here; known: {', '.join(FAMILIES)}")
    keys = _Keys(metadata, family)
    if "token_embd.weight" not in shapes:
        raise ValueError("it has no token_embd.weight: a file with a vocabulary only, or one part of several")
    layers, width, heads = (keys.get(key, int) for key in ("block_count", "embedding_length", "attention.head_count"))
    if not 0 < layers <= len(shapes) or not 0 < heads <= width:
        raise ValueError(f"it claims {layers} layers of {heads} heads and width {width} with {len(shapes)} tensors")
    if keys.get("expert_count", int, 0):
        raise ValueError("it is a mixture of experts, which is read from safetensors only")
    head_size = keys.get("attention.key_length", int, width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, int, head_size) != head_size:
            raise ValueError(f"{family}.{key}={keys.get(key, int)} differs from the head size {head_size}, which is not computed here")
    eps = "attention.layer_norm_epsilon" if family == "gpt2" else "attention.layer_norm_rms_epsilon"
    if family in ("qwen2", "gpt2") and head_size * heads != width:  # llama.cpp refuses to load it
        raise ValueError(f"a {family} model has heads of width / heads = {width // heads}, not {head_size}")
    context = keys.get("context_length", int)
    values = FAMILIES[family] | dict(
        vocab_size=shapes["token_embd.weight"][0], context=context, layers=layers, width=width, heads=heads, head_size=head_size,
        kv_heads=keys.get("attention.head_count_kv", int, heads), feedforward=keys.get("feed_forward_length", int), norm_eps=keys.get(eps, float),
        tied="output.weight" not in shapes, rope_theta=keys.get("rope.freq_base", float, 10_000.0))
    values |= _scaling(keys, factors if ROPE_FACTORS in shapes else None, values)
    window = keys.get("attention.sliding_window", int, 4096 if family == "gemma2" else 0)
    if family.startswith("gemma"):
        values["embedding_scale"] = math.sqrt(width)
    if family in _LARGE:
        values |= {"attention_softcap": keys.get("attn_logit_softcapping", float, 50.0 if family == "gemma2" else 0.0),
                   "final_softcap": keys.get("final_logit_softcapping", float, 30.0 if family == "gemma2" else 0.0),
                   "query_scale": float(width // heads if layers == _LARGE[family] else head_size)}
        values["windows"] = (0,) if not window else (window, 0) if family == "gemma2" else (window,) * 5 + (0,)
    elif window and window < context:
        values["windows"] = (window,)
    if family == "gemma3" and window:
        values["rope_local_theta"] = keys.get("rope.freq_base_swa", float, 10_000.0)
    believable(values)
    return family, TransformerConfig(**values).filled()


def _scaling(keys: _Keys, factors: Callable[[], np.ndarray] | None, values: Mapping[str, Any]) -> dict[str, Any]:
    kind, factor = keys.get("rope.scaling.type", str, "none"), keys.get("rope.scaling.factor", float, keys.get("rope.scale_linear", float, 1.0))
    if factors is not None:
        found = factors()
        scaling = dict(rope_scaling="llama3", rope_factor=float(found.max()), **_LLAMA3)
        expected = rope_factors(TransformerConfig(**values, **scaling))
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
            raise ValueError(f"{ROPE_FACTORS} does not hold the rotary scaling of Llama 3, the only one known here")
        return scaling
    if kind not in ("none", "linear"):
        raise ValueError(f"{keys.architecture}.rope.scaling.type={kind!r} is not computed here; known: none, linear")
    return {"rope_scaling": "linear", "rope_factor": factor} if factor != 1 else {}


def rope_factors(cfg: TransformerConfig) -> np.ndarray:
    """What each rotary frequency is divided by under llama3's scaling, float32 [head_size / 2]."""
    size = cfg.filled().head_size
    wavelengths = 2 * math.pi * cfg.rope_theta ** (np.arange(0, size, 2) / size)
    low, high = cfg.rope_original_context / cfg.rope_low_frequency, cfg.rope_original_context / cfg.rope_high_frequency
    smooth = np.clip((cfg.rope_original_context / wavelengths - cfg.rope_low_frequency) / (cfg.rope_high_frequency - cfg.rope_low_frequency), 0, 1)
    between = 1 / ((1 - smooth) / cfg.rope_factor + smooth)
    return np.where(wavelengths < high, 1, np.where(wavelengths > low, cfg.rope_factor, between)).astype(np.float32)


def write(cfg: TransformerConfig) -> tuple[str, dict[str, Any]]:
    """The first family that computes a model, and its metadata.

    Raises:
      ValueError: one line: no family that is known here does, and in what the nearest differs.
    """
    cfg = cfg.filled()
    shapes = {"token_embd.weight": (cfg.vocab_size, cfg.width), **{f"blk.{i}": () for i in range(cfg.layers)}}
    shapes |= {} if cfg.tied else {"output.weight": (cfg.vocab_size, cfg.width)}
    shapes |= {ROPE_FACTORS: ()} if cfg.rope_scaling == "llama3" else {}
    reasons = []
    for family in FAMILIES:
        metadata = _metadata(family, cfg)
        try:
            found = _plain(read(metadata, shapes, lambda: rope_factors(cfg))[1])
        except ValueError as error:
            reasons.append((3, f"{family}: {error}"))
            continue
        differs = [key for key, value in _plain(cfg).items() if found[key] != value]
        if not differs:
            return family, metadata
        reasons.append((len(differs), f"{family} has another {', '.join(differs)}"))
    raise ValueError(f"no family of GGUF that is known here ({', '.join(FAMILIES)}) computes this model; nearest: {min(reasons)[1]}")


def _metadata(family: str, cfg: TransformerConfig) -> dict[str, Any]:
    eps = "attention.layer_norm_epsilon" if family == "gpt2" else "attention.layer_norm_rms_epsilon"
    found: dict[str, Any] = {
        "block_count": cfg.layers, "context_length": cfg.context, "embedding_length": cfg.width, "feed_forward_length": cfg.feedforward,
        "attention.head_count": cfg.heads, eps: cfg.norm_eps}
    if family != "gpt2":
        found |= {"attention.head_count_kv": cfg.kv_heads, "rope.freq_base": cfg.rope_theta, "attention.key_length": cfg.head_size,
                  "attention.value_length": cfg.head_size, "rope.dimension_count": cfg.head_size, "vocab_size": cfg.vocab_size}
    if cfg.rope_scaling == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": cfg.rope_factor}
    if family in _LARGE:
        found |= {"attention.sliding_window": max(cfg.windows)} if any(cfg.windows) else {}
        found |= {"attn_logit_softcapping": cfg.attention_softcap} if family == "gemma2" or cfg.attention_softcap else {}
        found |= {"final_logit_softcapping": cfg.final_softcap} if family == "gemma2" or cfg.final_softcap else {}
    if family == "gemma3" and cfg.rope_local_theta:
        found["rope.freq_base_swa"] = cfg.rope_local_theta
    return {"general.architecture": family} | {f"{family}.{key}": value for key, value in found.items()}


def _plain(cfg: TransformerConfig) -> dict[str, Any]:
    """What a model computes, each thing said in one way."""
    cfg = cfg.filled()
    windows = tuple(window if window < cfg.context else 0 for window in (cfg.windows[i % len(cfg.windows)] for i in range(cfg.layers)))
    same = {key: getattr(TransformerConfig, key) for key in COMPUTED}
    if cfg.rope_scaling != "llama3":
        same |= {key: getattr(TransformerConfig, key) for key in _LLAMA3}
    if not cfg.experts:
        same |= {key: getattr(TransformerConfig, key) for key in ("experts_per_token", "expert_feedforward", "expert_renormalise")}
    if cfg.positions != "rotary":
        same["rope_theta"] = TransformerConfig.rope_theta
    values = dataclasses.asdict(dataclasses.replace(cfg, **same)) | {
        "windows": windows, "query_scale": cfg.query_scale or float(cfg.head_size), "qkv_bias": cfg.qkv_bias or cfg.bias,
        "rope_factor": cfg.rope_factor if cfg.rope_scaling != "none" else 1.0, "rope_scaling": cfg.rope_scaling if cfg.rope_factor != 1 else "none",
        "rope_local_theta": cfg.rope_local_theta if any(windows) and cfg.rope_local_theta != cfg.rope_theta else 0.0}
    return {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in values.items()}
