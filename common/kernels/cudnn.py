"""cuDNN's fused attention, for rows that are one segment each.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, C head dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from common.kernels.visibility import Visibility


def cudnn(
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """out_BQHC in the dtype of `q`, as `attention.attend` defines it.

    cuDNN knows lengths, but neither segments nor masks that select: `visibility.at_left` has to hold. Where an
    `implementation` is named, that one takes the same arguments in cuDNN's place.
    """
    assert visibility.at_left and visibility.bias is None and not visibility.prefix_length
    assert not visibility.causal or (visibility.placed and visibility.q_offset == 0)
    real_BQ, real_BK = visibility.q_segments_BQ != 0, visibility.k_segments_BK != 0
    queries_B, keys_B = (real.sum(axis=1, dtype=jnp.int32) for real in (real_BQ, real_BK))
    seeing_BQ = real_BQ & (keys_B > 0)[:, None]
    # Of no keys there is no mean: a row without any sees its first, and what comes of it is not used.
    out_BQHC = jax.nn.dot_product_attention(
        q_BQHC,
        k_BGKC.swapaxes(1, 2),
        v_BGKC.swapaxes(1, 2),
        scale=scale,
        is_causal=visibility.causal,
        query_seq_lengths=jnp.maximum(queries_B, 1),
        key_value_seq_lengths=jnp.maximum(keys_B, 1),
        implementation=implementation,
    )
    return jnp.where(seeing_BQ[:, :, None, None], out_BQHC, 0)
