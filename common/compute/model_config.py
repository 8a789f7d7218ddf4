"""The protocol through which ledgers and the loop read a family's config."""

from typing import Protocol

from common.compute.ledger import ForwardFlops
from common.compute.length_sums import LengthSums
from common.recipe import Recipe


class ModelConfig(Protocol):
    """A frozen dataclass that validates its fields when it is made."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def reads_incrementally(self) -> bool:
        """Whether cached keys and values stay valid when more text follows."""
        ...

    def param_count(self) -> int:
        """Returns the exact number of parameters."""
        ...

    def flops(self, text: LengthSums) -> ForwardFlops:
        """Counts the matrix-product FLOPs of a forward pass over `text`, exactly."""
        ...
