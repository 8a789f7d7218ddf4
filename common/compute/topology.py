"""Pod slices by name, as a planner is asked for them: `v5p:4x4x8`, `v5e-256`, two slices `2*v5e:16x16`."""

import dataclasses
import itertools
import math
import re

from common.compute.chips import CHIPS, Chip
from common.errors import UserError, nearest

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_MOST_CHIPS = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}
"""Of one slice."""
_NAMED_BY_CORES = ("v4", "v5p", "tpu7x")
"""`v5p-64` has 64 cores, two a chip; the number of the others counts chips."""
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Slices of equal form; chips within one are joined by links, slices by the data centre's network."""

    chip: str
    grid: tuple[int, ...]
    """Chips along each direction of a slice."""
    slices: int = 1

    def __str__(self) -> str:
        name = f"{self.chip}:{'x'.join(map(str, self.grid))}"
        return f"{self.slices}*{name}" if self.slices > 1 else name

    @property
    def facts(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.grid)

    @property
    def devices(self) -> int:
        """What JAX calls a device."""
        return self.chips * self.facts.devices_per_chip

    def wraps(self, direction: int) -> bool:
        """Whether links close the direction to a ring: in 16 chips of a flat slice, in multiples of 4 of a cube."""
        size = self.grid[direction]
        return size == 16 if len(self.grid) == 2 else size % 4 == 0


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Raises UserError, with the nearest valid name, for a chip or a grid that Google does not offer.

    >>> parse_topology("v5p:4x4x8").devices, str(parse_topology("v5litepod-256")), str(parse_topology("2*v5p-64"))
    (128, 'v5e:16x16', '2*v5p:2x4x4')
    >>> parse_topology("v5p:4x4x7")
    Traceback (most recent call last):
        ...
    common.errors.UserError: topology 'v5p:4x4x7': no slice has this form; nearest: v5p:4x4x8
    """
    form = re.fullmatch(r"(?:(\d{1,9})\*)?(\w+)(?::(\d{1,9}(?:x\d{1,9})+)|-(\d{1,9}))", text.strip().lower())
    if not form:
        raise UserError(f"topology {text!r} must be CHIP:GRID, such as v5p:4x4x8, v5e-256 or 2*v5e:16x16")
    times, name, grid, number = form.groups()
    name = _ALIASES.get(name, name)
    offered = [chip.name for chip in CHIPS.values() if chip.links]
    if name not in offered:
        raise UserError(f"topology {text!r}: unknown chip {name!r}, {nearest(name, offered)}")
    if slices < 1 or times == "0":
        raise UserError(f"topology {text!r}: the least number of slices is 1")
    if times and slices > 1:
        raise UserError(f"topology {text!r} says how many slices there are; leave --slices out")
    valid = _grids(name)
    if number:
        chips = int(number) // 2 if name in _NAMED_BY_CORES else int(number)
        chosen = min(valid, key=lambda grid: (abs(math.prod(grid) - chips), max(grid)))
        given: tuple[int, ...] | None = chosen if math.prod(chosen) == chips else None
    else:
        given = tuple(map(int, grid.split("x")))
        chips = math.prod(given)
        chosen = min(valid, key=lambda grid: (abs(math.log(math.prod(grid) / max(chips, 1))), max(grid)))
    if given not in valid:
        close = Topology(chip=name, grid=chosen, slices=int(times or slices))
        raise UserError(f"topology {text!r}: no slice has this form; nearest: {close}")
    return Topology(chip=name, grid=given, slices=int(times or slices))


def _grids(name: str) -> list[tuple[int, ...]]:
    """All forms of a slice."""
    if name not in _MOST_CHIPS:
        return [tuple(map(int, grid.split("x"))) for grid in _FLAT]
    sides = range(4, 33, 4)
    cubes = [grid for grid in itertools.combinations_with_replacement(sides, 3) if math.prod(grid) <= _MOST_CHIPS[name]]
    return [tuple(map(int, grid.split("x"))) for grid in _SMALL_CUBES] + cubes
