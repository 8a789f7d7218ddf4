"""Effects of two-level factors that are crossed in full: what each does on average over the others.

With k factors there are 2^k cells. A contrast gives each cell a sign; its effect is the mean of the cells with +1 less
the mean of those with -1, so all cells take part in every effect (Yates 1937; Box, Hunter and Hunter 2005, chapter 5).
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Seed = TypeVar("Seed", bound=Hashable)
Cell = tuple[int, ...]
"""The level of each factor: 0 (as it is) or 1 (changed)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """A main effect, or an interaction of two factors."""

    factors: tuple[str, ...]

    def sign(self, names: Sequence[str], cell: Cell) -> int:
        """Returns +1 where the factors of the contrast have an even number of 0s, else -1.

        A main effect is therefore changed less unchanged. An interaction is half of what changing one factor does
        where the other is changed, less half of what it does where the other is not.

        >>> Contrast(factors=("a",)).sign(("a", "b"), (1, 0)), Contrast(factors=("a", "b")).sign(("a", "b"), (1, 0))
        (1, -1)
        """
        return math.prod(1 if level else -1 for name, level in zip(names, cell, strict=True) if name in self.factors)


def contrasts(names: Sequence[str]) -> tuple[Contrast, ...]:
    """Returns the main effects, then the interactions of two factors; higher ones are left to the residue.

    >>> [contrast.factors for contrast in contrasts(("a", "b"))]
    [('a',), ('b',), ('a', 'b')]
    """
    return tuple(Contrast(factors=few) for size in (1, 2) for few in itertools.combinations(names, size))


def split_by(
    contrast: Contrast, names: Sequence[str], values: Mapping[Cell, Mapping[Seed, float]]
) -> tuple[dict[Seed, float], dict[Seed, float]]:
    """Returns the means over the cells with +1 and over those with -1, by seed.

    Only seeds that every cell has are used, so that each effect is free of the others. Their difference, seed by seed,
    is the effect, to be compared as any two arms are (`common.analysis.seeds.compare_seeds`).

    Raises ValueError unless `values` has all 2^k cells.

    >>> values = {(0, 0): {7: 1.0}, (0, 1): {7: 2.0}, (1, 0): {7: 4.0}, (1, 1): {7: 7.0}}
    >>> split_by(Contrast(factors=("a",)), ("a", "b"), values)
    ({7: 5.5}, {7: 1.5})
    >>> split_by(Contrast(factors=("a", "b")), ("a", "b"), values)
    ({7: 4.0}, {7: 3.0})
    """
    missing = set(itertools.product((0, 1), repeat=len(names))) - values.keys()
    if missing or len(values) != 2 ** len(names):
        raise ValueError(f"{len(values)} cells of {2 ** len(names)}; missing: {sorted(missing)}")
    shared = set.intersection(*(set(by_seed) for by_seed in values.values()))
    sides: dict[int, dict[Seed, float]] = {}
    for wanted in (1, -1):
        cells = [cell for cell in values if contrast.sign(names, cell) == wanted]
        sides[wanted] = {
            seed: math.fsum(values[cell][seed] for cell in cells) / len(cells) for seed in sorted(shared, key=str)
        }
    return sides[1], sides[-1]
