"""The FLOP ledger: exact counts of a forward pass, in parts, with named conventions.

A multiply-add counts 2. Only matrix products are counted (norms, softmax, gathers and the optimizer are not), as
everybody does. A training step costs three forward passes: backward does each product twice, for inputs and weights.
"""

import dataclasses

from common.recipe import Execution, Widths

TRAIN_OVER_FORWARD = 3
FLOPS_TOLERANCE = 0.01
"""The largest relative difference at which the training FLOPs of a comparison's arms count as equal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Of one forward pass over some examples."""

    dense: int
    """Projections, MLP and head."""
    head: int
    """The head's part of it."""
    mlp: int
    """The MLPs' part of it."""
    mlp_out: int
    """The part of these that leads out again: the last product of a layer, whose result no gradient asks for."""
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

    def of_slowest(self, parts: int) -> "ForwardFlops":
        """`parts` times what the busiest device does, where devices share a row's queries in order.

        Whoever has the last queries of causal attention sees nearly all keys, and the others wait for it.

        >>> whole = ForwardFlops(dense=0, head=0, mlp=0, mlp_out=0, attention_full=80, attention_causal_half=40)
        >>> [whole.of_slowest(parts).attention_causal_half for parts in (1, 2, 4)]
        [40, 60, 70]
        """
        causal = self.attention_full - self.attention_causal_half
        return dataclasses.replace(self, attention_causal_half=self.attention_causal_half + causal - causal // parts)

    def train_hardware(self, execution: Execution) -> int:
        """What the device is made to compute: the training step as it is run, and what its backward pass does anew.

        Attention counts in full where all logits are taken at once, with its causal part at half where blocks are
        skipped. Blocks compute their scores a second time (half of attention's forward pass). What rematerialisation
        does not keep is computed anew, but for what no gradient asks for: attention (`dots`, since it keeps no product
        of two activations), all but attention (`attention`, which knows that of blocks and kernels alone) or whole
        layers (`full`, `offload`); or MLPs in pieces alone (`none`). The head's gradient needs nothing twice.
        """
        plain = execution.attention == "plain"
        attention = self.attention_full if plain else self.attention_causal_half
        layers = self.dense - self.head - self.mlp_out
        anew = {
            "none": 0 if execution.mlp_chunk is None else self.mlp - self.mlp_out,
            "dots": attention,
            "attention": layers + (attention if plain else 0),
        }.get(execution.remat, layers + attention)
        anew += 0 if plain else attention // 2
        return TRAIN_OVER_FORWARD * (self.dense + attention) + anew

    def train_kernels(self, execution: Execution) -> int:
        """What attention costs in a training step where TPU kernels do it, which compilers cannot look into.

        Of the forward pass's two products each gradient's kernel takes the first anew: the queries' has three, that of
        keys and values four. Where rematerialisation does not keep attention's output, forward runs twice.
        """
        products = 2 + 3 + 4 + (0 if execution.remat in ("none", "attention") else 2)
        return self.attention_causal_half * products // 2


def query_out_matrices(w: Widths) -> int:
    """Matrix parameters on a query's way through attention."""
    return 2 * w.d_model * w.num_heads * w.head_dim


def key_value_matrices(w: Widths) -> int:
    """Matrix parameters on a key's way into attention."""
    return 2 * w.d_model * w.num_kv_heads * w.head_dim


def mlp_matrices(w: Widths) -> int:
    return (3 if w.recipe.gated_mlp else 2) * w.d_model * w.d_ff


def mlp_out_matrix(w: Widths) -> int:
    return w.d_model * w.d_ff


def pair_flops(w: Widths) -> int:
    """Of one query with one key in one layer: score and weighted value, all heads."""
    return 4 * w.num_heads * w.head_dim


def norm_parameters(w: Widths) -> int:
    return (2 if w.recipe.norm == "layernorm" else 1) * w.d_model


def attention_parameters(w: Widths) -> int:
    """Of one attention with its norm: matrices, biases, norms."""
    biases = (w.num_heads + 2 * w.num_kv_heads) * w.head_dim + w.d_model if w.recipe.biases else 0
    head_norms = 2 * w.head_dim if w.recipe.qk_norm else 0
    return query_out_matrices(w) + key_value_matrices(w) + biases + head_norms + norm_parameters(w)


def mlp_parameters(w: Widths) -> int:
    """Of one MLP with its norm."""
    biases = (2 if w.recipe.gated_mlp else 1) * w.d_ff + w.d_model if w.recipe.biases else 0
    return mlp_matrices(w) + biases + norm_parameters(w)


def table_parameters(w: Widths, vocab_size: int, max_positions: int | None) -> int:
    """Token table, head and learned positions."""
    tables = 1 if w.recipe.tied_embeddings else 2
    return (tables * vocab_size + (max_positions or 0)) * w.d_model


def bias_parameters(w: Widths) -> int:
    """Of one table of relative bias."""
    return w.num_heads * w.recipe.relative_buckets if w.recipe.positions == "t5_bias" else 0
