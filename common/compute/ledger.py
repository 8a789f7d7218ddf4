"""The FLOP ledger: exact counts of a forward pass, in parts, with named conventions.

A multiply-add counts 2. Only matrix products are counted (norms, softmax, gathers and the optimizer are not), as
everybody does. A training step costs three forward passes: backward does each product twice, for inputs and weights.
"""

import dataclasses

TRAIN_OVER_FORWARD = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Of one forward pass over some examples."""

    dense: int
    """Projections, MLP and head."""
    attention_full: int
    """Scores and weighted values, every key counted for every query: what XLA counts and plain attention computes."""
    attention_causal_half: int
    """The same with causal attention at half, as a kernel that skips masked blocks computes it."""

    @property
    def train_full_attention(self) -> int:
        return TRAIN_OVER_FORWARD * (self.dense + self.attention_full)

    @property
    def train_causal_half(self) -> int:
        return TRAIN_OVER_FORWARD * (self.dense + self.attention_causal_half)

    @property
    def train_six_nd(self) -> int:
        """6 x (matrix parameters that a token passes through) x (tokens that pass), summed over the model's parts."""
        return TRAIN_OVER_FORWARD * self.dense


def attention_parameters(d_model: int, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    """(query and output, key and value) matrix parameters of one attention layer."""
    return 2 * d_model * num_heads * head_dim, 2 * d_model * num_kv_heads * head_dim


def mlp_parameters(d_model: int, d_ff: int, gated: bool) -> int:
    return (3 if gated else 2) * d_model * d_ff
