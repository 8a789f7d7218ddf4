"""One matrix product for every projection, with a backward pass that copies little.

Legend: B batch rows, L sequence, P = B * L tokens, D features in, F features out, H heads, C head dim.
"""

import jax


def linear(x_BLD: jax.Array, w_DF: jax.Array, bias_F: jax.Array | None = None) -> jax.Array:
    """`x @ w + bias` in the dtype of `x` (parameters are cast to it): [B, L, F]."""
    B, L, D = x_BLD.shape
    y_BLF = _matmul(x_BLD.reshape(B * L, D), w_DF.astype(x_BLD.dtype)).reshape(B, L, w_DF.shape[1])
    return y_BLF if bias_F is None else y_BLF + bias_F[None, None].astype(x_BLD.dtype)


@jax.custom_vjp
def _matmul(x_PD: jax.Array, w_DF: jax.Array) -> jax.Array:
    return x_PD @ w_DF


def _forward(x_PD: jax.Array, w_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x_PD @ w_DF, (x_PD, w_DF)


def _backward(residuals: tuple[jax.Array, jax.Array], dy_PF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A CPU product wants its left operand untransposed, so a transposed one is copied: copy the narrower one.

    The automatic gradient always copies `dy`; `x` is often narrower, and shared by several projections.
    """
    x_PD, w_DF = residuals
    narrow = x_PD.shape[1] <= dy_PF.shape[1]
    dw_DF = x_PD.T @ dy_PF if narrow else (dy_PF.T @ x_PD).T
    return dy_PF @ w_DF.T, dw_DF


_matmul.defvjp(_forward, _backward)


def project(x_BLD: jax.Array, w_DHC: jax.Array, bias_HC: jax.Array | None = None) -> jax.Array:
    """Into heads: [B, L, H, C]."""
    D, H, C = w_DHC.shape
    bias_F = None if bias_HC is None else bias_HC.reshape(H * C)
    return linear(x_BLD, w_DHC.reshape(D, H * C), bias_F).reshape(*x_BLD.shape[:2], H, C)


def unproject(x_BLHC: jax.Array, w_HCD: jax.Array, bias_D: jax.Array | None = None) -> jax.Array:
    """Out of heads: [B, L, D]."""
    H, C, D = w_HCD.shape
    return linear(x_BLHC.reshape(*x_BLHC.shape[:2], H * C), w_HCD.reshape(H * C, D), bias_D)
