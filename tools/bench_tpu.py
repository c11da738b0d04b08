"""Our train step compiled for TPUs that are not here: against the plain recipe, over more chips, and the estimator against published steps.

    python tools/bench_tpu.py                                      Llama-2-7B and a 1.1 B Llama on four topologies: plain, ours, ratio
    python tools/bench_tpu.py --config=llama_7b --topology=v5e:4x4
    python tools/bench_tpu.py --scaling --plot=docs/scaling.svg    weak scaling: 16, 64, 256 chips, two slices
    python tools/bench_tpu.py --published                          the estimator against step times that others measured

One config on one topology, with its memory, collectives and the static cycles of its operations: `jaxlm fit --operations=30`; all of it is one estimator
(jaxlm/aot/schedule.py). Plain is FSDP over all chips, every layer recomputed, one microbatch; ours is what `jaxlm fit --search` chooses, compiled, for the
same tokens on each chip or half or twice as many. All figures are predicted. Needs libtpu (pip install 'jaxlm[tpu]') and no TPU; a compilation takes a
minute or more of one core, and each result is printed as it comes.
"""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags  # noqa: E402

from jaxlm import chips, config  # noqa: E402
from jaxlm.aot import compiler, plan, show  # noqa: E402

# Recipe -> tokens of a row, rows on each device.
MODELS = {"llama_7b": (2048, 1), "llama_1b": (2048, 4)}
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:4x4")
SIZES = (("v5e:4x4", 1), ("v5e:8x8", 1), ("v5e:16x16", 1), ("v5e:8x8", 2))

# Steps that others measured: what, topology, changes to a recipe of ours that make it the same work, seconds, where it stands. Ours differs in
# rematerialisation: theirs keeps projections in the host's memory.
PUBLISHED = (
    ("Llama-3.1-8B, 3 x 8192 tokens a chip", "v6e:4x4", "llama3_8b", dict(rows=3, length=8192), 3.393,
     "AI-Hypercomputer/tpu-recipes, training/trillium/Llama3.1-8B-MaxText/v6e-16"),
)


def recipe(name: str, topology: chips.Topology, length: int, rows: int, **model: Any) -> config.Config:
    """A packaged recipe with so many rows of so many tokens on each chip, in one microbatch, fully sharded."""
    cfg = config.load(name)
    data = dataclasses.replace(cfg.data, sequence_length=length, batch_size=rows * topology.chips)
    return dataclasses.replace(cfg, data=data, model=dataclasses.replace(cfg.model, **model), train=dataclasses.replace(cfg.train, microbatches=1),
                               mesh=config.MeshConfig())


def against_plain(name: str, topology: chips.Topology, top: int, quick: bool) -> dict[str, Any]:
    """Plain, ours, and the ratio of their times for a token."""
    plain = plan.judge(recipe(name, topology, *MODELS[name], remat="full"), topology, quick)
    found = plan.search(recipe(name, topology, *MODELS[name]), topology, top, quick)
    ours = next((v for v in found if v.method == "compiled" and v.fits), plain)
    rate = lambda v: v.time.tokens_per_second
    row = {"config": name, "topology": str(topology), "plain": plain.to_json(), "ours": ours.to_json(), "settings": plan.describe(ours),
           "ratio": rate(plain) / rate(ours) if plain.time else None}
    figures = lambda v: f"{v.total / 2**30:6.2f} GiB {v.time.step_seconds:8.4f} s ({v.time.core:.4f} + {v.time.waits:.4f}) MFU {v.time.mfu:.0%}" if v.time else "no program"
    print(f"{name} {topology}: plain {figures(plain)}; ours {figures(ours)} with {row['settings']}; ratio {row['ratio'] or float('nan'):.3f}", flush=True)
    return row


def scaling(name: str, quick: bool) -> list[plan.Verdict]:
    """The same work on each chip, on more and more of them."""
    found = []
    for shape, slices in SIZES:
        topology = chips.topology(shape, slices)
        v = plan.judge(recipe(name, topology, *MODELS[name], remat="dots"), topology, quick)
        found.append(v)
        sent = sum(c.bytes * c.times for c in v.collectives)
        print(f"{name} {topology} {topology.chips} chips: {sent / 2**30:.1f} GiB of collectives on each chip, step {v.time.step_seconds:.4f} s, of which it waits "
              f"{v.time.waits:.4f}; links busy {v.time.ici:.4f}, network {v.time.dcn:.4f} s" if v.time else f"{name} {topology}: {v.error}", flush=True)
    return found


def published(quick: bool) -> list[dict[str, Any]]:
    """Our step for the same work beside the measured one."""
    rows = []
    for what, name, base, work, seconds, source in PUBLISHED:
        topology = chips.topology(name)
        v = plan.judge(recipe(base, topology, work["length"], work["rows"], remat="full", context=work["length"]), topology, quick)
        rows.append({"what": what, "measured_seconds": seconds, "predicted_seconds": v.time.step_seconds, "source": source})
        print(f"{what} on {topology}: measured {seconds:.3f} s, predicted {v.time.step_seconds:.3f} s ({v.time.step_seconds / seconds - 1:+.0%}); {source}", flush=True)
    return rows


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_list("config", list(MODELS), f"Which of {', '.join(MODELS)}.", flag_values=values)
    flags.DEFINE_list("topology", list(TOPOLOGIES), "Topologies, as of jaxlm fit.", flag_values=values)
    flags.DEFINE_integer("top", 3, "Of the search, how many are compiled.", flag_values=values, lower_bound=1)
    flags.DEFINE_bool("quick", False, "Compile with less optimisation.", flag_values=values)
    flags.DEFINE_bool("scaling", False, "Weak scaling.", flag_values=values)
    flags.DEFINE_bool("published", False, "The estimator against measured steps.", flag_values=values)
    flags.DEFINE_string("plot", "", "With --scaling: draw it here (.svg or .png).", flag_values=values)
    flags.DEFINE_string("json", "", "Write the figures here too.", flag_values=values)
    if "--help" in argv:
        sys.exit(f"{__doc__}\n{values.get_help()}")
    values(["bench_tpu", *argv])
    unknown = [name for name in values.config if name not in MODELS]
    try:
        if unknown:
            raise ValueError(f"--config={unknown[0]} is not known; known: {', '.join(MODELS)}")
        topologies = [chips.topology(text) for text in values.topology]
        compiler.require_libtpu()
        if values.published:
            rows = published(values.quick)
        elif values.scaling:
            verdicts = scaling(values.config[0], values.quick)
            rows = [v.to_json() for v in verdicts]
            if values.plot:
                show.scaling_chart(values.config[0], verdicts, pathlib.Path(values.plot))
        else:
            rows = [against_plain(name, topology, values.top, values.quick) for name in values.config for topology in topologies]
    except ValueError as error:
        sys.exit(f"bench_tpu: {error}")
    if values.json:
        pathlib.Path(values.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
