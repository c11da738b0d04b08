"""Verdicts for people: tables and a bar chart. Home of matplotlib."""

import pathlib
from collections.abc import Sequence

from jaxlm.aot.plan import Verdict, describe

_GIB = 2**30


def gib(size: float) -> str:
    """Bytes in GiB, two decimals."""
    return f"{size / _GIB:.2f}"


def report(verdict: Verdict, operations: int = 0) -> str:
    """Everything about one topology, with so many of the longest operations."""
    v, chip = verdict, verdict.topology.chip
    how = f"compiled by libtpu in {v.compile_seconds:.0f} s" if v.method == "compiled" else "by formula only, nothing was compiled"
    batch = (f"batch {v.config.data.batch_size} x {v.config.data.sequence_length} tokens ({v.rows} rows on each device, {v.config.train.microbatches} "
             f"microbatch{'es' * (v.config.train.microbatches > 1)}), remat {v.config.model.remat}")
    lines = [f"{v.topology}  {v.topology.chips} chips ({how}; all figures are predicted)", f"  mesh       {describe(v).split(' model.')[0]}; {batch}"]
    lines.append(f"  memory     {gib(v.total)} of {gib(chip.usable)} GiB on each device: " + ("FITS" if v.fits else "DOES NOT FIT")
                 + f", {gib(abs(v.margin))} GiB {'left' if v.margin >= 0 else 'missing'}")
    lines += [f"    {name:<28}{gib(size):>8} GiB" for name, size in v.memory.items() if size]
    if v.error:
        lines.append(f"    the compiler says: {v.error}")
    if v.largest_rows is not None:
        lines.append(f"  largest    {v.largest_rows} rows on each device ({v.largest_how})")
    if v.collectives:
        lines += ["  collectives of one step, on one device (bytes as gathered, reduced or sent; * inside a loop)", *_collectives(v)]
    if v.time is None:
        return "\n".join(lines)
    t = v.time
    lines += [f"  work       {v.flops / 1e12:.2f} TFLOP on each device ({v.useful / v.topology.chips / 1e12:.2f} of them the model's own), {v.traffic / 1e9:.1f} GB "
              "through its memory",
              f"  step       {t.step_seconds:.4f} s: the core works {t.core:.4f} and waits {t.waits:.4f} for communication" + (
                  f", stages wait {t.bubble:.0%}" if t.bubble else ""),
              f"  bounds     at their peaks compute takes {t.compute:.4f}, hbm {t.hbm:.4f}, ici {t.ici:.4f}, dcn {t.dcn:.4f} s: no less than "
              f"{t.least_seconds:.4f} s, {t.bound} binds",
              f"  speed      {t.tokens_per_second:,.0f} tokens/s, MFU {t.mfu:.0%}",
              f"  cost       {t.dollars_per_billion:.2f} dollars and {t.kwh_per_billion:.2f} kWh for a billion tokens "
              f"({chip.dollars_per_hour:g} dollars and {chip.watts:g} W a chip{', watts assumed' if 'watts' in chip.assumed else ''}; change them with --prices)"]
    if operations and verdict.operations:
        lines.append("  operations of one step, longest first (communication as it takes, hidden or not)")
        lines += [f"    {o.seconds:>9.5f} s {o.times:>6} x {o.kind:<8} {o.name[:36]:<36} {o.source[:70]}".rstrip() for o in verdict.operations[:operations]]
    return "\n".join(lines)


def _collectives(verdict: Verdict, most: int = 14) -> list[str]:
    merged: dict[tuple, list] = {}
    for c in verdict.collectives:
        merged.setdefault((c.kind, c.axes, " ".join(map(str, c.arrays))[:38], bool(c.loop)), []).append(c)
    rows = sorted(merged.items(), key=lambda item: -sum(c.bytes * c.times for c in item[1]))
    lines = [f"    {kind:<19} over {axes:<14} {sum(c.times for c in cs):>6} x {cs[0].bytes / 2**20:>9.2f} MiB{'*' if loop else ' '} {arrays:<38} "
             f"{', '.join(sorted({c.source for c in cs}))[:52]}".rstrip() for (kind, axes, arrays, loop), cs in rows[:most]]
    if len(rows) > most:
        rest = sum(c.bytes * c.times for _, cs in rows[most:] for c in cs)
        lines.append(f"    and {len(rows) - most} smaller kinds, {rest / 2**20:.1f} MiB together (all of them with --json)")
    if any(c.kind == "ring permute" for c in verdict.collectives):
        lines.append("    ring permute: XLA splits a gather or scatter of a weight into steps around the ring, each hidden behind a part of its matrix product")
    return lines


def table(verdicts: Sequence[Verdict], most: int = 12) -> str:
    """One line each, in the given order: a comparison of topologies, or the ranking of a search."""
    lines = [f"{'rank':>4} {'topology':<14} {'how':<9} {'GiB':>7} {'fits':<5} {'step s':>8} {'bound':<8} {'MFU':>4} {'tokens/s':>11} {'$/1e9':>8} {'kWh/1e9':>8}  settings",
             ]
    for rank, v in enumerate(verdicts[:most], 1):
        t = v.time
        figures = f"{t.step_seconds:>8.4f} {t.bound:<8} {t.mfu:>4.0%} {t.tokens_per_second:>11,.0f} {t.dollars_per_billion:>8.2f} {t.kwh_per_billion:>8.2f}" \
            if t else f"{'':>8} {'':<8} {'':>4} {'':>11} {'':>8} {'':>8}"
        lines.append(f"{rank:>4} {v.topology!s:<14} {v.method:<9} {gib(v.total):>7} {'yes' if v.fits else 'no':<5} {figures}  {describe(v)}")
    if len(verdicts) > most:
        lines.append(f"     and {len(verdicts) - most} more with --json")
    return "\n".join([*lines, "     all predicted: the step from the compiled schedule, or by formula from peaks and shares; the rest follows from it"])


def chart(verdicts: Sequence[Verdict], path: pathlib.Path) -> None:
    """A PNG: memory by part against the limit, and the roofline's times, a pair of bars for each verdict.

    Raises:
      ValueError: matplotlib is absent.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"{v.topology}\n{'compiled' if v.method == 'compiled' else 'by formula'}\n{describe(v).replace(' model', chr(10) + 'model').replace(' train', chr(10) + 'train').replace(' data.batch', chr(10) + 'data.batch')}"
             for v in verdicts]
    figure = Figure(figsize=(max(8, 2.6 * len(verdicts) + 3), 9), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1)
    places, base = range(len(verdicts)), [0.0] * len(verdicts)
    for part in verdicts[0].memory:
        heights = [v.memory[part] / _GIB for v in verdicts]
        if any(heights):
            upper.bar(places, heights, 0.6, bottom=base, label=part)
            base = [a + b for a, b in zip(base, heights)]
    for place, v in zip(places, verdicts):
        limit = v.topology.chip.usable / _GIB
        upper.plot([place - 0.4, place + 0.4], [limit, limit], color="black")
        upper.annotate("fits" if v.fits else "does not fit", (place, max(limit, base[place])), ha="center", va="bottom")
    upper.plot([], [], color="black", label="limit")
    upper.set(title="Memory of one device (predicted)", ylabel="GiB", xticks=list(places), xticklabels=names)
    timed = [(place, v.time) for place, v in zip(places, verdicts) if v.time]
    for i, resource in enumerate(("core", "waits", "compute", "hbm", "ici", "dcn")):
        lower.bar([place + (i - 2.5) * 0.13 for place, _ in timed], [getattr(t, resource) for _, t in timed], 0.13, label=resource)
    for place, t in timed:
        lower.annotate(f"{t.tokens_per_second:,.0f} tokens/s\nMFU {t.mfu:.0%}", (place, t.step_seconds), ha="center", va="bottom")
    lower.set(title="One step (predicted: core and waits make the step, the others are at their peaks)", ylabel="seconds", xticks=list(places),
              xticklabels=[str(v.topology) for v in verdicts])
    for axes in (upper, lower):
        axes.margins(y=0.15)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")


def scaling_chart(name: str, verdicts: Sequence[Verdict], path: pathlib.Path) -> None:
    """Time and collectives of a step with the same work on each chip, a bar for each topology (.svg or .png).

    Raises:
      ValueError: matplotlib is absent.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [v for v in verdicts if v.time]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    places, names = range(len(timed)), [f"{v.topology.chips} chips\n{v.topology}" for v in timed]
    left.bar(places, [v.time.core for v in timed], 0.6, label="the core works")
    left.bar(places, [v.time.waits for v in timed], 0.6, bottom=[v.time.core for v in timed], label="it waits for communication")
    left.set(title=f"{name}: one step (predicted)", ylabel="seconds", xticks=list(places))
    right.bar(places, [sum(c.bytes * c.times for c in v.collectives) / _GIB for v in timed], 0.6, color="tab:gray")
    right.set(title="Collectives of a chip and step", ylabel="GiB", xticks=list(places))
    for axes in (left, right):
        axes.set_xticklabels(names, fontsize="small")
    left.set_ylim(0, 1.35 * max(v.time.core + v.time.waits for v in timed))
    left.legend(fontsize="small")
    figure.savefig(path)


def require_matplotlib() -> None:
    """Raises a ValueError that names the extra to install where matplotlib is absent."""
    import importlib.util
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'jaxlm[plot]'")
