"""TPU slices that Cloud TPU rents: accelerator types, and the software version of their hosts.

Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (names), cloud.google.com/tpu/docs/runtimes.
"""

import dataclasses

from common.compute.topology import Topology, parse_topology
from common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rented:
    """The API's names for slices of one chip generation."""

    prefix: str
    """How accelerator types begin."""
    units_per_chip: int
    """How much each chip adds to an accelerator type's number: 2 if it counts cores."""
    runtime: str
    """Software version of the hosts."""


RENTED = {
    "v4": Rented(prefix="v4", units_per_chip=2, runtime="tpu-ubuntu2204-base"),
    "v5e": Rented(prefix="v5litepod", units_per_chip=1, runtime="v2-alpha-tpuv5-lite"),
    "v5p": Rented(prefix="v5p", units_per_chip=2, runtime="v2-alpha-tpuv5"),
    "v6e": Rented(prefix="v6e", units_per_chip=1, runtime="v2-alpha-tpuv6e"),
}
"""Without TPU7x and later, which the Cloud TPU API that both engines use does not offer."""


def accelerator_type(topology: Topology) -> str:
    """The accelerator type of one slice.

    >>> accelerator_type(parse_topology("v5p:4x4x8")), accelerator_type(parse_topology("v5e-16"))
    ('v5p-256', 'v5litepod-16')
    """
    rented = RENTED[topology.chip]
    return f"{rented.prefix}-{rented.units_per_chip * (topology.chips // topology.slices)}"


def rentable(text: str, slices: int) -> Topology:
    """Parses slices that can be rented; raises UserError, naming the nearest that can, for others.

    >>> rentable("v5p:4x4x16", 1)
    Traceback (most recent call last):
        ...
    common.errors.UserError: --topology v5p:4x4x16 has no accelerator type; nearest: v5p:4x8x8 (v5p-512)
    """
    topology = parse_topology(text, slices)
    if topology.chip not in RENTED:
        raise UserError(
            f"--topology {text}: the Cloud TPU API, which both engines use, has no {topology.chip}; "
            f"it has {', '.join(RENTED)}"
        )
    name = accelerator_type(topology)
    default = parse_topology(name, topology.slices)
    if default != topology:
        raise UserError(f"--topology {topology} has no accelerator type; nearest: {default} ({name})")
    return topology
