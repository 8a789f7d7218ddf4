"""The shape of the device mesh: a plain config that needs no JAX."""

import dataclasses
import math
from typing import Annotated

from common.ranges import Range, check_ranges

Devices = Annotated[int, Range(1, 2**20, unit="devices")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """The number of devices along each mesh axis, slowest network first.

    Rows of a batch are sharded over replica, data and fsdp; parameters over fsdp and tensor; the positions of a row
    over context.
    """

    replica: Devices = 1
    """The number of slices: groups of devices that only the data centre's network connects."""
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
        """The number of shards of a batch's rows."""
        return math.prod(self.sizes()[axis] for axis in ROW_AXES)


ROW_AXES = ("replica", "data", "fsdp")
"""Mesh axes that shard a batch's rows."""
POSITION_AXES = (*ROW_AXES, "context")
"""Mesh axes that shard the positions of a batch."""
MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshShape))
