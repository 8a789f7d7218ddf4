"""TPU slices as Cloud TPU rents them: by accelerator types, with a software version for their machines.

Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (names), cloud.google.com/tpu/docs/runtimes.
"""

import dataclasses

from common.compute.topology import Topology, parse_topology
from common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rented:
    """What the API calls slices of one chip."""

    prefix: str
    """Of its accelerator types."""
    counted: int
    """What an accelerator type counts for each chip: 2 where it counts cores."""
    runtime: str
    """Software version of the machines."""


RENTED = {
    "v4": Rented(prefix="v4", counted=2, runtime="tpu-ubuntu2204-base"),
    "v5e": Rented(prefix="v5litepod", counted=1, runtime="v2-alpha-tpuv5-lite"),
    "v5p": Rented(prefix="v5p", counted=2, runtime="v2-alpha-tpuv5"),
    "v6e": Rented(prefix="v6e", counted=1, runtime="v2-alpha-tpuv6e"),
}
"""TPU7x and later are not here: the Cloud TPU API, which both engines ask, has none of them."""


def accelerator_type(topology: Topology) -> str:
    """Of one slice.

    >>> accelerator_type(parse_topology("v5p:4x4x8")), accelerator_type(parse_topology("v5e-16"))
    ('v5p-256', 'v5litepod-16')
    """
    rented = RENTED[topology.chip]
    return f"{rented.prefix}-{rented.counted * (topology.chips // topology.slices)}"


def rentable(text: str, slices: int) -> Topology:
    """The slices named, which can be rented. Raises UserError, with the nearest that can, for others.

    >>> rentable("v5p:4x4x16", 1)
    Traceback (most recent call last):
        ...
    common.errors.UserError: --topology v5p:4x4x16 has no accelerator type of its own; nearest: v5p:4x8x8 (v5p-512)
    """
    topology = parse_topology(text, slices)
    if topology.chip not in RENTED:
        raise UserError(
            f"--topology {text}: the Cloud TPU API, which both engines ask, has no {topology.chip}; "
            f"it has {', '.join(RENTED)}"
        )
    name = accelerator_type(topology)
    meant = parse_topology(name, topology.slices)
    if meant != topology:
        raise UserError(f"--topology {topology} has no accelerator type of its own; nearest: {meant} ({name})")
    return topology
