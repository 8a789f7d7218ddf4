"""Sibling sizes of equal cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from common.compute.ledger import FLOPS_TOLERANCE
from common.compute.length_sums import LengthSums
from common.compute.model_config import ModelConfig
from common.errors import UserError

Config = TypeVar("Config", bound=Any)


def match_training_flops(config: Config, target: ModelConfig, text: LengthSums, *, multiple: int) -> Config:
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


def matching_widths(models: Mapping[str, ModelConfig], reference: str, text: LengthSums) -> dict[str, int]:
    """The `d_ff` with which each other model costs as much as `reference` on `text`; none for those that do already.

    The roundest width within half of FLOPS_TOLERANCE, so that any two models are within all of it. Raises UserError
    naming the model that no width brings there.
    """
    widths = {}
    target = models[reference]
    for name, model in models.items():
        if name == reference or _apart(model, target, text) <= FLOPS_TOLERANCE / 2:
            continue
        try:
            widths[name] = _roundest(model, target, text)
        except UserError as error:
            raise UserError(f"{name} cannot match {reference}: {error}") from error
    return widths


def unequal(models: Mapping[str, ModelConfig], text: LengthSums) -> str | None:
    """Says by how much the models' training FLOPs on `text` differ, and what would match them; None where they do not
    by more than FLOPS_TOLERANCE."""
    flops = {name: model.flops(text).train_full_attention for name, model in models.items()}
    spread = max(flops.values()) / min(flops.values()) - 1
    if spread <= FLOPS_TOLERANCE:
        return None
    counts = ", ".join(f"{name} {count:.4g}" for name, count in flops.items())
    return f"training FLOPs of a step are {spread:.2%} apart ({counts}); {_cure(models, text)}"


def _cure(models: Mapping[str, ModelConfig], text: LengthSums) -> str:
    """Suggests the model to which the fewest others would have to be matched; of several, the last."""
    cures = {}
    for reference in reversed(list(models)):
        try:
            cures[reference] = matching_widths(models, reference, text)
        except UserError:
            continue
    if not cures:
        return "no d_ff makes them equal"
    best = min(cures, key=lambda reference: len(cures[reference]))
    widths = " ".join(f"arms.{name}.model.d_ff={width}" for name, width in cures[best].items())
    return f"--match {best} makes them equal: {widths}"


def _roundest(config: Any, target: ModelConfig, text: LengthSums) -> int:
    for multiple in (128, 64, 32, 16, 8, 4, 2):
        try:
            found = match_training_flops(config, target, text, multiple=multiple)
        except UserError:  # less than the multiple is wanted
            continue
        if _apart(found, target, text) <= FLOPS_TOLERANCE / 2:
            return found.d_ff
    return match_training_flops(config, target, text, multiple=1).d_ff


def _apart(one: ModelConfig, other: ModelConfig, text: LengthSums) -> float:
    """The relative difference of the models' training FLOPs."""
    counts = [model.flops(text).train_full_attention for model in (one, other)]
    return max(counts) / min(counts) - 1
