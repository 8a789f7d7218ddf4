"""Checksums of arrays, which do not depend on how they are sharded; the files of a checkpoint have none.

An array's checksum is the sum, modulo 2^32, of a hash of every element's bits and position. Swapping two elements
changes it, and each device can add up its own part. One program computes the checksums of a whole tree: with several
processes, the all-reduces of programs that run at the same time could be mixed up and hang.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_ODD = 0x9E37_79B1
"""A prime near 2^32 over the golden ratio."""


@jax.jit
def leaf_checksums(tree: Any) -> Any:
    """Returns a uint32 for each array of `tree`, over the bits and positions of its elements."""
    return jax.tree.map(_position_dependent, tree)


@jax.jit
def plain_sums(tree: Any) -> Any:
    """Returns a uint32 for each array over its elements' bits alone, as checkpoints of the first schema hold it."""
    return jax.tree.map(_sum_of_bits, tree)


def digest(checksums: Any, about: Mapping[str, Any]) -> str:
    """Returns the SHA-256, in hexadecimal, of the checksums of a tree's arrays and the JSON that is saved with them."""
    leaves = [int(checksum) for checksum in jax.tree.leaves(checksums)]
    return hashlib.sha256(json.dumps([leaves, about], sort_keys=True).encode()).hexdigest()


def plain_digest(sums: Any) -> int:
    """Returns the digest of `plain_sums` that checkpoints of the first schema hold."""
    total = 0
    for leaf in jax.tree.leaves(sums):
        total = (total * 31 + int(leaf)) % 2**32
    return total


def _position_dependent(leaf: jax.Array) -> jax.Array:
    position = jnp.zeros(leaf.shape, jnp.uint32)  # the sum of a hash of the index along each axis
    for axis, size in enumerate(leaf.shape):
        along = _mixed(jnp.arange(size, dtype=jnp.uint32) + jnp.uint32((axis + 1) * _ODD % 2**32))
        position += jax.lax.broadcast_in_dim(along, leaf.shape, (axis,))
    return jnp.sum(_mixed(_bits(leaf).astype(jnp.uint32) ^ position), dtype=jnp.uint32)


def _sum_of_bits(leaf: jax.Array) -> jax.Array:
    return jnp.sum(_bits(leaf), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """Hashes 32 bits by MurmurHash3's finalizer, which is a bijection."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EB_CA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2_AE35)
    return x ^ (x >> jnp.uint32(16))


def _bits(leaf: jax.Array) -> jax.Array:
    assert leaf.dtype.itemsize <= 4, f"{leaf.dtype} has more than 32 bits"
    return jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
