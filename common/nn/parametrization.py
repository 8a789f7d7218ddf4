"""How initial values, multipliers and updates follow a model's size: the only place with a parametrization's factors.

CompleteP with AdamW (Dey et al. 2025, arXiv 2505.01618, table 1 at alpha = 1). With m_N = d_model / base_width,
m_L = layers of the stack / base_layers and m_C = head_dim / base_head_dim, relative to the base model:

    parameter                                  initial std    learning rate   epsilon
    matrix of a layer                          m_N^-1/2       1/m_N           1/(m_N m_L)
    norm gain or bias of a layer               -              1               1/(m_N m_L)
    token table, positions, head               1              1               1/m_N
    final norms, relative bias                 1              1               1/m_N

    forward pass                               residual branches / m_L, logits / m_N, attention logits / m_C

Weight decay removes the same share of a matrix per step at all sizes (learning rate x weight decay of the base model;
the paper's weight decay of lambda m_N at a rate of eta / m_N). Initial residual outputs are not divided by the depth.

The paper gives epsilon in residual blocks only, and its authors' public code divides by m_N m_L everywhere. Here
epsilon follows the size of the gradient's entries, which outside of the layers does not depend on depth.

The paper has no encoder-decoder; what follows is inferred. Each stack has its own m_L. Self-attention, cross-attention
and MLP are residual branches alike: a decoder layer has three where the base model's has three, so their number cancels
in m_L. The memory's keys and values are read with weights of fan-in d_model, so cross-attention's matrices are matrices
of a layer. The encoder's gradient is a sum over decoder layers, each of which is divided by m_L, and so independent of
depth. Layers with shared parameters have the same depth in both stacks.
"""

import dataclasses
from typing import Any

import jax

from common.recipe import CompleteP, Parametrization, Standard, Widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """A stack's sizes relative to the base model's. Under `standard` every model is its own base."""

    base_width: int
    base_layers: int
    base_head_dim: int
    width: float
    """m_N"""
    depth: float
    """m_L"""
    head_dim: float
    """m_C"""

    @classmethod
    def of(cls, widths: Widths, layers: int) -> "Scaling":
        """Makes the scaling of a stack of `layers` layers."""
        base_width, base_layers, base_head_dim = widths.d_model, layers, widths.head_dim
        if isinstance(base := widths.recipe.parametrization, CompleteP):
            base_width, base_layers, base_head_dim = base.base_width, base.base_layers, base.base_head_dim
        return cls(
            base_width=base_width,
            base_layers=base_layers,
            base_head_dim=base_head_dim,
            width=widths.d_model / base_width,
            depth=layers / base_layers,
            head_dim=widths.head_dim / base_head_dim,
        )

    def base_heads(self, num_heads: int) -> float:
        """Returns how many heads the base model has, if the heads' total width grows with d_model."""
        return num_heads * self.head_dim / self.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateScale:
    """How a parameter's update differs from that in the base model."""

    rate: float
    """Factor of the learning rate."""
    gradient: float
    """Factor of the gradient before Adam, which is invariant to it up to epsilon: the same as epsilon divided by it."""


def update_scales(parametrization: Parametrization, logical_axes: Any, shapes: Any) -> Any:
    """Returns a tree like `logical_axes` of `UpdateScale`; None under `standard`, where nothing is scaled.

    What a parameter is follows from its logical axes: all of a layer's have `layers`, and its matrices have two more.
    """
    if isinstance(parametrization, Standard):
        return None
    pairs = zip(jax.tree.leaves(logical_axes, is_leaf=_is_axes), jax.tree.leaves(shapes), strict=True)
    sizes = [dict(zip(axes, shape.shape, strict=True)) for axes, shape in pairs]
    width = next(size["embed"] for size in sizes if "embed" in size) / parametrization.base_width
    scales = [_update_scale(size, width, parametrization.base_layers) for size in sizes]
    return jax.tree.unflatten(jax.tree.structure(shapes), scales)


def _update_scale(sizes: dict[str, int], width: float, base_layers: int) -> UpdateScale:
    """Returns the scale of a parameter from its size along each logical axis."""
    if "layers" not in sizes:
        return UpdateScale(rate=1.0, gradient=width)
    rate = 1 / width if is_matrix(tuple(sizes)) else 1.0
    return UpdateScale(rate=rate, gradient=width * sizes["layers"] / base_layers)


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Returns whether a parameter with these logical axes is a matrix: a bias [heads, head_dim] is a vector.

    >>> is_matrix(("layers", "embed", "heads", "head_dim")), is_matrix(("layers", "heads", "head_dim"))
    (True, False)
    """
    return sum(axis not in ("layers", "head_dim") for axis in axes) >= 2


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)
