"""Does a learning rate found for a narrow model hold for a wide one? Standard parametrisation beside muP (model.mup_width), on the text inside Python.

  python tools/mup_widths.py coordinates            sizes of activations over widths and steps, as a table; exit code 1 if muP's grow with the width
  python tools/mup_widths.py rates --svg=docs/mup.svg --json=mup.json      the best learning rate of each width (docs/search.md has the figures)

Every model has 2 layers, heads of 16, and bytes as tokens; the base width is the first of --widths. The coordinate check (Yang et al. 2022, appendix D.1)
takes a few steps of Adam at one learning rate: where a parametrisation is right, no activation grows with the width, at the first step or at any later one.
"""

import argparse
import functools
import json
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

LENGTH, ROWS, GROWTH = 32, 4, 0.25  # tokens of a row, rows of a batch; slope over the width, both in logarithms, from which activations count as growing
NAMES = ("standard", "muP")


def model(width: int, base: int) -> TransformerConfig:
    """A decoder of a width; `base` 0 is the standard parametrisation."""
    return TransformerConfig(vocab_size=256, context=LENGTH, layers=2, width=width, heads=width // 16, feedforward=2 * width, gated=False,
                             activation="gelu_tanh", init_std=0.06, mup_width=base)


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


def rates(text: np.ndarray, widths: list[int], steps: int, first: float, seeds: int) -> dict[str, dict[int, dict[float, float]]]:
    """parametrisation -> width -> power of 2 that is the learning rate -> loss on held-out text, mean over seeds. Of each width as many rates, a factor of 2 apart,
    as it takes to have worse ones on both sides of the best, from the best of the width before (of the first width: from 2^`first`)."""
    held_out, train = text[:len(text) // 20], text[len(text) // 20:]
    found: dict[str, dict[int, dict[float, float]]] = {name: {} for name in NAMES}

    def trained(cfg: TransformerConfig, exponent: float) -> float:
        (start, step, loss), ends = parts(cfg), []
        for seed in range(seeds):
            (params, opt), stream, test = start(seed), batches(train, seed), batches(held_out, 99)
            for number in range(steps):  # a tenth of warm-up, then linearly to 0
                share = min((number + 1) / (0.1 * steps), (steps - number) / (0.9 * steps), 1.0)
                params, opt = step(params, opt, next(stream), jnp.float32(2.0 ** exponent * share))
            ends.append(np.mean([float(loss(params, next(test))) for _ in range(32)]))
        return float(np.mean(ends)) if np.isfinite(ends).all() else 99.0

    for width in widths:
        for name in NAMES:
            if name == "muP" and width == widths[0]:  # which is the standard one
                found[name][width] = found["standard"][width]
                continue
            best = round(optimum(found[name][widths[widths.index(width) - 1]])) if found[name] else first
            losses: dict[float, float] = {}
            while missing := [e for e in (best, best - 1, best + 1) if e not in losses]:
                losses |= {e: trained(model(width, widths[0] * (name == "muP")), e) for e in missing}
                best = min(losses, key=losses.get)
            found[name][width] = dict(sorted(losses.items()))
            print(f"{name:<9} width {width:<5} best 2^{optimum(losses):6.2f}   " + "  ".join(f"2^{e:g} {value:.4f}" for e, value in found[name][width].items()), flush=True)
    return found


def optimum(losses: dict[float, float]) -> float:
    """The exponent where the parabola through the least loss and its neighbours is lowest."""
    best = min(losses, key=losses.get)
    a, b, c = losses[best - 1], losses[best], losses[best + 1]
    return best + 0.5 * (a - c) / (a - 2 * b + c)


def draw(found: dict[str, dict[int, dict[float, float]]], path: str) -> None:
    """Loss over the learning rate, a line for each width, both parametrisations side by side."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a quarter of the size

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, name in zip(figure.subplots(1, 2, sharex=True, sharey=True), NAMES):
        for number, (width, losses) in enumerate(found[name].items()):
            axes.plot([2.0 ** e for e in losses], list(losses.values()), color=f"C{number}", marker=".", label=f"width {width}")
            axes.axvline(2.0 ** optimum(losses), color=f"C{number}", linestyle=":")
        axes.set(title=name, xlabel="learning rate (dotted: the best)")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss on held-out text")
    figure.axes[1].legend(fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["coordinates", "rates"])
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument("--steps", type=int, default=0, help="default: 4 for coordinates, 100 for rates")
    parser.add_argument("--first", type=int, default=-7, help="the power of 2 that `rates` begins with")
    parser.add_argument("--rate", type=float, default=2.0 ** -7, help="learning rate of `coordinates`")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--svg", default="")
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    widths = [int(w) for w in given.widths.split(",")]
    texts = [text for _, text in python_docs.texts()]
    random.Random(0).shuffle(texts)
    text = np.frombuffer("\n".join(texts).encode(), np.uint8)
    if given.what == "coordinates":
        found = coordinates(text, widths, given.steps or 4, given.rate, 0)
        growing = [key for key, row in found["muP"].items() if slope(widths, row) > GROWTH]
        print(f"\nmuP: {', '.join(growing) or 'nothing'} grows with the width")
        return int(bool(growing))
    found = rates(text, widths, given.steps or 100, given.first, given.seeds)
    for name, by in found.items():
        best = [optimum(losses) for losses in by.values()]
        print(f"{name}: the best learning rate drifts by a factor of {2 ** (max(best) - min(best)):.2f} over widths {widths[0]} to {widths[-1]}")
    if given.json:
        pathlib.Path(given.json).write_text(json.dumps(found) + "\n")
    if given.svg:
        draw(found, given.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
