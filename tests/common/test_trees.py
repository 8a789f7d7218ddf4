"""Flat and nested dicts."""

import pytest

from common.trees import flatten, nest


@pytest.mark.parametrize("separator", [".", "/"])
def test_nest_and_flatten_are_inverses(separator):
    flat = {separator.join(path): i for i, path in enumerate([("a", "b", "c"), ("a", "d"), ("e",)])}
    assert nest(flat, separator) == {"a": {"b": {"c": 0}, "d": 1}, "e": 2}
    assert flatten(nest(flat, separator), separator) == flat


def test_names_may_hold_the_other_separator():
    assert flatten({"a.b": {"c": 1}}, "/") == {"a.b/c": 1}
    assert nest({"a.b/c": 1}, "/") == {"a.b": {"c": 1}}
