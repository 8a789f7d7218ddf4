"""Program of `test_hosts`: prints what a process computed as one JSON line; its arguments are `launch.flags`."""

import errno
import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common.errors import UserError
from common.infer.config import Beam, GenerationConfig, Limits
from common.infer.generate import Generator
from common.infer.score import continuation, score
from common.model import skeleton
from common.sharding.hosts import (
    counts_here,
    gather_to_host,
    on_first_process,
    place_rows,
    processes_where,
    rows_here,
    start_sum,
)
from common.sharding.mesh import make_mesh
from common.sharding.rules import parameter_shardings
from common.sharding.shape import MeshShape
from common.train.distributed import joined
from experiments.families import builder
from tests.helpers import random_params
from tests.tiny import EXECUTION, tiny

ROWS = 16
AXES = ("data", "fsdp", "tensor")


def mesh(shape: tuple[int, int, int], order: list[int]) -> Mesh:
    devices = np.array(jax.devices())[order].reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def feed(made: Mesh) -> dict[str, Any]:
    """Returns the rows that this process feeds, and whether the array that all processes build is complete."""
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
        "whole": bool((gather_to_host(array) == expected).all()),
        "added": start_sum([len(rows) if counts else 0])()[0],
    }


def answers(made: Mesh) -> dict[str, Any]:
    """Returns texts of beam search, and scores of a model whose parameters are sharded over the mesh."""
    # Imported here, because it runs programs, which must wait until processes have joined.
    from tests.common.infer.test_generate import LETTERS, MODEL, codec_of, requests

    codec, limits, rows = codec_of(), Limits(max_new_tokens=6), made.size
    everywhere = NamedSharding(made, PartitionSpec())
    letters = jax.device_put(MODEL.params, everywhere)
    generator = Generator(MODEL, letters, made, codec)
    how = GenerationConfig(method=Beam(size=2), limits=limits, samples=2, rows=1)
    texts = {prompt: [one.tokens for one in found] for prompt, found in generator.complete(requests(), how)}
    model = skeleton(builder(tiny("gpt"), EXECUTION))
    params = jax.device_put(random_params(tiny("gpt")), parameter_shardings(made, model.logical_axes))
    pairs = [continuation([5, 6], [7, number], start_id=0) for number in range(len(LETTERS))]
    found = score(model, params, made, pairs, execution=EXECUTION, rows=rows, lengths=(4,))
    return {
        "texts": [[list(tokens) for tokens in texts[prompt]] for prompt in sorted(texts)],
        "scores": [round(one.log_likelihood, 4) for one in found],
    }


def say() -> list[int]:
    if jax.process_index():
        raise AssertionError("only the first process calls this")
    return [1, 2, 3]


def fail() -> None:
    raise UserError("a mistake, for all processes: ü")


def find_nothing() -> None:
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", "runs/ü")


def main() -> None:
    n, index = jax.device_count(), jax.process_index()
    in_order, interleaved = list(range(n)), [*range(0, n, 2), *range(1, n, 2)]
    meshes = {
        "data": mesh((n, 1, 1), in_order),
        "interleaved": mesh((n, 1, 1), interleaved),
        "tensor": mesh((2, 1, n // 2), in_order),
        "across": mesh((1, 2, n // 2), in_order[::2] + in_order[1::2]),
        "overlapping": mesh((n // 2, 1, 2), [0, 1, 2, 4, 3, *range(5, n)]),
        "half": mesh((n // 2, 1, 1), in_order[: n // 2]),
    }
    found: dict[str, Any] = {name: feed(made) for name, made in meshes.items()}
    big = 2**128 - 1
    found["sum"] = start_sum([big if index == 0 else 0, index, 2**100 + index])()
    found["first"] = on_first_process(say)
    for name, mistaken in (("refused", fail), ("not found", find_nothing)):
        try:
            on_first_process(mistaken)
        except UserError as error:
            found[name] = str(error)
    found["where"] = processes_where(index > 0)
    processes = jax.process_count()
    found["answers"] = answers(make_mesh(MeshShape(data=processes), jax.devices()[:: n // processes]))
    print(json.dumps(found))


if __name__ == "__main__":
    with joined(sys.argv[2], int(sys.argv[4]), int(sys.argv[6])):
        main()
