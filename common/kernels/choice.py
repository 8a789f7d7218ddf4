"""Which implementation attends, and under which conditions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from common.errors import UserError
from common.kernels.blocks import LANES

Kind = Literal["auto", "splash", "flash", "cudnn", "blocked", "plain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """Which implementation is wanted, and in what blocks."""

    kind: Kind = "auto"
    block: int = 64
    """Queries that `blocked` takes at a time."""
    kernel_block: int = 512
    """Queries and keys that a TPU kernel takes at a time, at most."""
    interpret: bool = False
    """Kernels run without a TPU, slowly: for tests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What an implementation has to serve."""

    platform: str
    """`tpu`, `gpu` (`cuda`, `rocm`) or `cpu`: of the devices that the program is compiled for."""
    dtype: str
    head_dim: int
    queries: int
    biased: bool
    consecutive: bool
    prefix: bool
    placed: bool
    """Every query's index is known beforehand, or does not matter."""
    one_segment: bool
    """Every row is one segment at its begin, and its first query, where causal, stands at its first key."""
    divides: bool
    """Rows, queries and heads divide over the devices (or there is one)."""

    @property
    def whole(self) -> bool:
        """Not decoding, which takes all logits at once."""
        return self.queries > 1 and self.placed


SERVES: Mapping[Kind, Callable[[Case], bool]] = {
    "splash": lambda case: case.whole and case.divides and not case.biased and not case.prefix,
    "flash": lambda case: case.whole and case.divides and (case.consecutive or not case.biased),
    "cudnn": lambda case: (
        case.whole
        and case.divides
        and case.one_segment
        and not (case.biased or case.prefix)
        and case.dtype in ("bfloat16", "float16")
        and case.head_dim % 8 == 0
        and case.head_dim <= 128
    ),
    "blocked": lambda case: case.whole,
    "plain": lambda case: True,
}
"""Under which conditions each implementation is right. cuDNN knows lengths of rows, but no segments."""

_PREFERRED: Mapping[str, tuple[Kind, ...]] = {
    "tpu": ("splash", "flash", "blocked", "plain"),
    "gpu": ("cudnn", "blocked", "plain"),
    "cpu": ("blocked", "plain"),
}
"""The first that serves is taken; a platform that is not here goes by `cpu`."""

_RUNS_ON: Mapping[Kind, str] = {"splash": "tpu", "flash": "tpu", "cudnn": "gpu"}


def choose(how: How, case: Case) -> Kind:
    """The implementation wanted where it serves, else the first of the platform's that does.

    Raises UserError where the one wanted runs on other devices than these.

    >>> whole = Case(platform="tpu", dtype="bfloat16", head_dim=128, queries=512, biased=False, consecutive=False,
    ...              prefix=False, placed=True, one_segment=False, divides=True)
    >>> biased = dataclasses.replace(whole, biased=True)
    >>> choose(How(), whole), choose(How(), biased), choose(How(), dataclasses.replace(biased, consecutive=True))
    ('splash', 'blocked', 'flash')
    >>> choose(How(kind="plain"), whole), choose(How(kind="blocked"), dataclasses.replace(whole, queries=1))
    ('plain', 'plain')
    """
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(case.platform, case.platform)
    needs = _RUNS_ON.get(how.kind)
    if needs is not None and needs != platform and not how.interpret:
        raise UserError(
            f"execution.attention is {how.kind!r}, which runs on {needs}, but this program is for {platform}; "
            "nearest: auto"
        )
    wanted = _preferred(platform, case.head_dim)
    if how.kind != "auto":
        wanted = (how.kind, *wanted)
    return next(kind for kind in wanted if SERVES[kind](case))


def _preferred(platform: str, head_dim: int) -> tuple[Kind, ...]:
    kinds = _PREFERRED.get(platform, _PREFERRED["cpu"])
    if head_dim % LANES:
        # What splash attention reads and writes ends in the head dimension, which a TPU would pad to its lanes in
        # memory; of `flash` it ends in the length.
        return tuple(kind for kind in kinds if kind != "splash")
    return kinds
