"""A measured value with its uncertainty."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float
