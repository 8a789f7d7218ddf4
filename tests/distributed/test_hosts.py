"""The rows that a process feeds, and collectives on host values, with 2 and 4 real processes on this machine."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import UserError
from common.sharding.hosts import counts_here, on_first_process, place_rows, processes_where, rows_here, start_sum
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from tests.distributed.launch import flags, launched
from tests.distributed.talk import ROWS, answers, fail


def talk(count: int, devices: int, tmp_path: Path) -> list[dict[str, Any]]:
    arguments = flags(count)
    with launched(["tests.distributed.talk"], arguments, devices=devices, cache=tmp_path, logs=tmp_path) as job:
        assert job.wait() == [0] * count, job.everything()
    return [json.loads(job.output(index).rstrip().splitlines()[-1]) for index in range(count)]


@pytest.mark.parametrize(("count", "devices"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_processes_feed_the_rows_on_their_devices(count: int, devices: int, tmp_path: Path) -> None:
    """Covers meshes in which a process's rows are not contiguous, and in which several processes hold the same rows."""
    found, expected = talk(count, devices, tmp_path), answers(make_mesh(MeshShape()))
    n = count * devices
    part = ROWS // n * devices // 2
    overlapping = found[0]["overlapping"]
    if count == 2:  # rows 0 to 11 and rows 4 to 15
        assert all("hold only some of each other's rows" in each["overlapping"]["error"] for each in found)
    for name in ("data", "interleaved", "tensor", "across", *(() if "error" in overlapping else ("overlapping",))):
        of_all = [each[name] for each in found]
        assert all(each["whole"] and each["added"] == ROWS for each in of_all)
        counted = [row for each in of_all if each["counts"] for row in each["rows"]]
        assert sorted(counted) == list(range(ROWS)), "each row is counted once"
    assert [each["data"]["rows"] for each in found] == np.arange(ROWS).reshape(count, -1).tolist()
    # The mesh orders devices 0, 2, 4, ..., 1, 3, 5, ...: process 0 has rows from the start and from the middle.
    half = ROWS // 2
    assert found[0]["interleaved"]["rows"] == [*range(part), *range(half, half + part)]
    assert [len(each["tensor"]["rows"]) for each in found] == [half] * count
    assert sum(each["tensor"]["counts"] for each in found) == 2
    for each in found:
        assert "takes no device of process" in each["half"]["error"]
        assert each["sum"] == [2**128 - 1, sum(range(count)), count * 2**100 + sum(range(count))]
        assert each["first"] == [1, 2, 3] and each["refused"] == "a mistake, for all processes: ü"
        assert each["not found"] == "runs/ü: no such file or directory"
        assert each["where"] == list(range(1, count))
        assert each["answers"]["texts"] == expected["texts"]
        assert each["answers"]["scores"] == pytest.approx(expected["scores"], abs=2e-4)


# --- One process


def test_one_process_needs_no_collectives() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rows = rows_here(sharding, ROWS)
    assert rows == list(range(ROWS)) and counts_here(sharding, ROWS)
    x = np.arange(ROWS * 2).reshape(ROWS, 2)
    np.testing.assert_array_equal(place_rows(sharding, ROWS, rows, x), x)
    assert start_sum([2**127, 3])() == [2**127, 3]
    assert on_first_process(lambda: {"a": 1}) == {"a": 1}
    assert processes_where(True) == [0] and processes_where(False) == []
    with pytest.raises(UserError, match="a mistake"):
        on_first_process(fail)
