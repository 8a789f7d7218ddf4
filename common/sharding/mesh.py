"""The device mesh of a run."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from common.errors import UserError
from common.sharding.shape import MESH_AXES, MeshShape


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of the first `devices`, by default all devices of the run.

    With several slices, joined by the data centre's network, `replica` must be their number, and the devices of one
    slice stay together. Raises UserError if there are too few devices, or another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    if shape.devices > len(devices):
        raise UserError(
            f"train.mesh {shape} needs {shape.devices} devices, but there are {len(devices)} "
            f"({devices[0].device_kind}); nearest: data={len(devices)}"
        )
    chosen = list(devices[: shape.devices])
    slices = len({getattr(device, "slice_index", 0) for device in chosen})
    types = (AxisType.Auto,) * len(MESH_AXES)
    sizes = tuple(shape.sizes().values())
    if slices == 1:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=chosen)
    if shape.replica != slices:
        raise UserError(
            f"train.mesh.replica is {shape.replica}, but the devices are in {slices} slices; nearest: {slices}"
        )
    across = (slices, *(1 for _ in sizes[1:]))
    return Mesh(mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), across, chosen), MESH_AXES, axis_types=types)
