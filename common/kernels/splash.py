"""Splash attention, JAX's Pallas kernel for TPU, for what has no bias and no prefix.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, C head dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from common.kernels.blocks import LANES, even_block, multiple, padded
from common.kernels.visibility import ATTENTION, Visibility

NOTHING = -1e37
"""Logit of the key that stands for seeing nothing: far below any real one, and far above what masked ones become."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """These queries are one of several equal parts, each on a device of its own; all of them see the same keys."""

    index: jax.Array
    parts: int


def splash(
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    block: int = 512,
    part: Part | None = None,
    interpret: bool = False,
) -> jax.Array:
    """out_BQHC in the dtype of `q`, as `attention.attend` defines it; logits, softmax and sums in float32.

    At most `block` queries, a multiple of 128, meet as many keys at a time. Lengths need not be multiples of it.
    `visibility` describes the queries at hand, but for the index of the first one, where they are a `part`.
    """
    B, Q, H, C = q_BQHC.shape
    _, G, K, _ = k_BGKC.shape
    assert k_BGKC.shape == v_BGKC.shape == (B, G, K, C) and H % G == 0
    assert visibility.bias is None and not visibility.prefix_length
    assert visibility.placed or not visibility.causal
    assert block % LANES == 0
    if not visibility.causal:
        part = None  # all parts see the same
    block_q, block_k = even_block(Q, block), even_block(K, block)
    queries, keys = multiple(Q, block_q), multiple(K, block_k)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([_mask(visibility, queries, keys, 1 if part is None else part.parts)] * H),
        block_sizes=_block_sizes(block_q, block_k),
        head_shards=1,
        q_seq_shards=1 if part is None else part.parts,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    if part is not None:
        kernel = _of_part(kernel, part)
    # A kernel that compares ids alone knows no 0: padding gets other ids among queries than among keys.
    q_segments_BQ = padded(_renamed(visibility.q_segments_BQ, -1), queries, axis=1, value=-1)
    k_segments_BK = padded(_renamed(visibility.k_segments_BK, -2), keys, axis=1, value=-2)
    # Every query sees one key more, of value 0: nothing beside a real one, and all there is where there is none.
    nothing_H = jnp.full(H, NOTHING, jnp.float32)

    def row(
        q_HQC: jax.Array, k_GKC: jax.Array, v_GKC: jax.Array, q_segments_Q: jax.Array, k_segments_K: jax.Array
    ) -> Any:
        return kernel(q_HQC, k_GKC, v_GKC, kernels.SegmentIds(q_segments_Q, k_segments_K), nothing_H)

    out_BHQC = jax.vmap(row)(
        padded((q_BQHC * scale).swapaxes(1, 2), queries, axis=2),
        padded(k_BGKC, keys, axis=2),
        padded(v_BGKC, keys, axis=2),
        q_segments_BQ,
        k_segments_BK,
    )
    return out_BHQC[:, :, :Q].swapaxes(1, 2)


def _mask(visibility: Visibility, queries: int, keys: int, parts: int) -> masks.Mask:
    """Which keys the queries of all parts may see, by place alone; each part is padded to `queries`."""
    shape = (parts * queries, keys)
    if not visibility.causal:
        return masks.FullMask(shape)
    mask = masks.CausalMask(shape, offset=visibility.q_offset)
    part, at = np.divmod(np.arange(parts * queries, dtype=np.int32), queries)
    mask.q_sequence = part * visibility.q_segments_BQ.shape[1] + at
    return mask


def _block_sizes(block_q: int, block_k: int) -> kernels.BlockSizes:
    """The same in all three kernels; dk and dv apart from dq, as dq in one with them takes a sum a block of keys."""
    return kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )


def _of_part(kernel: kernels.SplashAttentionKernel, part: Part) -> kernels.SplashAttentionKernel:
    """Which blocks are visited was worked out for all parts: this part's."""

    def mine(x: Any, axis: int) -> Any:
        if x is None:
            return None
        size = x.shape[axis] // part.parts
        return jax.lax.dynamic_slice_in_dim(x, part.index * size, size, axis)

    infos, described = kernel.tree_flatten()
    of_part = [
        info._replace(
            data_next=mine(info.data_next, 1),
            block_mask=mine(info.block_mask, 1),
            q_sequence=mine(info.q_sequence, 0),
        )
        for info in infos
    ]
    return kernels.SplashAttentionKernel.tree_unflatten(described, of_part)


def _renamed(segments_BL: jax.Array, padding: int) -> jax.Array:
    return jnp.where(segments_BL == 0, padding, segments_BL)
