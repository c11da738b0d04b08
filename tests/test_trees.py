import numpy as np
import pytest

from jaxlm import trees

TREE = {"a": {"b": np.zeros((2, 3)), "c": np.zeros(4, np.int16)}, "d": np.zeros(())}


def test_flatten_and_back():
    assert list(trees.flatten(TREE)) == ["a/b", "a/c", "d"]
    assert trees.flatten(trees.unflatten(trees.flatten(TREE))).keys() == trees.flatten(TREE).keys()
    assert trees.count(TREE) == 11 and trees.nbytes(TREE) == 6 * 8 + 4 * 2 + 8


def test_split_and_merge():
    one, other = trees.split(TREE, {"a/b": True, "a/c": False, "d": True})
    assert list(trees.flatten(one)) == ["a/b", "d"] and list(trees.flatten(other)) == ["a/c"]
    assert trees.flatten(trees.merge(one, other)).keys() == trees.flatten(TREE).keys()


@pytest.mark.parametrize("rules, words", [
    ((("a/.*", 1),), "no rule matches 'd'"), ((("a/.*", 1), ("d", 2), (".*c", 3)), "all match 'a/c'"), ((("a/.*", 1), ("d", 2), ("e", 3)), "'e' matches no path"),
    ((("a", 1), ("d", 2)), "no rule matches 'a/b'")])
def test_rules_are_strict(rules, words):
    with pytest.raises(ValueError, match=words):
        trees.match(rules, trees.flatten(TREE), "table")


def test_rules_give_values():
    assert trees.match((("a/.*", 1), ("d", 2)), trees.flatten(TREE), "table") == {"a/b": 1, "a/c": 1, "d": 2}
