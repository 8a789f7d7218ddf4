"""Loads a trained model for use on this machine: on all of its devices, in its usual precision."""

import os
import typing

import jax
from jax.sharding import Mesh

from common.errors import UserError, nearest
from common.infer.policy import Policy
from common.recipe import Dtype, Execution
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from experiments.models.finding import open_model


def load(path: str | os.PathLike[str], *, dtype: Dtype | None = None) -> Policy:
    """Loads a trained or converted model, with its tokenizer.

    Args:
        path: an arm's run directory (the newest good checkpoint; `PATH@STEP` names another), a model folder that
            `twinstack convert` made, or the directory of a checkpoint.
        dtype: "float32" or "bfloat16", of activations and matrix products. By default float32 on a CPU and bfloat16
            elsewhere. Parameters are float32 in any case.

    Raises:
        UserError: where there is no model, or it cannot be read.
    """
    if dtype is not None and dtype not in typing.get_args(Dtype):
        raise UserError(f"dtype {dtype!r}: {nearest(str(dtype), typing.get_args(Dtype))}")
    return open_model(os.fspath(path), execution_here(dtype), mesh_here())


def execution_here(dtype: Dtype | None) -> Execution:
    """Returns how to compute on this machine: on CPU with unrolled layers, which are faster there, and in float32."""
    on_cpu = jax.default_backend() == "cpu"
    return Execution(dtype=dtype or ("float32" if on_cpu else "bfloat16"), scan_layers=not on_cpu)


def mesh_here() -> Mesh:
    """Returns a mesh of all devices, over which rows are sharded."""
    return make_mesh(MeshShape(data=len(jax.devices())))
