"""How large a model, how many tokens, what loss to expect: a scaling law, before anything is compiled or rented.

The parametric loss of Hoffmann et al. 2022 (arXiv:2203.15556, "approach 3"), L = E + A / N^alpha + B / D^beta for N parameters and D tokens, with the constants that
Besiroglu et al. 2024 (arXiv:2404.10102) fitted to the same runs after finding the published ones inconsistent with them; training costs C = 6 N D FLOP. For a
given C the loss is least at N = G (C / 6)^(beta / (alpha + beta)), D = C / (6 N), with G = (alpha A / (beta B))^(1 / (alpha + beta)).

The loss is in nats per token of DeepMind's corpus and tokenizer: compare sizes by it, do not expect its value of another corpus. The runs had 70 M to 16 B
parameters; what lies outside is extrapolated.
"""

import dataclasses
import math

from jaxlm.aot.chips import Topology

E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
FITTED = (70e6, 16e9)  # parameters of the runs behind the law
FACTORS = (1.0, 2.0, 5.0, 10.0)  # of over-training, shown together

_G = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
_BEND = (ALPHA - BETA) / (ALPHA + BETA)  # D / N of the optimum goes with (N D)^this


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its training; everything is predicted."""

    parameters: float
    tokens: float
    over_training: float  # tokens for each parameter, over those at the optimum of the same compute

    @property
    def flops(self) -> float:
        """6 N D, FLOP."""
        return 6 * self.parameters * self.tokens

    @property
    def loss(self) -> float:
        """Nats per token of the corpus behind the law."""
        return loss(self.parameters, self.tokens)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, width and heads of a decoder of about this size with the defaults of `config.TransformerConfig` (16 width^2 a layer, without the embedding); one
        layer for 64 of width, as Kaplan et al. 2020 (arXiv:2001.08361) find that the shape matters little."""
        wide = (4 * self.parameters) ** (1 / 3)
        head = 128 if wide >= 1024 else 64
        width = max(head, head * round(wide / head))
        return max(1, round(self.parameters / (16 * width**2))), width, width // head


def loss(parameters: float, tokens: float) -> float:
    """Expected loss in nats per token."""
    return E + A / parameters**ALPHA + B / tokens**BETA


def of_compute(flops: float, over_training: float = 1.0) -> Size:
    """The model that `flops` train with the least loss; or, over-trained, a smaller one with more tokens for the same compute."""
    best = _G * (flops / 6) ** (BETA / (ALPHA + BETA))
    parameters = best / math.sqrt(over_training)
    return Size(parameters, flops / (6 * parameters), over_training)


def of_tokens(tokens: float, over_training: float = 1.0) -> Size:
    """The model for which so many tokens are just right; or, over-trained, a smaller one."""
    return Size((tokens ** (1 - _BEND) * _G**2 / over_training) ** (1 / (1 + _BEND)), tokens, over_training)


def of_parameters(parameters: float, over_training: float = 1.0) -> Size:
    """The tokens that are just right for a model of this size, or more."""
    return Size(parameters, (over_training * parameters ** (1 + _BEND) / _G**2) ** (1 / (1 - _BEND)), over_training)


def of_both(parameters: float, tokens: float) -> Size:
    """A given model and number of tokens, with how far over-trained that is."""
    best = of_compute(6 * parameters * tokens)
    return Size(parameters, tokens, (tokens / parameters) / (best.tokens / best.parameters))


def flops_of(dollars: float, topology: Topology, mfu: float) -> float:
    """What the money buys there, FLOP: the price of the chips against their peak in bfloat16 and the share of it that is used."""
    return dollars / topology.chip.dollars_per_hour * 3600 * topology.chip.flops * mfu


def hours(size: Size, topology: Topology, mfu: float) -> float:
    """Time of training there."""
    return size.flops / (topology.chips * topology.chip.flops * mfu) / 3600


def report(sizes: list[Size], topology: Topology | None, mfu: float) -> str:
    """A table of sizes, one line each, under the law and its sources."""
    head = f"{'over-trained':>12}  {'parameters':>10}  {'tokens':>8}  {'each':>6}  {'loss':>6}  {'FLOP':>8}"
    lines = [f"predicted by L = {E} + {A} / N^{ALPHA} + {B} / D^{BETA} (Hoffmann et al. 2022, constants of Besiroglu et al. 2024), C = 6 N D",
             head + (f"  {'hours':>8}  {'dollars':>9}  on {topology} at MFU {mfu:.0%} (assumed)" if topology else "")]
    for size in sizes:
        row = (f"{size.over_training:>10.3g} x  {_short(size.parameters):>10}  {_short(size.tokens):>8}  {size.tokens / size.parameters:>6.0f}  {size.loss:>6.3f}  "
               f"{size.flops:>8.2g}")
        if topology:
            time = hours(size, topology, mfu)
            row += f"  {time:>8,.2f}  {time * topology.chips * topology.chip.dollars_per_hour:>9,.2f}"
        lines.append(row if FITTED[0] <= size.parameters <= FITTED[1] else row + "  extrapolated")
    layers, width, heads = sizes[0].shape
    return "\n".join([*lines, f"a decoder of about {_short(sizes[0].parameters)}, its embedding besides: "
                      f"--config.model.layers={layers} --config.model.width={width} --config.model.heads={heads}"])


def _short(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g}"
