"""Flash attention compiled for TPUs that are not here: it is taken, and needs little memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPU, is absent"),
]

TOPOLOGIES = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
# They must stand before JAX is imported: none is looked for, and several compilers may run at once.
VARIABLES = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from common.kernels import attention
from common.kernels.bias import BiasTable
from common.kernels.choice import How
from common.kernels.flash import flash
from common.kernels.visibility import Visibility

case = json.loads(sys.argv[1])
topology = topologies.get_topology_desc(topology_name=case["topology"], platform="tpu")
sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
B, L, H, G, C = (case[size] for size in "BLHGC")

def array(*shape, dtype=case["dtype"]):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

def attend(q, k, v, table, segments):
    positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
    bias = BiasTable(table_HR=table, bidirectional=not case["causal"], max_distance=128)
    seen = Visibility(q_segments_BQ=segments, k_segments_BK=segments, q_positions_BQ=positions,
                      k_positions_BK=positions, causal=case["causal"], bias=bias)
    if case["plain"]:
        return attention.attend(q, k, v, seen, scale=1.0, how=How(kind="plain"))
    return flash(q, k, v, seen, scale=1.0)

def backward(q, k, v, table, segments, dout):
    return jax.vjp(lambda *x: attend(*x, segments), q, k, v, table)[1](dout)

keys = array(B, G, L, C)
arguments = [array(B, L, H, C), keys, keys, array(H, 32, dtype="float32"), array(B, L, dtype="int32")]
if case["backward"]:
    arguments.append(array(B, L, H, C))
with jax.default_matmul_precision("highest" if case["dtype"] == "float32" else "default"):
    compiled = jax.jit(backward if case["backward"] else attend).lower(*arguments).compile()
memory = compiled.memory_analysis()
print(json.dumps({
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "peak": memory.peak_memory_in_bytes,
}))
"""
ROOT = Path(__file__).parents[3]
SIZES = {"B": 4, "L": 4096, "H": 16, "G": 16, "C": 64, "dtype": "bfloat16", "plain": False}


def compiled(chip: str, **case: Any) -> dict[str, int]:
    """Bytes that the compiler wants, in a process of its own."""
    case = SIZES | {"topology": f"{chip}:{TOPOLOGIES[chip]}"} | case
    command = [sys.executable, "-c", PROGRAM, json.dumps(case)]
    environment = os.environ | VARIABLES | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_no_more_than_the_operands_again(chip: str, causal: bool, backward: bool) -> None:
    """Sixteen heads of 4096 x 4096 are 1024 MiB in float32, for one row of the four."""
    memory = compiled(chip, causal=causal, backward=backward)
    print(chip, causal, backward, {name: f"{size / 2**20:.0f} MiB" for name, size in memory.items()})
    assert memory["temporaries"] <= memory["arguments"]
    assert memory["peak"] <= 2 * (memory["arguments"] + memory["outputs"])


@pytest.mark.parametrize("backward", [False, True])
def test_the_plain_implementation_needs_a_hundred_times_as_much(backward: bool) -> None:
    """On the one chip here whose memory holds it."""
    flash, plain = (compiled("v5p", causal=True, backward=backward, plain=plain) for plain in (False, True))
    assert plain["peak"] > 100 * flash["peak"]


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(
    "case",
    [
        {"C": 128, "G": 2},
        {"C": 128, "G": 1},
        {"C": 32, "G": 8, "L": 130},
        {"C": 128, "G": 4, "L": 1000, "dtype": "float32"},
        {"B": 1, "L": 32768},
    ],
    ids=["grouped", "one key head", "short", "float32", "long"],
)
def test_other_shapes_are_taken(chip: str, case: dict[str, Any]) -> None:
    compiled(chip, causal=True, backward=True, **case)
