"""Random numbers that belong to an example: a function of (seed, example number, draw), for many examples at once.

A generator object for each example would take longer to make than the example. This is SplitMix64 (Steele, Lea and
Flood 2014, "Fast splittable pseudorandom number generators") with a stream for each (seed, number): any draw of a
stream costs the same as its first, and no example depends on which others are made with it.

Legend: E examples, N draws, R rounds, X the examples still outside in `shuffled`.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: the generator's stride."""
ROUNDS = 6
"""Rounds of the shuffle's Feistel network."""
SHUFFLE = 0x5B1F_F1E5
"""Separates the shuffle's draws from the draws of examples with the same seed."""


def draw_bits(seed: int, number_E: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` uniform draws for each example, uint64 [E, N]."""
    start_E = _mix(_mix(np.array([seed], np.uint64)) ^ np.asarray(number_E, np.uint64))
    return _mix(start_E[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def draw_uniform(seed: int, number_E: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` uniform draws from [0, 1) for each example, float64 [E, N].

    >>> draw_uniform(7, np.array([3]), 2)[0].tolist() == draw_uniform(7, np.array([5, 3]), 4)[1, :2].tolist()
    True
    """
    return (draw_bits(seed, number_E, count) >> np.uint64(11)) * 2.0**-53


def draw_subset(bits_EN: np.ndarray, size: int) -> np.ndarray:
    """Marks the `size` smallest draws of each example, bool [E, N]: every subset of that size is equally likely."""
    if size == 0:
        return np.zeros(bits_EN.shape, bool)
    return bits_EN <= np.partition(bits_EN, size - 1, axis=1)[:, size - 1 : size]


def shuffled(index_E: np.ndarray, size: int, seed: int, epoch_E: np.ndarray) -> np.ndarray:
    """Maps each index by its epoch's own permutation of 0 to `size` - 1, int64 [E].

    A Feistel network permutes all numbers with an even count of bits (Luby and Rackoff 1988). A result beyond `size`
    goes through the network again until it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"). Memory does not depend on `size`.

    >>> sorted(shuffled(np.arange(10), 10, seed=3, epoch_E=np.zeros(10, np.int64)).tolist()) == list(range(10))
    True
    """
    assert size > 0, "an empty permutation maps no index"
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys_ER = draw_bits(seed ^ SHUFFLE, epoch_E, ROUNDS)

    def network(x: np.ndarray, keys_XR: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key_X in keys_XR.T:
            left, right = right, left ^ (_mix(right ^ key_X) & mask)
        return (left << half) | right

    out_E = network(np.asarray(index_E, np.uint64), keys_ER)
    while len(outside := np.flatnonzero(out_E >= size)):
        out_E[outside] = network(out_E[outside], keys_ER[outside])
    return out_E.astype(np.int64)


def _mix(z: np.ndarray) -> np.ndarray:
    """Advances SplitMix64 by one stride and scrambles the result, uint64."""
    z = z + GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
