"""Writes tests/interop/fixtures: tiny random checkpoints made by transformers with what torch computes from them, one per family and knob.

  python tools/make_parity_fixtures.py            all of them (needs torch and transformers; running the tests does not)
  python tools/make_parity_fixtures.py gemma2     some

Each folder holds config.json and model.safetensors as transformers saves them, and reference.npz:
  tokens_I, logits_I   token ids [T] and float32 logits [T, V] of document I, computed in float64, each document on its own
  error                largest difference of the float32 logits from these
  loss, grad_NAME      mean cross-entropy of all next tokens of all documents, and the norm of its gradient in each tensor NAME
  losses               the same loss at five steps of torch's AdamW (lr 0.01, betas 0.9 0.95, eps 1e-8, no decay), float32
  prompt, greedy       a prompt and its ten likeliest next tokens, one after the other
Encoder-decoders lie in the folder encdec: inputs_I are what the encoder reads, tokens_I what the decoder is given, targets_I what it should say.
  buckets              bucket of each distance -300 .. 300, without and with causality
Weights are drawn here, norms and biases too, so that nothing is mapped right by accident.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parents[1] / "tests" / "interop" / "fixtures"
LENGTHS = (20, 13, 9, 8)
SMALL = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
             max_position_embeddings=48, attn_implementation="eager", bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
NEOX = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads",)} | dict(hidden_size=32, num_attention_heads=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
LOCAL = dict(sliding_window=4, head_dim=4, query_pre_attn_scalar=9, tie_word_embeddings=True)
MADE = {
    "gpt2": ("GPT2", dict(vocab_size=64, n_positions=48, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager", bos_token_id=1, eos_token_id=2,
                          resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "gpt_neox": ("GPTNeoX", NEOX | dict(rotary_pct=0.25)),
    "gpt_neox_sequential": ("GPTNeoX", NEOX | dict(rotary_pct=1.0, use_parallel_residual=False, tie_word_embeddings=True)),
    "llama": ("Llama", SMALL),
    "llama_tied": ("Llama", SMALL | dict(tie_word_embeddings=True, num_key_value_heads=4, head_dim=6)),
    "llama_linear": ("Llama", SMALL | dict(rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=3.0))),
    "llama3": ("Llama", SMALL | dict(rope_parameters=LLAMA3, head_dim=8)),
    "llama_bias": ("Llama", SMALL | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", SMALL | dict(sliding_window=4, num_hidden_layers=3)),
    "mixtral": ("Mixtral", SMALL | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": ("Qwen2", SMALL | dict(tie_word_embeddings=True)),
    "qwen2_window": ("Qwen2", SMALL | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=3)),
    "qwen2_moe": ("Qwen2Moe", SMALL | EXPERTS | dict(shared_expert_intermediate_size=12, norm_topk_prob=False, num_hidden_layers=3, mlp_only_layers=[1])),
    "qwen3": ("Qwen3", SMALL | dict(head_dim=6)),
    "qwen3_moe": ("Qwen3Moe", SMALL | EXPERTS | dict(head_dim=6, norm_topk_prob=True)),
    "qwen3_moe_sparse_step": ("Qwen3Moe", SMALL | EXPERTS | dict(head_dim=4, norm_topk_prob=False, num_hidden_layers=4, decoder_sparse_step=2)),
    "olmo2": ("Olmo2", SMALL),
    "gemma": ("Gemma", SMALL | dict(head_dim=6, num_key_value_heads=1, tie_word_embeddings=True)),
    "gemma2": ("Gemma2", SMALL | LOCAL | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0, num_hidden_layers=4)),
    "gemma3": ("Gemma3", SMALL | LOCAL | dict(num_hidden_layers=3, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                                              rope_parameters={"full_attention": dict(rope_type="linear", rope_theta=1000.0, factor=2.0),
                                                               "sliding_attention": dict(rope_type="default", rope_theta=20.0)})),
}

T5 = dict(vocab_size=64, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4, relative_attention_num_buckets=8,
          relative_attention_max_distance=20, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, attn_implementation="eager")
ENCDEC = {"t5": T5, "t5_v1_1": T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=2)}


def build(family: str, options: dict):
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))(**options)
    config._experts_implementation = "eager"  # the grouped kernel knows no float64
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            plain_norm = parameter.ndim == 1 and name.endswith("weight") and "Gemma" not in family
            parameter.copy_(1 + 0.2 * noise if plain_norm else 0.2 * noise if parameter.ndim == 1 else noise * (1.0 if "embed" in name or "wte" in name else 0.3))
    return model


def mean_loss(model, documents):
    total, count = 0.0, 0
    for ids in documents:
        logits = model(ids[None]).logits[0, :-1]
        total, count = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"), count + len(ids) - 1
    return total / count


def reference(model) -> dict:
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(3, 64, (n,), generator=generator) for n in LENGTHS]
    found = {}
    with torch.no_grad():
        single = [model(ids[None]).logits[0] for ids in documents]
        model.double()
        exact = [model(ids[None]).logits[0] for ids in documents]
        row = documents[0][:6]
        for _ in range(10):
            best = model(row[None]).logits[0, -1].topk(2)
            if best.values[0] - best.values[1] < 5e-3:
                print("  a narrow choice:", float(best.values[0] - best.values[1]))
            row = torch.cat([row, best.indices[:1]])
    model.float()
    for i, (ids, logits) in enumerate(zip(documents, exact)):
        found |= {f"tokens_{i}": ids.int().numpy(), f"logits_{i}": logits.float().numpy()}
    found["error"] = np.float32(max(float((a.double() - b).abs().max()) for a, b in zip(single, exact)))
    found |= {"prompt": documents[0][:6].int().numpy(), "greedy": row[6:].int().numpy()}
    loss = mean_loss(model, documents)
    loss.backward()
    found["loss"] = np.float32(loss.item())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0), []
    for _ in range(5):
        optimiser.zero_grad()
        loss = mean_loss(model, documents)
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    return found | {"losses": np.float32(losses), "gradients": gradients}


def make(name: str) -> None:
    family, options = MADE[name]
    model = build(family, options)
    folder = OUT / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    found = reference(model)
    # Gradients under the names in the file: saved by transformers itself, whatever it renames or splits.
    gradients = found.pop("gradients")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(gradients[key] if gradients[key] is not None else torch.zeros_like(parameter))
    spare = folder / "gradients"
    model.save_pretrained(spare)
    from safetensors.numpy import load_file
    norms = {key: np.linalg.norm(value) for key, value in load_file(spare / "model.safetensors").items()}
    for path in spare.iterdir():
        path.unlink()
    spare.rmdir()
    np.savez_compressed(folder / "reference.npz", **found, **{f"grad_{key}": np.float32(norm) for key, norm in norms.items()})
    sizes = {path.name: path.stat().st_size // 1024 for path in folder.iterdir()}
    print(f"{name}: loss {found['loss']:.4f}, own error {found['error']:.1e}, KB {json.dumps(sizes)}")


def make_encdec(name: str) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention
    config = transformers.T5Config(**ENCDEC[name])
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not config.scale_decoder_outputs:  # transformers 5 ties every T5 that it makes, also those that are not
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise * (1.0 if "shared" in key or "relative" in key else 0.3))
    folder = OUT / "encdec" / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    draw = lambda n: torch.randint(3, 64, (n,), generator=generator)
    pairs = [(draw(n), draw(m)) for n, m in ((30, 9), (13, 12), (9, 6), (8, 14))]
    start = torch.zeros(1, dtype=torch.long)
    logits = lambda read, said: model(input_ids=read[None], decoder_input_ids=torch.cat([start, said])[None, :len(said)]).logits[0]
    with torch.no_grad():
        single = [logits(*pair) for pair in pairs]
        model.double()
        exact = [logits(*pair) for pair in pairs]
        said = torch.zeros(0, dtype=torch.long)
        for _ in range(10):
            best = logits(pairs[0][0], torch.cat([said, start]))[-1].topk(2)
            if best.values[0] - best.values[1] < 5e-3:
                print("  a narrow choice:", float(best.values[0] - best.values[1]))
            said = torch.cat([said, best.indices[:1]])
    model.float()
    total = sum(torch.nn.functional.cross_entropy(logits(*pair), pair[1], reduction="sum") for pair in pairs) / sum(len(pair[1]) for pair in pairs)
    total.backward()
    norms = {f"grad_{key}": np.float32(parameter.grad.norm()) for key, parameter in model.named_parameters()}
    found = {"error": np.float32(max(float((a.double() - b).abs().max()) for a, b in zip(single, exact))), "loss": np.float32(total.item()),
             "greedy": said.int().numpy()}
    for i, ((read, said), rows) in enumerate(zip(pairs, exact)):
        found |= {f"inputs_{i}": read.int().numpy(), f"targets_{i}": said.int().numpy(), f"tokens_{i}": torch.cat([start, said[:-1]]).int().numpy(),
                  f"logits_{i}": rows.float().numpy()}
    far = torch.arange(-300, 301)
    found["buckets"] = torch.stack([T5Attention._relative_position_bucket(far, bidirectional=b) for b in (True, False)]).int().numpy()
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0), []
    for _ in range(5):
        optimiser.zero_grad()
        loss = sum(torch.nn.functional.cross_entropy(logits(*pair), pair[1], reduction="sum") for pair in pairs) / sum(len(pair[1]) for pair in pairs)
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    np.savez_compressed(folder / "reference.npz", **found, **norms, losses=np.float32(losses))
    print(f"{name}: loss {found['loss']:.4f}, own error {found['error']:.1e}, KB {json.dumps({path.name: path.stat().st_size // 1024 for path in folder.iterdir()})}")


if __name__ == "__main__":
    wanted = sys.argv[1:] or [*MADE, *ENCDEC]
    if set(wanted) - {*MADE, *ENCDEC}:
        sys.exit(f"{__doc__}\nKnown: {', '.join([*MADE, *ENCDEC])}")
    torch.set_num_threads(1)
    for name in wanted:
        make_encdec(name) if name in ENCDEC else make(name)
