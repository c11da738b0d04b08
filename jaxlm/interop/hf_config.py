"""config.json of Hugging Face <-> TransformerConfig, one small pair of functions per family.

Both spellings are read: `rope_theta` and `rope_scaling` at the top (transformers 4) or inside `rope_parameters` (5), `layer_types` or the
patterns that came before. Written is the older one, which every version reads. What a family can say and we cannot is refused, never dropped.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxlm.config import TransformerConfig

Json = Mapping[str, Any]

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "relu": "relu"}
# How a model is computed and trained, which no config.json says: not compared.
COMPUTED = ("dtype", "remat", "attention", "dropout", "attention_dropout", "init", "init_std", "init_depth_scaled", "embedding_noise", "sequence_attention",
            "pipeline_microbatches", "pipeline_repeats")


_MOST, _MOST_LAYERS = 1 << 24, 1 << 12  # of any size, and of layers or experts; the largest published are some 10^7 (a context) and 126
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")


class Family(NamedTuple):
    """One architecture of transformers: its names, and its config in both directions."""

    architecture: str  # the class in transformers
    model_type: str
    table: str  # in hf_names.TABLES
    read: Callable[[Json], dict[str, Any]]  # config.json -> arguments of TransformerConfig
    write: Callable[[TransformerConfig], dict[str, Any]]  # the inverse; what it cannot say shows when it is read back
    prefix: str = ""  # that names of tensors may have or lack; empty: that of the table's first name


def read(config: Json) -> tuple[Family, TransformerConfig]:
    """The family and the model of a config.json.

    Raises:
      ValueError: one line: an unknown architecture (with the known ones), a missing key, or something that this code does not compute.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config.json has architectures={str(names)[:60]}, which must be a list of names: download it again")
    if "Gemma3ForConditionalGeneration" in names:
        if not isinstance(config.get("text_config"), Mapping):
            raise ValueError("config.json of Gemma3ForConditionalGeneration lacks text_config: download it again")
        config = _GEMMA3_TEXT | config["text_config"] | {"architectures": ["Gemma3ForCausalLM"]}
    family = _family(config)
    believable({key: config[key] for key in _LAYERS if key in config}, most=_MOST_LAYERS)  # what follows makes lists as long
    try:
        values = family.read(config)
        believable(values)
        if values["vocab_size"] < 1 or values["layers"] < 1:
            raise ValueError(f"config.json of {family.architecture} has {values['vocab_size']} tokens and {values['layers']} layers: download it again")
        cfg = TransformerConfig(**values).filled()
    except KeyError as error:
        raise ValueError(f"config.json of {family.architecture} lacks {error.args[0]}: download it again") from None
    except (TypeError, AttributeError, OverflowError, ZeroDivisionError, StopIteration, IndexError, RecursionError) as error:
        raise ValueError(f"config.json of {family.architecture} holds a value of the wrong type or size ({error or type(error).__name__}): download it again") from None
    return family, cfg


def believable(values: Json, most: int = _MOST) -> None:
    """Refuses sizes of a model that cannot be meant, before anything is made as large.

    Raises:
      ValueError: one line: a value of another kind than `TransformerConfig` has there, a number that is not finite, a size above `most`, or a matrix of more
        than 2^36 numbers.
    """
    for key, value in values.items():
        kind = type(getattr(TransformerConfig, key, None))
        kinds = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}.get(kind)
        if kinds and (not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool)):
            raise ValueError(f"the model's {key} is {str(value)[:60]!r}, of the wrong type, not {'yes or no' if kind is bool else 'text' if kind is str else 'a number'}: "
                             "download it again")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the model's {key} is {value}, not a finite number: download it again")
        if type(value) is int and abs(value) > most:
            raise ValueError(f"the model's {key} is {value:,}, more than the {most:,} that are believable: download it again")
    size = lambda key: max(1, values.get(key) or 0)
    widest = max(size("heads") * size("head_size"), *map(size, ("feedforward", "expert_feedforward", "vocab_size", "context")))
    if size("width") * widest > 1 << 36 or size("experts") > _MOST_LAYERS:
        raise ValueError(f"the model has a matrix of {size('width'):,} x {widest:,} and {size('experts'):,} experts, more than is believable: "
                         "download it again")


def write(cfg: TransformerConfig, architecture: str = "") -> tuple[Family, dict[str, Any]]:
    """The first family that can express a model, and its config.json.

    Args:
      architecture: the class in transformers; empty: any.

    Raises:
      ValueError: one line: no family, or not the one asked for, computes this.
    """
    if architecture and architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture!r} is not known; known: {', '.join(FAMILIES)}")
    plain = lambda c: dataclasses.replace(c.filled(), **{key: getattr(TransformerConfig, key) for key in COMPUTED})
    reasons = []
    for family in [FAMILIES[architecture]] if architecture else FAMILIES.values():
        try:
            config = family.write(cfg.filled()) | {"architectures": [family.architecture], "model_type": family.model_type}
            found = plain(read(config)[1])
        except ValueError as error:
            reasons.append((math.inf, str(error)))  # a family that cannot even be asked is not near
            continue
        if found == plain(cfg):
            return family, config
        differs = [f.name for f in dataclasses.fields(cfg) if getattr(found, f.name) != getattr(plain(cfg), f.name)]
        reasons.append((len(differs), f"{family.architecture} has another {', '.join(differs)}"))
    nearest = min(reasons, key=lambda reason: reason[0])[1]  # the fewest differences
    raise ValueError(f"no architecture of Hugging Face that is known here computes this model; nearest: {nearest}")


def _family(config: Json) -> Family:
    named = [_SAME.get(name, name) for name in config.get("architectures") or []]
    for family in FAMILIES.values():
        if family.architecture in named or (not named and family.model_type == config.get("model_type")):
            return family
    what = named[0] if named else config.get("model_type")
    raise ValueError(f"config.json names the architecture {what!r}, which is not known here; known: {', '.join(FAMILIES)}")


def _must(config: Json, **values: Any) -> None:
    """Refuses what the code does not compute. A missing key or null is what is usual."""
    for key, allowed in values.items():
        value = config.get(key)
        if value is not None and value != allowed:
            raise ValueError(f"config.json has {key}={value!r}, which is not computed here; allowed: {allowed!r}")


def _rope(config: Json, theta: float = 10_000.0, parameters: Json | None = None) -> dict[str, Any]:
    if parameters is None:
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    found: dict[str, Any] = {"rope_theta": float(parameters.get("rope_theta", config.get("rope_theta") or theta))}
    if kind in ("default", None):
        return found
    if kind not in ("linear", "llama3"):
        raise ValueError(f"config.json has rope scaling {kind!r}, which is not computed here; known: default, linear, llama3")
    found |= {"rope_scaling": kind, "rope_factor": float(parameters["factor"])}
    if kind == "llama3":
        found |= {"rope_low_frequency": float(parameters["low_freq_factor"]), "rope_high_frequency": float(parameters["high_freq_factor"]),
                  "rope_original_context": parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]}
    return found


def _rope_json(cfg: TransformerConfig) -> dict[str, Any]:
    if cfg.rope_scaling == "none":
        return {"rope_theta": cfg.rope_theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": cfg.rope_scaling, "factor": cfg.rope_factor}
    if cfg.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": cfg.rope_low_frequency, "high_freq_factor": cfg.rope_high_frequency,
                    "original_max_position_embeddings": cfg.rope_original_context}
    return {"rope_theta": cfg.rope_theta, "rope_scaling": scaling}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json has the activation {name!r}, which is not known here; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _activation_json(cfg: TransformerConfig) -> str:
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(cfg.activation, cfg.activation)


def _windows(config: Json, default: Callable[[int], bool]) -> tuple[int, ...]:
    """The shortest pattern of windows; `default` says of a layer whether it has one where no `layer_types` does."""
    size, layers = config.get("sliding_window") or 0, config["num_hidden_layers"]
    types = config.get("layer_types") or ["sliding_attention" if size and default(i) else "full_attention" for i in range(layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        raise ValueError(f"config.json has layer_types={types}, which must be {layers} of sliding_attention and full_attention")
    sizes = [size if kind == "sliding_attention" else 0 for kind in types]
    return next(tuple(sizes[:n]) for n in range(1, layers + 1) if all(s == sizes[i % n] for i, s in enumerate(sizes)))


def _windows_json(cfg: TransformerConfig) -> dict[str, Any]:
    sizes = [cfg.windows[i % len(cfg.windows)] for i in range(cfg.layers)]
    return {"sliding_window": max(sizes) or None, "layer_types": ["sliding_attention" if size else "full_attention" for size in sizes]}


def _rates(c: Json, branches: str, probabilities: str, usual: float = 0.0) -> dict[str, Any]:
    """Shares that training drops, under a family's names; `usual` where config.json does not say, as in transformers."""
    given = {"dropout": c.get(branches, usual) if branches else 0.0, "attention_dropout": c.get(probabilities, usual)}
    return {key: float(value or 0.0) for key, value in given.items()}


def _biases(c: Json) -> bool:
    """Whether a Llama's projections have biases: all of them or none."""
    attention, mlp = bool(c.get("attention_bias")), bool(c.get("mlp_bias"))
    if attention != mlp:
        raise ValueError(f"config.json has attention_bias={attention} and mlp_bias={mlp}, which is not computed here; allowed: both or neither")
    return attention


def _base(c: Json, *, eps: float = 1e-6, theta: float = 10_000.0, tied: bool = False) -> dict[str, Any]:
    """What the families around Llama share."""
    _must(c, attention_bias=False, rope_interleaved=False, use_bidirectional_attention=False)
    heads = c["num_attention_heads"]
    return dict(vocab_size=c["vocab_size"], context=c["max_position_embeddings"], layers=c["num_hidden_layers"], width=c["hidden_size"], heads=heads,
                kv_heads=c.get("num_key_value_heads") or heads, head_size=c.get("head_dim") or c["hidden_size"] // heads,
                feedforward=c["intermediate_size"], norm="rms", norm_eps=c.get("rms_norm_eps", eps), positions="rotary", gated=True,
                activation=_activation(c.get("hidden_act", "silu")), tied=c.get("tie_word_embeddings", tied), bias=False,
                init_std=c.get("initializer_range", 0.02), **_rates(c, "", "attention_dropout"), **_rope(c, theta))


def _base_json(cfg: TransformerConfig) -> dict[str, Any]:
    return dict(vocab_size=cfg.vocab_size, max_position_embeddings=cfg.context, num_hidden_layers=cfg.layers, hidden_size=cfg.width,
                num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_size, intermediate_size=cfg.feedforward,
                rms_norm_eps=cfg.norm_eps, hidden_act=_activation_json(cfg), tie_word_embeddings=cfg.tied, initializer_range=cfg.init_std,
                attention_bias=False, attention_dropout=cfg.attention_dropout, **_rope_json(cfg))


def _gpt2(c: Json) -> dict[str, Any]:
    _must(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return dict(vocab_size=c["vocab_size"], context=c["n_positions"], layers=c["n_layer"], width=c["n_embd"], heads=c["n_head"],
                feedforward=c.get("n_inner") or 4 * c["n_embd"], norm="layer", norm_eps=c.get("layer_norm_epsilon", 1e-5), positions="learned",
                activation=_activation(c.get("activation_function", "gelu_new")), gated=False, tied=c.get("tie_word_embeddings", True), bias=True,
                init_std=c.get("initializer_range", 0.02), **_rates(c, "resid_pdrop", "attn_pdrop", 0.1))


def _gpt2_json(cfg: TransformerConfig) -> dict[str, Any]:
    return dict(vocab_size=cfg.vocab_size, n_positions=cfg.context, n_layer=cfg.layers, n_embd=cfg.width, n_head=cfg.heads, n_inner=cfg.feedforward,
                layer_norm_epsilon=cfg.norm_eps, activation_function={"gelu_tanh": "gelu_new"}.get(cfg.activation, cfg.activation),
                tie_word_embeddings=cfg.tied, initializer_range=cfg.init_std, resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout,
                attn_pdrop=cfg.attention_dropout)


def _neox(c: Json) -> dict[str, Any]:
    _must(c, attention_bias=True)
    rope = c.get("rope_parameters") or {}
    return dict(vocab_size=c["vocab_size"], context=c["max_position_embeddings"], layers=c["num_hidden_layers"], width=c["hidden_size"],
                heads=c["num_attention_heads"], feedforward=c["intermediate_size"], norm="layer", norm_eps=c.get("layer_norm_eps", 1e-5),
                positions="rotary", rotary_fraction=float(rope.get("partial_rotary_factor", c.get("rotary_pct", 0.25))),
                parallel_residual=c.get("use_parallel_residual", True), activation=_activation(c.get("hidden_act", "gelu")), gated=False,
                tied=c.get("tie_word_embeddings", False), bias=True, init_std=c.get("initializer_range", 0.02),
                **_rates(c, "hidden_dropout", "attention_dropout"), **_rope(c, c.get("rotary_emb_base") or 10_000.0))


def _neox_json(cfg: TransformerConfig) -> dict[str, Any]:
    rope = _rope_json(cfg)
    return dict(vocab_size=cfg.vocab_size, max_position_embeddings=cfg.context, num_hidden_layers=cfg.layers, hidden_size=cfg.width,
                num_attention_heads=cfg.heads, intermediate_size=cfg.feedforward, layer_norm_eps=cfg.norm_eps, rotary_pct=cfg.rotary_fraction,
                rotary_emb_base=rope.pop("rope_theta"), use_parallel_residual=cfg.parallel_residual, hidden_act=_activation_json(cfg),
                tie_word_embeddings=cfg.tied, attention_bias=True, initializer_range=cfg.init_std,
                attention_dropout=cfg.attention_dropout, hidden_dropout=cfg.dropout, **rope)


def _llama(c: Json) -> dict[str, Any]:
    return _base({**c, "attention_bias": False}) | dict(bias=_biases(c))


def _llama_json(cfg: TransformerConfig) -> dict[str, Any]:
    return _base_json(cfg) | dict(attention_bias=cfg.bias, mlp_bias=cfg.bias)


def _mistral(c: Json) -> dict[str, Any]:
    return _base(c) | dict(windows=_windows(c, lambda layer: True))


def _mistral_json(cfg: TransformerConfig) -> dict[str, Any]:
    return _base_json(cfg) | {"sliding_window": _windows_json(cfg)["sliding_window"]}


def _mixtral(c: Json) -> dict[str, Any]:
    return _mistral(c) | dict(experts=c["num_local_experts"], experts_per_token=c["num_experts_per_tok"])


def _mixtral_json(cfg: TransformerConfig) -> dict[str, Any]:
    return _mistral_json(cfg) | dict(num_local_experts=cfg.experts, num_experts_per_tok=cfg.experts_per_token)


def _qwen(c: Json) -> dict[str, Any]:
    default = lambda layer: layer >= c.get("max_window_layers", 28)
    return _base(c) | dict(windows=_windows(c, default) if c.get("use_sliding_window", False) else (0,))


def _qwen_json(cfg: TransformerConfig) -> dict[str, Any]:
    windows = _windows_json(cfg)
    kinds = windows["layer_types"]
    return _base_json(cfg) | windows | dict(use_sliding_window=bool(windows["sliding_window"]),
                                            max_window_layers=kinds.index("sliding_attention") if "sliding_attention" in kinds else cfg.layers)


def _qwen_moe(c: Json) -> dict[str, Any]:
    step, dense = c.get("decoder_sparse_step", 1), set(c.get("mlp_only_layers") or ())
    dense |= {i for i in range(c["num_hidden_layers"]) if (i + 1) % step}
    return dict(experts=c["num_experts"] if "num_experts" in c else c["num_local_experts"], experts_per_token=c["num_experts_per_tok"],
                expert_feedforward=c["moe_intermediate_size"], expert_renormalise=c.get("norm_topk_prob", False), dense_layers=tuple(sorted(dense)))


def _qwen_moe_json(cfg: TransformerConfig) -> dict[str, Any]:
    return dict(num_experts=cfg.experts, num_experts_per_tok=cfg.experts_per_token, moe_intermediate_size=cfg.expert_feedforward,
                norm_topk_prob=cfg.expert_renormalise, decoder_sparse_step=1, mlp_only_layers=list(cfg.dense_layers))


def _qwen2_moe(c: Json) -> dict[str, Any]:
    _must(c, qkv_bias=True)
    return _qwen(c) | _qwen_moe(c) | dict(qkv_bias=True, shared_feedforward=c["shared_expert_intermediate_size"], shared_gate=True)


def _gemma(c: Json, head_size: int = 256) -> dict[str, Any]:
    # Gemma always uses the tanh form, whatever the older key hidden_act says.
    c = {**c, "hidden_act": c.get("hidden_activation") or "gelu_pytorch_tanh", "head_dim": c.get("head_dim", head_size)}
    return _base(c, tied=True) | dict(norm_offset=True, embedding_scale=math.sqrt(c["hidden_size"]))


def _gemma_json(cfg: TransformerConfig) -> dict[str, Any]:
    return _base_json(cfg) | {"hidden_activation": _activation_json(cfg)}


def _gemma2(c: Json) -> dict[str, Any]:
    return _gemma(c) | dict(norm_position="sandwich", query_scale=float(c.get("query_pre_attn_scalar", 256)),
                            windows=_windows({"sliding_window": 4096, **c}, lambda layer: layer % 2 == 0),
                            attention_softcap=float(c.get("attn_logit_softcapping", 50.0) or 0),
                            final_softcap=float(c.get("final_logit_softcapping", 30.0) or 0))


def _gemma2_json(cfg: TransformerConfig) -> dict[str, Any]:
    return _gemma_json(cfg) | _windows_json(cfg) | dict(
        query_pre_attn_scalar=_whole(cfg.query_scale), attn_logit_softcapping=cfg.attention_softcap or None,
        final_logit_softcapping=cfg.final_softcap or None)


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _gemma3(c: Json) -> dict[str, Any]:
    _must(c, attn_logit_softcapping=0)
    pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
    c = {"attn_logit_softcapping": None, "final_logit_softcapping": None, **c}
    nested = c.get("rope_parameters") or {}
    far, near = nested.get("full_attention"), nested.get("sliding_attention") or {}
    if near.get("rope_type", "default") != "default":
        raise ValueError(f"config.json scales the rotary positions of local layers ({near}), which is not computed here")
    rope = _rope(c, 1_000_000.0, far)
    local = float(near.get("rope_theta", c.get("rope_local_base_freq") or 10_000.0))
    return _gemma2(c) | rope | dict(windows=_windows({"sliding_window": 4096, **c}, lambda layer: bool((layer + 1) % pattern)), qk_norm="head",
                                    rope_local_theta=local)


# What transformers takes where the text part of a directory with pictures says nothing, as Google's own files do.
_GEMMA3_TEXT = dict(vocab_size=262208, max_position_embeddings=131072, num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=4096)


def _gemma3_json(cfg: TransformerConfig) -> dict[str, Any]:
    return _gemma2_json(cfg) | {"rope_local_base_freq": cfg.rope_local_theta}


_ENCODER = dict(kind="encoder", causal=False, norm="layer", norm_position="post", positions="learned", gated=False, tied=True, bias=True)


def _labels(c: Json) -> tuple[str, ...]:
    """Names of the classes in their order; by default LABEL_0, LABEL_1."""
    given = c.get("id2label") or _usual_labels(c.get("num_labels") or 2)
    names = {int(i): name for i, name in given.items()}
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"config.json numbers its labels {', '.join(map(str, sorted(names)[:5]))} ... in id2label, which must be 0, 1, 2 ...")
    return tuple(str(names[i]) for i in range(len(names)))


def _usual_labels(count: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(count)}


def _head(c: Json, output: str, activation: str = "tanh") -> dict[str, Any]:
    if output == "tokens":
        _must(c, tie_word_embeddings=True)
    names = _labels(c) if output.endswith("_labels") else ()
    return dict(output=output, labels=len(names), label_names=() if names == tuple(_usual_labels(len(names)).values()) else names, pooler_activation=activation if output == "sequence_labels" else "tanh")


def _head_json(cfg: TransformerConfig) -> dict[str, Any]:
    names = dict(enumerate(cfg.label_names)) or _usual_labels(cfg.labels)
    return {"id2label": {str(i): name for i, name in names.items()}, "label2id": {name: i for i, name in names.items()}} if names else {}


def _bert(c: Json, output: str, offset: int = 0) -> dict[str, Any]:
    _must(c, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    return _ENCODER | _head(c, output) | dict(
        vocab_size=c["vocab_size"], context=c["max_position_embeddings"] - offset, layers=c["num_hidden_layers"], width=c["hidden_size"],
        heads=c["num_attention_heads"], feedforward=c["intermediate_size"], norm_eps=c.get("layer_norm_eps", 1e-12), token_types=c.get("type_vocab_size", 2),
        position_offset=offset, activation=_activation(c.get("hidden_act", "gelu")), init_std=c.get("initializer_range", 0.02),
        **_rates(c, "hidden_dropout_prob", "attention_probs_dropout_prob", 0.1))


def _bert_json(cfg: TransformerConfig) -> dict[str, Any]:
    if cfg.token_types == 0:
        raise ValueError("BertModel has another token_types")
    return _head_json(cfg) | dict(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.context + cfg.position_offset, num_hidden_layers=cfg.layers, hidden_size=cfg.width,
        num_attention_heads=cfg.heads, intermediate_size=cfg.feedforward, layer_norm_eps=cfg.norm_eps, type_vocab_size=cfg.token_types,
        hidden_act=_activation_json(cfg), tie_word_embeddings=cfg.tied, initializer_range=cfg.init_std, position_embedding_type="absolute",
        hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=cfg.attention_dropout)


def _roberta(c: Json, output: str) -> dict[str, Any]:
    """Positions are counted from the row after that of padding. The masked-token head has the exact GELU whatever the layers have."""
    if output == "tokens":
        _must(c, hidden_act="gelu")
    return _bert(c, output, offset=c.get("pad_token_id", 1) + 1)


def _roberta_json(cfg: TransformerConfig) -> dict[str, Any]:
    if cfg.position_offset == 0:
        raise ValueError("RobertaModel has another position_offset")
    return _bert_json(cfg) | {"pad_token_id": cfg.position_offset - 1}


def _distilbert(c: Json, output: str) -> dict[str, Any]:
    _must(c, sinusoidal_pos_embds=False)
    return _ENCODER | _head(c, output, activation="relu") | dict(
        vocab_size=c["vocab_size"], context=c["max_position_embeddings"], layers=c["n_layers"], width=c["dim"], heads=c["n_heads"], feedforward=c["hidden_dim"],
        norm_eps=1e-12, activation=_activation(c.get("activation", "gelu")), init_std=c.get("initializer_range", 0.02),
        **_rates(c, "dropout", "attention_dropout", 0.1))


def _distilbert_json(cfg: TransformerConfig) -> dict[str, Any]:
    return _head_json(cfg) | dict(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.context, n_layers=cfg.layers, dim=cfg.width, n_heads=cfg.heads, hidden_dim=cfg.feedforward,
        activation=_activation_json(cfg), tie_word_embeddings=cfg.tied, initializer_range=cfg.init_std, sinusoidal_pos_embds=False,
        dropout=cfg.dropout, attention_dropout=cfg.attention_dropout)


def _encoder(architecture: str, table: str, read: Callable, output: str, write: Callable) -> Family:
    model_type = {"D": "distilbert", "R": "roberta", "B": "bert"}[architecture[0]]
    return Family(architecture, model_type, table, lambda c: read(c, output), write, f"{model_type}.")


_SAME = {"BertForPreTraining": "BertForMaskedLM"}  # and a head that tells whether one sentence follows the other, which is left out


def _t5(c: Json) -> dict[str, Any]:
    """T5 has one rate for all that it drops; also inside the MLP, where nothing is dropped here."""
    gate, _, name = c.get("feed_forward_proj", "relu").rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(f"config.json has feed_forward_proj={c['feed_forward_proj']!r}, which is not known here; known: gated-NAME and NAME")
    # The first T5 has one matrix at both ends and scales before the last; later ones say so by one key (transformers 4) or by another (5).
    tied = c.get("tie_word_embeddings") is not False and c.get("scale_decoder_outputs") is not False
    return dict(vocab_size=c["vocab_size"], context=c.get("n_positions") or 512, encoder_layers=c["num_layers"],
                layers=c.get("num_decoder_layers") or c["num_layers"], width=c["d_model"], heads=c["num_heads"], head_size=c["d_kv"], feedforward=c["d_ff"],
                norm="rms", norm_eps=c.get("layer_norm_epsilon", 1e-6), positions="relative", relative_buckets=c.get("relative_attention_num_buckets", 32),
                relative_distance=c.get("relative_attention_max_distance", 128), query_scale=1.0, gated=gate == "gated",
                activation="gelu_tanh" if (gate, name) == ("gated", "gelu") else _activation(name), tied=tied, bias=False,
                logit_scale=c["d_model"] ** -0.5 if tied else 1.0, decoder_start=c.get("decoder_start_token_id") or 0,
                **_rates(c, "dropout_rate", "dropout_rate", 0.1))


def _t5_json(cfg: TransformerConfig) -> dict[str, Any]:
    name = {"gelu_tanh": "gelu" if cfg.gated else "gelu_new"}.get(cfg.activation, cfg.activation)
    return dict(vocab_size=cfg.vocab_size, n_positions=cfg.context, num_layers=cfg.encoder_layers or cfg.layers, num_decoder_layers=cfg.layers,
                d_model=cfg.width, num_heads=cfg.heads, d_kv=cfg.head_size, d_ff=cfg.feedforward, layer_norm_epsilon=cfg.norm_eps,
                relative_attention_num_buckets=cfg.relative_buckets, relative_attention_max_distance=cfg.relative_distance,
                feed_forward_proj=f"gated-{name}" if cfg.gated else name, tie_word_embeddings=cfg.tied, scale_decoder_outputs=cfg.tied,
                decoder_start_token_id=cfg.decoder_start, is_encoder_decoder=True, pad_token_id=0, dropout_rate=cfg.dropout)


# In the order in which `write` tries them: the plainest first.
FAMILIES: dict[str, Family] = {family.architecture: family for family in (
    Family("LlamaForCausalLM", "llama", "llama", _llama, _llama_json),
    Family("GPT2LMHeadModel", "gpt2", "gpt2", _gpt2, _gpt2_json),
    Family("GPTNeoXForCausalLM", "gpt_neox", "gpt_neox", _neox, _neox_json),
    Family("MistralForCausalLM", "mistral", "llama", _mistral, _mistral_json),
    Family("MixtralForCausalLM", "mixtral", "mixtral", _mixtral, _mixtral_json),
    Family("Qwen2ForCausalLM", "qwen2", "llama", lambda c: _qwen(c) | dict(qkv_bias=True), _qwen_json),
    Family("Qwen2MoeForCausalLM", "qwen2_moe", "qwen_moe", _qwen2_moe,
           lambda cfg: _qwen_json(cfg) | _qwen_moe_json(cfg) | dict(shared_expert_intermediate_size=cfg.shared_feedforward)),
    Family("Qwen3ForCausalLM", "qwen3", "llama", lambda c: _qwen(c) | dict(qk_norm="head"), _qwen_json),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", "qwen_moe", lambda c: _qwen(c) | _qwen_moe(c) | dict(qk_norm="head"),
           lambda cfg: _qwen_json(cfg) | _qwen_moe_json(cfg)),
    Family("Olmo2ForCausalLM", "olmo2", "olmo2", lambda c: _base(c, eps=1e-5) | dict(norm_position="branch", qk_norm="full"), _base_json),
    Family("GemmaForCausalLM", "gemma", "llama", _gemma, _gemma_json),
    Family("Gemma2ForCausalLM", "gemma2", "gemma2", _gemma2, _gemma2_json),
    Family("Gemma3ForCausalLM", "gemma3_text", "gemma2", _gemma3, _gemma3_json),
    _encoder("BertForMaskedLM", "bert", _bert, "tokens", _bert_json),
    _encoder("BertModel", "bert_base", _bert, "pooled", _bert_json),
    _encoder("BertForSequenceClassification", "bert", _bert, "sequence_labels", _bert_json),
    _encoder("BertForTokenClassification", "bert", _bert, "token_labels", _bert_json),
    _encoder("RobertaForMaskedLM", "roberta", _roberta, "tokens", _roberta_json),
    _encoder("RobertaModel", "bert_base", _roberta, "pooled", _roberta_json),
    _encoder("RobertaForSequenceClassification", "roberta_sequence", _roberta, "sequence_labels", _roberta_json),
    _encoder("RobertaForTokenClassification", "roberta_tokens", _roberta, "token_labels", _roberta_json),
    _encoder("DistilBertForMaskedLM", "distilbert", _distilbert, "tokens", _distilbert_json),
    _encoder("DistilBertModel", "distilbert_base", _distilbert, "hidden", _distilbert_json),
    _encoder("DistilBertForSequenceClassification", "distilbert", _distilbert, "sequence_labels", _distilbert_json),
    _encoder("DistilBertForTokenClassification", "distilbert", _distilbert, "token_labels", _distilbert_json),
    Family("T5ForConditionalGeneration", "t5", "t5", _t5, _t5_json),
)}
