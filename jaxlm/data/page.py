"""report.html: report.json as one page for people (see jaxlm/page.py)."""

from collections.abc import Mapping
from typing import Any

from jaxlm import page

NAME = "report.html"
_SHOWN = 50  # rows of a table that may be long

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
    intro = f"jaxlm {page.text(report['jaxlm'])} prepared {page.text(', '.join(report['made_from']['data.source']))}"
    return page.render("Corpus report", intro, sections, _tiles(report))


# --- sections -----------------------------------------------------------------------------------------------------------------------------


def _tiles(report: Mapping[str, Any]) -> str:
    read, kept = report["read"], report["kept"]
    skipped = sum(report["skipped"].values())
    tiles = [(f"{kept['documents']:,}", f"documents of {read['documents']:,} read"), (page.size(kept["bytes"]), f"text of {page.size(read['bytes'])} read"),
             (f"{kept['tokens']:,}", "tokens"), (f"{report['tokens']['bytes_per_token']:.2f}", "bytes per token")]
    tiles += [(f"{split['documents']:,}", f"{name} documents, {split['tokens']:,} tokens") for name, split in report["splits"].items()]
    tiles += [(f"{skipped:,}", "records that cannot be read")] if skipped else []
    return page.tiles(tiles)


def _remains(report: Mapping[str, Any]) -> str:
    most = max(1, report["funnel"][0]["documents"])
    rows = [[f'{page.text(step["step"])}<small>{page.text(_EXPLAIN.get(step["step"], ""))}</small>', _number(step["documents"]), f"{step['documents'] / most:.1%}",
             _number(-step["removed"]) if "removed" in step else "", page.size(step["bytes"]) if "bytes" in step else "", page.bar(step["documents"] / most)]
            for step in report["funnel"]]
    return "<p>Documents that are left after each step.</p>" + page.table(["after", ">documents", ">share", ">removed", ">text", "="], rows)


def _removed(report: Mapping[str, Any]) -> str:
    parts = []
    if report["removed"]:
        read, most = max(1, report["read"]["documents"]), max(entry["documents"] for entry in report["removed"].values())
        rows = [[page.text(rule), _number(entry["documents"]), f"{entry['documents'] / read:.2%}", page.size(entry["bytes"]),
                 f"{entry['lowest']:.4g} to {entry['highest']:.4g}" if "lowest" in entry else "", page.bar(entry["documents"] / most)]
                for rule, entry in report["removed"].items()]
        parts.append("<p>A document counts for the first rule that it breaks. Values are those that broke the rule.</p>"
                     + page.table(["rule", ">documents", ">share", ">text", ">values", "=bad"], rows))
    if report["skipped"]:
        rows = [[page.text(reason), _number(number)] for reason, number in report["skipped"].items()]
        parts.append("<h3>Records that cannot be read</h3>" + page.table(["reason", ">records"], rows))
    for rule, examples in report["examples"].items():
        if rule == "dedup.near":
            continue
        shown = "".join(f'<div class="id">{page.text(example["id"])}{_value(example)}</div><pre>{page.text(example.get("text") or example.get("reason", ""))}</pre>'
                        for example in examples)
        parts.append(page.details(f"{rule}: {len(examples)} examples", shown))
    return "".join(parts) or "<p>Nothing.</p>"


def _changed(report: Mapping[str, Any]) -> str:
    rows = [[page.text(what), _number(entry.get("documents", 0)), _number(entry.get("times", 0)), page.size(entry["bytes"]) if "bytes" in entry else ""]
            for what, entry in report["changed"].items()]
    return page.table(["what", ">documents", ">times", ">text removed"], rows) if rows else ""


def _duplicates(report: Mapping[str, Any]) -> str:
    parts, found = [], report["duplicates"]
    if found.get("lines", {}).get("most_frequent"):
        rows = [[_number(line["times"]), f"<pre>{page.text(line['line'])}</pre>"] for line in found["lines"]["most_frequent"]]
        parts.append(f"<h3>Lines</h3><p>{found['lines']['dropped']:,} repeated lines were dropped; the most frequent:</p>" + page.table([">times", "line"], rows))
    near = found.get("near")
    if near:
        sizes = ", ".join(f"{count:,} of {size}" for size, count in near["cluster_sizes"].items())
        parts.append(f"<h3>Near-duplicates</h3><p>{near['documents_dropped']:,} documents in {near['clusters']:,} clusters"
                     f"{f' ({page.text(sizes)} documents)' if sizes else ''}; {near['pairs_compared']:,} pairs compared, {near['pairs_verified']:,} verified.</p>")
        for example in report["examples"].get("dedup.near", ()):
            sides = "".join(f'<div><div class="id">{what} {page.text(side["id"])}</div><pre>{page.text(side["text"])}</pre></div>'
                            for what, side in (("dropped:", example), ("kept:", example["kept"])))
            parts.append(page.details(f"similarity {example['value']:.2f}: {example['text'][:80]}", f'<div class="pair">{sides}</div>'))
    return "".join(parts)


def _lengths(report: Mapping[str, Any]) -> str:
    return ("<p>Bytes of a document: as read (light) and as kept (dark). Two bins to each doubling.</p>"
            + _histogram(report["lengths"]["kept"], report["lengths"]["read"], "bytes"))


def _languages(report: Mapping[str, Any]) -> str:
    rows = list(report["languages"].items())
    most = max((entry["documents"] for _, entry in rows), default=1)
    more = f"<p>and {len(rows) - _SHOWN} more in report.json</p>" if len(rows) > _SHOWN else ""
    cells = [[page.text(code), _number(entry["documents"]), page.size(entry["bytes"]), page.bar(entry["documents"] / most)] for code, entry in rows[:_SHOWN]]
    return page.table(["language", ">documents", ">text", "="], cells) + more if rows else ""


def _tokens(report: Mapping[str, Any]) -> str:
    tokens = report["tokens"]
    pieces = "".join(f'<span class="piece">{page.text(item["piece"])} <i>{item["times"]:,}</i></span>' for item in tokens["most_frequent"])
    unused = "".join(f'<span class="piece">{page.text(piece)}</span>' for piece in tokens["unused_examples"])
    return (f"<p>{tokens['total']:,} tokens, {tokens['bytes_per_token']:.2f} bytes of text per token; {tokens['unused']:,} of {tokens['vocab_size']:,} "
            "entries of the vocabulary do not occur.</p><h3>Tokens of a document</h3>" + _histogram(tokens["document_lengths"], {}, "tokens")
            + f"<h3>Most frequent</h3><div>{pieces}</div>" + (f"<h3>Not used</h3><div>{unused}</div>" if unused else ""))


def _sources(report: Mapping[str, Any]) -> str:
    rows = []
    for name, source in sorted(report["sources"].items(), key=lambda item: (-item[1].get("kept", {}).get("tokens", 0), item[0]))[:_SHOWN]:
        kept = source.get("kept", {"documents": 0, "bytes": 0, "tokens": 0})
        licences = ", ".join(f"{licence}: {entry['documents']:,}" for licence, entry in sorted(source.get("licences", {}).items()))
        rows.append([page.text(name), _number(source["read"]["documents"]), _number(kept["documents"]), page.size(source["read"]["bytes"]), page.size(kept["bytes"]),
                     _number(kept["tokens"]), f"{kept['tokens'] / max(1, report['kept']['tokens']):.1%}", page.text(licences)])
    more = f"<p>and {len(report['sources']) - _SHOWN} more in report.json</p>" if len(report["sources"]) > _SHOWN else ""
    return page.table(["source", ">read", ">kept", ">text read", ">text kept", ">tokens", ">share", "licences (documents)"], rows) + more


def _config(report: Mapping[str, Any]) -> str:
    lines = "\n".join(f"{key} = {value!r}" for key, value in report["made_from"].items())
    return page.details("all keys", f"<pre>{page.text(lines)}</pre>")


# --- pieces -------------------------------------------------------------------------------------------------------------------------------


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



def _number(value: int) -> str:
    return f"{value:,}"



def _short(value: int) -> str:
    for unit, scale in (("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if value >= scale:
            return f"{value / scale:g}{unit}" if (value / scale).is_integer() or value / scale < 10 else f"{value / scale:.0f}{unit}"
    return str(value)
