"""Chooses the implementation of attention for a call."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from common.errors import UserError
from common.kernels.blocks import LANES

Kind = Literal["auto", "splash", "flash", "cudnn", "blocked", "plain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """The implementation that the config names, and its block sizes."""

    kind: Kind = "auto"
    block: int = 64
    """Queries that `blocked` takes at a time."""
    kernel_block: int | None = None
    """The most queries and keys that a TPU kernel takes at a time; None: see `blocks.best_blocks`."""
    interpret: bool = False
    """Runs TPU kernels without a TPU, slowly: for tests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What the choice depends on: one call of attention and the devices it runs on."""

    platform: str
    """`tpu`, `gpu` (or `cuda`, `rocm`) or `cpu`: what the program is compiled for."""
    dtype: str
    head_dim: int
    queries: int
    biased: bool
    """Whether logits get a relative bias."""
    consecutive: bool
    """See `Visibility.consecutive`."""
    prefix: bool
    """Whether queries see a prefix bidirectionally."""
    static_index: bool
    """Whether every query's index is known when the program is traced, or does not matter."""
    one_segment: bool
    """Whether each row is one segment at its start and, if causal, its first query has the index of its first key."""
    divides: bool
    """Whether rows, queries and heads divide over the devices, or there is only one."""

    @property
    def whole_sequence(self) -> bool:
        """False when decoding, for which only the plain implementation serves."""
        return self.queries > 1 and self.static_index


SERVES: Mapping[Kind, Callable[[AttentionCall], bool]] = {
    "splash": lambda call: call.whole_sequence and call.divides and not call.biased and not call.prefix,
    "flash": lambda call: call.whole_sequence and call.divides and (call.consecutive or not call.biased),
    "cudnn": lambda call: (
        call.whole_sequence
        and call.divides
        and call.one_segment
        and not (call.biased or call.prefix)
        and call.dtype in ("bfloat16", "float16")
        and call.head_dim % 8 == 0
        and call.head_dim <= 128
    ),
    "blocked": lambda call: call.whole_sequence,
    "plain": lambda call: True,
}
"""The calls that each implementation computes correctly. cuDNN takes row lengths, but no segments."""

_PREFERRED: Mapping[str, tuple[Kind, ...]] = {
    "tpu": ("splash", "flash", "blocked", "plain"),
    "gpu": ("cudnn", "blocked", "plain"),
    "cpu": ("blocked", "plain"),
}
"""Best first; other platforms use `cpu`'s."""

_RUNS_ON: Mapping[Kind, str] = {"splash": "tpu", "flash": "tpu", "cudnn": "gpu"}


def choose(implementation: Implementation, call: AttentionCall) -> Kind:
    """Returns the named implementation if it serves the call, else the platform's best one that does.

    Raises UserError if the named one runs on other devices only.

    >>> whole = AttentionCall(platform="tpu", dtype="bfloat16", head_dim=128, queries=512, biased=False,
    ...     consecutive=False, prefix=False, static_index=True, one_segment=False, divides=True)
    >>> biased = dataclasses.replace(whole, biased=True)
    >>> packed = dataclasses.replace(biased, consecutive=True)
    >>> [choose(Implementation(), call) for call in (whole, biased, packed)]
    ['splash', 'blocked', 'flash']
    >>> choose(Implementation(kind="blocked"), whole)
    'blocked'
    >>> choose(Implementation(kind="blocked"), dataclasses.replace(whole, queries=1))  # decoding
    'plain'
    """
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(call.platform, call.platform)
    named = implementation.kind
    needs = _RUNS_ON.get(named)
    if needs is not None and needs != platform and not implementation.interpret:
        raise UserError(
            f"execution.attention is {named!r}, which runs on {needs}, but this program is for {platform}; "
            "nearest: auto"
        )
    best_first = _preferred(platform, call.head_dim)
    candidates = best_first if named == "auto" else (named, *best_first)
    return next(kind for kind in candidates if SERVES[kind](call))


def _preferred(platform: str, head_dim: int) -> tuple[Kind, ...]:
    kinds = _PREFERRED.get(platform, _PREFERRED["cpu"])
    if head_dim % LANES:
        # Splash attention's operands have the head dimension last, which a TPU would pad to its lanes in memory;
        # `flash` has the length last.
        return tuple(kind for kind in kinds if kind != "splash")
    return kinds
