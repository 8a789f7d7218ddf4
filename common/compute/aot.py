"""A training step compiled for a TPU that is not here, as far as its program and its memory are decided.

libtpu needs seconds to optimise a program and to place its arrays, and minutes to write machine code, which says
nothing more about memory, sending or time. So a compilation is watched by the files that it leaves, and left alone as
soon as they are whole. The process that does this has no other use and ends with it: `environment` must stand before
JAX is imported, and the compiler goes on in a thread.
"""

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.compute.collectives import Collective, collectives, scattered_bytes
from common.compute.hlo import parse
from common.compute.memory import Memory, read_memory
from common.compute.roofline import axes_name, links_of
from common.compute.topology import Topology
from common.compute.traffic import memory_traffic, product_flops

_PARTITIONED = "*.jit_*_step.*after_*spmd-partitioning.before_*.txt"
_UNPARTITIONED = "*.jit_*_step.*.before_optimizations.txt"
_OPTIMISED = "*.jit_*_step.*.after_optimizations.txt"
_LAST = "*.jit_*_step.*.after_optimizations_after_buffer_assignment.txt"
_NO_ROOM = re.compile(r"\(?([\d.]+)([KMGT]?)\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoRoom:
    """The compiler's answer for a step that is larger than a device's memory, in bytes."""

    needed: int
    """By temporaries alone, or by the whole program: the compiler stops at the first that is too much."""
    available: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a compiler says of one step on one device."""

    memory: Memory | None
    """None where there is no room."""
    no_room: NoRoom | None
    collectives: tuple[Collective, ...]
    ring_links: dict[str, float]
    """By the axes of a collective, see `common.compute.roofline.links_of`."""
    scattered_bytes: int
    """Of the arrays that are asked for by reduce-scatter, how many bytes the compiler really does so."""
    flops: int
    """Matrix products, recomputed ones included; those in kernels are not seen."""
    has_kernels: bool
    """Whether attention is in kernels."""
    moved_bytes: int
    """Through HBM; 0 where there is no room."""
    seconds: float
    """That the compilation took."""


def environment(dump: Path | None) -> dict[str, str]:
    """Variables of a process that compiles for TPUs without having one, silently, beside others.

    Where `dump` is a folder, the programs are written there as they are after the passes that planning reads.
    """
    dumping = (
        f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=.*spmd-partitioning.* "
        "--xla_dump_hlo_module_re=.*_step.*"
    )
    return {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is taken from a cache is not dumped
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any will do
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "XLA_FLAGS": "" if dump is None else dumping,
    }


def devices_of(topology: Topology) -> list[Any]:
    """JAX devices without hardware."""
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on the machines that are rented
    one = dataclasses.replace(topology, slices=1)
    return topologies.get_topology_desc(topology_name=str(one), platform="tpu", **options).devices


def compile_step(lower: Callable[[], Any], mesh: Any, topology: Topology, dump: Path) -> Compiled:
    """Lowers and compiles in a thread, and reads what lies in `dump` once it is whole.

    `lower` gives what `jax.jit(...).lower(...)` does, of a function named `..._step`. What else goes wrong is raised.
    """
    started = time.perf_counter()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            lower().compile()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive() and not list(dump.glob(_LAST)):
        thread.join(0.1)
    if failure and (no_room := parse_no_room(str(failure[0]))):
        return _read(dump, mesh, topology, no_room, time.perf_counter() - started)
    if failure:
        raise failure[0]
    return _read(dump, mesh, topology, None, time.perf_counter() - started)


def parse_no_room(message: str) -> NoRoom | None:
    """None for a message of another kind.

    >>> parse_no_room("Ran out of memory on HBM, the total memory required for HLO temporaries (47.25G) exceeds "
    ...               "available HBM (15.75G)").available / 2**30
    15.75
    >>> parse_no_room("Ran out of memory in memory space hbm. Used 18.00G of 15.75G hbm.").needed / 2**30
    18.0
    """
    found = _NO_ROOM.search(message)
    if not found or "memory" not in message:
        return None
    needed, unit, available, unit_ = found.groups()
    return NoRoom(needed=int(float(needed) * _UNITS[unit]), available=int(float(available) * _UNITS[unit_]))


def _read(dump: Path, mesh: Any, topology: Topology, no_room: NoRoom | None, seconds: float) -> Compiled:
    text = _text(dump, _PARTITIONED if mesh.size > 1 else _UNPARTITIONED)  # nobody parts what one device does
    partitioned = parse(text)
    sent = collectives(partitioned, mesh.shape)
    optimised = None if no_room else parse(_text(dump, _OPTIMISED))
    return Compiled(
        memory=None
        if optimised is None
        else read_memory(
            _text(dump, _OPTIMISED.replace(".txt", "-buffer-assignment.txt")),
            _text(dump, _OPTIMISED.replace(".txt", "-live-range.txt")),
            optimised,
        ),
        no_room=no_room,
        collectives=tuple(sent),
        ring_links={axes_name(axes): _ring_links(axes, mesh, topology) for axes in {one.axes for one in sent}},
        scattered_bytes=0 if optimised is None else scattered_bytes(optimised),
        flops=product_flops(partitioned),
        has_kernels="tpu_custom_call" in text,
        moved_bytes=0 if optimised is None else memory_traffic(optimised),
        seconds=seconds,
    )


def _ring_links(axes: tuple[str, ...], mesh: Any, topology: Topology) -> float:
    """By the coordinates of the first group: all devices that differ from the first along these axes."""
    first = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = np.ravel(mesh.devices[first])
    home = getattr(group[0], "slice_index", 0)
    places = [device.coords for device in group if getattr(device, "slice_index", 0) == home]
    return links_of(np.array(places), topology)


def _text(dump: Path, pattern: str) -> str:
    return max(dump.glob(pattern), key=lambda path: path.stat().st_size).read_text()
