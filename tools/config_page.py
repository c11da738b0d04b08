"""Writes docs/config.md, the page about every key of the configuration, from the fields and comments of jaxlm/config.py.

    python tools/config_page.py              writes it
    python tools/config_page.py --check      exit code 1 when it is not what config.py says; tests/test_docs.py asks the same
"""

import ast
import dataclasses
import io
import pathlib
import sys
import tokenize

from jaxlm import config

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "config.md"
HEAD = """# Every key

Written by `python tools/config_page.py` from `jaxlm/config.py`, which is the reference. A recipe is a Python file that returns only what differs from these defaults
([your data](your_data.md) has one); the command line overrides any of them:

```sh
jaxlm train --config=quickstart --workdir=runs/a --config.optim.lr=3e-4 --config.train.steps='2 epochs' --config.data.weights='(("web", 0.7), ("books", 0.3))'
```

A *duration* is `'2000 steps'`, `'3 epochs'`, `'1e9 tokens'`, `'5%'` of the run, or a number of steps. Lists are Python's: `--config.model.windows=0,1024`. A key that does not exist, a
value of the wrong type or one that cannot work is refused in one line that says what would be right.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of the page."""

    name: str
    kind: str
    default: str
    meaning: str


def comments(source: str) -> dict[int, tuple[str, bool]]:
    """Line number -> (comment without its mark, whether nothing else stands on the line)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# "), token.line.lstrip().startswith("#")
    return found


def keys_of(node: ast.ClassDef, said: dict[int, tuple[str, bool]]) -> list[Key]:
    """The fields of one part. A comment goes on in the lines below; a line that ends in ":" belongs to what follows it."""
    rows, before = [], ""
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign):
            continue
        line = statement.end_lineno
        words = [said[line][0]] if line in said else []
        while said.get(line + 1, ("", False))[1]:
            line += 1
            words.append(said[line][0])
        after = words.pop() + " " if words and words[-1].endswith(":") else ""
        rows.append(Key(statement.target.id, _kind(ast.unparse(statement.annotation)), ast.unparse(statement.value), before + " ".join(words)))
        before = after
    return rows


def _kind(annotation: str) -> str:
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "Duration": "duration", "tuple[str, ...]": "texts",
             "tuple[int, ...]": "whole numbers", "tuple[tuple[str, float], ...]": "pairs of text and number", "tuple[tuple[str, str], ...]": "pairs of texts",
             "Rules": "pairs of regex and true or false"}
    if "Literal[" in annotation:
        choices = ast.literal_eval("[" + annotation[annotation.index("Literal[") + 8:annotation.index("]")] + "]")
        return ("any of " if annotation.startswith("tuple") else "") + ", ".join(f"`{choice}`" for choice in choices)
    return names[annotation]


def parts() -> dict[str, tuple[str, list[Key]]]:
    """Part -> (what it is, its keys), in the order of `config.Config`."""
    source = pathlib.Path(config.__file__).read_text(encoding="utf-8")
    said, classes = comments(source), {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    made = {}
    for field in dataclasses.fields(config.Config):
        node = classes[field.default_factory.__name__]
        made[field.name] = " ".join(ast.get_docstring(node).split()), keys_of(node, said)
    return made


def page() -> str:
    """The whole page."""
    cell = lambda text: text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    lines = [HEAD]
    for part, (about, rows) in parts().items():
        lines += [f"## {part}\n", cell(about) + "\n", "| key | default | type | meaning |", "|---|---|---|---|"]
        for row in rows:
            default = row.default.removeprefix("Duration(").removesuffix(")") if row.default.startswith("Duration(") else row.default
            lines.append(f"| `{part}.{row.name}` | `{default}` | {row.kind} | {cell(row.meaning)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    if "--check" in sys.argv[1:]:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print("docs/config.md is current" if current else "docs/config.md is not what jaxlm/config.py says: run python tools/config_page.py")
        return 0 if current else 1
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
