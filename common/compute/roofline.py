"""Estimates a step's seconds from what it computes, moves and sends, at the peak rates that chip makers publish.

Nothing here is measured or fitted. Nothing reaches peak rates, so real steps take longer than the lower end of
`Estimate.seconds`. Its two ends differ in how much communication overlaps with computation, which a roofline cannot
know.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from common.compute.collectives import Collective
from common.compute.topology import Topology

SLICES_AXIS = "replica"
"""The mesh axis along which devices are in different slices."""
ON_CHIP_LINKS = 6
"""Two devices of one chip communicate as fast as over this many links (Google's page on tpu7x)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds that each resource needs for one step."""

    compute: float
    """Matrix products in bf16, recomputed ones included."""
    memory: float
    """Reads from and writes to HBM."""
    links: float
    """Communication within slices (ICI)."""
    data_centre: float
    """Communication between slices (DCN)."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Lower end: everything overlaps. Upper end: all communication comes after everything else."""
        busy, sending = max(self.compute, self.memory), self.links + self.data_centre
        return max(busy, self.links, self.data_centre), busy + sending

    @property
    def limit(self) -> str:
        """The resource that takes longest."""
        names = {"compute": "matrix products", "memory": "HBM", "links": "links (ICI)", "data_centre": "DCN"}
        return names[max(names, key=lambda name: getattr(self, name))]


def estimate(
    topology: Topology,
    *,
    flops: float,
    traffic_bytes: float,
    collectives: Sequence[Collective],
    ring_links: Mapping[str, float],
) -> Estimate:
    """Estimates the seconds of a step from what one device computes, moves and sends.

    `ring_links` has, by the `axes_name` of a ring's axes, how many links each device has for sending around it. A
    collective over several slices has two stages: one within each slice, then one between slices. In the second, a
    device sends only its own part of the array: with n group members per slice, 1 / n of it.

    >>> from common.compute.topology import parse_topology
    >>> gather = Collective(kind="all-gather", axes=("fsdp",), group=4, times=1, bytes=int(4e9))
    >>> v5e, links = parse_topology("v5e:2x2"), {"fsdp": 2.0}
    >>> estimate(v5e, flops=197e12, traffic_bytes=0, collectives=[gather], ring_links=links).seconds
    (1.0, 1.03)
    """
    chip = topology.chip_spec
    links, data_centre = 0.0, 0.0
    for collective in collectives:
        outside = topology.slices if SLICES_AXIS in collective.axes else 1
        inside = max(collective.group // outside, 1)
        if inside > 1:
            sent = dataclasses.replace(collective, group=inside).sent_bytes
            links += sent / (ring_links[axes_name(collective.axes)] * chip.link_bytes_per_second)
        if outside > 1:
            share = dataclasses.replace(collective, group=outside).sent_bytes / inside
            data_centre += share / (chip.dcn_bytes_per_second / chip.devices_per_chip)
    return Estimate(
        compute=flops / chip.flops_per_second,
        memory=traffic_bytes / chip.hbm_bytes_per_second,
        links=links,
        data_centre=data_centre,
    )


def axes_name(axes: Sequence[str]) -> str:
    """Returns the name of a set of mesh axes, for tables and as a key.

    >>> axes_name(("data", "fsdp"))
    'data x fsdp'
    """
    return " x ".join(axes)


def links_per_device(coordinates: np.ndarray, topology: Topology) -> float:
    """Returns how many links, each used one way, a device has for sending around a ring of its group.

    `coordinates` [members, directions] are the places of the members' chips in a slice. A direction along which they
    differ gives two links if the group spans all of it and it wraps around, else one. If neighbours are `step` chips
    apart, `step` groups share these links. The devices of a chip share them too. A group on one chip uses no links
    between chips, and gets `ON_CHIP_LINKS`.

    >>> from common.compute.topology import parse_topology
    >>> line = np.array([[0, 0], [1, 0], [2, 0], [3, 0]])
    >>> links_per_device(line, parse_topology("v5e:4x4")), links_per_device(line * 2, parse_topology("v5e:8x8"))
    (1.0, 0.5)
    """
    total = 0.0
    for direction in range(len(topology.grid)):
        places = np.unique(coordinates[:, direction])
        if len(places) > 1:
            step = float(places[-1] - places[0]) / (len(places) - 1)
            is_ring = len(places) == topology.grid[direction] and topology.wraps(direction)
            total += (2 if is_ring else 1) / step
    return total / topology.chip_spec.devices_per_chip if total else float(ON_CHIP_LINKS)
