"""Sibling sizes of equal cost."""

import dataclasses
from typing import Any, TypeVar

from common.compute.moments import Moments
from common.errors import UserError
from common.model import ModelConfig

Config = TypeVar("Config", bound=Any)


def match_training_flops(config: Config, target: ModelConfig, text: Moments, *, multiple: int) -> Config:
    """`config` with the `d_ff` (a multiple of `multiple`) whose training FLOPs on `text` come nearest to `target`'s.

    FLOPs are linear in d_ff, so two counts give the answer. Raises UserError where even the least d_ff costs more.
    """

    def flops(d_ff: int) -> int:
        return dataclasses.replace(config, d_ff=d_ff).flops(text).train_full_attention

    wanted = target.flops(text).train_full_attention
    slope = (flops(2 * multiple) - flops(multiple)) / multiple
    d_ff = round((multiple + (wanted - flops(multiple)) / slope) / multiple) * multiple
    if d_ff < multiple:
        raise UserError(
            f"no d_ff brings this size down to {wanted:.3g} training FLOPs: "
            f"it has {flops(multiple):.3g} at d_ff={multiple}"
        )
    return dataclasses.replace(config, d_ff=d_ff)
