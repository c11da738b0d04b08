"""Maximal update parametrisation (muP): what changes with the width, so that the best learning rate does not.

Yang et al. 2022, *Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer* (arXiv 2203.03466), table 3, for Adam. With m times
the width of the model that the hyper-parameters were found for (`TransformerConfig.wider`):

    role     maps              std of the first weights   Adam's rate
    input    finite -> width   as it was                  as it was       embeddings; likewise all vectors: norms, biases
    hidden   width -> width    / sqrt(m)                  / m             queries, keys, values, outputs of attention, MLPs, experts
    output   width -> finite   / m                        / m             an output projection of its own, routers, heads for labels

An output projection that is the token embedding keeps the embedding's role, and the hidden states before it are divided by m instead
(`TransformerConfig.hidden_scale`); attention scores shrink with 1 / head size (`score_scale`). At m = 1 all is as without.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxlm import trees
from jaxlm.config import TransformerConfig

_WIDE = ("embed", "heads", "kv_heads", "feedforward")  # axes that grow with the width
_FINITE = ("vocab", "positions", "labels", "routes", "types")
_BESIDE = ("layers", "expert", "head_size")  # how many such weights there are, and part of "heads"


def role(path: str, axes: Sequence[str]) -> str:
    """ "input", "hidden" or "output", by the logical axes of a parameter, inputs before outputs."""
    own = [axis for axis in axes if axis not in _BESIDE]
    if path.endswith("moe/shared_gate"):  # a matrix from the width to one number
        return "output"
    if len(own) < 2 or "lora" in path.split("/"):  # vectors; adapters are small whatever the width
        return "input"
    first, last = own
    assert {first, last} <= {*_WIDE, *_FINITE}, (path, axes)
    return "input" if first in _FINITE else "output" if last in _FINITE else "hidden"


def rates(cfg: TransformerConfig, axes: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """path -> factor on Adam's learning rate."""
    return {path: 1.0 if role(path, names) == "input" else 1 / cfg.wider for path, names in axes.items()}


def scaled(cfg: TransformerConfig, rules: Sequence[tuple[str, Sequence[str]]], init: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """`init`, its weights multiplied by what their roles say; `rules` are the model's path regex -> logical axes."""
    if cfg.wider == 1:
        return init
    factors = {"input": 1.0, "hidden": cfg.wider ** -0.5, "output": 1 / cfg.wider}

    def scaled_init(key: jax.Array) -> Any:
        params = init(key)
        axes = trees.match(rules, trees.flatten(params), "axes")
        return trees.map_paths(lambda path, w: w * factors[role(path, axes[path])], params)

    return scaled_init


def folded(cfg: TransformerConfig, params: Any) -> tuple[TransformerConfig, Any]:
    """The same function without muP's multipliers, for formats that have no place for them: the last norm and the queries take them in.

    Raises:
      ValueError: one line: a tied model without a norm before its output projection.
    """
    if not cfg.mup_width:
        return cfg, params
    hidden, plain = 1 / cfg.wider if cfg.tied else 1.0, dataclasses.replace(cfg, mup_width=0, mup_head_size=0)
    scores = cfg.score_scale / plain.score_scale
    if hidden != 1 and cfg.norm_position == "post":
        raise ValueError("model.mup_width with model.norm_position=post and a tied output projection has a factor that no other weight takes in: it stays here")
    offset = float(cfg.norm_offset)
    rules = {"final_norm/scale": lambda w: (w + offset) * hidden - offset, "final_norm/bias": lambda w: w * hidden,
             "layers/attn/q": lambda w: w * scores, "layers/attn/q_bias": lambda w: w * scores, "layers/attn/q_norm": lambda w: (w + offset) * scores - offset}
    normed = cfg.qk_norm != "none"  # a norm of the queries undoes what the matrix does to their size
    rules = {path: fold for path, fold in rules.items() if path.startswith("final_norm") or path.endswith("q_norm") == normed}
    return plain, trees.map_paths(lambda path, w: rules[path](w) if path in rules else w, params)
