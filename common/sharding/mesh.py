"""The device mesh of a run."""

import jax
from jax.sharding import AxisType, Mesh

from common.errors import UserError
from common.sharding.rules import MESH_AXES


def make_mesh(shape: tuple[int, int, int]) -> Mesh:
    """A mesh `(data, fsdp, tensor)` over the first devices; raises UserError where there are too few."""
    wanted = shape[0] * shape[1] * shape[2]
    devices = jax.devices()
    if wanted > len(devices):
        sizes = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise UserError(
            f"train.mesh {sizes} needs {wanted} devices, but there are {len(devices)} ({devices[0].device_kind}); "
            f"nearest: data={len(devices)}"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted])
