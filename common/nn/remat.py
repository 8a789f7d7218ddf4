"""Rematerialisation by name: what of a layer is kept for the backward pass, and what is computed again."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from common.kernels.visibility import ATTENTION
from common.sharding.rules import on_mesh

ENTERED = "entered"
"""Name of the stream that enters a layer."""
COSTS_NOTHING = {
    "broadcast_in_dim",
    "convert_element_type",
    "name",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "transpose",
}


def rematerialised(body: Callable[..., Any], remat: str, *, in_loop: bool) -> Callable[..., Any]:
    """`body(carry, x)` of one layer that keeps for its backward pass what `remat` (in Execution) specifies.

    Even `none` keeps no parameter that was gathered for use: it is gathered again.
    """
    match remat:
        case "none":
            if not on_mesh():
                return body
            policy: Any = _keep_what_costs
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
    # A loop's body is compiled apart from its backward pass, so that nothing need be done against merging the two.
    return jax.checkpoint(body, policy=policy, prevent_cse=not in_loop)


def entering(stream: Any) -> Any:
    """A layer's input under the name by which `offload` finds it."""
    return jax.tree.map(lambda x: checkpoint_name(x, ENTERED), stream)


def _keep_what_costs(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in COSTS_NOTHING
