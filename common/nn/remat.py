"""Named rematerialisation policies: what the forward pass of a layer keeps, and what the backward pass recomputes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from common.kernels.visibility import ATTENTION
from common.sharding.rules import on_mesh

ENTERED = "entered"
"""Checkpoint name of a layer's input."""
CHEAP = {
    "broadcast_in_dim",
    "convert_element_type",
    "name",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "transpose",
}
"""Primitives whose results are recomputed rather than kept, even by `none`."""


def rematerialised(body: Callable[..., Any], remat: str, *, in_loop: bool) -> Callable[..., Any]:
    """Wraps `body(carry, x)` of one layer so that it keeps what `remat` (see Execution) specifies.

    No policy keeps gathered parameters: the backward pass gathers them again.
    """
    match remat:
        case "none":
            if not on_mesh():
                return body
            policy: Any = _keep_expensive
        case "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        case "attention":
            policy = jax.checkpoint_policies.save_only_these_names(ATTENTION)
        case "full":
            policy = None
        case "offload":
            policy = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[ENTERED],
                offload_src="device",
                offload_dst="pinned_host",
            )
    # A loop compiles its body separately for both passes, so nothing has to prevent their merging (CSE).
    return jax.checkpoint(body, policy=policy, prevent_cse=not in_loop)


def mark_input(stream: Any) -> Any:
    """Marks a layer's input with the name that `offload` looks for."""
    return jax.tree.map(lambda x: checkpoint_name(x, ENTERED), stream)


def _keep_expensive(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in CHEAP
