"""Checks the roofline and the links of device groups against closed forms."""

import numpy as np
import pytest

from common.compute.chips import CHIPS
from common.compute.collectives import Collective
from common.compute.roofline import ON_CHIP_LINKS, estimate, links_per_device
from common.compute.topology import parse_topology


def grid_coordinates(*sides: int) -> np.ndarray:
    """Coordinates of all chips of a grid."""
    return np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), axis=-1).reshape(-1, len(sides))


@pytest.mark.parametrize(
    ("places", "topology", "links"),
    [
        (grid_coordinates(16, 16), "v5e:16x16", 4),  # both directions are rings
        (grid_coordinates(16, 1), "v5e:16x16", 2),
        (grid_coordinates(4, 1), "v5e:16x16", 1),  # a part of a ring is a line
        (grid_coordinates(4, 4), "v5e:4x4", 2),
        (grid_coordinates(4, 1) * 4, "v5e:16x16", 1 / 4),  # four steps apart: four groups share each link
        (grid_coordinates(4, 4, 8), "v5p:4x4x8", 6),
        (grid_coordinates(2, 2, 4), "v5p:2x2x4", 3),  # smaller than a cube of 4x4x4: no rings
        (np.repeat(grid_coordinates(4, 4, 4), 2, axis=0), "tpu7x:4x4x4", 3),  # two devices share a chip's six links
        (np.zeros((2, 3), int), "tpu7x:4x4x4", ON_CHIP_LINKS),
    ],
)
def test_links_of_a_group(places: np.ndarray, topology: str, links: float) -> None:
    assert links_per_device(places, parse_topology(topology)) == links


def test_between_slices_each_device_sends_only_its_share() -> None:
    """An all-reduce of S bytes over 2 slices of 4 devices sends 2 S 3/4 within slices, 2 (S / 4) 1/2 between them."""
    size = 10**9
    reduce = Collective(kind="all-reduce", axes=("replica", "fsdp"), group=8, times=1, bytes=size)
    within = Collective(kind="all-reduce", axes=("fsdp",), group=4, times=1, bytes=size)
    links = {"replica x fsdp": 2.0, "fsdp": 2.0}
    topology, chip = parse_topology("2*v5e:2x2"), CHIPS["v5e"]
    both = estimate(topology, flops=0, traffic_bytes=0, collectives=[reduce], ring_links=links)
    one = estimate(topology, flops=0, traffic_bytes=0, collectives=[within], ring_links=links)
    assert both.links == one.links == pytest.approx(1.5 * size / (2 * chip.link_bytes_per_second))
    assert both.data_centre == pytest.approx(size / 4 / chip.dcn_bytes_per_second)
    assert one.data_centre == 0 and both.limit == "DCN"


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.links])
def test_a_step_is_at_least_as_long_as_its_longest_part(name: str) -> None:
    chip = CHIPS[name]
    topology = parse_topology(f"{name}-8")
    time = estimate(
        topology,
        flops=chip.flops_per_second,
        traffic_bytes=2 * chip.hbm_bytes_per_second,
        collectives=[Collective(kind="all-gather", axes=("fsdp",), group=2, times=1, bytes=10**9)],
        ring_links={"fsdp": 1.0},
    )
    assert (time.compute, time.memory) == (1, 2)
    assert time.seconds == (2, 2 + time.links) and time.limit == "HBM"


@pytest.mark.parametrize("name", CHIPS)
def test_numbers_of_chips_are_consistent(name: str) -> None:
    chip = CHIPS[name]
    assert chip.usable_hbm_bytes is None or 0.9 * chip.hbm_bytes < chip.usable_hbm_bytes < 1.01 * chip.hbm_bytes
    assert chip.price is None or chip.price.spot is None or chip.price.spot < chip.price.on_demand
    # Memory is faster than links, and links are faster than the data centre's network.
    if chip.links:
        links = chip.links * chip.link_bytes_per_second / chip.devices_per_chip
        assert chip.hbm_bytes_per_second > links > chip.dcn_bytes_per_second


@pytest.mark.parametrize(
    ("name", "grid", "devices"),
    [
        ("v4-8", (2, 2, 1), 4),
        ("v4:4x4x4", (4, 4, 4), 64),
        ("v5e-1", (1, 1), 1),
        ("v5litepod-16", (4, 4), 16),
        ("v6e:8x16", (8, 16), 128),
        ("v5p-128", (4, 4, 4), 64),
        ("tpu7x:2x2x1", (2, 2, 1), 8),
        ("4*v5p:8x8x16", (8, 8, 16), 4096),
    ],
)
def test_names_of_slices(name: str, grid: tuple[int, ...], devices: int) -> None:
    topology = parse_topology(name)
    assert (topology.grid, topology.devices) == (grid, devices)
    assert parse_topology(str(topology)) == topology
