"""Does a learning rate found for a narrow model hold for a wide one? Standard parametrisation beside muP (model.mup_width), on the text inside Python.

  python tools/mup_widths.py coordinates            sizes of activations over widths and steps, as a table; exit code 1 if muP's grow with the width
  python tools/mup_widths.py rates --svg=docs/mup.svg --json=mup.json      the best learning rate of each width (docs/search.md has the figures)

Every model has 2 layers, heads of 16, and bytes as tokens; the base width is the first of --widths. The coordinate check (Yang et al. 2022, appendix D.1) takes a
few steps of Adam at one learning rate: where a parametrisation is right, no activation grows with the width, at the first step or at any later one.
"""

import argparse
import functools
import json
import math
import pathlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jaxlm import optim, trees  # noqa: E402
from jaxlm.config import ObjectiveConfig, OptimConfig, TransformerConfig  # noqa: E402
from jaxlm.data import python_docs  # noqa: E402
from jaxlm.models import decoder, stack  # noqa: E402
from jaxlm.objectives import OBJECTIVES  # noqa: E402

LENGTH, ROWS, GROWTH = 64, 8, 0.25  # tokens of a row, rows of a batch; slope over the width, both in logarithms, from which activations count as growing
NAMES = ("standard", "muP")


def model(width: int, base: int) -> TransformerConfig:
    """A decoder of a width; `base` 0 is the standard parametrisation."""
    return TransformerConfig(vocab_size=256, context=LENGTH, layers=2, width=width, heads=width // 16, feedforward=2 * width, gated=False, activation="gelu_tanh",
                             mup_width=base)


def batches(text: np.ndarray, seed: int) -> Iterator[dict[str, jax.Array]]:
    """Rows from random places, for ever."""
    draw, full = np.random.default_rng(seed), lambda value, kind: jnp.full((ROWS, LENGTH), value, kind)
    while True:
        rows = text[draw.integers(0, len(text) - LENGTH - 1, ROWS)[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
        yield {"tokens": jnp.asarray(rows[:, :-1]), "targets": jnp.asarray(rows[:, 1:]), "positions": jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH)),
               "segments": full(1, jnp.int32), "weights": full(1, jnp.float32)}


@functools.cache
def parts(cfg: TransformerConfig) -> tuple[Callable, Callable, Callable]:
    """`start(seed)`, `step(params, opt, batch, rate)` and `loss(params, batch)`, compiled once for all learning rates."""
    net = decoder.build(cfg)
    axes = trees.match(net.axes, trees.flatten(jax.eval_shape(net.init, jax.random.key(0))), "axes")
    tx = lambda rate: optim.build(OptimConfig(weight_decay=0.0), lambda step: rate, axes, cfg)

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        total, weight = OBJECTIVES["next_token"](ObjectiveConfig(), net, params, batch, None)["loss"]
        return total / weight

    def start(seed: int) -> tuple[Any, Any]:
        params = net.init(jax.random.key(seed))
        return params, tx(0.0).init(params)

    def step(params: Any, opt: Any, batch: dict[str, jax.Array], rate: jax.Array) -> tuple[Any, Any]:
        updates, opt = tx(rate).update(jax.grad(loss)(params, batch), opt, params)
        return jax.tree.map(jnp.add, params, updates), opt

    return jax.jit(start), jax.jit(step, donate_argnums=(0, 1)), jax.jit(loss)


def sizes(cfg: TransformerConfig, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Mean sizes of the residual stream after the embedding and each layer, and of the logits."""
    cfg, net = cfg.filled(), decoder.build(cfg)
    x, slots = decoder.embed(cfg, params, batch, jnp.float32), decoder.make_slots(cfg, batch)
    found = {"embedding": x}
    for layer in range(cfg.layers):
        own, per_layer = stack.rows(cfg, jax.tree.map(lambda w: w[layer:layer + 1], params["layers"]), None)
        x, _ = stack.scan(cfg, (False,), own, per_layer, x, slots, lambda w: w)
        found[f"layer {layer + 1}"] = x
    found["logits"] = net.head(params, net.apply(params, batch)[0])
    return {name: jnp.abs(value).mean() for name, value in found.items()}


def coordinates(text: np.ndarray, widths: list[int], steps: int, rate: float, seed: int) -> dict[str, dict[str, list[float]]]:
    """parametrisation -> activation -> its size at each width after so many steps; printed, with the slope over the width."""
    found: dict[str, dict[str, list[float]]] = {}
    print(f"mean size of activations, learning rate {rate:g}; slope: of its logarithm over that of the width")
    for name in NAMES:
        cfgs = [model(width, widths[0] * (name == "muP")) for width in widths]
        runs = []
        for cfg in cfgs:
            (params, opt), stream, look = parts(cfg)[0](seed), batches(text, seed), jax.jit(functools.partial(sizes, cfg))
            fixed, history = next(batches(text, seed + 1)), []
            for step in range(steps + 1):
                history.append({key: float(value) for key, value in look(params, fixed).items()})
                params, opt = parts(cfg)[1](params, opt, next(stream), rate)
            runs.append(history)
        for step in (0, steps):
            print(f"\n{name}, after {step} steps".ljust(28) + "".join(f"{width:>10}" for width in widths) + "     slope")
            for key in runs[0][0]:
                row = [run[step][key] for run in runs]
                print(f"  {key:<24}" + "".join(f"{value:10.4f}" for value in row) + f"{slope(widths, row):10.2f}")
                found.setdefault(name, {})[f"{key} after {step} steps"] = row
    return found


def slope(widths: list[int], values: list[float]) -> float:
    """Of the straight line through the logarithms."""
    return float(np.polyfit(np.log2(widths), np.log2(values), 1)[0])


def rates(text: np.ndarray, widths: list[int], steps: int, exponents: list[float], seeds: int) -> dict[str, dict[int, list[float]]]:
    """parametrisation -> width -> loss on held-out text at each learning rate, 2 to the power of `exponents`, mean over seeds."""
    held_out, train = text[:len(text) // 20], text[len(text) // 20:]
    found: dict[str, dict[int, list[float]]] = {name: {} for name in NAMES}
    for name in NAMES:
        for width in widths:
            cfg = model(width, widths[0] * (name == "muP"))
            start, step, loss = parts(cfg)
            losses = []
            for exponent in exponents:
                ends = []
                for seed in range(seeds):
                    (params, opt), stream = start(seed), batches(train, seed)
                    for number in range(steps):  # a tenth of warm-up, then linearly to 0
                        share = min((number + 1) / (0.1 * steps), (steps - number) / (0.9 * steps), 1.0)
                        params, opt = step(params, opt, next(stream), jnp.float32(2.0 ** exponent * share))
                    test = batches(held_out, 99)
                    ends.append(np.mean([float(loss(params, next(test))) for _ in range(8)]))
                losses.append(float(np.mean(ends)))
            found[name][width] = losses
            print(f"{name:<9} width {width:<5} best 2^{optimum(exponents, losses):6.2f}   " + " ".join(f"{value:7.4f}" for value in losses), flush=True)
    return found


def optimum(exponents: list[float], losses: list[float]) -> float:
    """The exponent where the parabola through the least loss and its neighbours is lowest."""
    losses = [value if math.isfinite(value) else 99.0 for value in losses]
    i = int(np.argmin(losses))
    if i in (0, len(losses) - 1):
        return exponents[i]
    a, b, c = losses[i - 1:i + 2]
    return exponents[i] + (exponents[i + 1] - exponents[i]) * 0.5 * (a - c) / (a - 2 * b + c)


def draw(found: dict[str, dict[int, list[float]]], exponents: list[float], path: str) -> None:
    """Loss over the learning rate, a line for each width, both parametrisations side by side."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, name in zip(figure.subplots(1, 2, sharey=True), NAMES):
        for number, (width, losses) in enumerate(found[name].items()):
            colour = f"C{number}"
            axes.plot([2.0 ** e for e in exponents], losses, color=colour, marker=".", label=f"width {width}")
            axes.axvline(2.0 ** optimum(exponents, losses), color=colour, linestyle=":")
        low = min(min(losses) for by in found.values() for losses in by.values())
        axes.set(title=name, xlabel="learning rate (dotted: the best)", xscale="log", ylim=(low - 0.05, low + 1.0))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss on held-out text")
    figure.axes[1].legend(fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["coordinates", "rates"])
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument("--steps", type=int, default=0, help="default: 4 for coordinates, 60 for rates")
    parser.add_argument("--exponents", default="-11,-10,-9,-8,-7,-6,-5,-4", help="learning rates of `rates`, as powers of 2")
    parser.add_argument("--rate", type=float, default=2.0 ** -7, help="learning rate of `coordinates`")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--svg", default="")
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    widths, exponents = [int(w) for w in given.widths.split(",")], [float(e) for e in given.exponents.split(",")]
    texts = [text for _, text in python_docs.texts()]
    random.Random(0).shuffle(texts)
    text = np.frombuffer("\n".join(texts).encode(), np.uint8)
    if given.what == "coordinates":
        found = coordinates(text, widths, given.steps or 4, given.rate, 0)
        growing = [key for key, row in found["muP"].items() if slope(widths, row) > GROWTH]
        print(f"\nmuP: {', '.join(growing) or 'nothing'} grows with the width")
        return int(bool(growing))
    found = rates(text, widths, given.steps or 60, exponents, given.seeds)
    for name, by in found.items():
        best = [optimum(exponents, losses) for losses in by.values()]
        print(f"{name}: the best learning rate drifts by a factor of {2 ** (max(best) - min(best)):.2f} over widths {widths[0]} to {widths[-1]}")
    if given.json:
        pathlib.Path(given.json).write_text(json.dumps({"exponents": exponents, "losses": found}) + "\n")
    if given.svg:
        draw(found, exponents, given.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
