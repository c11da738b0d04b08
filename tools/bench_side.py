"""One side of tools/bench.py, in a process and a Python environment of its own: builds a model from a description, then takes turns.

    python tools/bench_side.py NAME < turns       with the description as the first line of standard input

It prints a line of JSON when it is ready, then reads a number of steps, runs them and prints the seconds of one step; at the end of the input it ends.
The description (`describe` in tools/bench.py) holds the model twice: as jaxlm has it, and as the config.json that transformers reads. Every side trains
the same model in float32 with AdamW and a gradient clipped to norm 1, on random tokens that lie in memory.
"""

import json
import os
import pathlib
import resource
import sys
import time

THREADS = len(os.sched_getaffinity(0))


class Turns:
    """Called before each step: counts the steps of a turn, and between turns reports and waits for the next."""

    def __init__(self, done=lambda: None, **facts):
        self._done, self._left, self._steps, self._begin = done, 0, 0, 0.0
        self._say(**facts)

    def _say(self, **facts) -> None:
        print(json.dumps(facts), flush=True)

    def __call__(self) -> None:
        if not self._left:
            self._done()
            if self._steps:
                self._say(seconds=(time.perf_counter() - self._begin) / self._steps, rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
            line = sys.stdin.readline()
            if not line.strip():
                os._exit(0)
            self._left = self._steps = int(line)
            self._begin = time.perf_counter()
        self._left -= 1


def jaxlm(asked: dict) -> None:
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from jaxlm import cli, config

    cli.set_environment(verbose=False)
    import jax
    import numpy as np

    from jaxlm import sharding, trees
    from jaxlm.train import report, setup

    cfg = config.build(asked["config"])
    rows, length = cfg.data.batch_size, cfg.data.sequence_length
    mesh = sharding.make_mesh(cfg.mesh)
    parts = setup.build(cfg, mesh, cfg.model.vocab_size, tokens_per_epoch=10**9)
    ids = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (rows, length + 1), dtype=np.int32)
    place = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    host = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": place, "segments": np.ones_like(place), "weights": np.ones(place.shape, np.float32)}
    begin, end = sharding.local_rows(mesh, rows)
    with jax.set_mesh(mesh):
        batch = sharding.to_device(mesh, {k: v[begin:end] for k, v in host.items()}, rows)
        state, metrics = parts.init(), None
        start = time.perf_counter()
        step = setup.compiled(parts.step, state, batch)
        compiled, params = time.perf_counter() - start, trees.count(state.params)

        turn = Turns(lambda: jax.block_until_ready(metrics), parameters=params, version=f"jax {jax.__version__}", compile=compiled,
                     device=f"{jax.device_count()} x {jax.devices()[0].device_kind}", flops=rows * length * report.flops_per_token(parts.config.model, params, length))
        while True:
            turn()
            state, metrics = step(state, batch)


def floor(asked: dict) -> None:
    """The machine's speed: seconds of one FLOP in a plain matrix product, as `jaxlm train` measures it."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from jaxlm import cli

    cli.set_environment(verbose=False)
    from jaxlm.train import report

    print("{}", flush=True)
    while sys.stdin.readline().strip():
        print(json.dumps({"seconds": 1 / report.peak_flops()[0], "rss": 0.0}), flush=True)


def _torch(asked: dict, build, loss, compiled: bool) -> None:
    """The plain loop of PyTorch around `build() -> module` and `loss(module, inputs, targets)`."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    data, model = asked["config"]["data"], build()
    run = torch.compile(model) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(0, asked["config"]["model"]["vocab_size"], (data["batch_size"], data["sequence_length"] + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    turn = Turns(parameters=sum(p.numel() for p in model.parameters()), version=f"torch {torch.__version__}")
    while True:
        turn()
        loss(run, inputs, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def nanogpt(asked: dict, compiled: bool = False) -> None:
    """A GPT-2 as nanoGPT computes it: one matrix for queries, keys and values, torch's fused attention, the plain loop; written anew."""
    import torch
    from torch.nn import functional as F

    c = asked["config"]["model"]
    width, heads = c["width"], c["heads"]

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)])
            self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
            self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

        def forward(self, x):
            split = lambda a: a.view(*a.shape[:2], heads, -1).transpose(1, 2)
            q, k, v = map(split, self.qkv(self.norms[0](x)).split(width, dim=2))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = torch.nn.Embedding(c["vocab_size"], width), torch.nn.Embedding(c["context"], width)
            self.layers, self.norm = torch.nn.ModuleList(Layer() for _ in range(c["layers"])), torch.nn.LayerNorm(width)
            for p in self.parameters():
                if p.dim() > 1:
                    torch.nn.init.normal_(p, std=0.02)

        def forward(self, ids, targets):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            for layer in self.layers:
                x = layer(x)
            logits = F.linear(self.norm(x), self.tokens.weight)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    _torch(asked, Model, lambda model, inputs, targets: model(inputs, targets), compiled)


def litgpt(asked: dict) -> None:
    """LitGPT's model and loss in the loop of its `pretrain`, which compiles the model."""
    import litgpt as package
    from litgpt.utils import chunked_cross_entropy

    c = asked["config"]["model"]
    gated, rms = c["gated"], c["norm"] == "rms"
    cfg = package.Config(
        name="bench", block_size=c["context"], vocab_size=c["vocab_size"], padded_vocab_size=c["vocab_size"], n_layer=c["layers"], n_embd=c["width"],
        n_head=c["heads"], n_query_groups=c["kv_heads"], intermediate_size=c["feedforward"], bias=c["bias"], attn_bias=c["bias"] or c["qkv_bias"],
        norm_class_name="RMSNorm" if rms else "LayerNorm", norm_eps=c["norm_eps"], mlp_class_name="LLaMAMLP" if gated else "GptNeoxMLP",
        parallel_residual=c["parallel_residual"], rotary_percentage=c["rotary_fraction"], rope_base=int(c["rope_theta"]))
    _torch(asked, lambda: package.GPT(cfg), lambda model, inputs, targets: chunked_cross_entropy(model(inputs), targets), True)


def hf(asked: dict) -> None:
    """The Trainer of transformers, with its own loop and loader."""
    import tempfile

    import torch
    import transformers

    torch.set_num_threads(THREADS)
    data, config = asked["config"]["data"], asked["hf"]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), torch_dtype=torch.float32)
    ids = torch.randint(0, config["vocab_size"], (data["batch_size"], data["sequence_length"]))
    rows = [{"input_ids": row, "labels": row} for row in ids] * 10_000
    turn = Turns(parameters=model.num_parameters(), version=f"transformers {transformers.__version__}")

    class Turn(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn()

    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, per_device_train_batch_size=data["batch_size"], max_steps=10**9, report_to=[], logging_strategy="no",
        save_strategy="no", optim="adamw_torch_fused", max_grad_norm=1.0, learning_rate=1e-3, weight_decay=0.1, disable_tqdm=True)
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Turn()]).train()


SIDES = {"floor": floor, "jaxlm": jaxlm, "nanoGPT": nanogpt, "nanoGPT compiled": lambda asked: nanogpt(asked, compiled=True), "HF Trainer": hf, "litgpt": litgpt}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.stdin.readline()))
