"""What a model computes (Recipe), and how it is computed (Execution): plain configs that need no JAX."""

import dataclasses
from typing import Annotated, Literal, Protocol

from common.errors import UserError
from common.ranges import Layers, Range, Tiny, Tokens, Width, check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard:
    """No account of other sizes: the best learning rate of every width and depth is found by a search there."""

    kind: Literal["standard"] = "standard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleteP:
    """One learning rate for all widths and depths (arXiv 2505.01618, with AdamW): muP, and its extension to depth.

    A model of the base sizes trains as under `standard`. A rate that is best there is near the best at other widths and
    depths, if d_ff and the heads' total width grow with d_model. `common.nn.parametrization` has the factors.
    """

    kind: Literal["completep"] = "completep"
    base_width: Width
    """d_model of the model whose learning rates are searched."""
    base_layers: Layers
    """Its layers in each stack."""
    base_head_dim: Width

    def __post_init__(self) -> None:
        check_ranges(self)


Parametrization = Standard | CompleteP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options with the same meaning in every family; a controlled comparison uses one recipe for all arms."""

    positions: Literal["rope", "t5_bias", "learned"] = "rope"
    """`learned` adds a table of absolute positions to the embeddings (GPT-2)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    mlp: Literal["relu", "gelu", "geglu", "swiglu"] = "swiglu"
    """GELU is the tanh approximation; the GLU variants multiply by a second, linear projection (arXiv 2002.05202)."""
    biases: bool = False
    """Whether every projection of attention and MLP has a bias."""
    tied_embeddings: bool = False
    scale_embeddings: bool = False
    """Whether to multiply embedded tokens by sqrt(d_model) (arXiv 1706.03762, section 3.4)."""
    scale_logits: bool = False
    """Whether to divide hidden states by sqrt(d_model) before the head, as T5 does with tied embeddings."""
    init: Literal["t5", "fan_in"] = "fan_in"
    """`t5`: T5X's values. `fan_in`: variance 1/fan_in, with smaller residual outputs and embeddings. See
    `common.nn.parameters.Initialisers`."""
    parametrization: Parametrization = Standard()
    """How initial values, multipliers and updates follow the model's sizes. Not part of what Hugging Face's and T5X's
    formats can express."""
    scale_attention: bool = True
    """Whether to divide attention logits by sqrt(head_dim). T5 does not: its query initialiser includes the factor."""
    qk_norm: bool = False
    """Whether to apply RMSNorm to each head's queries and keys, before RoPE (arXiv 2302.05442)."""
    dropout: Annotated[float, Range(0, 1, "[)")] = 0.0
    z_loss: Annotated[float, Range(0, 1000)] = 0.0
    """Weight of log(Z)^2 in the loss."""
    norm_epsilon: Tiny = 1e-6
    rope_theta: Annotated[float, Range(1, 1e12)] = 10_000.0
    relative_buckets: Annotated[int, Range(4, 2**16)] = 32
    """Buckets of T5's relative bias, a multiple of 4."""
    relative_max_distance: Tokens = 128
    """Distance from which on all keys share the last bucket."""
    relative_sides: Literal["as_seen", "one", "two"] = "as_seen"
    """`two`: buckets distinguish keys after a query from keys before it. `as_seen`: only in stacks that see
    keys after a query."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.relative_buckets % 4:
            raise UserError(f"relative_buckets is {self.relative_buckets}: it must be a multiple of 4")
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise UserError(
                f"relative_max_distance is {self.relative_max_distance}: it must be more than half the buckets "
                f"({self.relative_buckets // 2})"
            )

    @property
    def gated_mlp(self) -> bool:
        return self.mlp in ("geglu", "swiglu")


T5_V1_1 = Recipe(positions="t5_bias", mlp="geglu", init="t5", scale_attention=False, z_loss=1e-4)
"""The network of T5X's t5_1_1, as pretrained: without dropout."""

T5_V1_0 = dataclasses.replace(T5_V1_1, mlp="relu", tied_embeddings=True, scale_logits=True)
"""The network of arXiv 1910.10683."""

LLAMA = Recipe(positions="rope", mlp="swiglu", init="fan_in")

GPT2 = Recipe(positions="learned", norm="layernorm", mlp="gelu", biases=True, tied_embeddings=True, norm_epsilon=1e-5)
"""The network of GPT-2 (Radford et al. 2019)."""


Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is computed; no option changes a result beyond rounding."""

    dtype: Dtype = "bfloat16"
    """The dtype of activations and matrix products; parameters, norms, softmax and loss are always float32."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    scan_layers: bool = True
    """Whether to run layers in a scan (faster to compile) or unrolled (faster to run on a CPU)."""
    remat: Literal["none", "dots", "attention", "full", "offload"] = "none"
    """What the forward pass of a layer keeps for its backward pass, which recomputes the rest. `none` (no
    rematerialisation): everything. `dots`: matrix products. `attention`: its input and the attention's outputs. `full`:
    its input only. `offload`: its input, moved to host memory in between."""
    attention: Literal["auto", "splash", "flash", "cudnn", "blocked", "plain"] = "auto"
    """`plain`: all logits at once; FLOPs are counted on it. `blocked`: a block of queries at a time, recomputed in the
    backward pass. `splash`, and `flash` for T5's bias: TPU kernels. `cudnn`: NVIDIA's kernel. `auto`, or one that
    does not support the call: the platform's kernel that does, or `blocked` if there is none, as on a CPU."""
    attention_block: Tokens = 64
    """Queries per block of `blocked`."""
    attention_kernel_block: Annotated[int, Range(128, 2**16, unit="tokens")] | None = None
    """Most queries and most keys in a block of the TPU kernels; a multiple of 128. None: by a table for the chip."""
    mlp_chunk: Tokens | None = None
    """Most positions of a row that an MLP processes at a time, forward and backward; None: all of them."""
    loss_chunk: Annotated[int, Range(1, 2**31 - 1, unit="positions")] = 1024
    """Most target positions, over all rows of a device, whose logits exist at a time; but at least one per row."""

    def __post_init__(self) -> None:
        check_ranges(self)
        size = self.attention_kernel_block
        if size is not None and size % 128:
            raise UserError(
                f"attention_kernel_block is {size}: it must be a multiple of 128; nearest: {round(size / 128) * 128}"
            )


class Widths(Protocol):
    """The sizes of a layer: fields that the config of every family has."""

    @property
    def d_model(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...
    @property
    def recipe(self) -> Recipe: ...


def check_widths(model: Widths) -> None:
    """Raises UserError if the sizes are out of range or do not fit together."""
    check_ranges(model)
    positions, max_positions = model.recipe.positions, model.max_positions
    if (max_positions is not None) != (positions == "learned"):
        raise UserError(
            f"max_positions is {max_positions} with recipe.positions={positions!r}: "
            "learned positions need a number, other schemes need null"
        )
    num_heads, num_kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    if num_heads % num_kv_heads:
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        close = min(divisors, key=lambda n: abs(n - num_kv_heads))
        raise UserError(f"num_kv_heads is {num_kv_heads}: it must divide num_heads ({num_heads}); nearest: {close}")
    if positions == "rope" and head_dim % 2:
        raise UserError(f"head_dim is {head_dim}: RoPE needs an even number; nearest: {head_dim + 1}")
