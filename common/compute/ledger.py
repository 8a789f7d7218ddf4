"""The FLOP ledger: exact counts of a forward pass, in parts, with named conventions.

A multiply-add counts 2. Only matrix products count; norms, softmax, gathers and the optimizer do not, as is customary.
A training step costs three forward passes, since the backward pass computes two products for each one: the gradients
of inputs and of weights.
"""

import dataclasses

from common.recipe import Execution, Widths

TRAIN_OVER_FORWARD = 3
FLOPS_TOLERANCE = 0.01
"""The largest relative difference at which the training FLOPs of two arms count as equal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """FLOPs of one forward pass over some examples."""

    dense: int
    """Projections, MLP and head."""
    head: int
    """The head's part of `dense`."""
    mlp: int
    """The MLPs' part of `dense`."""
    mlp_out: int
    """The MLPs' output products, a part of `mlp`: each is the last of its layer, and no gradient needs its result."""
    attention_full: int
    """Scores and weighted values with every key for every query: what XLA counts and plain attention computes."""
    attention_causal_half: int
    """The same with half of causal attention, as computed by a kernel that skips masked blocks."""

    @property
    def train_full_attention(self) -> int:
        return TRAIN_OVER_FORWARD * (self.dense + self.attention_full)

    @property
    def train_causal_half(self) -> int:
        return TRAIN_OVER_FORWARD * (self.dense + self.attention_causal_half)

    @property
    def train_six_nd(self) -> int:
        """6 x (matrix parameters that a token passes through) x (tokens), summed over the model's parts."""
        return TRAIN_OVER_FORWARD * self.dense

    def of_slowest(self, devices: int) -> "ForwardFlops":
        """Returns `devices` times the FLOPs of the slowest of the devices that share each row's queries, in order.

        In causal attention the device with the last queries sees nearly all keys, and the others wait for it.

        >>> whole = ForwardFlops(dense=0, head=0, mlp=0, mlp_out=0, attention_full=80, attention_causal_half=40)
        >>> [whole.of_slowest(devices).attention_causal_half for devices in (1, 2, 4)]
        [40, 60, 70]
        """
        causal = self.attention_full - self.attention_causal_half
        return dataclasses.replace(self, attention_causal_half=self.attention_causal_half + causal - causal // devices)

    def train_hardware(self, execution: Execution) -> int:
        """Returns the FLOPs that the hardware computes in a training step, recomputation included.

        Attention counts in full with all logits at once, and with half of its causal part where blocks are skipped.
        Attention in blocks recomputes its scores (half of its forward pass). The backward pass also recomputes what the
        remat policy does not keep, except products whose result no gradient needs:

            none                only MLPs in chunks, if `mlp_chunk` is set
            dots                attention, as it keeps no product of two activations
            attention           all but attention; plain attention too, which has no name to keep it by
            full, offload       whole layers

        The head is never recomputed.
        """
        plain = execution.attention == "plain"
        attention = self.attention_full if plain else self.attention_causal_half
        layers = self.dense - self.head - self.mlp_out
        recomputed = {
            "none": 0 if execution.mlp_chunk is None else self.mlp - self.mlp_out,
            "dots": attention,
            "attention": layers + (attention if plain else 0),
        }.get(execution.remat, layers + attention)
        recomputed += 0 if plain else attention // 2
        return TRAIN_OVER_FORWARD * (self.dense + attention) + recomputed

    def train_kernels(self, execution: Execution) -> int:
        """Returns the FLOPs of attention in TPU kernels in a training step; compilers cannot count inside kernels.

        The forward kernel has two products. The gradient kernels recompute the first of them: the one for queries has
        three products, the one for keys and values four. The forward kernel runs twice if the remat policy does not
        keep attention's output.
        """
        products = 2 + 3 + 4 + (0 if execution.remat in ("none", "attention") else 2)
        return self.attention_causal_half * products // 2  # attention_causal_half has the two forward products


def query_out_matrices(widths: Widths) -> int:
    """Parameters of the matrices that project queries and attention's output."""
    return 2 * widths.d_model * widths.num_heads * widths.head_dim


def key_value_matrices(widths: Widths) -> int:
    """Parameters of the matrices that project keys and values."""
    return 2 * widths.d_model * widths.num_kv_heads * widths.head_dim


def mlp_matrices(widths: Widths) -> int:
    """Parameters of an MLP's matrices."""
    return (3 if widths.recipe.gated_mlp else 2) * widths.d_model * widths.d_ff


def mlp_out_matrix(widths: Widths) -> int:
    """Parameters of an MLP's output matrix."""
    return widths.d_model * widths.d_ff


def pair_flops(widths: Widths) -> int:
    """FLOPs of one query with one key in one layer: score and weighted value, all heads."""
    return 4 * widths.num_heads * widths.head_dim


def norm_parameters(widths: Widths) -> int:
    """Parameters of one norm."""
    return (2 if widths.recipe.norm == "layernorm" else 1) * widths.d_model


def attention_parameters(widths: Widths) -> int:
    """Parameters of one attention and its norm: matrices, biases, norms."""
    biases = (
        (widths.num_heads + 2 * widths.num_kv_heads) * widths.head_dim + widths.d_model if widths.recipe.biases else 0
    )
    head_norms = 2 * widths.head_dim if widths.recipe.qk_norm else 0
    return query_out_matrices(widths) + key_value_matrices(widths) + biases + head_norms + norm_parameters(widths)


def mlp_parameters(widths: Widths) -> int:
    """Parameters of one MLP and its norm."""
    biases = (2 if widths.recipe.gated_mlp else 1) * widths.d_ff + widths.d_model if widths.recipe.biases else 0
    return mlp_matrices(widths) + biases + norm_parameters(widths)


def table_parameters(widths: Widths, vocab_size: int, max_positions: int | None) -> int:
    """Parameters of the token table, the head and learned positions."""
    tables = 1 if widths.recipe.tied_embeddings else 2
    return (tables * vocab_size + (max_positions or 0)) * widths.d_model


def bias_parameters(widths: Widths) -> int:
    """Parameters of one table of relative bias."""
    return widths.num_heads * widths.recipe.relative_buckets if widths.recipe.positions == "t5_bias" else 0
