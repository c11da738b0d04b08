"""Names and layouts of tensors in Hugging Face files, as tables: theirs <-> ours, both ways.

A table may list more than a model has: an entry counts when the model has its parameters. The use is strict: each parameter of the model is in
exactly one entry that counts, and each tensor of a file is used or named in `IGNORED`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Form(NamedTuple):
    """How one of their tensors holds one or more of our parameters (of one layer and one expert)."""
    shape: Callable[[Sequence[Shape]], Shape]  # our shapes -> theirs
    read: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]  # their tensor, our shapes -> ours
    write: Callable[[Sequence[np.ndarray]], np.ndarray]  # ours -> theirs; the inverse of `read`


def _single(shape: Callable[[Shape], Shape], read: Callable, write: Callable) -> Form:
    return Form(lambda shapes: shape(shapes[0]), lambda theirs, shapes: [read(theirs, shapes[0])], lambda ours: write(ours[0]))


def _linear(inputs: int, transposed: bool) -> Form:
    """A matrix whose first `inputs` axes are summed over: torch's Linear holds it as [out, in], GPT-2's Conv1D as [in, out]."""
    flat = lambda s: (math.prod(s[:inputs]), math.prod(s[inputs:]))
    turn = (lambda a: a.T) if transposed else lambda a: a
    return _single(lambda s: flat(s)[::-1] if transposed else flat(s), lambda a, s: turn(a).reshape(s), lambda a: turn(a.reshape(flat(a.shape))))


def _fused(split: Callable[[np.ndarray, Shape], np.ndarray], join: Callable[[np.ndarray], np.ndarray]) -> Form:
    """Queries, keys and values of equal shape in one tensor; `split` brings it to [3, *ours] and `join` back."""
    total = lambda shapes: join(np.broadcast_to(np.zeros((), np.int8), (3, *shapes[0]))).shape
    return Form(total, lambda a, shapes: list(split(a, shapes[0])), lambda ours: join(np.stack(ours)))


FORMS: dict[str, Form] = {
    "same": _single(lambda s: s, lambda a, s: a, lambda a: a),
    "flat": _single(lambda s: (math.prod(s),), lambda a, s: a.reshape(s), lambda a: a.reshape(-1)),
    "row": _single(lambda s: (1, *s), lambda a, s: a.reshape(s), lambda a: a[None]),
    "linear": _linear(1, True), "linear_out": _linear(2, True),
    "conv": _linear(1, False), "conv_out": _linear(2, False),
    # GPT-2: [D, 3 N H] and [3 N H]; GPT-NeoX: [N 3 H, D] and [N 3 H].
    "qkv_conv": _fused(lambda a, s: a.reshape(s[0], 3, *s[1:]).swapaxes(0, 1), lambda a: a.swapaxes(0, 1).reshape(a.shape[1], -1)),
    "qkv_conv_bias": _fused(lambda a, s: a.reshape(3, *s), lambda a: a.reshape(-1)),
    "qkv_heads": _fused(lambda a, s: a.reshape(s[1], 3, s[2], s[0]).transpose(1, 3, 0, 2), lambda a: a.transpose(2, 0, 3, 1).reshape(-1, a.shape[1])),
    "qkv_heads_bias": _fused(lambda a, s: a.reshape(s[0], 3, s[1]).swapaxes(0, 1), lambda a: a.swapaxes(0, 1).reshape(-1)),
}


class Entry(NamedTuple):
    """One tensor's name there and its parameters here."""

    theirs: str  # with {layer} and {expert}
    ours: tuple[str, ...]
    form: str
    when: tuple[str, bool] | None = None  # counts only in a model that has, or has not, this parameter too


def _table(*rows: tuple[str, str, str]) -> tuple[Entry, ...]:
    return tuple(Entry(theirs, tuple(ours.split()), form) for theirs, ours, form in rows)


def _layers(prefix: str, *rows: tuple[str, str, str]) -> tuple[Entry, ...]:
    return _table(*((f"{prefix}.{{layer}}.{theirs}", " ".join(f"layers/{name}" for name in ours.split()), form) for theirs, ours, form in rows))


def _linears(prefix: str, ours: str, names: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [(f"{prefix}.{theirs}.weight", f"{ours}/{name}", "linear") for name, theirs in names.items()]


_GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_LLAMA_ENDS = _table(("model.embed_tokens.weight", "embed/tokens", "same"), ("model.norm.weight", "final_norm/scale", "same"),
                     ("lm_head.weight", "head/kernel", "linear"))
_LLAMA_ATTENTION = [
    *_linears("self_attn", "attn", {"q": "q_proj", "k": "k_proj", "v": "v_proj"}), ("self_attn.o_proj.weight", "attn/o", "linear_out"),
    *((f"self_attn.{x}_proj.bias", f"attn/{x}_bias", "flat") for x in "qkv"), ("self_attn.o_proj.bias", "attn/o_bias", "same"),
    *((f"self_attn.{x}_norm.weight", f"attn/{x}_norm", "flat") for x in "qk")]
_PRE = [("input_layernorm.weight", "attn_norm/scale", "same"), ("post_attention_layernorm.weight", "mlp_norm/scale", "same")]
_BRANCH = [("post_attention_layernorm.weight", "attn_norm/scale", "same"), ("post_feedforward_layernorm.weight", "mlp_norm/scale", "same")]
_SANDWICH = [("input_layernorm.weight", "attn_norm/scale", "same"), ("post_attention_layernorm.weight", "attn_out_norm/scale", "same"),
             ("pre_feedforward_layernorm.weight", "mlp_norm/scale", "same"), ("post_feedforward_layernorm.weight", "mlp_out_norm/scale", "same")]
_MLP = [*_linears("mlp", "mlp", _GATED), *((f"mlp.{theirs}.bias", f"mlp/{ours}_bias", "same") for ours, theirs in _GATED.items())]
_QWEN_MOE = [("mlp.gate.weight", "moe/router", "linear"), *_linears("mlp.experts.{expert}", "moe", _GATED),
             *_linears("mlp.shared_expert", "moe/shared", _GATED), ("mlp.shared_expert_gate.weight", "moe/shared_gate", "row")]
_MIXTRAL_MOE = [("block_sparse_moe.gate.weight", "moe/router", "linear"),
                *_linears("block_sparse_moe.experts.{expert}", "moe", {"gate": "w1", "up": "w3", "down": "w2"})]


def _llama(*parts: list[tuple[str, str, str]]) -> tuple[Entry, ...]:
    return _LLAMA_ENDS + _layers("model.layers", *_LLAMA_ATTENTION, *(row for part in parts for row in part))


def _with_bias(rows: Sequence[tuple[str, str, str]], bias_forms: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Each weight of layers whose projections and norms all have biases, and its bias."""
    bias = lambda ours: " ".join(name.replace("/scale", "/bias") if name.endswith("/scale") else f"{name}_bias" for name in ours.split())
    return [row for theirs, ours, form in rows for row in
            ((f"{theirs}.weight", ours, form), (f"{theirs}.bias", bias(ours), bias_forms.get(form, "flat")))]


def _bert(prefix: str) -> tuple[Entry, ...]:
    """BERT and RoBERTa below their heads; the base model has no prefix."""
    embeddings = _with_bias([("LayerNorm", "embed_norm/scale", "same")], {})
    tables = {"word_embeddings": "tokens", "position_embeddings": "positions", "token_type_embeddings": "types"}
    return _table(*((f"{prefix}embeddings.{theirs}.weight", f"embed/{name}", "same") for theirs, name in tables.items()),
                  *((f"{prefix}embeddings.{theirs}", ours, form) for theirs, ours, form in embeddings)) + _layers(f"{prefix}encoder.layer", *_with_bias([
                      *((f"attention.self.{theirs}", f"attn/{name}", "linear") for name, theirs in (("q", "query"), ("k", "key"), ("v", "value"))),
                      ("attention.output.dense", "attn/o", "linear_out"), ("attention.output.LayerNorm", "attn_norm/scale", "same"),
                      ("intermediate.dense", "mlp/up", "linear"), ("output.dense", "mlp/down", "linear"),
                      ("output.LayerNorm", "mlp_norm/scale", "same")], {}))


def _distilbert(prefix: str) -> tuple[Entry, ...]:
    tables = {"word_embeddings": "tokens", "position_embeddings": "positions"}
    return _table(*((f"{prefix}embeddings.{theirs}.weight", f"embed/{name}", "same") for theirs, name in tables.items()),
                  (f"{prefix}embeddings.LayerNorm.weight", "embed_norm/scale", "same"), (f"{prefix}embeddings.LayerNorm.bias", "embed_norm/bias", "same")
                  ) + _layers(f"{prefix}transformer.layer", *_with_bias([
                      *((f"attention.{name}_lin", f"attn/{name}", "linear") for name in "qkv"), ("attention.out_lin", "attn/o", "linear_out"),
                      ("sa_layer_norm", "attn_norm/scale", "same"), ("ffn.lin1", "mlp/up", "linear"), ("ffn.lin2", "mlp/down", "linear"),
                      ("output_layer_norm", "mlp_norm/scale", "same")], {}))


def _masked(dense: str, norm: str, bias: str) -> tuple[Entry, ...]:
    return _table((f"{dense}.weight", "head/dense", "linear"), (f"{dense}.bias", "head/dense_bias", "same"),
                  (f"{norm}.weight", "head/norm/scale", "same"), (f"{norm}.bias", "head/norm/bias", "same"), (bias, "head/bias", "same"))


def _labels(pooler: str, classifier: str) -> tuple[Entry, ...]:
    return _table((f"{pooler}.weight", "pooler/kernel", "linear"), (f"{pooler}.bias", "pooler/bias", "same"),
                  (f"{classifier}.weight", "classifier/kernel", "linear"), (f"{classifier}.bias", "classifier/bias", "same"))


def _t5(side: str, last: int) -> tuple[Entry, ...]:
    """One side of a T5, the MLP of whose layers has the number `last`; its first matrix is called `wi`, or `wi_1` where a gate `wi_0` is before it."""
    attention = lambda number, theirs, ours: [
        *_linears(f"{number}.{theirs}", ours, {x: x for x in "qkv"}), (f"{number}.{theirs}.o.weight", f"{ours}/o", "linear_out"),
        (f"{number}.layer_norm.weight", f"{ours}_norm/scale", "same")]
    layers = lambda rows: _table(*((f"{side}.block.{{layer}}.layer.{theirs}", f"{side}/layers/{ours}", form) for theirs, ours, form in rows))
    mlp = lambda names: layers(_linears(f"{last}.DenseReluDense", "mlp", names))
    gate = f"{side}/layers/mlp/gate"
    ends = _table((f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{side}/relative_bias", "same"),
                  (f"{side}.final_layer_norm.weight", f"{side}/final_norm/scale", "same"))
    return (*ends, *layers(attention(0, "SelfAttention", "attn") + attention(1, "EncDecAttention", "cross")),
            *(entry._replace(when=(gate, False)) for entry in mlp({"up": "wi"})), *(entry._replace(when=(gate, True)) for entry in mlp({"up": "wi_1"})),
            *mlp({"gate": "wi_0", "down": "wo"}), *layers([(f"{last}.layer_norm.weight", "mlp_norm/scale", "same")]))


_QKV = "attn/q attn/k attn/v"
TABLES: dict[str, tuple[Entry, ...]] = {
    "gpt2": _table(("transformer.wte.weight", "embed/tokens", "same"), ("transformer.wpe.weight", "embed/positions", "same"),
                   ("transformer.ln_f.weight", "final_norm/scale", "same"), ("transformer.ln_f.bias", "final_norm/bias", "same"),
                   ("lm_head.weight", "head/kernel", "linear"))
    + _layers("transformer.h", *_with_bias([
        ("ln_1", "attn_norm/scale", "same"), ("ln_2", "mlp_norm/scale", "same"), ("attn.c_attn", _QKV, "qkv_conv"),
        ("attn.c_proj", "attn/o", "conv_out"), ("mlp.c_fc", "mlp/up", "conv"), ("mlp.c_proj", "mlp/down", "conv")],
        {"qkv_conv": "qkv_conv_bias"})),
    "gpt_neox": _table(("gpt_neox.embed_in.weight", "embed/tokens", "same"), ("gpt_neox.final_layer_norm.weight", "final_norm/scale", "same"),
                       ("gpt_neox.final_layer_norm.bias", "final_norm/bias", "same"), ("embed_out.weight", "head/kernel", "linear"))
    + _layers("gpt_neox.layers", *_with_bias([
        ("input_layernorm", "attn_norm/scale", "same"), ("post_attention_layernorm", "mlp_norm/scale", "same"),
        ("attention.query_key_value", _QKV, "qkv_heads"), ("attention.dense", "attn/o", "linear_out"),
        ("mlp.dense_h_to_4h", "mlp/up", "linear"), ("mlp.dense_4h_to_h", "mlp/down", "linear")], {"qkv_heads": "qkv_heads_bias"})),
    "llama": _llama(_PRE, _MLP),
    "mixtral": _llama(_PRE, _MIXTRAL_MOE),
    "qwen_moe": _llama(_PRE, _MLP, _QWEN_MOE),
    "olmo2": _llama(_BRANCH, _MLP),
    "gemma2": _llama(_SANDWICH, _MLP),
    "bert": _bert("bert.") + _masked("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
    + _labels("bert.pooler.dense", "classifier"),
    "roberta": _bert("roberta.") + _masked("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    "roberta_sequence": _bert("roberta.") + _labels("classifier.dense", "classifier.out_proj"),
    "roberta_tokens": _bert("roberta.") + _labels("roberta.pooler.dense", "classifier"),
    "bert_base": _bert("") + _labels("pooler.dense", "classifier"),
    "distilbert": _distilbert("distilbert.") + _masked("vocab_transform", "vocab_layer_norm", "vocab_projector.bias") + _labels("pre_classifier", "classifier"),
    "distilbert_base": _distilbert(""),
    "t5": _table(("shared.weight", "embed/tokens", "same"), ("lm_head.weight", "head/kernel", "linear")) + _t5("encoder", 1) + _t5("decoder", 2),
}

# What older files hold besides: buffers that are computed anew, encoders' parts that a model without that head does not use (the pooler, BERT's head
# for the next sentence), copies of T5's embedding and a table that T5 never used, and the output projection of a tied model, which is the embedding again, with its bias.
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)|(\w+\.)?embeddings\.position_ids|"
                     r"((bert|roberta)\.)?pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)|"
                     r"(encoder|decoder)\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
TIED = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "lm_head.decoder.weight",
        "lm_head.decoder.bias", "vocab_projector.weight", "language_model.lm_head.weight")

# Parts beside the text model of one that also sees pictures (Gemma 3), which are left out.
PICTURES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..+")


def spellings(theirs: str, prefix: str) -> tuple[str, ...]:
    """How files call a tensor: as the table does, without the model's prefix (saved without a head) or with it, as the text part of a model that also
    sees pictures, and with BERT's first names of norms."""
    names = (theirs, theirs.removeprefix(prefix), prefix + theirs, f"language_model.{theirs}", f"{prefix}language_model.{theirs.removeprefix(prefix)}")
    older = [re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)) for name in names]
    return (*names, *older)


class Place(NamedTuple):
    """One of their tensors and where it goes."""
    theirs: str
    entry: Entry
    index: tuple[int, ...]  # rows of our stacks: (), (layer,) or (layer, expert)


def places(table: str, shapes: Mapping[str, Shape], layers: Mapping[str, Sequence[int]]) -> list[Place]:
    """All tensors of a model, in the order of layers.

    Args:
      table: a name in `TABLES`.
      shapes: path -> shape of our parameters.
      layers: "mlp", "moe", "encoder", "decoder" and "" (all other parts) -> number of the layer of each row in that part's stacks.
    """
    covered, found = [], []
    for entry in TABLES[table]:
        if not set(entry.ours) <= set(shapes) or (entry.when and (entry.when[0] in shapes) != entry.when[1]):
            continue
        covered += entry.ours
        parts = entry.ours[0].split("/")
        if "layers" not in parts:
            found.append((-1, Place(entry.theirs, entry, ())))
            continue
        stack = parts[1] if parts[0] == "layers" else parts[0]
        for row, layer in enumerate(layers.get(stack, layers[""])):
            if "{expert}" in entry.theirs:
                experts = shapes[entry.ours[0]][1]
                found += [(layer, Place(entry.theirs.format(layer=layer, expert=e), entry, (row, e))) for e in range(experts)]
            else:
                found.append((layer, Place(entry.theirs.format(layer=layer), entry, (row,))))
    assert sorted(covered) == sorted(shapes), f"{table}: {sorted(set(shapes) ^ set(covered))} are not mapped, or twice"
    return [place for _, place in sorted(found, key=lambda pair: pair[0])]


def own_shapes(place: Place, shapes: Mapping[str, Shape]) -> list[Shape]:
    """Shapes of the place's parameters in one layer and expert."""
    return [shapes[path][len(place.index):] for path in place.entry.ours]
