"""TPU slices by name: `v5p:4x4x8`, `v5e-256`, or two slices, `2*v5e:16x16`."""

import dataclasses
import itertools
import math
import re

from common.compute.chips import CHIPS, Chip
from common.errors import UserError, nearest

_FLAT_GRIDS = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_GRIDS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_MOST_CHIPS = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}
"""The largest slice of chips whose grids have three dimensions."""
_NAMED_BY_CORES = ("v4", "v5p", "tpu7x")
"""`v5p-64` has 64 cores, two per chip; for other chips the number counts chips."""
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Slices of equal shape. Links (ICI) join the chips of a slice, the data centre's network joins slices."""

    chip: str
    grid: tuple[int, ...]
    """Chips along each direction of a slice."""
    slices: int = 1

    def __str__(self) -> str:
        name = f"{self.chip}:{'x'.join(map(str, self.grid))}"
        return f"{self.slices}*{name}" if self.slices > 1 else name

    @property
    def chip_spec(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.grid)

    @property
    def devices(self) -> int:
        """The number of JAX devices."""
        return self.chips * self.chip_spec.devices_per_chip

    def wraps(self, direction: int) -> bool:
        """Whether links close this direction to a ring.

        In two dimensions they do if it has 16 chips; in three, all or none do: optical switches join cubes of 4x4x4
        chips, and smaller slices have none. Source: MaxText's `accelerator_to_spec_map.py`, field `wrap`.

        >>> [[topology.wraps(i) for i in range(len(topology.grid))] for topology in map(parse_topology, (
        ...     "v6e:8x16", "v5p:2x4x4", "v5p:4x4x8"))]
        [[False, True], [False, False, False], [True, True, True]]
        """
        return self.grid[direction] == 16 if len(self.grid) == 2 else all(size % 4 == 0 for size in self.grid)


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parses a slice's name; `slices` is how many there are if the name does not say it.

    Raises UserError, with the nearest valid name, for a chip or a grid that Google does not offer.

    >>> parse_topology("v5p:4x4x8").devices, str(parse_topology("v5litepod-256")), str(parse_topology("2*v5p-64"))
    (128, 'v5e:16x16', '2*v5p:2x4x4')
    >>> parse_topology("v5p:4x4x7")
    Traceback (most recent call last):
        ...
    common.errors.UserError: topology 'v5p:4x4x7': no slice has this shape; nearest: v5p:4x4x8
    """
    match = re.fullmatch(r"(?:(\d{1,9})\*)?(\w+)(?::(\d{1,9}(?:x\d{1,9})+)|-(\d{1,9}))", text.strip().lower())
    if not match:
        raise UserError(f"topology {text!r} must be CHIP:GRID, such as v5p:4x4x8, v5e-256 or 2*v5e:16x16")
    times, alias, sides, number = match.groups()
    chip = _ALIASES.get(alias, alias)
    offered = [chip.name for chip in CHIPS.values() if chip.links]
    if chip not in offered:
        raise UserError(f"topology {text!r}: unknown chip {chip!r}, {nearest(chip, offered)}")
    if slices < 1 or times == "0":
        raise UserError(f"topology {text!r}: there must be at least 1 slice")
    if times and slices > 1:
        raise UserError(f"topology {text!r} already has a number of slices; remove --slices")
    grids = _grids(chip)
    if number:
        chips = int(number) // 2 if chip in _NAMED_BY_CORES else int(number)
        close = min(grids, key=lambda grid: (abs(math.prod(grid) - chips), max(grid)))
        grid = close if math.prod(close) == chips else None
    else:
        grid = tuple(map(int, sides.split("x")))
        chips = math.prod(grid)
        close = min(grids, key=lambda grid: (abs(math.log(math.prod(grid) / max(chips, 1))), max(grid)))
    if grid not in grids:
        nearest_topology = Topology(chip=chip, grid=close, slices=int(times or slices))
        raise UserError(f"topology {text!r}: no slice has this shape; nearest: {nearest_topology}")
    return Topology(chip=chip, grid=grid, slices=int(times or slices))


def _grids(chip: str) -> list[tuple[int, ...]]:
    """All grids that slices of a chip come in."""
    if chip not in _MOST_CHIPS:
        return [tuple(map(int, grid.split("x"))) for grid in _FLAT_GRIDS]
    sides = range(4, 33, 4)
    cubes = [grid for grid in itertools.combinations_with_replacement(sides, 3) if math.prod(grid) <= _MOST_CHIPS[chip]]
    return [tuple(map(int, grid.split("x"))) for grid in _SMALL_GRIDS] + cubes
