"""Checksums of arrays, however they are sharded: the files of a checkpoint carry none of their contents.

Each is the sum, modulo 2^32, of a hash of every element's bits and place, so that two elements that were swapped change
it, and devices can add up their own parts. A tree is one program: of several processes, programs that run at one time
could meet each other's sums and hang.
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
    """A uint32 for each array of `tree`, over bits and places."""
    return jax.tree.map(_ordered, tree)


@jax.jit
def plain_sums(tree: Any) -> Any:
    """A uint32 for each array over its bits alone: what checkpoints of the first schema hold."""
    return jax.tree.map(_plain, tree)


def digest(checksums: Any, about: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, over the checksums of a tree's arrays and the JSON that is saved beside them."""
    leaves = [int(checksum) for checksum in jax.tree.leaves(checksums)]
    return hashlib.sha256(json.dumps([leaves, about], sort_keys=True).encode()).hexdigest()


def plain_digest(sums: Any) -> int:
    """The digest of `plain_sums` that checkpoints of the first schema hold."""
    total = 0
    for leaf in jax.tree.leaves(sums):
        total = (total * 31 + int(leaf)) % 2**32
    return total


def _ordered(leaf: jax.Array) -> jax.Array:
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        along = _mixed(jnp.arange(size, dtype=jnp.uint32) + jnp.uint32((axis + 1) * _ODD % 2**32))
        place += jax.lax.broadcast_in_dim(along, leaf.shape, (axis,))
    return jnp.sum(_mixed(_bits(leaf).astype(jnp.uint32) ^ place), dtype=jnp.uint32)


def _plain(leaf: jax.Array) -> jax.Array:
    return jnp.sum(_bits(leaf), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """MurmurHash3's last step, a bijection of 32 bits."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EB_CA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2_AE35)
    return x ^ (x >> jnp.uint32(16))


def _bits(leaf: jax.Array) -> jax.Array:
    assert leaf.dtype.itemsize <= 4, f"{leaf.dtype} has more than 32 bits"
    return jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
