"""The audit of an arm's FLOPs: the matrix products of the training step, counted in the program that XLA is given."""

import dataclasses
from collections.abc import Sequence
from typing import cast

import jax

from common.compute.hlo import parse_lowered
from common.compute.traffic import product_flops
from common.sharding.shape import MeshShape
from common.train.programs import Setup, lower_step, make_programs
from experiments.config import ModelConfig
from experiments.families import builder

LONGEST_REASON = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCount:
    """FLOPs of one training step, or why they could not be counted."""

    flops: float | None
    why_not: str = ""


def count_step(setup: Setup, devices: Sequence[jax.Device] | None = None) -> StepCount:
    """Counts the matrix products of a whole batch's step, as the ledger does: nothing skipped, nothing recomputed.

    Lowers the step for one row on one device and multiplies, since products are linear in rows: nothing is compiled,
    and no batch is too large. Layers are scanned or unrolled as in training. An audit ends no run: whatever goes wrong
    is returned as the reason why there is no count.
    """
    rows, inputs, targets = setup.row_slots
    try:
        row = _plainly(dataclasses.replace(setup, row_slots=(1, inputs, targets)))
        return StepCount(flops=float(rows * product_flops(parse_lowered(lower_step(row, make_programs(row, devices))))))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return StepCount(flops=None, why_not=reason[:LONGEST_REASON])


def _plainly(setup: Setup) -> Setup:
    """The setup on one device, without kernels, which hide their products, and without recomputation to save memory."""
    execution = dataclasses.replace(setup.train.execution, remat="none", attention="plain", mlp_chunk=None)
    train = dataclasses.replace(setup.train, mesh=MeshShape(), accumulation=1, execution=execution)
    return dataclasses.replace(setup, build=builder(cast(ModelConfig, setup.model), execution), train=train)
