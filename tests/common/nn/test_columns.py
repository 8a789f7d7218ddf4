"""Matrices split into blocks of columns for decoding on a CPU."""

import jax
import jax.numpy as jnp
import pytest

from common.nn.linear import Columns, project, split_columns, unproject
from tests.helpers import close


@pytest.mark.parametrize(
    ("axes", "shape", "blocks"),
    [
        (("embed", "heads", "head_dim"), (8, 6, 4), [(8, 3, 4)] * 2),
        (("embed", "kv_heads", "head_dim"), (8, 2, 4), [(8, 1, 4)] * 2),
        (("heads", "head_dim", "embed"), (6, 4, 8), [(6, 4, 4)] * 2),
        (("mlp", "embed"), (12, 8), [(12, 4)] * 2),
        (("embed", "kv_heads", "head_dim"), (8, 1, 4), None),
        (("embed", "mlp"), (8, 12), None),
        (("heads", "head_dim"), (6, 4), None),
        (("embed",), (8,), None),
    ],
)
def test_which_matrices_are_split(
    axes: tuple[str, ...], shape: tuple[int, ...], blocks: list[tuple[int, ...]] | None
) -> None:
    w = jnp.zeros(shape)
    made = split_columns(w, axes)
    if blocks is None:
        assert made is w
    else:
        assert isinstance(made, Columns)
        assert [block.shape for block in made.blocks] == blocks


def test_products_are_the_same() -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    x_BLD, w_DHC, bias_HC = (
        jax.random.normal(k, s) for k, s in zip(keys, ((2, 3, 8), (8, 6, 4), (6, 4)), strict=False)
    )
    w_HCD, bias_D = jax.random.normal(keys[3], (6, 4, 8)), jax.random.normal(keys[4], (8,))
    q_BLHC = project(x_BLD, w_DHC, bias_HC)
    close(project(x_BLD, split_columns(w_DHC, ("embed", "heads", "head_dim")), bias_HC), q_BLHC, 1e-6)
    out_BLD = unproject(q_BLHC, w_HCD, bias_D)
    close(unproject(q_BLHC, split_columns(w_HCD, ("heads", "head_dim", "embed")), bias_D), out_BLD, 1e-6)
