"""Speed of a train step against what the machine can do at best.

    python tools/bench.py --config=quickstart
    python tools/bench.py --config=gpt2_124m --config.data.batch_size=8 --rounds=5

Steps on random tokens (no data, no checkpoint) and a plain matrix product take turns, A B A B, so that a noisy machine disturbs both; medians
are printed: tokens/s, MFU against the peak measured in the same minutes, and the step's floor (its FLOPs at that peak). Figures of different
runs on a shared machine do not compare; ratios do.
"""

import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import flags  # noqa: E402

from jaxlm import cli, config  # noqa: E402


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("config", "quickstart", "Recipe to measure.", flag_values=values)
    flags.DEFINE_integer("rounds", 7, "How often steps and matrix products take turns.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("steps", 3, "Steps of one round.", flag_values=values, lower_bound=1)
    if "--help" in argv:
        sys.exit(f"{__doc__}\n{values.get_help()}")
    overrides = cli.take_overrides(argv)
    values(["bench", *(a for a in argv if not a.startswith("--config."))])
    cli.set_environment(verbose=False)
    measure(config.load(values.config, overrides), values.rounds, values.steps)


def measure(cfg: config.Config, rounds: int, steps: int) -> None:
    """Prints the table for one config."""
    import jax
    import numpy as np

    from jaxlm import sharding, trees
    from jaxlm.train import report, setup

    mesh = sharding.make_mesh(cfg.mesh)
    parts = setup.build(cfg, mesh, cfg.model.vocab_size or cfg.tokenizer.vocab_size, tokens_per_epoch=10**9)
    rows, length = cfg.data.batch_size, cfg.data.sequence_length
    draw = np.random.default_rng(0)
    ids = draw.integers(0, parts.config.model.vocab_size, (rows, length + 1), dtype=np.int32)
    place = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    begin, end = sharding.local_rows(mesh, rows)
    host = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": place, "segments": np.ones_like(place), "weights": np.ones(place.shape, np.float32)}
    with jax.set_mesh(mesh):
        batch = sharding.to_device(mesh, {k: v[begin:end] for k, v in host.items()}, rows)
        state = parts.init()
        start = time.perf_counter()
        step = parts.step.lower(state, batch).compile()
        compiled = time.perf_counter() - start
        state, _ = jax.block_until_ready(step(state, batch))
    tokens = rows * length
    flops = tokens * report.flops_per_token(parts.config.model, trees.count(state.params), length)
    seconds, peaks = [], []
    for number in range(rounds):
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append((time.perf_counter() - start) / steps)
        peaks.append(report.peak_flops()[0])
        print(f"\rround {number + 1}/{rounds}", end="", flush=True)
    second, peak = statistics.median(seconds), statistics.median(peaks)
    print(f"\r{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {os.cpu_count()} cores, {trees.count(state.params):,} parameters, "
          f"{rows} x {length} tokens, {cfg.model.dtype}")
    for name, value in (("tokens/s", f"{tokens / second:,.0f}"), ("step", f"{second * 1e3:,.1f} ms (spread {min(seconds) * 1e3:,.1f} to {max(seconds) * 1e3:,.1f})"),
                        ("peak", f"{peak / 1e9:,.0f} GFLOP/s"), ("floor of a step", f"{flops / peak * 1e3:,.1f} ms ({flops / 1e9:,.1f} GFLOP)"),
                        ("MFU", f"{flops / second / peak:.1%}"), ("compile", f"{compiled:.1f} s")):
        print(f"  {name:<16} {value}")


if __name__ == "__main__":
    main(sys.argv[1:])
