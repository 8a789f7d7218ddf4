"""Audits an arm's FLOPs: counts the matrix products of its training step in the program that is passed to XLA."""

import dataclasses
from collections.abc import Sequence
from typing import cast

import jax

from common.compute.hlo import parse_lowered
from common.compute.traffic import product_flops
from common.sharding.shape import MeshShape
from common.train.programs import Setup, lower_step, make_programs
from experiments.families import ModelConfig, builder

LONGEST_REASON = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCount:
    """The FLOPs of one training step, or the reason why they could not be counted."""

    flops: float | None
    why_not: str = ""


def count_step(setup: Setup, devices: Sequence[jax.Device] | None = None) -> StepCount:
    """Counts the FLOPs of the matrix products in a step on a whole batch.

    Counts what the ledger counts: all of full attention, and no recomputation. Lowers the step for one row on one
    device and multiplies by the number of rows, since the products are linear in rows; so nothing is compiled, and no
    batch is too large. Layers are scanned or unrolled as in training. Never raises: an audit must not end a run, so an
    error is returned as `why_not`.
    """
    rows, inputs, targets = setup.row_slots
    try:
        row = _on_one_device(dataclasses.replace(setup, row_slots=(1, inputs, targets)))
        return StepCount(flops=float(rows * product_flops(parse_lowered(lower_step(row, make_programs(row, devices))))))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return StepCount(flops=None, why_not=reason[:LONGEST_REASON])


def _on_one_device(setup: Setup) -> Setup:
    """Returns the setup on one device, without kernels, which hide their products, and without rematerialization."""
    execution = dataclasses.replace(setup.train.execution, remat="none", attention="plain", mlp_chunk=None)
    train = dataclasses.replace(setup.train, mesh=MeshShape(), accumulation=1, execution=execution)
    return dataclasses.replace(setup, build=builder(cast(ModelConfig, setup.model), execution), train=train)
