"""Pretraining objectives: how a record's tokens become inputs, targets and loss weights. No model is known here.

An objective is a pure function of (seed, index, tokens), so any example can be made again by anyone at any time.
Inputs and targets may be empty, and id 0 may stand anywhere: lengths are explicit.

Legend: I an example's input tokens, T its target tokens (both without padding), E examples.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from common.data.config import CausalLM, Objective, Supervised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One example before packing."""

    inputs_I: np.ndarray
    """int32."""
    targets_T: np.ndarray
    """int32, not shifted."""
    weights_T: np.ndarray
    """float32; the loss is a mean over tokens by these weights."""


class SpecialIds(Protocol):
    """What examples and batches need of a tokenizer."""

    eos_id: int
    pad_id: int
    start_id: int
    content_hash: str

    def sentinel_id(self, k: int) -> int: ...


def fields(objective: Objective) -> tuple[str, ...]:
    """The fields of a record that the objective reads.

    >>> fields(CausalLM())
    ('text',)
    """
    return _FIELDS[type(objective)]


def make_example(
    objective: Objective, *, seed: int, index: int, tokens: Mapping[str, np.ndarray], ids: SpecialIds
) -> Example:
    """The example that `objective` makes of record `index`, whose fields hold int32 `tokens`.

    >>> import types
    >>> ids = types.SimpleNamespace(eos_id=1)
    >>> record = {"inputs": np.array([7, 0], np.int32), "targets": np.array([], np.int32)}
    >>> example = make_example(Supervised(), seed=0, index=0, tokens=record, ids=ids)
    >>> example.inputs_I.tolist(), example.targets_T.tolist(), example.weights_T.tolist()
    ([7, 0, 1], [1], [1.0])
    """
    del seed, index  # none of the objectives below draws anything
    match objective:
        case Supervised():
            inputs_I = _ended(tokens["inputs"], ids.eos_id, objective.eos_after_inputs)
            targets_T = _ended(tokens["targets"], ids.eos_id, objective.eos_after_targets)
        case CausalLM():
            inputs_I = np.zeros(0, np.int32)
            targets_T = _ended(tokens["text"], ids.eos_id, objective.eos)
    return Example(inputs_I=inputs_I, targets_T=targets_T, weights_T=np.ones(len(targets_T), np.float32))


def example_lengths(objective: Objective, token_lengths: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Input and target lengths int64 [E] of all examples, from the token lengths of their fields, without making them.

    >>> example_lengths(CausalLM(), {"text": np.array([0, 4])})
    (array([0, 0]), array([1, 5]))
    """
    match objective:
        case Supervised():
            inputs_E = np.asarray(token_lengths["inputs"], np.int64) + objective.eos_after_inputs
            targets_E = np.asarray(token_lengths["targets"], np.int64) + objective.eos_after_targets
        case CausalLM():
            targets_E = np.asarray(token_lengths["text"], np.int64) + objective.eos
            inputs_E = np.zeros_like(targets_E)
    return inputs_E, targets_E


def _ended(tokens: np.ndarray, eos_id: int, ended: bool) -> np.ndarray:
    if not ended:
        return np.asarray(tokens, np.int32)
    out = np.empty(len(tokens) + 1, np.int32)
    out[:-1] = tokens
    out[-1] = eos_id
    return out


_FIELDS: dict[type, tuple[str, ...]] = {Supervised: ("inputs", "targets"), CausalLM: ("text",)}
