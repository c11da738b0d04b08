"""Writes tests/interop/fixtures/encoders: tiny random encoders made by transformers with what torch computes from them, one per family and head.

  python tools/make_encoder_fixtures.py            all of them (needs torch and transformers; running the tests does not)
  python tools/make_encoder_fixtures.py roberta    those whose name begins so

Each folder holds config.json and model.safetensors as transformers saves them, and reference.npz:
  tokens, types, mask  a batch [B, T] of ids, token types (0 where the family has none) and 1 where there is no padding, which is on the right
  hidden               float32 hidden states [B, T, D] of the base model, computed in float64
  outputs              float32 logits of the head, or the pooled vectors; left out where there is no head
  error                largest difference of the float32 results from these, outside padding
  labels, loss, losses, grad_NAME      of models with logits: a class of each token (-100: does not count) or sequence, their mean cross-entropy, that at
                       five steps of torch's AdamW (lr 0.01, betas 0.9 0.95, eps 1e-8, no decay), and the norm of the first gradient in each tensor
Weights are drawn here, norms and biases too, so that nothing is mapped right by accident.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parents[1] / "tests" / "interop" / "fixtures" / "encoders"
LENGTHS = (20, 13, 9)
DROPOUTS = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
BERT = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=26, type_vocab_size=2,
            attn_implementation="eager", **DROPOUTS)
DISTILBERT = dict(vocab_size=64, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=24, attn_implementation="eager", dropout=0.0,
                  attention_dropout=0.0, seq_classif_dropout=0.0)
HEADS = {"": "Model", "_masked": "ForMaskedLM", "_sequence": "ForSequenceClassification", "_tokens": "ForTokenClassification"}
FAMILIES = {"bert": ("Bert", BERT), "roberta": ("Roberta", BERT | dict(pad_token_id=1, type_vocab_size=1)), "distilbert": ("DistilBert", DISTILBERT)}
MADE = {name + head: (family + suffix, family, options | (dict(num_labels=3) if head in ("_sequence", "_tokens") else {}))
        for name, (family, options) in FAMILIES.items() for head, suffix in HEADS.items()}


def build(name: str):
    architecture, family, options = MADE[name]
    model = getattr(transformers, architecture)(getattr(transformers, f"{family}Config")(**options)).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and key.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else 0.2 * noise if parameter.ndim == 1 else noise * (0.6 if "embeddings" in key else 0.3))
    return model


def compute(model, batch: dict):
    """Hidden states, and logits or pooled vectors or None."""
    base = getattr(model, model.base_model_prefix, model)
    found = model(**batch)
    hidden = base(**batch).last_hidden_state
    return hidden, found.logits if "logits" in found else found.get("pooler_output")


def make(name: str) -> None:
    model, folder = build(name), OUT / name
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    tokens = torch.where(mask > 0, torch.randint(3, 64, shape, generator=generator), 1)
    types = torch.randint(0, getattr(model.config, "type_vocab_size", 1), shape, generator=generator) * mask
    batch = {"input_ids": tokens, "attention_mask": mask} | ({} if name.startswith("distilbert") else {"token_type_ids": types})
    with torch.no_grad():
        single = compute(model, batch)
        exact = compute(model.double(), batch)
    model.float()
    counts = lambda x: x[mask > 0] if x.shape[:2] == shape else x
    error = max(float((counts(a.double()) - counts(b)).abs().max()) for a, b in zip(single, exact) if a is not None)
    found = {"tokens": tokens.int().numpy(), "types": types.int().numpy(), "mask": mask.int().numpy(), "hidden": exact[0].float().numpy(), "error": np.float32(error)}
    if exact[1] is not None:
        found["outputs"] = exact[1].float().numpy()
    if model.config.architectures[0].endswith("Model"):
        return save(folder, found)
    classes = single[1].shape[-1]
    labels = torch.randint(0, classes, single[1].shape[:-1], generator=generator)
    if labels.ndim == 2:
        labels = torch.where((mask > 0) & (torch.rand(shape, generator=generator) < 0.4), labels, -100)
    loss = lambda: torch.nn.functional.cross_entropy(model(**batch).logits.reshape(-1, classes), labels.reshape(-1))
    value = loss()
    value.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    found |= {f"grad_{key}": np.float32(0 if gradient is None else gradient.norm()) for key, gradient in gradients.items()}
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0), []
    for _ in range(5):
        optimiser.zero_grad()
        step = loss()
        step.backward()
        losses.append(step.item())
        optimiser.step()
    save(folder, found | {"labels": labels.int().numpy(), "loss": np.float32(value.item()), "losses": np.float32(losses)})


def save(folder: pathlib.Path, found: dict) -> None:
    np.savez_compressed(folder / "reference.npz", **found)
    print(f"{folder.name}: own error {found['error']:.1e}, {sum(path.stat().st_size for path in folder.iterdir()) // 1024} KB")


if __name__ == "__main__":
    wanted = [name for name in MADE if not sys.argv[1:] or name.startswith(tuple(sys.argv[1:]))]
    if not wanted:
        sys.exit(f"{__doc__}\nKnown: {', '.join(MADE)}")
    torch.set_num_threads(1)
    for name in wanted:
        make(name)
