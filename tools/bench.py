"""Speed of a train step beside the machine's own limit and, when asked, beside PyTorch, transformers and LitGPT on the same model.

    python tools/bench.py --config=quickstart
    python tools/bench.py --config=gpt2_124m --config.data.batch_size=8 --config.data.sequence_length=256 --rounds=5
    python tools/bench.py --all --peers=peers           the tables of docs/performance.md; installs the peers into the folder `peers` first

Every side runs in a process of its own and trains on random tokens; they take turns, A B A B, and medians are printed, so that a noisy machine disturbs all
alike. A step's floor is its FLOPs (the model's own: no recomputation) at the speed of a plain matrix product, measured between the turns. Figures of
different runs on a shared machine do not compare; ratios do. Peers are compared in float32 on CPUs; tools/bench_gpu.py and tools/bench_tpu.py do the rest.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import venv

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import flags  # noqa: E402

from jaxlm import cli, config  # noqa: E402
from jaxlm.config import Config, TransformerConfig  # noqa: E402

PACKAGES = ("torch", "transformers", "accelerate", "litgpt")


def models() -> dict[str, Config]:
    """What `--all` measures: nanoGPT's model for a laptop, another with a larger vocabulary, and of each family of decoders a model of that size."""
    from jaxlm.models.presets import PRESETS

    def cut(like: TransformerConfig, rows: int, length: int, **sizes) -> Config:
        sizes = dict(context=length, heads=sizes["width"] // 64, kv_heads=0, head_size=64, feedforward=4 * sizes["width"], dense_layers=()) | sizes
        model = dataclasses.replace(like, **sizes)
        return config.build({"model": dataclasses.asdict(model), "data": {"batch_size": rows, "sequence_length": length}})

    small = dict(layers=4, width=256, vocab_size=8192)
    gated = lambda name, **more: cut(PRESETS[name], 16, 128, **small | dict(feedforward=704) | more)
    return {
        "GPT-2, 6 x 384, T 256, V 65": cut(PRESETS["gpt2_124m"], 8, 256, layers=6, width=384, vocab_size=65),
        "GPT-2, 4 x 256, T 128, V 8192": cut(PRESETS["gpt2_124m"], 16, 128, **small),
        "GPT-NeoX": cut(PRESETS["pythia_160m"], 16, 128, **small),
        "Llama": gated("llama_7b"), "Llama 3": gated("llama_8b", kv_heads=2),
        "Mistral": gated("mistral_7b", kv_heads=2, windows=(64,)), "Mixtral": gated("mixtral_8x7b", kv_heads=2, experts=4),
        "Qwen 2": gated("qwen2_0.5b", kv_heads=2), "Qwen 3": gated("qwen3_0.6b", kv_heads=2), "OLMo 2": gated("olmo2_1b"),
        "Gemma": gated("gemma_2b", kv_heads=1, embedding_scale=16.0),
        "Gemma 2": gated("gemma2_2b", kv_heads=2, windows=(64, 0), query_scale=64.0, embedding_scale=16.0),
        "Gemma 3": gated("gemma3_1b", kv_heads=1, windows=(64, 64, 64, 0), query_scale=64.0, embedding_scale=16.0),
    }


def describe(cfg: Config) -> dict:
    """What tools/bench_side.py builds: the config, and the model as config.json (empty where transformers has none like it)."""
    from jaxlm.interop import hf_config

    try:
        hf = hf_config.write(cfg.model)[1]
    except ValueError:
        hf = {}
    return {"config": config.to_dict(dataclasses.replace(cfg, model=cfg.model.filled())), "hf": hf}


def sides(cfg: Config, peers: bool) -> list[str]:
    """Who can compute this model."""
    c = cfg.model.filled()
    if not peers or c.kind != "decoder" or c.encoder_layers:
        return ["jaxlm"]
    gpt2 = c.norm == "layer" and c.positions == "learned" and c.bias and not c.gated and c.tied
    lit = (c.positions == "rotary" and not c.tied and not c.experts and c.norm_position == "pre" and c.qk_norm == "none" and c.bias == (not c.gated) and
           not c.qkv_bias and not any(c.windows) and c.rope_scaling == "none")
    return ["jaxlm", *["nanoGPT", "nanoGPT compiled"] * gpt2, *["HF Trainer"] * bool(describe(cfg)["hf"]), *["litgpt"] * lit]


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("config", "quickstart", "Recipe to measure.", flag_values=values)
    flags.DEFINE_bool("all", False, "Measure a small model of every family of decoders instead.", flag_values=values)
    flags.DEFINE_string("only", "", "With --all: those whose name contains this.", flag_values=values)
    flags.DEFINE_string("peers", "", f"Compare with others: folder of a virtual environment with {', '.join(PACKAGES)}; made by pip if absent (on Linux the "
                        "torch of PyPI is the 3 GB one for GPUs: set PIP_FIND_LINKS or PIP_INDEX_URL to where your CPU build is).", flag_values=values)
    flags.DEFINE_integer("rounds", 5, "How often the sides take turns.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("steps", 5, "Steps of one turn.", flag_values=values, lower_bound=1)
    if "--help" in argv:
        sys.exit(f"{__doc__}\n{values.get_help()}")
    overrides = cli.take_overrides(argv)
    values(["bench", *(a for a in argv if not a.startswith("--config."))])
    cli.use_huge_pages()
    python = _install(pathlib.Path(values.peers)) if values.peers else ""
    cfg = config.load(values.config, overrides)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or cfg.tokenizer.vocab_size))
    chosen = {name: c for name, c in models().items() if values.only in name} if values.all else {values.config: cfg}
    for name, cfg in chosen.items():
        measure(name, cfg, sides(cfg, bool(python)), python, values.rounds, values.steps)


def _install(folder: pathlib.Path) -> str:
    """Python of the environment of the peers."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return str(python)


class Side:
    """A process of tools/bench_side.py."""

    def __init__(self, name: str, asked: dict, python: str):
        self.name, self.seconds, self.rss = name, [], 0.0
        script = pathlib.Path(__file__).with_name("bench_side.py")
        self._process = subprocess.Popen([sys.executable if name in ("floor", "jaxlm") else python, script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
        self.facts = self._ask(json.dumps(asked))

    def _ask(self, line: str) -> dict:
        print(line, file=self._process.stdin, flush=True)
        for answer in self._process.stdout:
            if answer.startswith("{"):
                return json.loads(answer)
        raise SystemExit(f"{self.name} ended: {self._process.stderr.read()[-2000:]}")

    def turn(self, steps: int, counts: bool = True) -> None:
        found = self._ask(str(steps))
        self.rss = found["rss"]
        if counts:
            self.seconds.append(found["seconds"])

    def close(self) -> None:
        self._process.communicate()


def measure(name: str, cfg: Config, names: list[str], python: str, rounds: int, steps: int) -> None:
    """Prints the table of one model."""
    tokens, asked = cfg.data.batch_size * cfg.data.sequence_length, describe(cfg)
    floor, *found = turns = [Side(side, asked, python) for side in ("floor", *names)]
    for side in turns:
        side.turn(3, counts=False)  # compiles, and fills caches
    for number in range(rounds):
        for side in turns:
            print(f"\r{name}, round {number + 1} of {rounds}: {side.name:<20}", end="", file=sys.stderr, flush=True)
            side.turn(steps)
    print(file=sys.stderr)
    for side in turns:
        side.close()
    ours, other = found[0], [s.facts["parameters"] for s in found if s.facts["parameters"] != found[0].facts["parameters"]]
    assert not other, f"not the same model: {ours.facts['parameters']} parameters against {other}"
    peak, flops = 1 / statistics.median(floor.seconds), ours.facts["flops"]
    print(f"\n{name}: {ours.facts['parameters']:,} parameters, {cfg.data.batch_size} x {cfg.data.sequence_length} tokens, {cfg.model.dtype}; "
          f"{ours.facts['device']}, {os.cpu_count()} cores, compiled in {ours.facts['compile']:.1f} s\nfloor of a step: {flops / peak * 1e3:,.1f} ms ({flops / 1e9:,.1f} GFLOP at "
          f"{peak / 1e9:,.0f} GFLOP/s)\n")
    print("| | tokens/s | step, ms (fastest to slowest) | of the floor (MFU) | jaxlm is | peak memory, GiB |\n|---|---|---|---|---|---|")
    mine = statistics.median(ours.seconds)
    for side in found:
        second = statistics.median(side.seconds)
        print(f"| {side.name}, {side.facts['version']} | {tokens / second:,.0f} | {second * 1e3:,.0f} ({min(side.seconds) * 1e3:,.0f} to "
              f"{max(side.seconds) * 1e3:,.0f}) | {flops / second / peak:.0%} | {second / mine:.2f}x | {side.rss:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
