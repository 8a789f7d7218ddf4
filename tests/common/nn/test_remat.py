"""Rematerialisation changes no gradient, and each policy keeps what its name promises."""

import functools
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from common.kernels.visibility import ATTENTION
from common.nn.layers import map_in_chunks
from common.nn.linear import linear
from common.nn.remat import mark_input, rematerialised
from common.recipe import Execution
from common.sharding.mesh import make_mesh
from common.sharding.rules import all_gather_parameter, constrain
from common.sharding.shape import MeshShape

REMATS = get_args(get_type_hints(Execution)["remat"])
B, L, D, F = 2, 6, 8, 32
Weights = tuple[jax.Array, jax.Array]


def layer(carry: jax.Array, w: Weights) -> tuple[jax.Array, None]:
    """A product, an array with attention's checkpoint name, and a product; both weights are all-gathered."""
    h_BLF = jnp.tanh(linear(mark_input(carry), all_gather_parameter(w[0], ("embed", "mlp"))))
    h_BLF = checkpoint_name(jnp.sin(h_BLF), ATTENTION)
    return linear(jnp.cos(h_BLF), all_gather_parameter(w[1], ("mlp", "embed"))), None


def operands() -> tuple[jax.Array, Weights]:
    keys = jax.random.split(jax.random.key(0), 3)
    w_DF, w_FD = jax.random.normal(keys[1], (D, F)) / D, jax.random.normal(keys[2], (F, D)) / D
    return jax.random.normal(keys[0], (B, L, D)), (w_DF, w_FD)


def residual_shapes(remat: str, mesh: MeshShape) -> list[tuple[int, ...]]:
    """Returns the shapes of all residuals of the backward pass."""
    body = rematerialised(layer, remat, in_loop=True)
    with jax.set_mesh(make_mesh(mesh)):
        _, backward = jax.vjp(lambda *x: body(*x)[0], *operands())
    return sorted(x.shape for x in jax.tree.leaves(backward))


@functools.cache
def gradients(remat: str, scan: bool) -> list[jax.Array]:
    """Returns the gradients of two layers."""

    def loss(x: jax.Array, w: Weights) -> jax.Array:
        body = rematerialised(layer, remat, in_loop=scan)
        if scan:
            return jax.lax.scan(body, x, jax.tree.map(lambda w: jnp.stack([w, 2 * w]), w))[0].sum()
        return body(body(x, w)[0], jax.tree.map(lambda w: 2 * w, w))[0].sum()

    return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(*operands()))


@pytest.mark.parametrize("remat", [name for name in REMATS if name != "offload"])
@pytest.mark.parametrize("scan", [False, True])
def test_gradients_are_the_same(remat: str, scan: bool) -> None:
    for found, expected in zip(gradients(remat, scan), gradients("none", scan), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("remat", "hidden"),  # JAX's automatic gradient decides how many of several elementwise results to keep
    [("full", {0}), ("attention", {1}), ("dots", {1}), ("none", {3, 4, 5, 6, 7})],
)
def test_what_is_kept(remat: str, hidden: set[int]) -> None:
    """Keeps the operands and `hidden` arrays of [B, L, F], but never both a stored parameter and its gathered copy."""
    found = residual_shapes(remat, MeshShape(fsdp=2))
    assert set(found) <= {(B, L, D), (B, L, F), (B * L, D), (B * L, F), (D, F), (F, D)}
    assert found.count((D, F)) == found.count((F, D)) == 1
    assert found.count((B, L, F)) + found.count((B * L, F)) in hidden


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 99])
@pytest.mark.parametrize("length", [6, 13])
def test_chunks_equal_the_whole(chunk: int, length: int) -> None:
    """One length has divisors, the other is prime."""
    w = operands()[1][0]
    x = jax.random.normal(jax.random.key(1), (B, length, D))

    def network(x: jax.Array, w: jax.Array, chunk: int | None) -> jax.Array:
        return jnp.square(map_in_chunks(lambda x: jnp.tanh(x @ w), x, chunk)).sum()

    gradient = jax.value_and_grad(network, argnums=(0, 1))
    (value, grads), (expected, wanted) = gradient(x, w, chunk), gradient(x, w, None)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for one, other in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 8, 12])
def test_chunks_of_a_sharded_row_equal_the_whole(chunk: int) -> None:
    """Two devices have 7 of 14 positions each, and only 7 chunks need no padding."""
    x, w = jax.random.normal(jax.random.key(1), (B, 14, D)), operands()[1][0]

    def network(x: jax.Array, w: jax.Array, chunk: int | None) -> jax.Array:
        return map_in_chunks(lambda x: jnp.tanh(constrain(x, "batch", "length", None) @ w), x, chunk)

    with jax.set_mesh(make_mesh(MeshShape(context=2))):
        found = jax.jit(network, static_argnums=2)(x, w, chunk)
    np.testing.assert_allclose(found, network(x, w, None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("length", "chunk"), [(626, 256), (521, 256), (512, 256), (127, 20), (97, 1), (7, 8)])
def test_chunks_are_few_and_have_little_padding(length: int, chunk: int) -> None:
    seen: list[int] = []

    def function(x: jax.Array) -> jax.Array:
        seen.append(x.shape[1])
        return x

    jax.eval_shape(lambda x: map_in_chunks(function, x, chunk), jax.ShapeDtypeStruct((1, length, 1), jnp.float32))
    size = seen[0]
    chunks, fewest = -(-length // size), -(-length // chunk)
    assert size <= chunk and fewest <= chunks < 2 * fewest
    assert chunks * size - length < chunks, "less than one position of padding per chunk"


@pytest.mark.parametrize("long", [512, 521])
def test_hidden_features_exist_for_one_chunk_at_a_time(long: int) -> None:
    def temporary_bytes(chunk: int | None) -> Any:
        shapes = (jax.ShapeDtypeStruct((1, long, D), jnp.float32), jax.ShapeDtypeStruct((D, 4096), jnp.float32))

        def network(x: jax.Array, w: jax.Array) -> jax.Array:
            return map_in_chunks(lambda x: jnp.tanh(x @ w) @ w.T, x, chunk).sum()

        return jax.jit(jax.grad(network)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(32) < temporary_bytes(None) / 4
