"""Parameters by dotted name, `layers.attention.query_DHC`, as rules and messages write them."""

from collections.abc import Mapping
from typing import Any

from flax import nnx


def flatten(tree: Any) -> dict[str, Any]:
    """A nested dict's leaves by dotted path.

    >>> flatten({"layers": {"mlp": {"in_DF": 1}}, "table_VD": 2})
    {'layers.mlp.in_DF': 1, 'table_VD': 2}
    """
    return nnx.traversals.flatten_mapping(tree, sep=".")


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return dict(nnx.traversals.unflatten_mapping(leaves, sep="."))
