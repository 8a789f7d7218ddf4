"""The matrix product of every projection, with a backward pass that copies little.

Legend: B batch rows, L sequence, x tokens (one dimension, or B and L), D features in, F features out, H heads, C head
dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from common.sharding.rules import on_mesh

CPU_BLOCKS = 2
"""Blocks of columns into which decoding on a CPU splits a matrix."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """A matrix stored as blocks of columns, each contiguous in memory."""

    blocks: tuple[jax.Array, ...]

    def __getitem__(self, everything: Any) -> "Columns":
        """Returns itself, so that it can stand for a parameter, which is read with `[...]`."""
        return self


def split_columns(w: jax.Array, axes: tuple[str, ...]) -> jax.Array | Columns:
    """Splits one layer's parameter, with logical `axes`, into columns for faster decoding on a CPU.

    A product of few rows takes as long as reading its matrix. Cores parallelise one product poorly, but run two
    products in parallel. An MLP's input matrix is not split: it usually runs in parallel with the other input
    projection.
    """
    match axes:
        case ("embed", "heads" | "kv_heads", "head_dim"):
            axis = 1
        case (_, *_, "embed"):
            axis = len(axes) - 1
        case _:
            return w
    return Columns(tuple(jnp.split(w, CPU_BLOCKS, axis))) if w.shape[axis] % CPU_BLOCKS == 0 else w


def linear(x_BLD: jax.Array, w_DF: jax.Array | Columns, bias_F: jax.Array | None = None) -> jax.Array:
    """Returns `x @ w + bias`, [B, L, F], in the dtype of `x`, to which the parameters are cast."""
    B, L, D = x_BLD.shape
    if isinstance(w_DF, Columns):
        y_BLF = jnp.concatenate([linear(x_BLD, block) for block in w_DF.blocks], axis=-1)
    elif on_mesh():  # merging B and L is impossible if both are sharded
        y_BLF = _matmul(x_BLD, w_DF.astype(x_BLD.dtype))
    else:
        y_BLF = _matmul(x_BLD.reshape(B * L, D), w_DF.astype(x_BLD.dtype)).reshape(B, L, w_DF.shape[1])
    return y_BLF if bias_F is None else y_BLF + bias_F[None, None].astype(x_BLD.dtype)


@jax.custom_vjp
def _matmul(x_xD: jax.Array, w_DF: jax.Array) -> jax.Array:
    return x_xD @ w_DF


def _forward(x_xD: jax.Array, w_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x_xD @ w_DF, (x_xD, w_DF)


def _backward(residuals: tuple[jax.Array, jax.Array], dy_xF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes dw by the product that copies the narrower of `x` and `dy`.

    A CPU copies the left operand of a product to transpose it. The automatic gradient always copies `dy`, but `x` is
    often narrower, and shared by several projections.
    """
    x_xD, w_DF = residuals
    tokens = (tuple(range(x_xD.ndim - 1)),) * 2
    narrow = x_xD.shape[-1] <= dy_xF.shape[-1]
    dw_DF = jnp.tensordot(x_xD, dy_xF, tokens) if narrow else jnp.tensordot(dy_xF, x_xD, tokens).T
    dx_xD = dy_xF @ w_DF.T
    if on_mesh():
        # Otherwise compilers for accelerators postpone the gradients of weights, and keep their operands until then.
        dx_xD, dw_DF = jax.lax.optimization_barrier((dx_xD, dw_DF))
    return dx_xD, dw_DF


_matmul.defvjp(_forward, _backward)


def project(x_BLD: jax.Array, w_DHC: jax.Array | Columns, bias_HC: jax.Array | None = None) -> jax.Array:
    """Projects into heads: [B, L, H, C]."""
    C = jax.tree.leaves(w_DHC)[0].shape[-1]
    w_DF = jax.tree.map(lambda w: w.reshape(w.shape[0], -1), w_DHC)
    bias_F = None if bias_HC is None else bias_HC.reshape(-1)
    y_BLF = linear(x_BLD, w_DF, bias_F)
    return y_BLF.reshape(*x_BLD.shape[:2], y_BLF.shape[-1] // C, C)


def unproject(x_BLHC: jax.Array, w_HCD: jax.Array | Columns, bias_D: jax.Array | None = None) -> jax.Array:
    """Projects out of heads: [B, L, D]."""
    B, L, H, C = x_BLHC.shape
    w_FD = jax.tree.map(lambda w: w.reshape(H * C, -1), w_HCD)
    return linear(x_BLHC.reshape(B, L, H * C), w_FD, bias_D)
