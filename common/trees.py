"""Nested dicts as flat ones: a leaf's path becomes its name."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Returns the leaves of a nested mapping by path, in the order of the tree.

    >>> flatten({"layers": {"mlp": {"in_DF": 1}}, "table_VD": 2})
    {'layers.mlp.in_DF': 1, 'table_VD': 2}
    """
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            inner = flatten(value, separator)
            leaves |= {f"{name}{separator}{path}": leaf for path, leaf in inner.items()}
        else:
            leaves[str(name)] = value
    return leaves


def nest(leaves: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """The inverse of `flatten`.

    >>> nest({"layers.mlp.in_DF": 1, "table_VD": 2})
    {'layers': {'mlp': {'in_DF': 1}}, 'table_VD': 2}
    """
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split(separator)
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree
