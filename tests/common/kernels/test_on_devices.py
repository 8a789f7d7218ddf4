"""Compares attention on a mesh of eight devices with the plain implementation on one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.kernels.attention import attend
from common.kernels.bias import BiasTable
from common.kernels.choice import Implementation
from common.kernels.visibility import Visibility
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from tests.common.kernels.cases import Operands, error, jit

B, H, G, C = 4, 4, 2, 16
PLAIN = Implementation(kind="plain")
IMPLEMENTATIONS = {
    "flash": Implementation(kind="flash", kernel_block=16, interpret=True),
    "splash": Implementation(kind="splash", kernel_block=128, interpret=True),
    "blocked": Implementation(kind="blocked", block=8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshCase:
    queries: int = 48
    keys: int = 48
    causal: bool = False
    prefix: int = 0
    q_offset: int = 0
    bias: bool = False

    def operands(self) -> Operands:
        """Random q_BQHC, k_BGKC, v_BGKC and table_HR."""
        keys = jax.random.split(jax.random.key(0), 4)
        k, v = (jax.random.normal(key, (B, G, self.keys, C)) for key in keys[1:3])
        return jax.random.normal(keys[0], (B, self.queries, H, C)), k, v, jax.random.normal(keys[3], (H, 32))

    def visibility(self, table_HR: jax.Array) -> Visibility:
        """Each row has two segments and padding, cut at different places; the last row's first keys are padding."""
        segments = []
        for length in (self.queries, self.keys):
            cuts = np.arange(B)[:, None] + length // 3
            at = np.arange(length)[None]
            segments.append(np.where(at < cuts, 1, np.where(at < length - cuts // 2, 2, 0)).astype(np.int32))
        segments[1][-1, : self.keys // 4] = 0
        positions = [jnp.arange(length, dtype=jnp.int32)[None] for length in (self.queries, self.keys)]
        bias = BiasTable(table_HR=table_HR, bidirectional=not self.causal, max_distance=48)
        return Visibility(
            q_segments_BQ=jnp.array(segments[0]),
            k_segments_BK=jnp.array(segments[1]),
            q_positions_BQ=positions[0] + self.q_offset,
            k_positions_BK=positions[1],
            causal=self.causal,
            prefix_length=self.prefix,
            q_offset=self.q_offset,
            bias=bias if self.bias else None,
            consecutive=True,
        )


CASES = {
    "bidirectional": MeshCase(bias=True),
    "causal": MeshCase(causal=True, bias=True),
    "no bias": MeshCase(causal=True),
    "prefix": MeshCase(causal=True, prefix=29, bias=True),
    "cross": MeshCase(queries=32, keys=51),
    "after inputs": MeshCase(queries=32, keys=56, q_offset=24, causal=True),
}


def output_and_gradients(implementation: Implementation, case: MeshCase, mesh: MeshShape | None) -> tuple[Any, ...]:
    """The output, and the gradients of a random weighted sum of it: of queries, keys, values and table."""
    weights = jax.random.normal(jax.random.key(6), (B, case.queries, H, C))

    def total(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*operands[:3], case.visibility(operands[3]), scale=0.3, implementation=implementation)
        return (out * weights).sum(), out

    program = jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))
    if mesh is None:
        gradients, out = program(*case.operands())
    else:
        with jax.set_mesh(make_mesh(mesh)):
            gradients, out = program(*case.operands())
    return out, *gradients


@functools.cache
def expected_of(case: MeshCase) -> tuple[Any, ...]:
    return output_and_gradients(PLAIN, case, None)


EVERY_AXIS = MeshShape(data=2, context=2, tensor=2)
MESHES = [
    *((name, EVERY_AXIS) for name in CASES),
    ("causal", MeshShape(replica=2, fsdp=2, tensor=2)),
    ("prefix", MeshShape(context=4)),
    ("no bias", MeshShape(context=4)),
]


@pytest.mark.parametrize(
    ("kind", "name", "mesh"),
    [
        (kind, name, mesh)
        for kind in IMPLEMENTATIONS
        for name, mesh in MESHES
        if kind != "splash" or not (CASES[name].bias or CASES[name].prefix)
    ],
    ids=str,
)
def test_a_mesh_changes_neither_output_nor_gradients(kind: str, name: str, mesh: MeshShape) -> None:
    implementation, case = IMPLEMENTATIONS[kind], CASES[name]
    found, expected = output_and_gradients(implementation, case, mesh), expected_of(case)
    assert all(error(x, y) <= 1e-5 for x, y in zip(found, expected, strict=True))
    sees_nothing = np.asarray(case.visibility(case.operands()[3]).mask_BQK()).sum(axis=-1) == 0
    assert sees_nothing.any() and all((np.asarray(x)[sees_nothing] == 0).all() for x in found[:2])


@pytest.mark.parametrize("kind", ["splash", "flash", "cudnn"])
def test_a_kernel_that_these_devices_cannot_run_is_an_error(kind: Any) -> None:
    q, k, v, table = CASES["causal"].operands()
    with pytest.raises(UserError, match=f"attention is '{kind}'.*nearest: auto"):
        attend(q, k, v, CASES["causal"].visibility(table), scale=1.0, implementation=Implementation(kind=kind))
