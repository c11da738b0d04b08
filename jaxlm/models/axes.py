"""Logical axes of every parameter: what sharding, optimisers and reports know of a weight."""

from jaxlm.config import TransformerConfig

Axes = tuple[tuple[str, tuple[str, ...]], ...]


def decoder_axes(cfg: TransformerConfig) -> Axes:
    """Strict rules, path regex -> logical axes, for the decoder that `cfg` describes."""
    learned = cfg.positions == "learned"
    norm_bias = cfg.bias and cfg.norm == "layer"
    table = [
        (True, "embed/tokens", ("vocab", "embed")),
        (learned, "embed/positions", ("positions", "embed")),
        (True, "layers/(attn|mlp)_norm/scale", ("layers", "embed")),
        (norm_bias, "layers/(attn|mlp)_norm/bias", ("layers", "embed")),
        (True, "layers/attn/q", ("layers", "embed", "heads", "head_size")),
        (True, "layers/attn/[kv]", ("layers", "embed", "kv_heads", "head_size")),
        (True, "layers/attn/o", ("layers", "heads", "head_size", "embed")),
        (cfg.bias, "layers/attn/q_bias", ("layers", "heads", "head_size")),
        (cfg.bias, "layers/attn/[kv]_bias", ("layers", "kv_heads", "head_size")),
        (cfg.bias, "layers/attn/o_bias", ("layers", "embed")),
        (cfg.qk_norm, "layers/attn/[qk]_norm", ("layers", "head_size")),
        (True, "layers/mlp/(up|gate)" if cfg.gated else "layers/mlp/up", ("layers", "embed", "feedforward")),
        (True, "layers/mlp/down", ("layers", "feedforward", "embed")),
        (cfg.bias, "layers/mlp/(up|gate)_bias" if cfg.gated else "layers/mlp/up_bias", ("layers", "feedforward")),
        (cfg.bias, "layers/mlp/down_bias", ("layers", "embed")),
        (True, "final_norm/scale", ("embed",)),
        (norm_bias, "final_norm/bias", ("embed",)),
        (not cfg.tied, "head/kernel", ("embed", "vocab")),
    ]
    return tuple((path, axes) for present, path, axes in table if present)
