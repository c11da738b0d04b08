"""Speed of our train step on a GPU beside torch.compile's step of the same model: tokens/s, MFU, peak memory.

    python tools/bench_gpu.py                              GPT-2 124M and a Llama of 1.1 B parameters, bfloat16, on the first GPU
    python tools/bench_gpu.py --model=llama_1b --batch=8 --torch=false
    python tools/bench_gpu.py --tiny                       the same code on a toy, on any machine: seconds, no figure that means anything

Needs JAX, Flax and Optax, nothing else of jaxlm's requirements, and no network; torch only for the comparison, which is left out, with a word, where it
is absent. Random tokens, one document a row; float32 parameters, gradients and AdamW state, bfloat16 products, no recomputation, dropout or accumulation,
on both sides; torch with fused AdamW, `scaled_dot_product_attention` and `torch.compile(mode="max-autotune-no-cudagraphs")`. Rounds of steps take turns,
A B A B, in one process; medians are printed, and the ratio. MFU counts 6 N + 6 L T D operations a token (train/report.py) against the data sheet's peak.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags  # noqa: E402

from jaxlm import chips, cli, config  # noqa: E402
from jaxlm.models import presets  # noqa: E402

# Model -> rows of a batch, tokens of a row. The vocabulary is padded to a multiple of 64, as nanoGPT's. Both sides of 1B must fit into 80 GB together.
MODELS = {"gpt2_124m": (32, 1024), "llama_1b": (4, 2048)}


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two that are compared."""
    name: str
    run: Callable[[int], float]  # does so many steps, returns the last loss
    memory: Callable[[], float]  # peak so far in bytes, 0 where nobody tells
    start_seconds: float  # to the end of the first step


def recipe(model: str, batch: int, tiny: bool) -> config.Config:
    """The config of one comparison; `batch` 0 is the table's."""
    rows, length = MODELS[model]
    sizes = dataclasses.asdict(presets.PRESETS[model])
    sizes |= dict(vocab_size=-(-sizes["vocab_size"] // 64) * 64, context=length, dtype="bfloat16", remat="none")
    if tiny:
        rows, length = 2, 64
        sizes |= dict(vocab_size=256, context=length, layers=2, width=64, heads=4, kv_heads=2 if sizes["kv_heads"] else 0, feedforward=128)
    return config.build({"model": sizes, "data": dict(batch_size=batch or rows, sequence_length=length), "tokenizer": dict(kind="bytes"),
                         "optim": dict(lr=1e-4, schedule="constant", warmup="0"), "train": dict(steps="1_000_000 steps"), "mesh": dict(fsdp=1)})


def ours(cfg: config.Config, ids: Any) -> Side:
    """jaxlm's own step. `ids`: int32 `[B, T + 1]`."""
    import jax
    import numpy as np

    from jaxlm import sharding
    from jaxlm.train import setup

    start = time.perf_counter()
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    parts = setup.build(cfg, mesh, 259 if cfg.model.vocab_size >= 259 else cfg.model.vocab_size)
    place = np.tile(np.arange(ids.shape[1] - 1, dtype=np.int32), (len(ids), 1))
    host = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": place, "segments": np.ones_like(place), "weights": np.ones(place.shape, np.float32)}
    with jax.set_mesh(mesh):
        batch = sharding.to_device(mesh, host, len(ids))
        held = [parts.init()]

    def run(steps: int) -> float:
        with jax.set_mesh(mesh):
            for _ in range(steps):
                held[0], metrics = parts.step(held[0], batch)
            loss, weight = jax.block_until_ready(metrics["sums"]["loss"])
        return float(loss) / float(weight)

    run(1)
    memory = lambda: float((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))
    return Side(f"jaxlm, jax {jax.__version__}", run, memory, time.perf_counter() - start)


def torch_side(cfg: config.Config, ids: Any) -> Side:
    """The same model in torch, compiled. `ids`: int32 `[B, T + 1]`."""
    import torch

    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    model = torch_model(cfg.model.filled()).to(device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": cfg.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=cfg.optim.lr,
                                  betas=(cfg.optim.b1, cfg.optim.b2), eps=cfg.optim.eps, fused=device == "cuda")
    tokens = torch.tensor(ids, dtype=torch.long, device=device)

    def loss_of(tokens):
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(tokens[:, :-1])
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    compiled = torch.compile(loss_of, mode="max-autotune-no-cudagraphs" if device == "cuda" else "default")

    def run(steps: int) -> float:
        for _ in range(steps):
            loss = compiled(tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return float(loss)  # waits for the device

    run(1)
    memory = lambda: float(torch.cuda.max_memory_allocated()) if device == "cuda" else 0.0
    return Side(f"torch.compile, torch {torch.__version__}", run, memory, time.perf_counter() - start)


def torch_model(cfg: Any) -> Any:
    """A decoder in torch with exactly our parameters: GPT-2's or Llama's kind of block, by `cfg` (filled in), initialised alike."""
    import torch
    from torch import nn
    from torch.nn import functional

    assert cfg.norm_position == "pre" and cfg.qk_norm == "none" and not cfg.experts and cfg.positions in ("learned", "rotary")
    norm = lambda: nn.LayerNorm(cfg.width, eps=cfg.norm_eps, bias=cfg.bias) if cfg.norm == "layer" else nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
    linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=cfg.bias)
    act = {"gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "gelu": functional.gelu, "silu": functional.silu}[cfg.activation]
    size, kv = cfg.heads * cfg.head_size, cfg.kv_heads * cfg.head_size

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([norm(), norm()])
            self.qkv, self.o = linear(cfg.width, size + 2 * kv), linear(size, cfg.width)
            self.up, self.down = linear(cfg.width, cfg.feedforward * (2 if cfg.gated else 1)), linear(cfg.feedforward, cfg.width)

        def forward(self, x, turn):
            b, t, _ = x.shape
            q, k, v = (a.view(b, t, -1, cfg.head_size).transpose(1, 2) for a in self.qkv(self.norms[0](x)).split([size, kv, kv], dim=-1))
            if turn is not None:
                q, k = (a * turn[0] + torch.cat([-a[..., cfg.head_size // 2:], a[..., :cfg.head_size // 2]], -1) * turn[1] for a in (q, k))
            q, k = q.to(v.dtype), k.to(v.dtype)
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=cfg.kv_heads != cfg.heads)
            x = x + self.o(out.transpose(1, 2).reshape(b, t, size))
            hidden = self.up(self.norms[1](x))
            if cfg.gated:
                gate, hidden = hidden.chunk(2, dim=-1)
                return x + self.down(act(gate) * hidden)
            return x + self.down(act(hidden))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(cfg.vocab_size, cfg.width)
            self.places = nn.Embedding(cfg.context, cfg.width) if cfg.positions == "learned" else None
            self.layers, self.norm = nn.ModuleList([Layer() for _ in range(cfg.layers)]), norm()
            self.head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
            if cfg.tied:
                self.head.weight = self.embed.weight
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=cfg.init_std / (math.sqrt(2 * cfg.layers) if name.endswith(("o.weight", "down.weight")) else 1))
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

        def forward(self, tokens):
            place, turn = torch.arange(tokens.shape[1], device=tokens.device), None
            x = self.embed(tokens) + (self.places(place) if self.places is not None else 0)
            if cfg.positions == "rotary":
                angles = place[:, None] / cfg.rope_theta ** (torch.arange(0, cfg.head_size, 2, device=tokens.device) / cfg.head_size)
                turn = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
            for layer in self.layers:
                x = layer(x, turn)
            return self.head(self.norm(x))

    return Decoder()


def compare(cfg: config.Config, rounds: int, steps: int, with_torch: bool) -> list[dict[str, Any]]:
    """Rows of the table: one for each side."""
    import jax
    import numpy as np

    from jaxlm.train import report

    rows, length = cfg.data.batch_size, cfg.data.sequence_length
    ids = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (rows, length + 1), dtype=np.int32)
    sides = [ours(cfg, ids)] + ([torch_side(cfg, ids)] if with_torch else [])
    times, losses = {side.name: [] for side in sides}, {}
    for number in range(rounds):
        for side in sides:
            begin = time.perf_counter()
            losses[side.name] = side.run(steps)
            times[side.name].append((time.perf_counter() - begin) / steps)
        print(f"\rround {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    shapes = jax.eval_shape(_init(cfg), jax.random.key(0))
    flops = report.flops_per_token(cfg.model, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)), length) * rows * length
    peak = chips.peak_flops(jax.devices()[0].device_kind) or math.nan
    found = []
    for side in sides:
        second = statistics.median(times[side.name])
        found.append({"side": side.name, "tokens_per_second": rows * length / second, "step_seconds": second, "spread": [min(times[side.name]), max(times[side.name])],
                      "mfu": flops / second / peak, "peak_memory_gib": side.memory() / 2**30, "first_step_seconds": side.start_seconds, "loss": losses[side.name]})
    return found


def _init(cfg: config.Config) -> Callable:
    from jaxlm.models import kinds
    return kinds.build(cfg.model).init


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_list("model", list(MODELS), f"Which of {', '.join(MODELS)}.", flag_values=values)
    flags.DEFINE_integer("batch", 0, "Rows of a batch; 0: the model's own.", flag_values=values, lower_bound=0)
    flags.DEFINE_integer("rounds", 7, "How often the sides take turns.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("steps", 10, "Steps of one round.", flag_values=values, lower_bound=1)
    flags.DEFINE_bool("torch", True, "Compare with torch, where it is installed.", flag_values=values)
    flags.DEFINE_bool("tiny", False, "Toy sizes: tries the code, on any machine.", flag_values=values)
    flags.DEFINE_string("json", "", "Write the figures here too.", flag_values=values)
    if "--help" in argv:
        sys.exit(f"{__doc__}\n{values.get_help()}")
    values(["bench_gpu", *argv])
    unknown = [name for name in values.model if name not in MODELS]
    if unknown:
        sys.exit(f"bench_gpu: --model={unknown[0]} is not known; known: {', '.join(MODELS)}")
    cli.set_environment(verbose=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both sides share the GPU's memory
    import importlib.util

    import jax

    if jax.default_backend() != "gpu" and not values.tiny:
        sys.exit(f"bench_gpu: jax finds no GPU here ({jax.devices()[0].device_kind}); --tiny tries the code on any machine")
    with_torch = values.torch and importlib.util.find_spec("torch") is not None
    if values.torch and not with_torch:
        print("torch is not installed: no comparison")
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    facts = {"date": datetime.date.today().isoformat(), "device": jax.devices()[0].device_kind, "commit": commit, "xla_flags": os.environ.get("XLA_FLAGS", "")}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results = {}
    for model in values.model:
        cfg = recipe(model, values.batch, values.tiny)
        results[model] = compare(cfg, values.rounds, values.steps, with_torch)
        print(f"{model}{' (toy sizes)' if values.tiny else ''}: {cfg.data.batch_size} x {cfg.data.sequence_length} tokens, {cfg.model.dtype}")
        for row in results[model]:
            print(f"  {row['side']:<34} {row['tokens_per_second']:>10,.0f} tokens/s  step {row['step_seconds'] * 1e3:8.2f} ms ({row['spread'][0] * 1e3:.2f} to "
                  f"{row['spread'][1] * 1e3:.2f})  MFU {row['mfu']:6.1%}  peak {row['peak_memory_gib']:6.2f} GiB  first step {row['first_step_seconds']:6.1f} s")
        if with_torch:
            print(f"  ratio {results[model][0]['tokens_per_second'] / results[model][1]['tokens_per_second']:.3f}")
    if values.json:
        pathlib.Path(values.json).write_text(json.dumps(facts | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
