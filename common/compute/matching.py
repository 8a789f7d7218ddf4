"""Finds model sizes of equal training cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from common.compute.ledger import FLOPS_TOLERANCE
from common.compute.length_sums import LengthSums
from common.compute.model_config import ModelConfig
from common.errors import UserError

Config = TypeVar("Config", bound=Any)


def match_training_flops(config: Config, target: ModelConfig, lengths: LengthSums, *, multiple: int) -> Config:
    """Returns `config` with the multiple of `multiple` as `d_ff` whose training FLOPs are nearest to `target`'s.

    FLOPs are linear in d_ff, so two counts give the answer. Raises UserError if even the smallest d_ff costs more.
    """

    def flops(d_ff: int) -> int:
        return dataclasses.replace(config, d_ff=d_ff).flops(lengths).train_full_attention

    wanted = target.flops(lengths).train_full_attention
    slope = (flops(2 * multiple) - flops(multiple)) / multiple
    d_ff = round((multiple + (wanted - flops(multiple)) / slope) / multiple) * multiple
    if d_ff < multiple:
        raise UserError(
            f"no d_ff brings this size down to {wanted:.3g} training FLOPs: "
            f"it has {flops(multiple):.3g} at d_ff={multiple}"
        )
    return dataclasses.replace(config, d_ff=d_ff)


def matching_widths(models: Mapping[str, ModelConfig], reference: str, lengths: LengthSums) -> dict[str, int]:
    """Returns the `d_ff` at which each other model costs as much as `reference`, without those that already do.

    Each is the roundest width within half of FLOPS_TOLERANCE, so that any two models are within all of it. Raises
    a UserError that names the model which no width can match.
    """
    widths = {}
    target = models[reference]
    for name, model in models.items():
        if name == reference or _relative_difference(model, target, lengths) <= FLOPS_TOLERANCE / 2:
            continue
        try:
            widths[name] = _roundest_width(model, target, lengths)
        except UserError as error:
            raise UserError(f"{name} cannot match {reference}: {error}") from error
    return widths


def unequal(models: Mapping[str, ModelConfig], lengths: LengthSums) -> str | None:
    """Returns a message about how far the models' training FLOPs are apart and what would match them.

    Returns None if they are within FLOPS_TOLERANCE.
    """
    flops = {name: model.flops(lengths).train_full_attention for name, model in models.items()}
    spread = max(flops.values()) / min(flops.values()) - 1
    if spread <= FLOPS_TOLERANCE:
        return None
    counts = ", ".join(f"{name} {count:.4g}" for name, count in flops.items())
    return f"training FLOPs of a step are {spread:.2%} apart ({counts}); {_suggestion(models, lengths)}"


def _suggestion(models: Mapping[str, ModelConfig], lengths: LengthSums) -> str:
    """Suggests matching to the model for which the fewest others must change; among equals, the last."""
    widths_to = {}
    for reference in reversed(list(models)):
        try:
            widths_to[reference] = matching_widths(models, reference, lengths)
        except UserError:
            continue
    if not widths_to:
        return "no d_ff makes them equal"
    best = min(widths_to, key=lambda reference: len(widths_to[reference]))
    widths = " ".join(f"arms.{name}.model.d_ff={width}" for name, width in widths_to[best].items())
    return f"--match {best} makes them equal: {widths}"


def _roundest_width(config: Any, target: ModelConfig, lengths: LengthSums) -> int:
    for multiple in (128, 64, 32, 16, 8, 4, 2):
        try:
            found = match_training_flops(config, target, lengths, multiple=multiple)
        except UserError:  # the width would be below the multiple
            continue
        if _relative_difference(found, target, lengths) <= FLOPS_TOLERANCE / 2:
            return found.d_ff
    return match_training_flops(config, target, lengths, multiple=1).d_ff


def _relative_difference(one: ModelConfig, other: ModelConfig, lengths: LengthSums) -> float:
    """The relative difference of the models' training FLOPs."""
    counts = [model.flops(lengths).train_full_attention for model in (one, other)]
    return max(counts) / min(counts) - 1
