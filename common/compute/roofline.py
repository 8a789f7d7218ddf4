"""An estimate of a step's seconds from what it computes, moves and sends, at the peaks that a chip's maker publishes.

Nothing here is measured or fitted. Nobody reaches peaks, so true times are longer than `seconds`' lower end; what lies
between its ends is how much of the sending hides behind computing, which a roofline cannot know.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from common.compute.collectives import Collective
from common.compute.topology import Topology

SLICES_AXIS = "replica"
ON_CHIP_LINKS = 6
"""Two devices of one chip are joined as fast as by so many links (Google's page on tpu7x)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of one step, by what limits it."""

    compute: float
    """Matrix products in bf16, recomputed ones included."""
    memory: float
    """Reading and writing HBM."""
    links: float
    """Sending within slices (ICI)."""
    data_centre: float
    """Sending between slices (DCN)."""

    @property
    def seconds(self) -> tuple[float, float]:
        """All at the same time; and all that is sent after everything else."""
        busy, sending = max(self.compute, self.memory), self.links + self.data_centre
        return max(busy, self.links, self.data_centre), busy + sending

    @property
    def limit(self) -> str:
        """What takes longest."""
        names = {"compute": "matrix products", "memory": "HBM", "links": "links (ICI)", "data_centre": "DCN"}
        return names[max(names, key=lambda name: getattr(self, name))]


def estimate(
    topology: Topology,
    *,
    flops: float,
    moved_bytes: float,
    collectives: Sequence[Collective],
    ring_links: Mapping[str, float],
) -> Estimate:
    """Of one device's step; `ring_links` says how many links carry a ring along axes, by `axes_name`.

    A collective over slices is done in two stages: within each slice, and between slices with a part of the array each.

    >>> from common.compute.topology import parse_topology
    >>> gather = Collective(kind="all-gather", axes=("fsdp",), group=4, times=1, bytes=int(4e9))
    >>> v5e, links = parse_topology("v5e:2x2"), {"fsdp": 2.0}
    >>> estimate(v5e, flops=197e12, moved_bytes=0, collectives=[gather], ring_links=links).seconds
    (1.0, 1.03)
    """
    chip = topology.facts
    links, data_centre = 0.0, 0.0
    for collective in collectives:
        outside = topology.slices if SLICES_AXIS in collective.axes else 1
        inside = max(collective.group // outside, 1)
        if inside > 1:
            sent = dataclasses.replace(collective, group=inside).sent_bytes
            links += sent / (ring_links[axes_name(collective.axes)] * chip.link_bytes_per_second)
        if outside > 1:
            part = dataclasses.replace(collective, group=outside).sent_bytes / inside
            data_centre += part / (chip.dcn_bytes_per_second / chip.devices_per_chip)
    return Estimate(
        compute=flops / chip.flops_per_second,
        memory=moved_bytes / chip.hbm_bytes_per_second,
        links=links,
        data_centre=data_centre,
    )


def axes_name(axes: Sequence[str]) -> str:
    """
    >>> axes_name(("data", "fsdp"))
    'data x fsdp'
    """
    return " x ".join(axes)


def links_of(places: np.ndarray, topology: Topology) -> float:
    """How many links, one way each, a device has for sending around a ring of its group.

    `places` [members, directions] are chips' coordinates in a slice. A direction that the group spans whole and that
    wraps around gives two, another one; members some steps apart share links with as many other groups.

    >>> from common.compute.topology import parse_topology
    >>> line = np.array([[0, 0], [1, 0], [2, 0], [3, 0]])
    >>> links_of(line, parse_topology("v5e:4x4")), links_of(line * 2, parse_topology("v5e:8x8"))
    (1.0, 0.5)
    """
    total = 0.0
    for direction in range(len(topology.grid)):
        seen = np.unique(places[:, direction])
        if len(seen) > 1:
            step = float(seen[-1] - seen[0]) / (len(seen) - 1)
            whole = len(seen) == topology.grid[direction] and topology.wraps(direction)
            total += (2 if whole else 1) / step
    return total / topology.facts.devices_per_chip if total else float(ON_CHIP_LINKS)
