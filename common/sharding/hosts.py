"""Several processes that run one program: which rows each one feeds, and what they must know of each other.

Everything here is called by all processes, in the same order. Of one process nothing is asked, and nothing waited for.
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
"""A number below 2**128 as int32s, of which thousands can be added."""

FOREVER_MS = 7 * 24 * 3600 * 1000
"""A process that is lost is noticed by other means."""

Said = TypeVar("Said")
_meetings = itertools.count()


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def rows_here(sharding: NamedSharding, rows: int) -> list[int]:
    """Numbers of the rows that this process's devices hold of an array whose first axis has `rows` rows, sorted.

    They need not be contiguous: a mesh orders devices by their links. Raises UserError where none of its devices is in
    the mesh.
    """
    return list(_rows_by_process(sharding, rows)[jax.process_index()])


def counts_here(sharding: NamedSharding, rows: int) -> bool:
    """Whether this process counts its rows: where several hold the same ones, the first of them does.

    Raises UserError where two processes hold some, but not all, of each other's rows.
    """
    held = _rows_by_process(sharding, rows)
    here = jax.process_index()
    for process, theirs in held.items():
        if theirs != held[here] and set(theirs) & set(held[here]):
            raise UserError(
                f"train.mesh {dict(sharding.mesh.shape)}: processes {here} and {process} hold only some of each "
                f"other's rows; nearest: a tensor that divides the {jax.local_device_count()} devices of a process"
            )
    return here == min(process for process, theirs in held.items() if theirs == held[here])


def _rows_by_process(sharding: NamedSharding, rows: int) -> dict[int, tuple[int, ...]]:
    held: dict[int, set[int]] = {}
    device: Any
    along_rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    for device, (of_rows,) in along_rows.devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, set()).update(range(*of_rows.indices(rows)))
    if without := sorted({device.process_index for device in jax.devices()} - set(held)):
        raise UserError(
            f"train.mesh {dict(sharding.mesh.shape)} takes no device of process {without[0]}; "
            f"nearest: {jax.device_count()} devices in all"
        )
    return {process: tuple(sorted(found)) for process, found in held.items()}


def place_rows(sharding: NamedSharding, rows: int, held: Sequence[int], x: np.ndarray) -> jax.Array:
    """The array of `rows` rows of which each process gives those that it holds (`rows_here`), in order."""
    position = {row: place for place, row in enumerate(held)}

    def part(index: Any) -> np.ndarray:
        first, stop, _ = index[0].indices(rows)
        # All of them are held, so they lie side by side.
        return x[position[first] :][: stop - first][:, *index[1:]]

    return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, part)


def barrier() -> None:
    """Waits until all processes are here, however long that takes; devices take no part.

    It comes before whatever may be their first exchange: there CPUs wait for each other for half a minute only.
    """
    if jax.process_count() > 1:
        wait = multihost.get_barrier_sync_fn()
        wait(key=f"meeting {next(_meetings)}", timeout_ms=FOREVER_MS)


def start_sum(numbers: Sequence[int]) -> Callable[[], list[int]]:
    """Adds up whole numbers (0 to 2**128 - 1) over all processes; waits only when the result is asked for."""
    if jax.process_count() == 1:
        return lambda: list(numbers)
    mask = 2**LIMB_BITS - 1
    limbs = [[number >> (LIMB_BITS * place) & mask for place in range(LIMBS)] for number in numbers]
    sharding, add = _adding()
    shape = (jax.process_count(), len(numbers), LIMBS)
    added = add(jax.make_array_from_callback(shape, sharding, lambda index: np.asarray([limbs], np.int32)))

    def result() -> list[int]:
        return [sum(int(limb) << (LIMB_BITS * place) for place, limb in enumerate(row)) for row in np.asarray(added)]

    return result


def on_first_process(say: Callable[[], Said]) -> Said:
    """What `say()` gives in the first process (something that JSON holds), in all; only the first one calls it.

    A UserError that it raises is raised in all of them, and an error of the system about a path as one.
    """
    if jax.process_count() == 1:
        return say()
    message = b""
    if is_first():
        try:
            message = json.dumps({"value": say()}).encode()
        except (UserError, OSError) as error:
            mistake = as_user_error(error) if isinstance(error, OSError) else error
            if mistake is None:
                raise
            message = json.dumps({"error": str(mistake)}).encode()
    barrier()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.frombuffer(message.ljust(length), np.uint8)[:length]
    heard: dict[str, Any] = json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
    if "error" in heard:
        raise UserError(heard["error"])
    return heard["value"]


def processes_where(flag: bool) -> list[int]:
    """Numbers of the processes in which `flag` is true."""
    if jax.process_count() == 1:
        return [0] if flag else []
    barrier()
    return np.flatnonzero(multihost_utils.process_allgather(np.array(flag))).tolist()


def gather_to_host(x: jax.Array) -> np.ndarray:
    """A copy of all of an array, wherever its parts lie."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.array(x)
    return np.array(multihost_utils.process_allgather(x, tiled=True))


@functools.cache
def _adding() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """How numbers lie, a row for each process, and the program that adds them up."""
    # Apart from the run's mesh, whose order may be another.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("processes", "devices"))
    add = jax.jit(lambda x: x.sum(axis=0, dtype=x.dtype), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return NamedSharding(mesh, PartitionSpec("processes")), add
