"""Checks the arguments for cuDNN (lengths instead of segments) by passing them to XLA. None of it has run on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.kernels.attention import attend
from common.kernels.choice import Implementation
from common.kernels.cudnn import cudnn
from common.kernels.visibility import Visibility
from tests.common.kernels.cases import error, jit

LENGTHS = {"self": ((7, 0, 12, 1), (7, 0, 12, 1)), "cross": ((7, 3, 12, 0), (5, 0, 9, 4))}
B, L, H, G, C = 4, 12, 4, 2, 8


@pytest.mark.parametrize(("name", "causal"), [("self", False), ("self", True), ("cross", False)])
def test_lengths_are_segments(name: str, causal: bool) -> None:
    """Output and gradients agree, including rows without queries and rows without keys."""
    at = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
    q_segments, k_segments = ((at < jnp.array(x)[:, None]).astype(jnp.int32) for x in LENGTHS[name])
    seen = Visibility(
        q_segments_BQ=q_segments,
        k_segments_BK=k_segments,
        q_positions_BQ=at,
        k_positions_BK=at,
        causal=causal,
        one_segment=True,
    )
    keys = jax.random.split(jax.random.key(0), 4)
    q, weights = (jax.random.normal(key, (B, L, H, C)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, G, L, C)) for key in keys[2:])

    def total(of_xla: bool, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        if of_xla:
            out = cudnn(*operands, seen, scale=0.3, implementation="xla")
        else:
            out = attend(*operands, seen, scale=0.3, implementation=Implementation(kind="plain"))
        return (out * weights).sum(), out

    (found, of_found), (expected, of_expected) = (
        jit(jax.grad(total, argnums=(1, 2, 3), has_aux=True), static_argnums=0)(of_xla, q, k, v)[::-1]
        for of_xla in (True, False)
    )
    blind = (np.asarray(q_segments) == 0) | (np.asarray(k_segments).sum(axis=1) == 0)[:, None]
    assert blind.any() and (np.asarray(found)[blind] == 0).all() and (np.asarray(of_found[0])[blind] == 0).all()
    assert error(found, expected) <= 1e-5
    assert all(error(x, y) <= 1e-5 for x, y in zip(of_found, of_expected, strict=True))
