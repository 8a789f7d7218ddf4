"""What processes know of each other, as JSON lines: `FLAGS OF launch.flags`."""

import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common.errors import UserError
from common.sharding.hosts import counts_here, first_says, place_rows, rows_here, start_sum, where, whole
from common.train.distributed import joined

ROWS = 16
AXES = ("data", "fsdp", "tensor")


def mesh(shape: tuple[int, int, int], order: list[int]) -> Mesh:
    devices = np.array(jax.devices())[order].reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def fed(made: Mesh) -> dict[str, Any]:
    """Which rows this process feeds, and whether the array that all make together is the whole one."""
    sharding = NamedSharding(made, PartitionSpec(("data", "fsdp")))
    try:
        rows = rows_here(sharding, ROWS)
        counts = counts_here(sharding, ROWS)
    except UserError as error:
        return {"error": str(error)}
    expected = np.arange(ROWS * 3).reshape(ROWS, 3)
    array = place_rows(sharding, ROWS, rows, expected[rows])
    assert array.shape == expected.shape and array.sharding == sharding
    return {
        "rows": rows,
        "counts": counts,
        "whole": bool((whole(array) == expected).all()),
        "added": start_sum([len(rows) if counts else 0])()[0],
    }


def say() -> list[int]:
    if jax.process_index():
        raise AssertionError("only the first is asked")
    return [1, 2, 3]


def fail() -> None:
    raise UserError("a mistake, to be told to all: ü")


def main() -> None:
    n, index = jax.device_count(), jax.process_index()
    in_order, dealt = list(range(n)), [*range(0, n, 2), *range(1, n, 2)]
    meshes = {
        "data": mesh((n, 1, 1), in_order),
        "dealt": mesh((n, 1, 1), dealt),
        "tensor": mesh((2, 1, n // 2), in_order),
        "across": mesh((1, 2, n // 2), in_order[::2] + in_order[1::2]),
        "torn": mesh((n // 2, 1, 2), [0, 1, 2, 4, 3, *range(5, n)]),
        "half": mesh((n // 2, 1, 1), in_order[: n // 2]),
    }
    found: dict[str, Any] = {name: fed(made) for name, made in meshes.items()}
    big = 2**128 - 1
    found["sum"] = start_sum([big if index == 0 else 0, index, 2**100 + index])()
    found["said"] = first_says(say)
    try:
        first_says(fail)
    except UserError as error:
        found["refused"] = str(error)
    found["where"] = where(index > 0)
    print(json.dumps(found))


if __name__ == "__main__":
    with joined(sys.argv[2], int(sys.argv[4]), int(sys.argv[6])):
        main()
