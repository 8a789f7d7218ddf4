"""Greedy decoding with a cache, one compiled program a shape.

Legend: B batch rows, T new tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common.infer.prompt import Prompt
from common.train.state import Skeleton


def make_greedy(
    model: Skeleton, *, max_new_tokens: int, start_id: int, eos_id: int
) -> Callable[[Any, Prompt], jax.Array]:
    """A jitted `(params, prompt) -> tokens_BT` (int32). A row's tokens end with `eos_id`, which then fills its rest.

    The loop stops as soon as every row has ended.
    """

    @jax.jit
    def greedy(params: Any, prompt: Prompt) -> jax.Array:
        merged = model.merge(params)
        B = prompt.lengths_B.shape[0]
        w_DV = merged.head()

        def unfinished(loop: tuple[Any, ...]) -> jax.Array:
            t, _, _, done_B, _ = loop
            return (t < max_new_tokens) & ~done_B.all()

        def step(loop: tuple[Any, ...]) -> tuple[Any, ...]:
            t, token_B, cache, done_B, tokens_BT = loop
            h_BD, cache = merged.decode(token_B, cache)
            logits_BV = jnp.dot(h_BD, w_DV.astype(h_BD.dtype), preferred_element_type=jnp.float32)
            token_B = jnp.where(done_B, eos_id, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32))
            tokens_BT = jax.lax.dynamic_update_slice_in_dim(tokens_BT, token_B[:, None], t, axis=1)
            return t + 1, token_B, cache, done_B | (token_B == eos_id), tokens_BT

        start = (
            jnp.int32(0),
            jnp.full((B,), start_id, jnp.int32),
            merged.prefill(prompt, max_new_tokens),
            jnp.zeros((B,), bool),
            jnp.full((B, max_new_tokens), eos_id, jnp.int32),
        )
        return jax.lax.while_loop(unfinished, step, start)[-1]

    return greedy
