"""Compiles the attention kernels for TPUs that are not here; checks that they compile and need little memory."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.compute.aot import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPU, is absent"),
]

TOPOLOGIES = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
# Set before JAX is imported: JAX then looks for no TPU, and several compilers may run at once.
VARIABLES = environment(None)
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from common.kernels.attention import attend
from common.kernels.bias import BiasTable
from common.kernels.choice import Implementation
from common.kernels.visibility import Visibility
from common.sharding.rules import compute_spec
from common.sharding.shape import MESH_AXES, MeshShape

case = json.loads(sys.argv[1])
topology = topologies.get_topology_desc(topology_name=case["topology"], platform="tpu")
shape = MeshShape(**case["mesh"])
# Not by jax.make_mesh, which refuses a v4 whose two cores per chip are separate devices, as here.
devices = np.array(topology.devices[: shape.devices]).reshape(tuple(shape.sizes().values()))
mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * devices.ndim)
B, L, H, G, C = (case[size] for size in "BLHGC")

def array(*shape, axes, dtype=case["dtype"]):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, compute_spec(*axes)))

def attention(q, k, v, table, segments):
    positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
    bias = BiasTable(table_HR=table, bidirectional=not case["causal"], max_distance=128) if case["bias"] else None
    seen = Visibility(q_segments_BQ=segments, k_segments_BK=segments, q_positions_BQ=positions,
                      k_positions_BK=positions, causal=case["causal"], prefix_length=case["prefix"], bias=bias,
                      consecutive=True)
    return attend(q, k, v, seen, scale=1.0, implementation=Implementation(kind=case["kind"]))

def backward(q, k, v, table, segments, dout):
    return jax.vjp(lambda *x: attention(*x, segments), q, k, v, table)[1](dout)

queries = array(B, L, H, C, axes=("batch", "length", "heads", None))
keys = array(B, G, L, C, axes=("batch", "kv_heads", None, None))
table = array(H, 32, axes=("heads", None), dtype="float32")
arguments = [queries, keys, keys, table, array(B, L, axes=("batch", "length"), dtype="int32")]
if case["backward"]:
    arguments.append(queries)
precision = "highest" if case["dtype"] == "float32" else "default"
with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
    lowered = jax.jit(backward if case["backward"] else attention).lower(*arguments)
    compiled = lowered.compile()
memory = compiled.memory_analysis()
print(json.dumps({
    "kernels": sorted(set(re.findall('kernel_name = "([a-z]+)_', lowered.as_text()))),
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "peak": memory.peak_memory_in_bytes,
}))
"""
ROOT = Path(__file__).parents[3]
SIZES: dict[str, Any] = {"B": 4, "L": 4096, "H": 16, "G": 16, "C": 64, "dtype": "bfloat16"}
CASE: dict[str, Any] = {"kind": "auto", "mesh": {}, "bias": True, "prefix": 0, "causal": True, "backward": True}


def compile_attention(chip: str, kernels: list[str], **case: Any) -> dict[str, int]:
    """Compiles in another process, checks which kernels the program has, and returns its memory in bytes."""
    case = SIZES | CASE | {"topology": f"{chip}:{TOPOLOGIES[chip]}"} | case
    command = [sys.executable, "-c", PROGRAM, json.dumps(case)]
    environment = os.environ | VARIABLES | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("kernels") == kernels
    return found


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["flash", "splash"])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_no_array_of_queries_times_keys(chip: str, kernel: str, causal: bool, backward: bool) -> None:
    """Sixteen heads of 4096 x 4096 are 1024 MiB in float32, for one row of the four.

    Splash attention pads heads of 64 to 128 and writes its log-sums 128 times over: it needs more than the operands,
    but less than that.
    """
    memory = compile_attention(chip, [kernel], kind=kernel, bias=kernel == "flash", causal=causal, backward=backward)
    print(chip, kernel, causal, backward, {name: f"{size / 2**20:.0f} MiB" for name, size in memory.items()})
    if kernel == "flash":
        assert memory["temporaries"] <= memory["arguments"]
        assert memory["peak"] <= 2 * (memory["arguments"] + memory["outputs"])
    else:
        assert memory["temporaries"] <= 1024 * 2**20


@pytest.mark.parametrize("backward", [False, True])
def test_the_plain_implementation_needs_a_hundred_times_as_much(backward: bool) -> None:
    """Compiled for the one chip whose memory is large enough."""
    flash = compile_attention("v5p", ["flash"], backward=backward)
    plain = compile_attention("v5p", [], backward=backward, kind="plain")
    assert plain["peak"] > 100 * flash["peak"]


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("kernel", ["flash", "splash"])
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
def test_other_shapes_compile(chip: str, kernel: str, case: dict[str, Any]) -> None:
    compile_attention(chip, [kernel], kind=kernel, bias=kernel == "flash", **case)


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("splash", {"bias": False}),
        ("splash", {"bias": False, "causal": False, "G": 4}),
        ("flash", {}),
        ("flash", {"bias": False, "prefix": 1000, "L": 2200}),
    ],
    ids=str,
)
def test_kernels_compile_on_a_mesh(chip: str, kernel: str, case: dict[str, Any]) -> None:
    """Length and heads are split in two, and each device runs the kernel on its shard."""
    compile_attention(chip, [kernel], kind=kernel, mesh={"context": 2, "tensor": 2}, **case)
