"""jaxlm fit: before you rent, what a training step needs on TPUs and GPUs that you do not have.

  jaxlm fit --config=llama_1b --topology=v5e:4x4                            does it fit? compiles the real step with the real TPU compiler
  jaxlm fit --config=llama_7b --topology=v5e:4x8,v5p:2x2x4,v6e:4x4 --plot=fit.png --json=fit.json
  jaxlm fit --config=llama_1b --topology=v5e:4x4 --search                   tries meshes, remat policies, microbatches, batch sizes
  jaxlm fit --config=llama_1b --topology=v5e:4x4 --num_slices=2             two slices; only the axis mesh.slice crosses between them
  jaxlm fit --config=llama_1b --topology=gpu:h100x8                         GPUs: by formula only, nothing is compiled
  jaxlm fit --config=my_recipe.py --topology=v5e:2x4 --config.mesh.tensor=2 --config.model.remat=dots
  jaxlm fit --tokens=3e9                                                    how large a model for so much text? also --flops=1e20, --parameters=1e9
  jaxlm fit --dollars=500 --topology=v5e:4x4 --mfu=0.4                      or for so much money there

The last two need no config: a scaling law (jaxlm/aot/scaling.py has it, with its sources) says sizes, tokens and the loss to expect, for the optimum and for smaller
models that are trained longer, which is what one wants of a model that will be used much.

Of a config it compiles the step. For TPUs this needs libtpu (pip install 'jaxlm[tpu]', any x86 Linux machine, no TPU). It prints, for each topology:

  memory       parameters, optimiser, batch, activations and temporaries, and the program of one device when it needs most, against what a program may
               take there. FITS is the compiler's own word: near the limit it recomputes more, and what it cannot bring below it refuses.
  largest      the most rows of a batch that one device holds: extrapolated from two compilations, or, with --confirm, compiled itself.
  collectives  what goes between devices in one step: kind, mesh axis, how often, how large. Gathers of weights over fsdp are the price of splitting
               them; nothing should be larger than one layer's weights or one device's activations.
  step         how long the core works, from the compiler's own cycles of each operation, and waits for communication that nothing hides. Beside it
               the bounds: what arithmetic, memory, links (ici) and network (dcn) take at their peaks; no step is shorter than the longest. Checked
               against published steps in docs/performance.md. By formula (GPUs, --search's first ranking) the time is coarser.
  operations   with --operations=N, the N kinds of operations that take longest.

All figures are predicted. Prices and watts come from a table (jaxlm/aot/chips.py, with sources); list prices change and the power of new TPUs is not
published, so put in your own: --prices=FILE with {"v5e": {"dollars_per_hour": 0.6, "watts": 180}}.

A compilation takes 1 to 3 minutes of one core for a model of 1 to 70 B parameters; --quick takes a third of it, with memory up to a tenth higher and
some weights gathered in float32 that full effort gathers in bfloat16; its step time is coarse, since such a program's schedule is far from a real one.
Exits 1 when something does not fit.
--search ranks every setting by formula and compiles the best --top of them. Batch sizes other than the config's change the training, the rest does not.
Topologies: v5e and v6e 2x2 2x4 4x4 4x8 8x8 8x16 16x16; v4 and v5p 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16; gpu:a100xN, h100xN, h200xN.
"""

import pathlib
import sys

from absl import flags


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "Recipe: a packaged name or a file, with an optional :argument.", flag_values=values)
    flags.DEFINE_list("topology", None, "One or more, separated by commas: v5e:4x4, v5p:2x2x2, gpu:h100x8.", flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "TPU slices, joined by the data-centre network.", flag_values=values)
    flags.DEFINE_bool("search", False, "Rank meshes, remat policies, microbatches and batch sizes.", flag_values=values)
    flags.DEFINE_integer("top", 3, "With --search: how many of the best are compiled.", flag_values=values)
    flags.DEFINE_bool("largest", True, "Find the largest batch that fits: one more compilation.", flag_values=values)
    flags.DEFINE_bool("confirm", False, "Compile the largest batch until the compiler agrees.", flag_values=values)
    flags.DEFINE_bool("quick", False, "Compile with less optimisation.", flag_values=values)
    flags.DEFINE_integer("operations", 0, "Show so many kinds of operations, the longest first.", flag_values=values, lower_bound=0)
    for name, meaning in (("tokens", "tokens of training"), ("flops", "operations of training, 6 for each parameter and token"), ("dollars", "so much money, with "
                          "--topology"), ("parameters", "a model of this size; with --tokens both are given")):
        flags.DEFINE_float(name, None, f"The right size by a scaling law, of: {meaning}.", flag_values=values, lower_bound=1.0)
    flags.DEFINE_float("mfu", 0.4, "With these and --topology: the share of the chips' peak that training uses.", flag_values=values, lower_bound=0.01, upper_bound=1.0)
    flags.DEFINE_string("json", "", "Write everything here, sizes in bytes.", flag_values=values)
    flags.DEFINE_string("plot", "", "Write a bar chart here (.png; needs pip install 'jaxlm[plot]').", flag_values=values)
    flags.DEFINE_string("prices", "", "JSON file of figures that replace those of the table of chips.", flag_values=values)
    flags.DEFINE_string("hlo", "", "Write the compiled program's text here (the last one compiled).", flag_values=values)


def main(values: flags.FlagValues, overrides: list[tuple[str, str]]) -> int:
    import os

    from jaxlm import config
    from jaxlm.aot import chips

    table = chips.read_prices(values.prices) if values.prices else chips.CHIPS
    if asked := {name: values[name].value for name in ("tokens", "flops", "dollars", "parameters") if values[name].value is not None}:
        return _size(values, asked, table)
    for name in ("config", "topology"):
        if not values[name].value:
            raise ValueError(f"--{name} is needed, such as --config=llama_1b --topology=v5e:4x4; or ask for a size, such as --tokens=3e9")
    topologies = [chips.topology(text, values.num_slices if not text.startswith("gpu:") else 1, table) for text in values.topology]
    if values.top < 1:
        raise ValueError(f"--top={values.top} must be at least 1")
    cfg = config.load(values.config, overrides)

    os.environ["JAX_PLATFORMS"] = "cpu"  # the device of this machine, if any, has no part in this
    from jaxlm.aot import compiler, plan, show

    if any(t.chip.platform == "tpu" for t in topologies):
        compiler.require_libtpu()
    if values.plot:
        show.require_matplotlib()
    say = lambda line: print(line, file=sys.stderr, flush=True)
    text = (lambda program: pathlib.Path(values.hlo).write_text(program, encoding="utf-8")) if values.hlo else lambda program: None
    verdicts, fits = [], True
    for topology in topologies:
        if values.search:
            found = plan.search(cfg, topology, values.top, values.quick, say)
            print(f"\n{topology}: {len(found)} settings\n{show.table(found)}\n")
            fits &= any(v.fits for v in found)
            verdicts += found
            continue
        say(f"{topology}: {'reckoning' if topology.chip.platform == 'gpu' else 'compiling'} ...")
        verdict = plan.judge(cfg, topology, values.quick, text)
        if values.largest:
            verdict = plan.largest_batch(verdict, values.quick, values.confirm, say)
        fits &= verdict.fits
        verdicts.append(verdict)
        print(show.report(verdict, values.operations) + "\n", flush=True)
    if len(topologies) > 1 and not values.search:
        print(show.table(sorted(verdicts, key=plan.rank)))
    if values.json:
        pathlib.Path(values.json).write_text(plan.dump(verdicts), encoding="utf-8")
    if values.plot:
        show.chart(verdicts[:8], pathlib.Path(values.plot))
    return 0 if fits else 1


def _size(values: flags.FlagValues, asked: dict[str, float], table: dict) -> int:
    """The table of sizes that a scaling law gives."""
    import dataclasses
    import json

    from jaxlm.aot import chips, scaling

    if values.config or len(asked) > 1 and asked.keys() != {"tokens", "parameters"}:
        raise ValueError("give one of --tokens, --flops, --dollars and --parameters, or --tokens with --parameters, and no --config")
    if len(values.topology or ()) > 1 or "dollars" in asked and not values.topology:
        raise ValueError("--dollars needs one --topology, such as v5e:4x4" if not values.topology else "a size is reckoned for one --topology, not several")
    topology = chips.topology(values.topology[0], values.num_slices, table) if values.topology else None
    if "dollars" in asked and not topology.chip.dollars_per_hour:
        raise ValueError(f"{topology} costs nothing by --prices: give --flops instead of --dollars")
    if len(asked) == 2:
        sizes = [scaling.of_both(**asked)]
    elif "parameters" in asked:
        sizes = [scaling.of_parameters(asked["parameters"], factor) for factor in scaling.FACTORS]
    elif "tokens" in asked:
        sizes = [scaling.of_tokens(asked["tokens"], factor) for factor in scaling.FACTORS]
    else:
        flops = asked["flops"] if "flops" in asked else scaling.flops_of(asked["dollars"], topology, values.mfu)
        sizes = [scaling.of_compute(flops, factor) for factor in scaling.FACTORS]
    print(scaling.report(sizes, topology, values.mfu))
    if values.json:
        rows = [dataclasses.asdict(size) | {"flops": size.flops, "loss": size.loss, "predicted": True} for size in sizes]
        pathlib.Path(values.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0
