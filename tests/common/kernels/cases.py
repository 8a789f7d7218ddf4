"""Cases of attention, a reference in NumPy, and the outputs and gradients of an implementation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.kernels import attention
from common.kernels.bias import BiasTable, relative_bucket
from common.kernels.choice import Implementation
from common.kernels.visibility import Visibility

SCALE = 0.3
# An interpreted kernel takes longer to compile than to run.
COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=COMPILE_FAST)
Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    queries: int = 100
    keys: int = 100
    heads: int = 2
    groups: int = 2
    head_dim: int = 32
    causal: bool = False
    prefix: int = 0
    q_offset: int = 0
    bias: bool = True
    block: int = 32
    rows: int = 2

    def operands(self, dtype: Any = jnp.float32) -> Operands:
        """Random q_BQHC, k_BGKC, v_BGKC and table_HR."""
        keys, C = jax.random.split(jax.random.key(0), 4), self.head_dim
        q = jax.random.normal(keys[0], (self.rows, self.queries, self.heads, C), dtype)
        k, v = (jax.random.normal(key, (self.rows, self.groups, self.keys, C), dtype) for key in keys[1:3])
        return q, k, v, jax.random.normal(keys[3], (self.heads, 32))

    def visibility(self, table_HR: jax.Array | None) -> Visibility:
        """Rows of two segments and padding; the last row is padding and then one segment."""
        q_segments, k_segments = (np.ones((self.rows, n), np.int32) for n in (self.queries, self.keys))
        for segments in (q_segments, k_segments):
            length = segments.shape[1]
            segments[:-1, length // 3 :] = 2
            segments[:-1, length - length // 5 :] = 0
            segments[-1, : length // 6] = 0
        positions = [jnp.broadcast_to(jnp.arange(n)[None], (self.rows, n)) for n in (self.queries, self.keys)]
        return Visibility(
            q_segments_BQ=jnp.array(q_segments),
            k_segments_BK=jnp.array(k_segments),
            q_positions_BQ=positions[0] + self.q_offset,
            k_positions_BK=positions[1],
            causal=self.causal,
            prefix_length=self.prefix,
            q_offset=self.q_offset,
            bias=None
            if table_HR is None or not self.bias
            else BiasTable(table_HR=table_HR, bidirectional=not self.causal, max_distance=48),
            consecutive=True,
        )


def reference(case: AttentionCase, q: Any, k: Any, v: Any, table: Any) -> np.ndarray:
    """The definition of attention, in float64."""
    seen, bias = case.visibility(None), np.zeros((case.heads, case.queries, case.keys))
    q_segments, k_segments = np.asarray(seen.q_segments_BQ), np.asarray(seen.k_segments_BK)
    mask = (q_segments[:, :, None] == k_segments[:, None]) & (k_segments[:, None] != 0)
    i, j = np.indices((case.queries, case.keys))
    i += case.q_offset
    if case.causal:
        mask &= (j <= i) | ((i < case.prefix) & (j < case.prefix))
    if case.bias:
        bucket = relative_bucket(jnp.array(j - i), bidirectional=not case.causal, buckets=32, max_distance=48)
        bias = np.asarray(table, np.float64)[:, np.asarray(bucket)]
    k, v = (np.repeat(np.asarray(x, np.float64), case.heads // case.groups, axis=1) for x in (k, v))
    logits = np.einsum("bqhc,bhkc->bhqk", np.asarray(q, np.float64) * SCALE, k) + bias
    weights = np.where(mask[:, None], np.exp(logits - logits.max()), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bhkc->bqhc", weights / np.where(total > 0, total, 1.0), v)


def plain(case: AttentionCase, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
    return attention.attend(q, k, v, case.visibility(table), scale=SCALE, implementation=Implementation(kind="plain"))


def output_and_gradients(
    attend: Callable[..., jax.Array], case: AttentionCase, operands: Operands
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The output, and the gradients of a random weighted sum of it: of queries, keys, values and table."""
    weights = jax.random.normal(jax.random.key(6), operands[0].shape)

    def total(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(case, *operands)
        return (out.astype(jnp.float32) * weights).sum(), out

    gradients, out = jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*operands)
    return out, dict(zip(("q", "k", "v", "table"), gradients, strict=True))


def error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def check_no_leak(run: Callable[..., jax.Array], case: AttentionCase) -> None:
    """Checks bit for bit that huge keys in segment 1 and in padding do not change the output in segment 2."""
    q, k, v, table = case.operands()
    segments = np.asarray(case.visibility(None).q_segments_BQ)[0]
    others = jnp.array(segments == 2, jnp.float32)[:, None, None]

    def total(planted: jax.Array) -> tuple[jax.Array, jax.Array]:
        huge_k, huge_v = (x.at[0, :, 0].set(planted).at[0, :, -1].set(planted) for x in (k, v))
        out = run(case, q, huge_k, huge_v, table)[0]
        return (out * others).sum(), out

    look = jit(jax.grad(total, has_aux=True))
    _, before = look(jnp.ones((case.groups, case.head_dim)))
    for size in (1e4, 1e18, 1e30):
        gradient, after = look(jnp.full((case.groups, case.head_dim), size))
        assert (np.asarray(before)[segments == 2] == np.asarray(after)[segments == 2]).all()
        assert not np.allclose(before[segments == 1], after[segments == 1])
        assert (np.asarray(gradient) == 0).all()
