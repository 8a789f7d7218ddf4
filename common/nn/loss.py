"""Cross-entropy from hidden states and the head's weights, a chunk of positions at a time.

Legend: B batch rows, T target slots, U target slots of a row in one chunk, N chunks, D model, V vocab.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from common.sharding.rules import num_shards
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
    """Returns two float32 scalars: the sum of `weight * (CE + z_loss * log(Z)^2)`, and the sum of `weight * CE`.

    On each device, logits exist for at most `chunk` positions at a time, or for one position of each row
    (`slots_at_once`). Under differentiation, the gradients are computed in the same pass, so no logits are recomputed.
    Only the first result has a gradient, and only for `h_BTD` and `w_DV`; the second is a metric. z-loss as in T5X
    (PaLM, arXiv 2204.02311, section 5).

    On a mesh, every device processes its own positions. The gradient of `w_DV` is summed over devices once, after the
    last chunk, and scattered along `fsdp`.

    Args:
        h_BTD: hidden states in the activation dtype.
        w_DV: float32; products are computed in the dtype of `h_BTD` and accumulated in float32.
        targets_BT: int32 ids.
        weights_BT: float32; slots of weight 0 have no effect.
        z_loss: weight of log(Z)^2.
        chunk: most positions, over all rows of a device, whose logits exist at a time.
        unroll: loops over chunks in Python instead of a scan.
    """
    run = partial(_over_chunks, z_loss=z_loss, chunk=chunk, unroll=unroll, gradients=False)
    total, ce, _, _ = _on_each_device(run, h_BTD, w_DV, targets_BT, weights_BT)
    return total, ce


def _forward(h_BTD, w_DV, targets_BT, weights_BT, z_loss, chunk, unroll):  # type: ignore[no-untyped-def]
    run = partial(_over_chunks, z_loss=z_loss, chunk=chunk, unroll=unroll, gradients=True)
    total, ce, dh_BTD, dw_DV = _on_each_device(run, h_BTD, w_DV, targets_BT, weights_BT)
    return (total, ce), (dh_BTD, dw_DV)


def _backward(z_loss, chunk, unroll, residuals, cotangents):  # type: ignore[no-untyped-def]
    dh_BTD, dw_DV = residuals
    scale = cotangents[0]
    return (dh_BTD * scale.astype(dh_BTD.dtype), dw_DV * scale, None, None)


cross_entropy.defvjp(_forward, _backward)


def slots_at_once(rows: int, length: int, chunk: int) -> int:
    """Returns the slots of each row in one chunk: at most `chunk` over all rows, but at least one per row.

    Of the numbers of chunks below twice the fewest, it takes the first that divides `length`, so that no chunk is
    shorter than the others; the fewest if there is none.

    >>> [slots_at_once(rows, length, 512) for rows, length in ((8, 114), (12, 2048), (1000, 64), (1, 521))]
    [57, 32, 1, 261]
    """
    fewest = -(-length // max(1, chunk // rows))
    dividing = (chunks for chunks in range(fewest, 2 * fewest) if length % chunks == 0)
    return -(-length // next(dividing, fewest))


def _on_each_device(
    run: Any, h_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """Runs `run` on each device's own positions and sums over devices: (total, ce, dh_BTD, dw_DV).

    With P devices along the axes that shard rows, Q along `context` and F along `fsdp`:

        operand                      on one device         sum over devices
        h_BTD, targets, weights      [B/P, T/Q, ...]
        w_DV                         [D, V]                (sharded along `tensor` by the compiler)
        total, ce                    []                    all-reduce
        dh_BTD                       [B/P, T/Q, D]
        dw_DV                        [D, V] -> [D/F, V]    reduce-scatter along `fsdp`, all-reduce along the others
    """
    w_DV = w_DV.astype(h_BTD.dtype)
    if num_shards("batch") * num_shards("length") == 1:
        return run(h_BTD, w_DV, targets_BT, weights_BT)  # the compiler inserts the sums along `tensor`

    def local(*operands: jax.Array) -> tuple[jax.Array, jax.Array, Any, Any]:
        total, ce, dh_BTD, dw_DV = run(*operands)
        total, ce = jax.lax.psum((total, ce), POSITION_AXES)
        if dw_DV is not None:
            dw_DV = jax.lax.psum_scatter(dw_DV, "fsdp", scatter_dimension=0, tiled=True)
            dw_DV = jax.lax.psum(dw_DV, [axis for axis in POSITION_AXES if axis != "fsdp"])
            # The rest of the backward pass starts from dh, so this makes it wait for the sum. Otherwise the compiler
            # may postpone the sum to the optimizer's update, and the unsummed [D, V] stays in memory until then.
            dh_BTD, dw_DV = jax.lax.optimization_barrier((dh_BTD, dw_DV))
        return total, ce, dh_BTD, dw_DV

    positions, replicated = PartitionSpec(ROW_AXES, "context"), PartitionSpec()
    return jax.shard_map(
        local,
        in_specs=(positions, replicated, positions, positions),
        out_specs=(replicated, replicated, positions, PartitionSpec("fsdp")),
        axis_names=set(POSITION_AXES),
        check_vma=False,  # the scan's carry starts as zeros that are equal everywhere, and ends different per device
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
    """Sums chunk after chunk; returns (total, ce, dh_BTD, dw_DV), the last two None unless `gradients`.

    Full chunks run in one scan, unless `unroll`; a shorter last chunk runs after it.
    """
    B, T, D = h_BTD.shape
    U = slots_at_once(B, T, chunk)
    add_chunk = partial(_add_chunk, w_DV=w_DV, z_loss=z_loss, gradients=gradients)
    carry: Any = (jnp.float32(0), jnp.float32(0), jnp.zeros_like(w_DV, jnp.float32) if gradients else None)
    scanned = 0 if unroll else T // U
    dh_parts = []
    if scanned:
        # [B, T, ...] -> [N, B, U, ...]: rows keep their sharding.
        chunks = [
            jnp.moveaxis(x[:, : scanned * U].reshape(B, scanned, U, *x.shape[2:]), 1, 0)
            for x in (h_BTD, targets_BT, weights_BT)
        ]
        carry, dh_NBUD = jax.lax.scan(lambda carry, chunk: add_chunk(carry, *chunk), carry, tuple(chunks))
        if gradients:
            dh_parts.append(jnp.moveaxis(dh_NBUD, 0, 1).reshape(B, scanned * U, D))
    for start in range(scanned * U, T, U):
        part = slice(start, min(start + U, T))
        carry, dh_BUD = add_chunk(carry, h_BTD[:, part], targets_BT[:, part], weights_BT[:, part])
        dh_parts.append(dh_BUD)
    total, ce, dw_DV = carry
    return total, ce, jnp.concatenate(dh_parts, axis=1) if gradients else None, dw_DV


def _add_chunk(
    carry: tuple[jax.Array, jax.Array, Any],
    h_BUD: jax.Array,
    targets_BU: jax.Array,
    weights_BU: jax.Array,
    *,
    w_DV: jax.Array,
    z_loss: float,
    gradients: bool,
) -> tuple[tuple[jax.Array, jax.Array, Any], Any]:
    """Adds one chunk to (total, ce, dw_DV); also returns its dh_BUD. Both gradients are None unless `gradients`."""
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
