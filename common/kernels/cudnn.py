"""cuDNN's fused attention, for rows of one segment each.

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
    """Returns out_BQHC in the dtype of `q`, as `attention.attend` defines it.

    cuDNN takes lengths, but neither segments nor arbitrary masks: `visibility.one_segment` must hold. Tests without a
    GPU pass `implementation="xla"`, which takes the same arguments.
    """
    assert visibility.one_segment and visibility.bias is None and not visibility.prefix_length
    assert not visibility.causal or (visibility.static_index and visibility.q_offset == 0)
    is_query_BQ, is_key_BK = visibility.q_segments_BQ != 0, visibility.k_segments_BK != 0
    queries_B, keys_B = (real.sum(axis=1, dtype=jnp.int32) for real in (is_query_BQ, is_key_BK))
    sees_key_BQ = is_query_BQ & (keys_B > 0)[:, None]
    # A softmax over no keys is undefined: a row without any sees its first key, and its output is replaced by 0.
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
    return jnp.where(sees_key_BQ[:, :, None, None], out_BQHC, 0)
