"""What a study claims to hold equal between its arms: part of its config, and checked by its report."""

import dataclasses
from typing import Literal

from common.compute.ledger import FLOPS_TOLERANCE
from common.ranges import NotNegative, check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """What a study claims to hold equal between arms that differ in certain labels only.

    Runs that are equal in all other labels, seed included, form a group; within each group the report checks the claim.
    """

    over: tuple[str, ...] = ("arm",)
    """The labels in which the arms of a group may differ; `arm` stands for all of them."""
    data: Literal["batches", "prefix", "source", "any"] = "batches"
    """`batches`: the same batches in the same order. `prefix`: a shorter run reads the first batches of a longer one.
    `source`: the same source examples in the same order, whatever the objective makes of them."""
    steps: bool = True
    """Whether they train for the same number of steps."""
    flops_within: NotNegative | None = FLOPS_TOLERANCE
    """Largest relative difference in training FLOPs; None: they may differ."""
    apart: tuple[str, ...] = ()
    """Fields of a run that may differ because the study is about them, such as `model.memory`; `*` matches anything.

    Sizes, and the learning rate and whatever else the study's search tunes, may always differ; other fields never."""

    def __post_init__(self) -> None:
        check_ranges(self)
