"""Compiles a training step for a TPU that is not here, until its program and its memory layout are known.

libtpu optimises a program and assigns its buffers in seconds, and then takes minutes to generate machine code, which
says nothing more about memory, communication or time. So the compiler runs in a thread and dumps its intermediate
programs to files; as soon as the last file needed is there, the files are read and the compiler is left running. Use a
separate process for each compilation, and end it afterwards, since the thread goes on. Set the variables of
`environment` before the process imports JAX.
"""

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.compute.collectives import Collective, collectives, scattered_bytes, summed_gather_bytes
from common.compute.hlo import parse
from common.compute.memory import Memory, read_memory
from common.compute.roofline import axes_name, links_per_device
from common.compute.topology import Topology
from common.compute.traffic import memory_traffic, product_flops

# Dumped files: the partitioned program (or the unoptimised one, for one device), the optimised one, and the last one.
_PARTITIONED = "*.jit_*_step.*after_*spmd-partitioning.before_*.txt"
_UNPARTITIONED = "*.jit_*_step.*.before_optimizations.txt"
_OPTIMISED = "*.jit_*_step.*.after_optimizations.txt"
_LAST = "*.jit_*_step.*.after_optimizations_after_buffer_assignment.txt"
_OUT_OF_MEMORY = re.compile(r"\(?([\d.]+)([KMGT]?)\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGT]?)")
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """The compiler's error for a step that is larger than a device's memory, in bytes."""

    needed: int
    """Needed by the temporaries alone or by the whole program: the compiler stops at the first that is too large."""
    available: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """One device's program for a training step."""

    memory: Memory | None
    """None if the step is too large."""
    out_of_memory: OutOfMemory | None
    collectives: tuple[Collective, ...]
    ring_links: dict[str, float]
    """How many links carry a ring, by the axes of a collective; see `common.compute.roofline.links_per_device`."""
    scattered_bytes: int
    """Bytes of arrays that the optimised program reduce-scatters; the others it all-reduces and slices."""
    summed_gather_bytes: int
    """Bytes of arrays that the optimised program gathers by an all-reduce, which sends twice as much."""
    flops: int
    """FLOPs of matrix products, recomputed ones included, but not those inside kernels."""
    has_kernels: bool
    """Whether attention runs in kernels."""
    traffic_bytes: int
    """Bytes read from and written to HBM; 0 if the step is too large."""
    seconds: float
    """Time that the compilation took."""


def environment(dump: Path | None) -> dict[str, str]:
    """Returns environment variables for a process that compiles for TPUs without having one.

    They also silence the compiler, and let several such processes run at once. With `dump`, a folder, the compiler
    writes its programs there after the passes that `compile_step` reads.
    """
    dumping = (
        f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=.*spmd-partitioning.* "
        "--xla_dump_hlo_module_re=.*_step.*"
    )
    return {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache would not be dumped
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # required, but any will do
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "XLA_FLAGS": "" if dump is None else dumping,
    }


def devices_of(topology: Topology) -> list[Any]:
    """Returns JAX devices for the topology, without hardware."""
    from jax.experimental import topologies

    rings = [topology.wraps(direction) for direction in range(len(topology.grid))]
    # Without `wrap` the compiler assumes that no direction is a ring. In three dimensions it then replaces every gather
    # along all of them by an all-reduce of zeros and one shard.
    options: dict[str, Any] = {"wrap": [*rings, False][:3]}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chip == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on rented machines
    one = dataclasses.replace(topology, slices=1)
    return topologies.get_topology_desc(topology_name=str(one), platform="tpu", **options).devices


def compile_step(lower: Callable[[], Any], mesh: Any, topology: Topology, dump: Path) -> Compiled:
    """Lowers and compiles a step in a thread; reads the compiler's files in `dump` as soon as they are complete.

    `lower` returns `jax.jit(f).lower(...)` for a function whose name ends with `_step`. Errors other than running out
    of memory are raised.
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
    out_of_memory = parse_out_of_memory(str(failure[0])) if failure else None
    if failure and not out_of_memory:
        raise failure[0]
    return _read_dump(dump, mesh, topology, out_of_memory, time.perf_counter() - started)


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """Returns the bytes in the compiler's error message, or None for a message of another kind.

    >>> parse_out_of_memory("Ran out of memory on HBM, the total memory required for HLO temporaries (47.25G) exceeds "
    ...               "available HBM (15.75G)").available / 2**30
    15.75
    >>> parse_out_of_memory("Ran out of memory in memory space hbm. Used 18.00G of 15.75G hbm.").needed / 2**30
    18.0
    """
    found = _OUT_OF_MEMORY.search(message)
    if not found or "memory" not in message:
        return None
    needed, needed_unit, available, available_unit = found.groups()
    return OutOfMemory(
        needed=int(float(needed) * _BYTES[needed_unit]), available=int(float(available) * _BYTES[available_unit])
    )


def _read_dump(
    dump: Path, mesh: Any, topology: Topology, out_of_memory: OutOfMemory | None, seconds: float
) -> Compiled:
    text = _read_largest(dump, _PARTITIONED if mesh.size > 1 else _UNPARTITIONED)  # one device: not partitioned
    partitioned = parse(text)
    sent = collectives(partitioned, mesh.shape)
    memory = optimised = None
    if not out_of_memory:
        optimised = parse(_read_largest(dump, _OPTIMISED))
        memory = read_memory(
            _read_largest(dump, _OPTIMISED.replace(".txt", "-buffer-assignment.txt")),
            _read_largest(dump, _OPTIMISED.replace(".txt", "-live-range.txt")),
            optimised,
        )
    return Compiled(
        memory=memory,
        out_of_memory=out_of_memory,
        collectives=tuple(sent),
        ring_links={axes_name(axes): _ring_links(axes, mesh, topology) for axes in {one.axes for one in sent}},
        scattered_bytes=0 if optimised is None else scattered_bytes(optimised),
        summed_gather_bytes=0 if optimised is None else summed_gather_bytes(optimised),
        flops=product_flops(partitioned),
        has_kernels="tpu_custom_call" in text,
        traffic_bytes=0 if optimised is None else memory_traffic(optimised),
        seconds=seconds,
    )


def _ring_links(axes: tuple[str, ...], mesh: Any, topology: Topology) -> float:
    """How many links carry a ring along the axes, by where the first group's devices are in their slice."""
    first = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = np.ravel(mesh.devices[first])
    first_slice = getattr(group[0], "slice_index", 0)
    coordinates = [device.coords for device in group if getattr(device, "slice_index", 0) == first_slice]
    return links_per_device(np.array(coordinates), topology)


def _read_largest(dump: Path, pattern: str) -> str:
    """Reads the largest file that matches: helper programs named `..._step` may be dumped too."""
    return max(dump.glob(pattern), key=lambda path: path.stat().st_size).read_text()
