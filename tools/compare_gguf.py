"""Compares a GGUF file, read here, with transformers reading the same file: python tools/compare_gguf.py FILE.gguf (needs torch, transformers and gguf).

Printed are, over three prompts, the largest difference of all logits in float32 and whether 16 greedy tokens are the same.
"""

import pathlib
import sys
import time

import jax
import numpy as np
import torch
import transformers

from jaxlm import generate
from jaxlm.interop import gguf
from jaxlm.models import kinds

PROMPTS = ("The capital of France is", "def fib(n):\n    return", "In 1969, Neil Armstrong")

path, begin = pathlib.Path(sys.argv[1]), time.time()
source = gguf.open_file(path)
params, model, tokenizer = gguf.load(source), kinds.build(source.cfg), gguf.tokenizer(source)
print(f"{path.name}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters in {time.time() - begin:.1f} s")
theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
for prompt in PROMPTS:
    ids = ([tokenizer.bos] if tokenizer.adds_bos else []) + tokenizer.encode(prompt)
    row = np.array([ids], np.int32)
    found = np.asarray(model.head(params, model.apply(params, {"tokens": row, "positions": np.arange(len(ids))[None], "segments": np.ones_like(row)})[0]))[0]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        said = theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None)[0, len(ids):].tolist()
    [ours] = generate.generate(model, params, [ids], max_tokens=16, context=source.cfg.context, settings=generate.Settings(temperature=0))
    print(f"{prompt!r}: {np.abs(found - expected).max():.1e} of {np.abs(expected).max():.0f}, greedy {'equal' if ours == said else f'{ours} not {said}'}, "
          f"{tokenizer.decode(ours)!r}")
