"""Opens models and compares parameters, for the tests of `experiments.models`."""

from typing import Any

import numpy as np

from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.trees import flatten
from experiments.models.finding import open_model
from tests.tiny import EXECUTION

MESH = MeshShape()


def opened(path: Any, **how: Any) -> Any:
    return open_model(str(path), EXECUTION, make_mesh(MESH), **how)


def same_bits(one: Any, other: Any) -> None:
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
