"""Splash attention, JAX's Pallas kernel for TPU, for attention without bias and prefix.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, C head dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from common.kernels.blocks import LANES, even_block, pad_to, round_up
from common.kernels.visibility import ATTENTION, Visibility

NOTHING = -1e37
"""Logit of an extra key that every query sees: far below any real logit, and far above a masked one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryShard:
    """Which of `count` equal shards of the queries one device holds; all shards see the same keys."""

    index: jax.Array
    """int32 scalar."""
    count: int


def splash(
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    block: int = 512,
    shard: QueryShard | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns out_BQHC in the dtype of `q`, as `attention.attend` defines it; logits, softmax and sums are float32.

    Computes tiles of at most `block` queries and `block` keys, a multiple of 128; lengths need not be multiples of it.
    `visibility` describes the queries of this shard, but its indices do not include the shard's own offset.
    """
    B, Q, H, C = q_BQHC.shape
    _, G, K, _ = k_BGKC.shape
    assert k_BGKC.shape == v_BGKC.shape == (B, G, K, C) and H % G == 0
    assert visibility.bias is None and not visibility.prefix_length
    assert visibility.static_index or not visibility.causal
    assert block % LANES == 0
    if not visibility.causal:
        shard = None  # all shards see the same keys
    shards = 1 if shard is None else shard.count
    block_q, block_k = even_block(Q, block), even_block(K, block)
    queries, keys = round_up(Q, block_q), round_up(K, block_k)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([_mask(visibility, queries, keys, shards)] * H),
        block_sizes=_block_sizes(block_q, block_k),
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    if shard is not None:
        kernel = _select_shard(kernel, shard)
    # Splash attention only compares segment ids, without a special id for padding: padding gets one id among queries
    # and another one among keys, so that neither sees the other.
    q_segments_BQ = pad_to(_replace_padding(visibility.q_segments_BQ, -1), queries, axis=1, value=-1)
    k_segments_BK = pad_to(_replace_padding(visibility.k_segments_BK, -2), keys, axis=1, value=-2)
    # Every query sees one extra key with value 0. Its weight underflows to 0 next to any real key; a query without keys
    # sees only this one, and its output is 0.
    nothing_H = jnp.full(H, NOTHING, jnp.float32)

    def row(
        q_HQC: jax.Array, k_GKC: jax.Array, v_GKC: jax.Array, q_segments_Q: jax.Array, k_segments_K: jax.Array
    ) -> Any:
        return kernel(q_HQC, k_GKC, v_GKC, kernels.SegmentIds(q_segments_Q, k_segments_K), nothing_H)

    out_BHQC = jax.vmap(row)(
        pad_to((q_BQHC * scale).swapaxes(1, 2), queries, axis=2),
        pad_to(k_BGKC, keys, axis=2),
        pad_to(v_BGKC, keys, axis=2),
        q_segments_BQ,
        k_segments_BK,
    )
    return out_BHQC[:, :, :Q].swapaxes(1, 2)


def _mask(visibility: Visibility, queries: int, keys: int, shards: int) -> masks.Mask:
    """Which keys the queries of all shards see by index, segments aside; each shard is padded to `queries`."""
    shape = (shards * queries, keys)
    if not visibility.causal:
        return masks.FullMask(shape)
    mask = masks.CausalMask(shape, offset=visibility.q_offset)
    shard, index = np.divmod(np.arange(shards * queries, dtype=np.int32), queries)
    # Indices go on from shard to shard, not counting the padding between them.
    mask.q_sequence = shard * visibility.q_segments_BQ.shape[1] + index
    return mask


def _block_sizes(block_q: int, block_k: int) -> kernels.BlockSizes:
    """The same blocks in all three kernels. dq has a separate kernel: fused with dk and dv it would need memory for a
    partial sum per block of keys."""
    return kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )


def _select_shard(kernel: kernels.SplashAttentionKernel, shard: QueryShard) -> kernels.SplashAttentionKernel:
    """The kernel for one shard. `kernel` lists the blocks to visit for all shards; the slices take those of one."""

    def slice_shard(x: Any, axis: int) -> Any:
        if x is None:
            return None
        size = x.shape[axis] // shard.count
        return jax.lax.dynamic_slice_in_dim(x, shard.index * size, size, axis)

    mask_infos, aux = kernel.tree_flatten()
    selected = [
        info._replace(
            data_next=slice_shard(info.data_next, 1),
            block_mask=slice_shard(info.block_mask, 1),
            q_sequence=slice_shard(info.q_sequence, 0),
        )
        for info in mask_infos
    ]
    return kernels.SplashAttentionKernel.tree_unflatten(aux, selected)


def _replace_padding(segments_BL: jax.Array, padding: int) -> jax.Array:
    return jnp.where(segments_BL == 0, padding, segments_BL)
