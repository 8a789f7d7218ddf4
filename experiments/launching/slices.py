"""TPU slices by the names that Cloud TPU gives them.

Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (grids and names), cloud.google.com/tpu/docs/runtimes. TPU7x and
later are not here: the Cloud TPU API, which both engines ask, has none of them.
"""

import dataclasses
import math

from common.errors import UserError, nearest

PLANE = tuple("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split())
CUBES = tuple("2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16".split())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    prefix: str
    """Of its accelerator types."""
    counted: int
    """What an accelerator type counts for each chip: 2 where it counts cores."""
    grids: tuple[str, ...]
    """Chips along each axis: the one grid that an accelerator type of so many chips stands for."""
    runtime: str
    """Software version of the machines."""


CHIPS = {
    "v4": Chip(prefix="v4", counted=2, grids=CUBES, runtime="tpu-ubuntu2204-base"),
    "v5e": Chip(prefix="v5litepod", counted=1, grids=PLANE, runtime="v2-alpha-tpuv5-lite"),
    "v5p": Chip(prefix="v5p", counted=2, grids=(*CUBES, "16x16x16", "16x16x24"), runtime="v2-alpha-tpuv5"),
    "v6e": Chip(prefix="v6e", counted=1, grids=PLANE, runtime="v2-alpha-tpuv6e"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    chip: str
    grid: str

    @property
    def chips(self) -> int:
        return _product(self.grid)

    @property
    def accelerator_type(self) -> str:
        chip = CHIPS[self.chip]
        return f"{chip.prefix}-{chip.counted * self.chips}"

    @property
    def runtime(self) -> str:
        return CHIPS[self.chip].runtime


def slice_of_type(name: str) -> Slice:
    """The slice of an accelerator type. Raises UserError naming the nearest.

    >>> slice_of_type("v5p-64"), slice_of_type("v5p-64").chips
    (Slice(chip='v5p', grid='2x4x4'), 32)
    >>> slice_of_type("v5litepod-16").grid
    '4x4'
    """
    prefix, _, count = name.partition("-")
    chip = next((chip for chip, facts in CHIPS.items() if prefix in (chip, facts.prefix)), None)
    if chip is None:
        raise UserError(f"--tpu {name!r}: {nearest(prefix, [facts.prefix for facts in CHIPS.values()])}")
    valid = {found.accelerator_type: found for found in _slices(chip)}
    if name not in valid:
        asked = int(count) // CHIPS[chip].counted if count.isdecimal() else 1
        raise UserError(
            f"--tpu {name!r} is none of Cloud TPU's: nearest: {_closest(chip, asked).accelerator_type}; "
            f"valid: {', '.join(valid)}"
        )
    return valid[name]


def slice_of_topology(name: str) -> Slice:
    """The slice of `CHIP:GRID`. Raises UserError naming the nearest.

    >>> slice_of_topology("v5p:4x4x8").accelerator_type, slice_of_topology("v6e:4x8").accelerator_type
    ('v5p-256', 'v6e-32')
    """
    chip, _, grid = name.partition(":")
    if chip not in CHIPS:
        raise UserError(f"--topology {name!r} must be CHIP:GRID, such as v5p:4x4x8; chip {nearest(chip, CHIPS)}")
    valid = [found.grid for found in _slices(chip)]
    if grid not in valid:
        asked = _product(grid) if all(part.isdecimal() for part in grid.split("x")) else 1
        raise UserError(
            f"--topology {name!r} has no accelerator type: nearest: {chip}:{_closest(chip, asked).grid}; "
            f"valid: {', '.join(valid)}"
        )
    return Slice(chip=chip, grid=grid)


def _slices(chip: str) -> list[Slice]:
    return [Slice(chip=chip, grid=grid) for grid in CHIPS[chip].grids]


def _closest(chip: str, chips: int) -> Slice:
    return min(_slices(chip), key=lambda found: abs(found.chips - chips))


def _product(grid: str) -> int:
    return math.prod(map(int, grid.split("x")))
