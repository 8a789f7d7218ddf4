"""How many devices stand along each axis of the mesh. Plain config, no JAX needed to read it."""

import dataclasses
import math
from typing import Annotated

from common.ranges import Range, check_ranges

Devices = Annotated[int, Range(1, 2**20, unit="devices")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each mesh axis, the slowest network first.

    Rows are split over replica, data and fsdp; parameters over fsdp and tensor; a row's positions over context.
    """

    replica: Devices = 1
    """Slices, which only the data centre's network joins."""
    data: Devices = 1
    fsdp: Devices = 1
    context: Devices = 1
    tensor: Devices = 1

    def __post_init__(self) -> None:
        check_ranges(self)

    def __str__(self) -> str:
        """
        >>> print(MeshShape(data=2, tensor=4), MeshShape())
        data=2,tensor=4 data=1
        """
        return ",".join(f"{axis}={size}" for axis, size in self.sizes().items() if size > 1) or "data=1"

    def sizes(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def devices(self) -> int:
        return math.prod(self.sizes().values())

    @property
    def row_parts(self) -> int:
        """Into how many parts a batch's rows are dealt out."""
        return math.prod(self.sizes()[axis] for axis in ROW_AXES)


ROW_AXES = ("replica", "data", "fsdp")
"""Among which a batch's rows are dealt out."""
POSITION_AXES = (*ROW_AXES, "context")
"""Among which the positions of all rows are dealt out."""
MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshShape))
