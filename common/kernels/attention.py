"""Attention: the choice among implementations, and on a mesh each device's part of it.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, C head dim, R relative buckets.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from common.kernels.blocked import blocked
from common.kernels.choice import Case, How, Kind, choose
from common.kernels.cudnn import cudnn
from common.kernels.flash import flash
from common.kernels.plain import plain
from common.kernels.splash import Part, splash
from common.kernels.visibility import Visibility
from common.sharding.rules import compute_spec, num_shards, on_mesh


def attend(
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    how: How,
) -> jax.Array:
    """out_BQHC in the dtype of `q`; logits and softmax in float32.

    A query that sees no key gets exactly 0, with gradient 0. Masked logits are replaced, never added to, so that no key
    of a stranger, however large, can leak. `how` names the implementation; decoding takes the plain one, which holds
    all logits at once. Several rows of queries in turn may share a row of keys, as the beams of a prompt do; then
    nothing may be causal.

    On a mesh every other implementation computes on each device its own rows, heads and queries: rows and heads as the
    rules deal them out, queries along `length`, against keys and values gathered along it. The plain one, and what does
    not divide by the mesh, is left to the compiler. Raises UserError where `how` wants what these devices cannot run.
    """
    if q_BQHC.shape[0] != k_BGKC.shape[0]:
        rows = k_BGKC.shape[0]
        out_BQHC = attend(
            q_BQHC.reshape(rows, -1, *q_BQHC.shape[2:]),
            k_BGKC,
            v_BGKC,
            visibility.gathered(rows),
            scale=scale,
            how=how,
        )
        return out_BQHC.reshape(q_BQHC.shape)
    if 0 in (q_BQHC.shape[1], k_BGKC.shape[2]):
        return jnp.zeros_like(q_BQHC)
    divides = _divides(q_BQHC, k_BGKC)
    kind = choose(how, _case(q_BQHC, visibility, divides=divides))
    if kind == "plain":
        return plain(q_BQHC * scale, k_BGKC, v_BGKC, visibility)
    if on_mesh() and divides:
        return _on_devices(kind, how, scale, q_BQHC, k_BGKC, v_BGKC, visibility)
    return _here(kind, how, scale, q_BQHC, k_BGKC, v_BGKC, visibility)


def _case(q_BQHC: jax.Array, visibility: Visibility, *, divides: bool) -> Case:
    return Case(
        platform=_platform(),
        dtype=q_BQHC.dtype.name,
        head_dim=q_BQHC.shape[3],
        queries=q_BQHC.shape[1],
        biased=visibility.bias is not None,
        consecutive=visibility.consecutive,
        prefix=visibility.prefix_length > 0,
        placed=visibility.placed or not visibility.causal,
        one_segment=visibility.at_left
        and (not visibility.causal or (visibility.q_offset == 0 and num_shards("length") == 1)),
        divides=divides,
    )


def _platform() -> str:
    """Of the devices that the program is traced for: the mesh's, which need not be here, else the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _here(
    kind: Kind,
    how: How,
    scale: float,
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    part: Part | None = None,
) -> jax.Array:
    """By one device, of which these queries may be a `part`."""
    operands = q_BQHC, k_BGKC, v_BGKC
    if kind == "splash":
        return splash(*operands, visibility, scale=scale, block=how.kernel_block, part=part, interpret=how.interpret)
    if part is not None:
        visibility = dataclasses.replace(visibility, q_start=part.index * q_BQHC.shape[1])
    if kind == "flash":
        return flash(*operands, visibility, scale=scale, block=how.kernel_block, interpret=how.interpret)
    if kind == "cudnn":
        return cudnn(*operands, visibility, scale=scale)
    assert kind == "blocked"
    return blocked(q_BQHC * scale, k_BGKC, v_BGKC, visibility, how.block)


def _on_devices(
    kind: Kind, how: How, scale: float, q_BQHC: jax.Array, k_BGKC: jax.Array, v_BGKC: jax.Array, visibility: Visibility
) -> jax.Array:
    """By every device of the mesh: its rows, heads and queries against all keys of these rows and heads."""
    queries, keys = compute_spec("batch", "length"), compute_spec("batch", None)
    rows = q_BQHC.shape[0]
    spread = dataclasses.replace(
        visibility,
        q_segments_BQ=_rows(visibility.q_segments_BQ, rows),
        k_segments_BK=_rows(visibility.k_segments_BK, rows),
        q_positions_BQ=_rows(visibility.q_positions_BQ, rows),
        k_positions_BK=_rows(visibility.k_positions_BK, rows),
    )
    specs: dict[str, Any] = {
        "q_segments_BQ": queries,
        "k_segments_BK": keys,
        "q_positions_BQ": queries,
        "k_positions_BK": keys,
        "q_start": jax.tree.map(lambda _: compute_spec(), visibility.q_start),
        "bias": jax.tree.map(lambda _: compute_spec("heads", None), visibility.bias),
    }
    of_queries = compute_spec("batch", "length", "heads", None)
    of_keys = compute_spec("batch", "kv_heads", None, None)
    lengths, length_axis = num_shards("length"), compute_spec("length")[0]

    def local(q_BQHC: jax.Array, k_BGKC: jax.Array, v_BGKC: jax.Array, visibility: Visibility) -> jax.Array:
        part = None if lengths == 1 else Part(index=jax.lax.axis_index(length_axis), parts=lengths)
        return _here(kind, how, scale, q_BQHC, k_BGKC, v_BGKC, visibility, part)

    # Unchecked, as splash attention does not say over which axes its results vary. Each result varies over all axes,
    # so the gradient of what is whole along one, keys and the table of the bias, is the sum over it.
    in_specs = (of_queries, of_keys, of_keys, dataclasses.replace(visibility, **specs))
    sharded = jax.shard_map(local, in_specs=in_specs, out_specs=of_queries, check_vma=False)
    return sharded(q_BQHC, k_BGKC, v_BGKC, spread)


def _divides(q_BQHC: jax.Array, k_BGKC: jax.Array) -> bool:
    sizes = zip((*q_BQHC.shape[:3], k_BGKC.shape[1]), ("batch", "length", "heads", "kv_heads"), strict=True)
    return all(size % num_shards(name) == 0 for size, name in sizes)


def _rows(x_BL: jax.Array, rows: int) -> jax.Array:
    return jnp.broadcast_to(x_BL, (rows, x_BL.shape[1]))
