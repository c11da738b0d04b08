"""Nested dicts of arrays by path ("layers/attn/q"), and the one rule matcher that everything uses.

A rule table is an ordered sequence of `(path regex, value)`. It is strict: each path matches exactly one rule (whole path), and each rule
matches some path, so that neither a new parameter nor a typo passes in silence.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, in sorted order of paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def path_name(path: Sequence[Any]) -> str:
    """A jax key path as text; only dict keys count, so a parameter has the same name inside an optimiser's state."""
    return "/".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def match(rules: Sequence[tuple[str, T]], paths: Iterable[str], table: str) -> dict[str, T]:
    """The value of each path's one rule.

    Args:
      rules: ordered `(regex, value)`; the regex must match the whole path.
      paths: names to look up.
      table: the table's name, for messages.

    Raises:
      ValueError: a path with no rule or with two, or a rule without a path.
    """
    paths = list(paths)
    unused = {regex for regex, _ in rules}
    found = {}
    for path in paths:
        hits = [(regex, value) for regex, value in rules if re.fullmatch(regex, path)]
        if len(hits) != 1:
            which = f"rules {', '.join(repr(r) for r, _ in hits)} all match" if hits else "no rule matches"
            raise ValueError(f"{table}: {which} {path!r}; each path needs exactly one of {[r for r, _ in rules]}")
        unused.discard(hits[0][0])
        found[path] = hits[0][1]
    if unused:
        raise ValueError(f"{table}: rule {sorted(unused)[0]!r} matches no path; the paths are {', '.join(sorted(paths))}")
    return found


def split(tree: Mapping[str, Any], chosen: Mapping[str, bool]) -> tuple[dict, dict]:
    """(leaves whose path is chosen, the others), each as a nested dict without holes; `merge` is the inverse."""
    flat = flatten(tree)
    return (unflatten({p: x for p, x in flat.items() if chosen[p]}), unflatten({p: x for p, x in flat.items() if not chosen[p]}))


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict:
    """One nested dict of two that share no path."""
    return unflatten(flatten(a) | flatten(b))


def map_paths(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """`tree` with `f(path, leaf)` in place of each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(path_name(path), leaf), tree)


def count(tree: Any) -> int:
    """Number of elements of all leaves (arrays or `jax.ShapeDtypeStruct`)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
