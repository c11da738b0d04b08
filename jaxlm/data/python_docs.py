"""The text that every CPython carries, as a corpus of which nothing has to be fetched."""

import ast
import functools
import sysconfig
import warnings
from pathlib import Path


@functools.cache
def texts() -> tuple[tuple[str, str], ...]:
    """The text that every CPython carries: the language reference's help topics and the docstrings of the standard library, about 2.3 MB.

    The docstrings are read from the source files with `ast`; nothing is imported but the topics. One text is a topic, or a module with
    all its docstrings ("name, blank line, docstring", in the order of the source). Sorted; exact duplicates are dropped.

    Returns:
      (name, text) of each.

    Raises:
      ValueError: this Python has neither topics nor source files.
    """
    texts = {}
    try:
        from pydoc_data import topics
        texts = {f"topics/{name}": text for name, text in topics.topics.items()}
    except ImportError:
        pass
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not {"site-packages", "dist-packages", "test", "tests", "__pycache__"}.intersection(name.parts):
            texts[name.as_posix()] = _docstrings(path, ".".join(name.with_suffix("").parts).removesuffix(".__init__"))
    seen, found = {""}, []
    for name in sorted(texts):
        text = texts[name].encode("utf-8", "replace").decode()  # a docstring may spell half of a surrogate pair
        if text not in seen:
            seen.add(text)
            found.append((name, text))
    if not found:
        raise ValueError(f"python_docs: this Python has neither pydoc_data nor the standard library's source in {library}: "
                         "name text files in data.source")
    return tuple(found)


def _docstrings(path: Path, module: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, kinds)), key=lambda node: getattr(node, "lineno", 0))
    pairs = [(getattr(node, "name", module), ast.get_docstring(node)) for node in nodes]
    return "\n\n".join(f"{name}\n\n{text}" for name, text in pairs if text)
