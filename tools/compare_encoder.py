"""Compares a BERT-like Hugging Face directory, imported, with transformers in float64: python tools/compare_encoder.py DIR (needs torch and transformers)."""

import pathlib
import sys

import jax
import numpy as np
import torch
import transformers

from jaxlm.interop import hf
from jaxlm.models import kinds

folder = pathlib.Path(sys.argv[1])
source = hf.open_directory(folder)
params, model = hf.load(source), kinds.build(source.cfg)
draw = np.random.default_rng(0)
mask = np.arange(48)[None] < np.array([48, 20])[:, None]
tokens, types = draw.integers(1000, 30000, (2, 48)) * mask, draw.integers(0, max(1, source.cfg.token_types), (2, 48)) * mask
hidden = model.apply(params, {"tokens": tokens.astype(np.int32), "types": types.astype(np.int32), "segments": mask.astype(np.int32),
                              "positions": np.arange(48, dtype=np.int32)[None] * mask})[0]
theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
run = lambda: theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), token_type_ids=torch.tensor(types)).last_hidden_state.numpy()
with torch.no_grad():
    single = run()
    theirs.double()
    exact = run()
difference = lambda found: float(np.abs(np.asarray(found) - exact)[mask].max())
print(f"{source.family.architecture}, {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, hidden states up to {np.abs(exact[mask]).max():.2f}")
print(f"largest difference from float64: jaxlm {difference(hidden):.1e}, transformers in float32 {difference(single):.1e}")
