"""Chunked cross-entropy against log_softmax in float64 and its automatic gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from common.nn.loss import cross_entropy
from common.sharding.mesh import make_mesh
from common.sharding.rules import compute_spec, stored_spec
from common.sharding.shape import MeshShape
from tests.helpers import EIGHT_DEVICES

B, T, D, V = 3, 11, 8, 40


def operands() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (B, T, D)),
        jax.random.normal(keys[1], (D, V)),
        jax.random.randint(keys[2], (B, T), 0, V),
        jax.random.bernoulli(keys[3], 0.7, (B, T)).astype(jnp.float32) * jnp.linspace(0.5, 2.0, T)[None],
    )


def plain_cross_entropy(
    h: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    logits = h @ w
    log_z = jax.nn.logsumexp(logits, axis=-1)
    ce = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (weights * (ce + z_loss * log_z**2)).sum(), (weights * ce).sum()


@pytest.mark.parametrize(
    ("chunk", "unroll", "z_loss"),
    [
        pytest.param(chunk, unroll, z_loss, marks=[] if (number + unroll + (z_loss > 0)) % 2 else pytest.mark.slow)
        for number, chunk in enumerate((1, 10, 20, 64))
        for unroll in (False, True)
        for z_loss in (0.0, 0.3)
    ],
)
def test_values_and_gradients(chunk: int, unroll: bool, z_loss: float) -> None:
    h, w, targets, weights = operands()

    def ours(h: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(h, w, targets, weights, z_loss, chunk, unroll)

    (total, ce), (dh, dw) = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(h, w)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (h, w)]
        mask = jnp.asarray(np.asarray(weights, np.float64))
        reference = jax.value_and_grad(
            lambda h, w: plain_cross_entropy(h, w, targets, mask, z_loss), argnums=(0, 1), has_aux=True
        )
        (expected, expected_ce), gradients = jax.tree.map(np.asarray, reference(*wide))
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    assert float(ce) == pytest.approx(float(expected_ce), rel=1e-6)
    assert [float(x) for x in ours(h, w)] == pytest.approx([float(total), float(ce)], rel=1e-6)
    for found, wanted in zip((dh, dw), gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(("rows", "length"), [(1, 512), (16, 32)], ids=["one-long-row", "many-short-rows"])
def test_logits_never_exist_for_all_positions(rows: int, length: int) -> None:
    chunk, vocab = 16, 4096
    shapes = (jax.ShapeDtypeStruct((rows, length, D), jnp.float32), jax.ShapeDtypeStruct((D, vocab), jnp.float32))
    targets, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))
    step = jax.jit(jax.grad(lambda h, w: cross_entropy(h, w, targets, weights, 0.0, chunk, False)[0], argnums=(0, 1)))
    memory = step.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * length * vocab * 4 / 4


@pytest.mark.parametrize(
    "mesh",
    [MeshShape(fsdp=8), MeshShape(tensor=8), EIGHT_DEVICES, MeshShape(replica=2, context=2, tensor=2)],
    ids=str,
)
def test_results_on_a_mesh_equal_those_of_one_device(mesh: MeshShape) -> None:
    """Sums and gradients are equal, whichever mesh axes shard rows, positions and vocabulary."""
    h, w, targets, weights = (jnp.tile(x, (8, 2, 1)[: x.ndim]) if x.shape[0] == B else x for x in operands())

    def both(h: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(h, w, targets, weights, 0.3, 12, False)

    gradient = jax.value_and_grad(both, argnums=(0, 1), has_aux=True)
    alone, expected = jax.jit(gradient)(h, w)
    with jax.set_mesh(make_mesh(mesh)):
        places = (compute_spec("batch", "length", None), stored_spec(("embed", "vocab")))
        found, gradients = jax.jit(gradient)(*(jax.device_put(x, spec) for x, spec in zip((h, w), places, strict=True)))
    np.testing.assert_allclose(jnp.stack(found), jnp.stack(alone), rtol=1e-6)
    for x, wanted, place in zip(gradients, expected, places, strict=True):
        np.testing.assert_allclose(x, wanted, atol=2e-6 * np.abs(wanted).max())
        assert x.sharding.is_equivalent_to(NamedSharding(make_mesh(mesh), place), x.ndim)
