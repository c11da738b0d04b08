"""What every HTML page of ours shares: one style (light and dark, desktop and phone), escaping, tables, bars, line charts.

A page is one file with nothing from outside: no network, no script, plots in SVG and CSS. Whatever comes from data goes through `text`.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_STYLE = """
:root { --ink: #1d2433; --soft: #5b6577; --line: #dde2ea; --bar: #3b6fb6; --bar2: #c9d8ee; --bad: #b4532a; --good: #3a7d44; --back: #ffffff; --card: #f6f8fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8f0; --soft: #9aa5b8; --line: #333c4d; --bar: #6c9bdc; --bar2: #2d4162; --bad: #e08a5f; --good: #7fc08a;
    --back: #141922; --card: #1c232f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.2rem 5rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, .note { color: var(--soft); margin: .2rem 0 .8rem; max-width: 60rem; }
nav a { margin-right: 1rem; color: var(--bar); text-decoration: none; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; min-width: 9rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; margin: .4rem 0 1rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } th { color: var(--soft); font-weight: 600; font-size: .85rem; }
td small { display: block; color: var(--soft); }
td.bar { width: 30%; min-width: 8rem; } td.bar div { background: var(--bar); height: .8rem; border-radius: 2px; min-width: 1px; }
td.bar.bad div { background: var(--bad); }
.scroll { overflow-x: auto; } .scroll svg { min-width: 34rem; }
details { margin: .3rem 0; border: 1px solid var(--line); border-radius: .4rem; padding: .3rem .8rem; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border-radius: .3rem; padding: .5rem .7rem; margin: .3rem 0; font-size: 12.5px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; } .id { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
.piece { display: inline-block; background: var(--card); border: 1px solid var(--line); border-radius: .3rem; padding: 0 .4rem; margin: .12rem;
  font: 12.5px monospace; white-space: pre; } .piece i { color: var(--soft); font-style: normal; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
svg rect { fill: var(--bar); } svg rect.behind { fill: var(--bar2); }
.cell { background: color-mix(in srgb, var(--bad) calc(var(--share) * 70%), transparent); border-radius: .3rem; padding: .2rem .6rem; }
.cell.hit { background: color-mix(in srgb, var(--good) calc(var(--share) * 70%), transparent); } .cell small { display: block; color: inherit; opacity: .75; }
.good, .warn { border-left: .3rem solid var(--good); background: var(--card); padding: .5rem .9rem; margin: .4rem 0; }
.warn { border-color: var(--bad); font-weight: 600; }
svg polyline { fill: none; stroke: var(--bar); stroke-width: 2; vector-effect: non-scaling-stroke; } svg line { stroke: var(--line); }
svg .b polyline, polyline.b { stroke: var(--bad); } svg polyline.c { stroke: var(--good); }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin: 0 .3rem 0 .9rem; vertical-align: -1px; background: var(--bar); }
.key.b { background: var(--bad); } .key.c { background: var(--good); }
@media (max-width: 40rem) { body { padding: 1.2rem .8rem 3rem; font-size: 14px; } .pair { grid-template-columns: 1fr; } th, td { padding: .25rem .35rem; }
  td.bar { min-width: 4rem; } nav a { display: inline-block; padding: .2rem 0; } .tile { flex: 1 1 40%; min-width: 0; } }
"""


def render(title: str, intro: str, sections: Iterable[tuple[str, str, str]], lead: str = "") -> str:
    """A whole page.

    Args:
      title: plain text, escaped here.
      intro: HTML of a line or two below it.
      sections: (anchor, plain title, HTML); those with no HTML are left out.
      lead: HTML above the links to the sections, such as `tiles`.
    """
    shown = [(anchor, name, body) for anchor, name, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name, _ in shown)
    body = "".join(f'<h2 id="{anchor}">{text(name)}</h2>{content}' for anchor, name, content in shown)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
            f"<title>{text(title)}</title><style>{_STYLE}</style></head><body><h1>{text(title)}</h1><p>{intro}</p>"
            f"{lead}<nav>{links}</nav>{body}</body></html>\n")


def text(value: Any) -> str:
    """Escaped; control characters, which would be invisible, become pictures of themselves."""
    shown = "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in str(value))
    return html.escape(shown)


def tiles(items: Iterable[tuple[Any, Any]]) -> str:
    """Large figures, each with what it is."""
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(what)}</span></div>' for value, what in items) + "</div>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """`heads` that begin with ">" are of numbers, "=" of bars (what follows is a class); cells are HTML."""
    kinds = ["n" if head[:1] == ">" else f"bar {head[1:]}" if head[:1] == "=" else "" for head in heads]
    head = "".join(f'<th class="{kind}">{"" if name[:1] == "=" else text(name.lstrip(">"))}</th>' for kind, name in zip(kinds, heads))
    body = "".join("<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def bar(share: float) -> str:
    """A cell's bar, `share` of its width."""
    return f'<div style="width:{100 * share:.1f}%"></div>'


def details(summary: str, body: str) -> str:
    """What is shown when it is asked for; `summary` is plain text, `body` HTML."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def chart(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, marks: Mapping[str, float] = {}) -> str:
    """Lines over a common x as SVG, up to three, with a key; points that are not finite are left out.

    Args:
      lines: name -> points (x, y).
      x, y: what the axes show.
      marks: name -> height of a dotted line.
    """
    lines = {name: [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b)] for name, points in lines.items()}
    points = [point for some in lines.values() for point in some]
    if not points:
        return ""
    xs, ys = [a for a, _ in points], [b for _, b in points] + list(marks.values())
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    width, height = (right - left) or 1.0, (high - low) or 1.0
    at = lambda a, b: f"{60 + 860 * (a - left) / width:.1f},{200 - 180 * (b - low) / height:.1f}"
    kinds = ("", "b", "c")
    drawn = "".join(f'<polyline class="{kind}" points="{" ".join(at(a, b) for a, b in some)}"/>' for kind, some in zip(kinds, lines.values()))
    for name, level in marks.items():
        place = 200 - 180 * (level - low) / height
        drawn += f'<line x1="60" x2="920" y1="{place:.1f}" y2="{place:.1f}" stroke-dasharray="4 4"/>'
        drawn += f'<text x="920" y="{place - 4:.1f}" text-anchor="end">{text(name)}</text>'
    ticks = "".join(f'<text x="{60 + 860 * i / 4:.0f}" y="218" text-anchor="middle">{_tick(left + width * i / 4)}</text>' for i in range(5))
    ticks += "".join(f'<text x="54" y="{204 - 180 * i / 2:.0f}" text-anchor="end">{_tick(low + height * i / 2)}</text>' for i in range(3))
    key = "".join(f'<span class="key {kind}"></span>{text(name)}' for kind, name in zip(kinds, lines))
    return (f'<div class="note">{text(y)} over {text(x)}{key}</div><div class="scroll"><svg viewBox="0 0 950 224" role="img" aria-label="{text(y)} over {text(x)}">'
            f'<line x1="60" x2="920" y1="200" y2="200"/>{drawn}{ticks}</svg></div>')


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes, as people read them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} B"
