"""report.html: report.json as one page for people, with nothing from outside: no network, no script, plots in SVG and CSS."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAME = "report.html"
_SHOWN = 50  # rows of a table that may be long

_STYLE = """
:root { --ink: #1d2433; --soft: #5b6577; --line: #dde2ea; --bar: #3b6fb6; --bar2: #c9d8ee; --bad: #b4532a; --back: #ffffff; --card: #f6f8fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8f0; --soft: #9aa5b8; --line: #333c4d; --bar: #6c9bdc; --bar2: #2d4162; --bad: #e08a5f; --back: #141922; --card: #1c232f; }
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
td.bar { width: 30%; min-width: 8rem; } td.bar div { background: var(--bar); height: .8rem; border-radius: 2px; min-width: 1px; } td.bar.bad div { background: var(--bad); }
.scroll { overflow-x: auto; }
details { margin: .3rem 0; border: 1px solid var(--line); border-radius: .4rem; padding: .3rem .8rem; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border-radius: .3rem; padding: .5rem .7rem; margin: .3rem 0; font-size: 12.5px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; } .id { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
.piece { display: inline-block; background: var(--card); border: 1px solid var(--line); border-radius: .3rem; padding: 0 .4rem; margin: .12rem;
  font: 12.5px monospace; white-space: pre; } .piece i { color: var(--soft); font-style: normal; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
svg rect { fill: var(--bar); } svg rect.behind { fill: var(--bar2); }
"""

_EXPLAIN = {
    "read": "documents as they stand in the sources", "clean.extract": "pages in which no text was found", "clean.empty": "blank documents",
    "clean": "other languages, and what could not be read as text", "filter": "documents that broke a rule of quality",
    "decontaminate": "documents with text of an evaluation set", "cleaned": "what was left of each document, before comparing documents",
    "dedup.exact": "documents whose text occurred before", "dedup.lines": "documents that repeated lines were all, or made all the difference, of",
    "dedup.near": "documents nearly equal to a longer or earlier one", "kept": "what the shards hold",
}


def render(report: Mapping[str, Any]) -> str:
    """The whole page. Every text from a document, file name or config is escaped."""
    sections = [
        ("remains", "What remains", _remains(report)), ("removed", "What was removed", _removed(report)), ("changed", "What was changed", _changed(report)),
        ("duplicates", "Duplicates", _duplicates(report)), ("lengths", "Lengths", _lengths(report)), ("languages", "Languages", _languages(report)),
        ("tokens", "Tokens", _tokens(report)), ("sources", "Sources and licences", _sources(report)), ("config", "Made from", _config(report))]
    sections = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    body = "".join(f'<h2 id="{anchor}">{title}</h2>{content}' for anchor, title, content in sections)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
            f"<title>Corpus report</title><style>{_STYLE}</style></head><body><h1>Corpus report</h1>"
            f"<p>jaxlm {_text(report['jaxlm'])} prepared {_text(', '.join(report['made_from']['data.source']))}</p>{_tiles(report)}<nav>{links}</nav>{body}"
            "</body></html>\n")


# --- sections -----------------------------------------------------------------------------------------------------------------------------


def _tiles(report: Mapping[str, Any]) -> str:
    read, kept = report["read"], report["kept"]
    skipped = sum(report["skipped"].values())
    tiles = [(f"{kept['documents']:,}", f"documents of {read['documents']:,} read"), (_size(kept["bytes"]), f"text of {_size(read['bytes'])} read"),
             (f"{kept['tokens']:,}", "tokens"), (f"{report['tokens']['bytes_per_token']:.2f}", "bytes per token")]
    tiles += [(f"{split['documents']:,}", f"{name} documents, {split['tokens']:,} tokens") for name, split in report["splits"].items()]
    tiles += [(f"{skipped:,}", "records that cannot be read")] if skipped else []
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{_text(value)}</b><span>{_text(what)}</span></div>' for value, what in tiles) + "</div>"


def _remains(report: Mapping[str, Any]) -> str:
    most = max(1, report["funnel"][0]["documents"])
    rows = [[f'{_text(step["step"])}<small>{_text(_EXPLAIN.get(step["step"], ""))}</small>', _number(step["documents"]), f"{step['documents'] / most:.1%}",
             _number(-step["removed"]) if "removed" in step else "", _size(step["bytes"]) if "bytes" in step else "", _bar(step["documents"] / most)]
            for step in report["funnel"]]
    return "<p>Documents that are left after each step.</p>" + _table(["after", ">documents", ">share", ">removed", ">text", "="], rows)


def _removed(report: Mapping[str, Any]) -> str:
    parts = []
    if report["removed"]:
        read, most = max(1, report["read"]["documents"]), max(entry["documents"] for entry in report["removed"].values())
        rows = [[_text(rule), _number(entry["documents"]), f"{entry['documents'] / read:.2%}", _size(entry["bytes"]),
                 f"{entry['lowest']:.4g} to {entry['highest']:.4g}" if "lowest" in entry else "", _bar(entry["documents"] / most)]
                for rule, entry in report["removed"].items()]
        parts.append("<p>A document counts for the first rule that it breaks. Values are those that broke the rule.</p>"
                     + _table(["rule", ">documents", ">share", ">text", ">values", "=bad"], rows))
    if report["skipped"]:
        rows = [[_text(reason), _number(number)] for reason, number in report["skipped"].items()]
        parts.append("<h3>Records that cannot be read</h3>" + _table(["reason", ">records"], rows))
    for rule, examples in report["examples"].items():
        if rule == "dedup.near":
            continue
        shown = "".join(f'<div class="id">{_text(example["id"])}{_value(example)}</div><pre>{_text(example.get("text") or example.get("reason", ""))}</pre>'
                        for example in examples)
        parts.append(f"<details><summary>{_text(rule)}: {len(examples)} examples</summary>{shown}</details>")
    return "".join(parts) or "<p>Nothing.</p>"


def _changed(report: Mapping[str, Any]) -> str:
    rows = [[_text(what), _number(entry.get("documents", 0)), _number(entry.get("times", 0)), _size(entry["bytes"]) if "bytes" in entry else ""]
            for what, entry in report["changed"].items()]
    return _table(["what", ">documents", ">times", ">text removed"], rows) if rows else ""


def _duplicates(report: Mapping[str, Any]) -> str:
    parts, found = [], report["duplicates"]
    if found.get("lines", {}).get("most_frequent"):
        rows = [[_number(line["times"]), f"<pre>{_text(line['line'])}</pre>"] for line in found["lines"]["most_frequent"]]
        parts.append(f"<h3>Lines</h3><p>{found['lines']['dropped']:,} repeated lines were dropped; the most frequent:</p>" + _table([">times", "line"], rows))
    near = found.get("near")
    if near:
        sizes = ", ".join(f"{count:,} of {size}" for size, count in near["cluster_sizes"].items())
        parts.append(f"<h3>Near-duplicates</h3><p>{near['documents_dropped']:,} documents in {near['clusters']:,} clusters"
                     f"{f' ({_text(sizes)} documents)' if sizes else ''}; {near['pairs_compared']:,} pairs compared, {near['pairs_verified']:,} verified.</p>")
        for example in report["examples"].get("dedup.near", ()):
            sides = "".join(f'<div><div class="id">{what} {_text(side["id"])}</div><pre>{_text(side["text"])}</pre></div>'
                            for what, side in (("dropped:", example), ("kept:", example["kept"])))
            title = f"similarity {example['value']:.2f}: {_text(example['text'][:80])}"
            parts.append(f'<details><summary>{title}</summary><div class="pair">{sides}</div></details>')
    return "".join(parts)


def _lengths(report: Mapping[str, Any]) -> str:
    return ("<p>Bytes of a document: as read (light) and as kept (dark). Two bins to each doubling.</p>"
            + _histogram(report["lengths"]["kept"], report["lengths"]["read"], "bytes"))


def _languages(report: Mapping[str, Any]) -> str:
    rows = list(report["languages"].items())
    most = max((entry["documents"] for _, entry in rows), default=1)
    more = f"<p>and {len(rows) - _SHOWN} more in report.json</p>" if len(rows) > _SHOWN else ""
    cells = [[_text(code), _number(entry["documents"]), _size(entry["bytes"]), _bar(entry["documents"] / most)] for code, entry in rows[:_SHOWN]]
    return _table(["language", ">documents", ">text", "="], cells) + more if rows else ""


def _tokens(report: Mapping[str, Any]) -> str:
    tokens = report["tokens"]
    pieces = "".join(f'<span class="piece">{_text(item["piece"])} <i>{item["times"]:,}</i></span>' for item in tokens["most_frequent"])
    unused = "".join(f'<span class="piece">{_text(piece)}</span>' for piece in tokens["unused_examples"])
    return (f"<p>{tokens['total']:,} tokens, {tokens['bytes_per_token']:.2f} bytes of text per token; {tokens['unused']:,} of {tokens['vocab_size']:,} "
            "entries of the vocabulary do not occur.</p><h3>Tokens of a document</h3>" + _histogram(tokens["document_lengths"], {}, "tokens")
            + f"<h3>Most frequent</h3><div>{pieces}</div>" + (f"<h3>Not used</h3><div>{unused}</div>" if unused else ""))


def _sources(report: Mapping[str, Any]) -> str:
    rows = []
    for name, source in sorted(report["sources"].items(), key=lambda item: (-item[1].get("kept", {}).get("tokens", 0), item[0]))[:_SHOWN]:
        kept = source.get("kept", {"documents": 0, "bytes": 0, "tokens": 0})
        licences = ", ".join(f"{licence}: {entry['documents']:,}" for licence, entry in sorted(source.get("licences", {}).items()))
        rows.append([_text(name), _number(source["read"]["documents"]), _number(kept["documents"]), _size(source["read"]["bytes"]), _size(kept["bytes"]),
                     _number(kept["tokens"]), f"{kept['tokens'] / max(1, report['kept']['tokens']):.1%}", _text(licences)])
    more = f"<p>and {len(report['sources']) - _SHOWN} more in report.json</p>" if len(report["sources"]) > _SHOWN else ""
    return _table(["source", ">read", ">kept", ">text read", ">text kept", ">tokens", ">share", "licences (documents)"], rows) + more


def _config(report: Mapping[str, Any]) -> str:
    lines = "\n".join(f"{key} = {value!r}" for key, value in report["made_from"].items())
    return f"<details><summary>all keys</summary><pre>{_text(lines)}</pre></details>"


# --- pieces -------------------------------------------------------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """`heads` that begin with ">" are of numbers, "=" of bars (what follows is a class); cells are HTML."""
    kinds = ["n" if head[:1] == ">" else f"bar {head[1:]}" if head[:1] == "=" else "" for head in heads]
    head = "".join(f'<th class="{kind}">{"" if text[:1] == "=" else _text(text.lstrip(">"))}</th>' for kind, text in zip(kinds, heads))
    body = "".join("<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _bar(share: float) -> str:
    return f'<div style="width:{100 * share:.1f}%"></div>'


def _histogram(front: Mapping[str, int], behind: Mapping[str, int], unit: str) -> str:
    """Bars over bins {lower edge: number}; `behind` is drawn lighter, behind them."""
    edges = sorted({int(edge) for edge in (*front, *behind)})
    if not edges:
        return ""
    scale = [0]
    while scale[-1] < edges[-1]:  # all bins up to the last, so that gaps show (edges as in counts.length_bin)
        last = scale[-1]
        scale.append(16 if not last else last * 3 // 2 if last & (last - 1) == 0 else last * 4 // 3)
    scale = [edge for edge in scale if edge >= edges[0]]
    highest, step, height = max(*front.values(), *behind.values(), 1), 900 / len(scale), 180
    bars = []
    for i, edge in enumerate(scale):
        for values, kind in ((behind, ' class="behind"'), (front, "")):
            number = values.get(str(edge), 0)
            if number:
                size = max(1.0, number / highest * height)
                bars.append(f'<rect{kind} x="{40 + i * step + step * .08:.1f}" y="{height + 10 - size:.1f}" width="{step * .84:.1f}" height="{size:.1f}">'
                            f"<title>from {edge:,} {unit}: {number:,} documents</title></rect>")
        if i % max(1, len(scale) // 12) == 0:
            bars.append(f'<text x="{40 + i * step:.1f}" y="{height + 26}">{_short(edge)}</text>')
    return (f'<svg viewBox="0 0 950 {height + 36}" role="img" aria-label="documents by {unit}"><text x="0" y="20">{_short(highest)}</text>'
            f'<text x="0" y="{height + 10}">0</text>{"".join(bars)}</svg>')


def _value(example: Mapping[str, Any]) -> str:
    return f" · value {example['value']:.4g}" if "value" in example else ""


def _text(value: Any) -> str:
    """Escaped; control characters, which would be invisible, become pictures of themselves."""
    shown = "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in str(value))
    return html.escape(shown)


def _number(value: int) -> str:
    return f"{value:,}"


def _size(size: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} B"


def _short(value: int) -> str:
    for unit, scale in (("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if value >= scale:
            return f"{value / scale:g}{unit}" if (value / scale).is_integer() or value / scale < 10 else f"{value / scale:.0f}{unit}"
    return str(value)
