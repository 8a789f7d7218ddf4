"""Attention by the implementation that fits the call; on a mesh, each device computes its own shard.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, C head dim, R relative buckets.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from common.kernels.blocked import blocked
from common.kernels.blocks import DEFAULT_BLOCK, best_blocks
from common.kernels.choice import AttentionCall, Implementation, Kind, choose
from common.kernels.cudnn import cudnn
from common.kernels.flash import flash
from common.kernels.plain import plain
from common.kernels.splash import QueryShard, splash
from common.kernels.visibility import Visibility
from common.sharding.rules import compute_spec, num_shards, on_mesh


def attend(
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    implementation: Implementation,
) -> jax.Array:
    """Returns out_BQHC in the dtype of `q`; logits and softmax are float32.

    A query that sees no key gets exactly 0, with gradient 0. Masked logits are replaced, never added to: no key of
    another segment, however large, can leak. Decoding always takes the plain implementation, which holds all logits at
    once. `q` may have more rows than `k` and `v`: consecutive rows of queries then share a row of keys, as the beams of
    one prompt do, and nothing may be causal.

    On a mesh every implementation but the plain one runs on each device for its own rows, heads and queries: rows and
    heads are sharded as the rules say, queries along `length`, and keys and values are all-gathered along it. The plain
    one, and sizes that do not divide over the mesh, are left to the compiler. Raises UserError if these devices cannot
    run `implementation`.
    """
    if q_BQHC.shape[0] != k_BGKC.shape[0]:
        rows = k_BGKC.shape[0]
        out_BQHC = attend(
            q_BQHC.reshape(rows, -1, *q_BQHC.shape[2:]),
            k_BGKC,
            v_BGKC,
            visibility.fold_rows(rows),
            scale=scale,
            implementation=implementation,
        )
        return out_BQHC.reshape(q_BQHC.shape)
    if 0 in (q_BQHC.shape[1], k_BGKC.shape[2]):
        return jnp.zeros_like(q_BQHC)
    divides = _divides(q_BQHC, k_BGKC)
    kind = choose(implementation, _describe(q_BQHC, visibility, divides=divides))
    if kind == "plain":
        return plain(q_BQHC * scale, k_BGKC, v_BGKC, visibility)
    attend_on_device = partial(_on_one_device, kind, implementation, scale)
    if on_mesh() and divides:
        return _on_every_device(attend_on_device, q_BQHC, k_BGKC, v_BGKC, visibility)
    return attend_on_device(q_BQHC, k_BGKC, v_BGKC, visibility)


def _describe(q_BQHC: jax.Array, visibility: Visibility, *, divides: bool) -> AttentionCall:
    return AttentionCall(
        platform=_platform(),
        dtype=q_BQHC.dtype.name,
        head_dim=q_BQHC.shape[3],
        queries=q_BQHC.shape[1],
        biased=visibility.bias is not None,
        consecutive=visibility.consecutive,
        prefix=visibility.prefix_length > 0,
        static_index=visibility.static_index or not visibility.causal,
        one_segment=visibility.one_segment
        and (not visibility.causal or (visibility.q_offset == 0 and num_shards("length") == 1)),
        divides=divides,
    )


def _platform() -> str:
    """The platform that the program is traced for: that of the mesh, which need not be here, else the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _device_kind() -> str:
    """Likewise the kind of these devices, as `jax.Device.device_kind`."""
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def _on_one_device(
    kind: Kind,
    implementation: Implementation,
    scale: float,
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    shard: QueryShard | None = None,
) -> jax.Array:
    """Attention on one device; `shard` says which of a longer sequence's queries it holds (None: all)."""
    operands = q_BQHC, k_BGKC, v_BGKC
    named, interpret = implementation.kernel_block, implementation.interpret
    if kind == "splash":
        block = named or DEFAULT_BLOCK
        return splash(*operands, visibility, scale=scale, block=block, shard=shard, interpret=interpret)
    if shard is not None:
        visibility = dataclasses.replace(visibility, q_start=shard.index * q_BQHC.shape[1])
    if kind == "flash":
        pair = (named, named) if named else best_blocks(_device_kind(), q_BQHC, k_BGKC)
        return flash(*operands, visibility, scale=scale, block=pair, interpret=interpret)
    if kind == "cudnn":
        return cudnn(*operands, visibility, scale=scale)
    assert kind == "blocked"
    return blocked(q_BQHC * scale, k_BGKC, v_BGKC, visibility, implementation.block)


def _on_every_device(
    attend_on_device: Callable[..., jax.Array],
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
) -> jax.Array:
    """Attention on every device of the mesh: its rows, heads and queries against all keys of these rows and heads."""
    per_query, per_key = compute_spec("batch", "length"), compute_spec("batch", None)
    rows = q_BQHC.shape[0]
    visibility = dataclasses.replace(
        visibility,
        q_segments_BQ=_broadcast_rows(visibility.q_segments_BQ, rows),
        k_segments_BK=_broadcast_rows(visibility.k_segments_BK, rows),
        q_positions_BQ=_broadcast_rows(visibility.q_positions_BQ, rows),
        k_positions_BK=_broadcast_rows(visibility.k_positions_BK, rows),
    )
    specs: dict[str, Any] = {
        "q_segments_BQ": per_query,
        "k_segments_BK": per_key,
        "q_positions_BQ": per_query,
        "k_positions_BK": per_key,
        "q_start": jax.tree.map(lambda _: compute_spec(), visibility.q_start),
        "bias": jax.tree.map(lambda _: compute_spec("heads", None), visibility.bias),
    }
    q_spec = compute_spec("batch", "length", "heads", None)
    kv_spec = compute_spec("batch", "kv_heads", None, None)
    length_shards, length_axis = num_shards("length"), compute_spec("length")[0]

    def local(q_BQHC: jax.Array, k_BGKC: jax.Array, v_BGKC: jax.Array, visibility: Visibility) -> jax.Array:
        shard = None if length_shards == 1 else QueryShard(index=jax.lax.axis_index(length_axis), count=length_shards)
        return attend_on_device(q_BQHC, k_BGKC, v_BGKC, visibility, shard)

    # check_vma=False, since splash attention does not declare over which mesh axes its results vary. Each result varies
    # over all of them, so gradients of operands that are replicated along an axis (keys, the bias's table) are summed
    # along it.
    in_specs = (q_spec, kv_spec, kv_spec, dataclasses.replace(visibility, **specs))
    attend_on_shards = jax.shard_map(local, in_specs=in_specs, out_specs=q_spec, check_vma=False)
    return attend_on_shards(q_BQHC, k_BGKC, v_BGKC, visibility)


def _divides(q_BQHC: jax.Array, k_BGKC: jax.Array) -> bool:
    """Whether rows, queries and heads divide over the mesh."""
    sizes = zip((*q_BQHC.shape[:3], k_BGKC.shape[1]), ("batch", "length", "heads", "kv_heads"), strict=True)
    return all(size % num_shards(name) == 0 for size, name in sizes)


def _broadcast_rows(x_BL: jax.Array, rows: int) -> jax.Array:
    return jnp.broadcast_to(x_BL, (rows, x_BL.shape[1]))
