"""Several processes that run one program: the rows that each one feeds, and collectives on host values.

All processes must call these functions, in the same order. With one process, each returns immediately.
"""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from common.errors import UserError
from common.paths import as_user_error

LIMB_BITS, LIMBS = 16, 8
"""A number below 2**128 is summed as 8 int32s of 16 bits each, so that thousands can be added without overflow."""

FOREVER_MS = 7 * 24 * 3600 * 1000
"""Timeout of barriers, in milliseconds; a lost process is detected by other means."""

Value = TypeVar("Value")
_barriers = itertools.count()


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def rows_here(sharding: NamedSharding, rows: int) -> list[int]:
    """Returns the sorted indices of the rows on this process's devices, of an array with `rows` rows.

    They need not be contiguous: a mesh orders devices by their links. Raises UserError if the mesh contains none of
    this process's devices.
    """
    return list(_rows_by_process(sharding, rows)[jax.process_index()])


def counts_here(sharding: NamedSharding, rows: int) -> bool:
    """Whether this process counts its rows: if several processes hold the same rows, only the first of them does.

    Raises UserError if two processes share some of their rows, but not all.
    """
    rows_of = _rows_by_process(sharding, rows)
    here = jax.process_index()
    for process, theirs in rows_of.items():
        if theirs != rows_of[here] and set(theirs) & set(rows_of[here]):
            raise UserError(
                f"train.mesh {dict(sharding.mesh.shape)}: processes {here} and {process} hold only some of each "
                f"other's rows; nearest: a tensor that divides the {jax.local_device_count()} devices of a process"
            )
    return here == min(process for process, theirs in rows_of.items() if theirs == rows_of[here])


def _rows_by_process(sharding: NamedSharding, rows: int) -> dict[int, tuple[int, ...]]:
    found: dict[int, set[int]] = {}
    device: Any
    along_rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    for device, (of_rows,) in along_rows.devices_indices_map((rows,)).items():
        found.setdefault(device.process_index, set()).update(range(*of_rows.indices(rows)))
    if without := sorted({device.process_index for device in jax.devices()} - set(found)):
        raise UserError(
            f"train.mesh {dict(sharding.mesh.shape)} takes no device of process {without[0]}; "
            f"nearest: {jax.device_count()} devices in all"
        )
    return {process: tuple(sorted(indices)) for process, indices in found.items()}


def place_rows(sharding: NamedSharding, rows: int, indices: Sequence[int], x: np.ndarray) -> jax.Array:
    """Builds a global array of `rows` rows; each process passes its own rows `x`, whose `indices` are `rows_here`.

    >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    >>> array = place_rows(NamedSharding(mesh, PartitionSpec("data")), 2, [0, 1], np.array([[5], [6]]))
    >>> array.shape, array.sum().item()
    ((2, 1), 11)
    """
    position = {row: place for place, row in enumerate(indices)}

    def shard(index: Any) -> np.ndarray:
        first, stop, _ = index[0].indices(rows)
        # This process has all rows of the shard, and its rows are sorted, so those of the shard are contiguous.
        return x[position[first] :][: stop - first][:, *index[1:]]

    return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, shard)


def barrier() -> None:
    """Waits until every process has called this, however long that takes; no device is involved.

    Call it before a collective on devices for which processes may wait long: collectives on CPUs time out after half a
    minute.
    """
    if jax.process_count() > 1:
        wait = multihost.get_barrier_sync_fn()
        wait(key=f"meeting {next(_barriers)}", timeout_ms=FOREVER_MS)


def start_sum(numbers: Sequence[int]) -> Callable[[], list[int]]:
    """Starts to sum integers (0 to 2**128 - 1) over all processes; the returned function waits for the sums.

    >>> start_sum([2**100, 3])() == [2**100, 3]  # one process
    True
    """
    if jax.process_count() == 1:
        return lambda: list(numbers)
    mask = 2**LIMB_BITS - 1
    limbs = [[number >> (LIMB_BITS * place) & mask for place in range(LIMBS)] for number in numbers]
    sharding, add = _sum_over_processes()
    shape = (jax.process_count(), len(numbers), LIMBS)
    sums = add(jax.make_array_from_callback(shape, sharding, lambda index: np.asarray([limbs], np.int32)))

    def result() -> list[int]:
        return [sum(int(limb) << (LIMB_BITS * place) for place, limb in enumerate(row)) for row in np.asarray(sums)]

    return result


def on_first_process(call: Callable[[], Value]) -> Value:
    """Calls `call` in the first process only, and returns its result (a JSON value) in every process.

    If it raises UserError, or OSError about a user's path, every process raises UserError with that message.
    """
    if jax.process_count() == 1:
        return call()
    message = b""
    if is_first():
        try:
            message = json.dumps({"value": call()}).encode()
        except (UserError, OSError) as error:
            mistake = as_user_error(error) if isinstance(error, OSError) else error
            if mistake is None:
                raise
            message = json.dumps({"error": str(mistake)}).encode()
    barrier()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.frombuffer(message.ljust(length), np.uint8)[:length]
    received: dict[str, Any] = json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
    if "error" in received:
        raise UserError(received["error"])
    return received["value"]


def processes_where(flag: bool) -> list[int]:
    """Returns the indices of the processes in which `flag` is true."""
    if jax.process_count() == 1:
        return [0] if flag else []
    barrier()
    return np.flatnonzero(multihost_utils.process_allgather(np.array(flag))).tolist()


def gather_to_host(x: jax.Array) -> np.ndarray:
    """Copies a whole array to every process, wherever its shards are."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.array(x)
    return np.array(multihost_utils.process_allgather(x, tiled=True))


@functools.cache
def _sum_over_processes() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Returns the sharding of an array with one row per process, and the program that sums its rows."""
    # A mesh of its own: the run's mesh may order devices differently.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("processes", "devices"))
    add = jax.jit(lambda x: x.sum(axis=0, dtype=x.dtype), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return NamedSharding(mesh, PartitionSpec("processes")), add
