"""Chooses the flash kernels' block sizes by the TPU compiler's static schedules, without a TPU.

    python -m benchmarks.attention_blocks            # all chips; writes common/kernels/block_table.py
    python -m benchmarks.attention_blocks v5e        # prints one chip's figures and writes nothing

libtpu compiles both kernels of one biased call for each chip, head dim and pair of block sizes, and dumps the final
VLIW bundles of each kernel (one bundle is one cycle, stalls apart). The two stretches without branches that use the
matrix unit are the kernel's even and its mixed tile, in this order; see `common.kernels.flash_kernels`. The rest counts
for every step of the grid, though some of it runs only at the first or the last step of a sum: totals are upper bounds.
A call costs the bundles of its tiles, twice for the forward kernel, which a rematerialised layer runs again.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from common.compute.aot import environment
from common.files import write_atomically

CHIPS = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}
HEAD_DIMS = (64, 128)
LENGTHS = (512, 1024, 2048, 4096)
PAIRS = ((512, 512), (1024, 512), (512, 1024))
"""Queries and keys of a block."""
MAX_DISTANCE = 128
TABLE = Path(__file__).parents[1] / "common/kernels/block_table.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundles:
    """Bundles of one kernel: of a tile of each kind, and of a step of the grid besides."""

    even: int
    mixed: int
    step: int


def measure(chip: str, head_dim: int, pair: tuple[int, int]) -> dict[str, Bundles] | None:
    """Compiles in a separate process, as libtpu reads its flags once; None if the blocks do not fit in fast memory."""
    with tempfile.TemporaryDirectory() as folder:
        dumping = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.attention_blocks", "compile", json.dumps([chip, head_dim, *pair])],
            env=os.environ | environment(None) | dumping,
            capture_output=True,
            text=True,
        )
        if done.returncode and "vmem" in done.stderr.lower():
            return None
        if done.returncode:
            raise RuntimeError(f"{chip}, {head_dim}, {pair} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return {kernel: _read(Path(folder), kernel) for kernel in ("forward", "backward")}


def compile_case(chip: str, head_dim: int, block_q: int, block_k: int) -> None:
    """Compiles a biased call and its gradients; only for the process that `measure` starts."""
    import jax
    import jax.numpy as jnp

    from common.compute.aot import devices_of
    from common.compute.topology import parse_topology
    from common.kernels.bias import BiasTable
    from common.kernels.flash import flash
    from common.kernels.visibility import Visibility

    device = jax.sharding.SingleDeviceSharding(devices_of(parse_topology(f"{chip}:{CHIPS[chip]}"))[0])
    heads, length = 2, 4096

    def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, segments: jax.Array) -> jax.Array:
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        seen = Visibility(
            q_segments_BQ=segments,
            k_segments_BK=segments,
            q_positions_BQ=positions,
            k_positions_BK=positions,
            causal=False,
            bias=BiasTable(table_HR=table, bidirectional=True, max_distance=MAX_DISTANCE),
            consecutive=True,
        )
        return flash(q, k, v, seen, scale=1.0, block=(block_q, block_k))

    def gradients(q, k, v, table, segments, dout):  # type: ignore[no-untyped-def]
        out, backward = jax.vjp(partial(attention, segments=segments), q, k, v, table)
        return out, backward(dout)

    queries, keys = array(1, length, heads, head_dim), array(1, heads, length, head_dim)
    table, segments = array(heads, 32, dtype="float32"), array(1, length, dtype="int32")
    jax.jit(gradients).lower(queries, keys, keys, table, segments, queries).compile()


def _read(folder: Path, kernel: str) -> Bundles:
    (bundles,) = folder.glob(f"*flash_{kernel}*[0-9]-final_bundles.txt")
    (usage,) = folder.glob(f"*flash_{kernel}*-final_hlo-static-per-bundle-utilization.txt")
    return parse_bundles(bundles.read_text(), usage.read_text())


def parse_bundles(bundles: str, usage: str) -> Bundles:
    """Reads a kernel's final bundles, and how many operations of each unit (first the matrix unit) each of them has."""
    counts = [line.split() for line in usage.partition("== UTILIZATION:")[2].splitlines()]
    matmuls = [int(row[0]) for row in counts if row]
    ends = {0, len(matmuls)}
    for line in bundles.splitlines():
        found = re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z ,]*):", line)
        if found and found[2].strip():  # a label: something jumps here
            ends.add(int(found[1], 16))
        if found and "sbr.rel" in line:
            ends.add(int(found[1], 16) + 5)  # a branch, and its four delay slots
    order = sorted(end for end in ends if end <= len(matmuls))
    even, mixed = (end - begin for begin, end in itertools.pairwise(order) if sum(matmuls[begin:end]))
    return Bundles(even=even, mixed=mixed, step=len(matmuls) - even - mixed)


def tiles(length: int, pair: tuple[int, int]) -> tuple[int, int]:
    """Returns how many even and how many mixed tiles a bidirectional call of one segment has.

    >>> tiles(4096, (512, 512)), tiles(512, (512, 512))
    ((42, 22), (0, 1))
    """
    block_q, block_k = pair
    firsts = [(i, j) for i in range(0, length, block_q) for j in range(0, length, block_k)]
    even = sum(j + block_k - 1 - i <= -MAX_DISTANCE or j - i - block_q + 1 >= MAX_DISTANCE for i, j in firsts)
    return even, len(firsts) - even


def total(length: int, pair: tuple[int, int], kernels: dict[str, Bundles]) -> int:
    """Returns the bundles of one head: two times forward, and backward."""
    even, mixed = tiles(length, pair)

    def of(kernel: Bundles) -> int:
        return even * kernel.even + mixed * kernel.mixed + (even + mixed) * kernel.step

    return 2 * of(kernels["forward"]) + of(kernels["backward"])


def main(chips: list[str]) -> None:
    rows = []
    for chip in chips or CHIPS:
        for head_dim in HEAD_DIMS:
            found = {}
            for pair in PAIRS:
                kernels = measure(chip, head_dim, pair)
                print(chip, head_dim, pair, "does not fit" if kernels is None else kernels, flush=True)
                if kernels is not None:
                    found[pair] = kernels
            for length in LENGTHS:
                totals = {p: total(length, p, kernels) for p, kernels in found.items() if max(p) <= length}
                best = min(totals, key=totals.__getitem__)
                print(chip, head_dim, length, totals, "->", best, flush=True)
                rows.append(f'    ("{chip}", {head_dim}, {length}): {best},\n')
    if not chips:
        version, today = importlib.metadata.version("libtpu"), datetime.date.today().isoformat()
        text = TABLE_HEAD.format(version=version, today=today) + "".join(rows) + "}\n"
        write_atomically(TABLE, text.encode())


TABLE_HEAD = '''"""Block sizes of the flash kernels, written by `python -m benchmarks.attention_blocks`: do not edit."""

LIBTPU, DATE = "{version}", "{today}"
"""The compiler whose static schedules decided, and when."""

BLOCKS: dict[tuple[str, int, int], tuple[int, int]] = {{  # (chip, head dim, length): (queries, keys)
'''


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_case(*json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
