"""Sizes of a T5X checkpoint, which has no config, inferred from the shapes of its arrays."""

from collections.abc import Mapping

from common.errors import UserError
from common.weights.mapping import TensorInfo


def matrix_shape(tensors: Mapping[str, TensorInfo], where: str, name: str) -> tuple[int, int]:
    """Raises UserError where there is no such array, or it is no matrix."""
    if name not in tensors:
        raise UserError(f"{where}: {name} is missing, and sizes cannot be inferred without it")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or not all(shape):
        raise UserError(f"{where}: {name} is {list(shape)}, and should be a matrix")
    return shape


def count_layers(tensors: Mapping[str, TensorInfo], stack: str, where: str) -> int:
    """Raises UserError where there are none."""
    count = sum(name.startswith(f"{stack}/layers_") and name.endswith("/mlp/wo/kernel") for name in tensors)
    if not count:
        raise UserError(f"{where}: {stack}/layers_0/mlp/wo/kernel is missing, and sizes cannot be inferred without it")
    return count
