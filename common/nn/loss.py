"""Cross-entropy from hidden states and the head's weights, a chunk of positions at a time.

Legend: B batch rows, T target slots, U target slots of a row in one chunk, D model, V vocab.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from common.sharding.rules import parts
from common.sharding.shape import POSITION_AXES, ROW_AXES


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    h_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    chunk: int,
    unroll: bool,
) -> tuple[jax.Array, jax.Array]:
    """Two float32 scalars: sum of `weight * (CE + z_loss * log(Z)^2)`, and the sum of `weight * CE` alone.

    Logits never exist for more than `chunk` positions of all rows of a device, or one of each row (`slots_at_once`).
    Under differentiation the gradients are formed in the same pass, so nothing is recomputed. Only the first result
    carries a gradient, and only to `h_BTD` and `w_DV`; the second is for metrics. z-loss as in T5X (PaLM, arXiv
    2204.02311, section 5).

    On a mesh every device goes over its own positions, and the gradient of `w_DV` is summed over devices once, at the
    end, each keeping the part that it stores.

    Args:
        h_BTD: activation dtype.
        w_DV: float32; products are taken in the dtype of `h_BTD` and summed in float32.
        targets_BT: int32 ids.
        weights_BT: float32; slots of weight 0 count for nothing.
        unroll: a Python loop over chunks instead of a scan.
    """
    run = partial(_over_chunks, z_loss=z_loss, chunk=chunk, unroll=unroll, gradients=False)
    total, ce, _, _ = _on_devices(run, h_BTD, w_DV, targets_BT, weights_BT)
    return total, ce


def _forward(h_BTD, w_DV, targets_BT, weights_BT, z_loss, chunk, unroll):  # type: ignore[no-untyped-def]
    run = partial(_over_chunks, z_loss=z_loss, chunk=chunk, unroll=unroll, gradients=True)
    total, ce, dh_BTD, dw_DV = _on_devices(run, h_BTD, w_DV, targets_BT, weights_BT)
    return (total, ce), (dh_BTD, dw_DV)


def _backward(z_loss, chunk, unroll, residuals, cotangents):  # type: ignore[no-untyped-def]
    dh_BTD, dw_DV = residuals
    scale = cotangents[0]
    return (dh_BTD * scale.astype(dh_BTD.dtype), dw_DV * scale, None, None)


cross_entropy.defvjp(_forward, _backward)


def slots_at_once(rows: int, length: int, chunk: int) -> int:
    """Slots of each row that are taken together: at most `chunk` of all rows, or one of each, and mostly as many in
    every turn.

    >>> [slots_at_once(rows, length, 512) for rows, length in ((8, 114), (12, 2048), (1000, 64), (1, 521))]
    [57, 32, 1, 261]
    """
    turns = -(-length // max(1, chunk // rows))
    even = (more for more in range(turns, 2 * turns) if length % more == 0)
    return -(-length // next(even, turns))


def _on_devices(
    run: Any, h_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """`run` on each device's positions, with all of the weights that `tensor` does not split; sums over devices."""
    w_DV = w_DV.astype(h_BTD.dtype)
    if parts("batch") * parts("length") == 1:  # no sums over devices but along `tensor`, which the compiler sees to
        return run(h_BTD, w_DV, targets_BT, weights_BT)

    def local(*operands: jax.Array) -> tuple[jax.Array, jax.Array, Any, Any]:
        total, ce, dh_BTD, dw_DV = run(*operands)
        total, ce = jax.lax.psum((total, ce), POSITION_AXES)
        if dw_DV is not None:
            dw_DV = jax.lax.psum_scatter(dw_DV, "fsdp", scatter_dimension=0, tiled=True)
            dw_DV = jax.lax.psum(dw_DV, [axis for axis in POSITION_AXES if axis != "fsdp"])
            # The backward pass, which begins with dh, waits: else the whole sum would stay until the update needs it.
            dh_BTD, dw_DV = jax.lax.optimization_barrier((dh_BTD, dw_DV))
        return total, ce, dh_BTD, dw_DV

    split, whole = PartitionSpec(ROW_AXES, "context"), PartitionSpec()
    return jax.shard_map(
        local,
        in_specs=(split, whole, split, split),
        out_specs=(whole, whole, split, PartitionSpec("fsdp")),
        axis_names=set(POSITION_AXES),
        check_vma=False,  # the scan's sums begin as the same zeros everywhere, and end as each device's own
    )(h_BTD, w_DV, targets_BT, weights_BT)


def _over_chunks(
    h_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float,
    chunk: int,
    unroll: bool,
    gradients: bool,
) -> tuple[jax.Array, jax.Array, Any, Any]:
    B, T, D = h_BTD.shape
    U = slots_at_once(B, T, chunk)
    one = partial(_one_chunk, w_DV=w_DV, z_loss=z_loss, gradients=gradients)
    zero = (jnp.float32(0), jnp.float32(0), jnp.zeros_like(w_DV, jnp.float32) if gradients else None)
    whole = 0 if unroll else T // U
    carry, dh_parts = zero, []
    if whole:
        # [T] -> [chunks, U] in front, so that rows stay sharded as they are.
        split = [
            jnp.moveaxis(x[:, : whole * U].reshape(B, whole, U, *x.shape[2:]), 1, 0)
            for x in (h_BTD, targets_BT, weights_BT)
        ]
        carry, dh = jax.lax.scan(lambda carry, x: one(carry, *x), carry, tuple(split))
        if gradients:
            dh_parts.append(jnp.moveaxis(dh, 0, 1).reshape(B, whole * U, D))
    for start in range(whole * U, T, U):
        part = slice(start, min(start + U, T))
        carry, dh = one(carry, h_BTD[:, part], targets_BT[:, part], weights_BT[:, part])
        dh_parts.append(dh)
    total, ce, dw_DV = carry
    return total, ce, jnp.concatenate(dh_parts, axis=1) if gradients else None, dw_DV


def _one_chunk(
    carry: tuple[jax.Array, jax.Array, Any],
    h_BUD: jax.Array,
    targets_BU: jax.Array,
    weights_BU: jax.Array,
    *,
    w_DV: jax.Array,
    z_loss: float,
    gradients: bool,
) -> tuple[tuple[jax.Array, jax.Array, Any], Any]:
    total, ce, dw_DV = carry
    logits_BUV = jnp.einsum("BUD,DV->BUV", h_BUD, w_DV, preferred_element_type=jnp.float32)
    is_target_BUV = jnp.arange(w_DV.shape[1], dtype=jnp.int32)[None, None] == targets_BU[..., None]
    peak_BU1 = logits_BUV.max(axis=-1, keepdims=True)
    exp_BUV = jnp.exp(logits_BUV - peak_BU1)
    sum_BU1 = exp_BUV.sum(axis=-1, keepdims=True)
    log_z_BU = (jnp.log(sum_BU1) + peak_BU1)[..., 0]
    ce_BU = log_z_BU - jnp.where(is_target_BUV, logits_BUV, 0).sum(axis=-1)
    ce += (weights_BU * ce_BU).sum()
    total += (weights_BU * (ce_BU + z_loss * jnp.square(log_z_BU))).sum()
    if not gradients:
        return (total, ce, None), None
    on_probability_BU1 = (weights_BU * (1 + 2 * z_loss * log_z_BU))[..., None]
    dlogits_BUV = on_probability_BU1 / sum_BU1 * exp_BUV - jnp.where(is_target_BUV, weights_BU[..., None], 0)
    dlogits_BUV = dlogits_BUV.astype(h_BUD.dtype)
    dh_BUD = jnp.einsum("BUV,DV->BUD", dlogits_BUV, w_DV)
    dw_DV += jnp.einsum("BUD,BUV->DV", h_BUD, dlogits_BUV, preferred_element_type=jnp.float32)
    return (total, ce, dw_DV), dh_BUD
