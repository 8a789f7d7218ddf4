"""Finds texts of a test set that also occur in the training data.

Texts are compared by 64-bit hashes of their token ids; two different texts have the same hash with a chance of about
1 in 10^19. Most records of the training data are ruled out by a cheaper hash, the sketch.

Legend: E records, P their tokens, concatenated, S texts that are searched for.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from common.data.ragged import Ragged
from common.data.tokenized.token_store import StoredShard, TokenStream
from common.evals.measure import InTraining

SEARCHED_TOKENS = 1 << 28
"""Most training tokens that are searched; this takes seconds."""
RECORDS_TOGETHER = 1 << 14
"""Records that are hashed at a time."""
INPUTS, TARGETS, BOTH = "inputs", "targets", "both"
Shard = Ragged | StoredShard
_NEVER = np.uint64(0)
"""The hash of texts that are never counted: empty ones, and ones with unknown tokens, which may hide a difference."""


def count_in_training(
    train: Sequence[Mapping[str, TokenStream]], test: Mapping[str, TokenStream], places_S: np.ndarray, unk_id: int
) -> InTraining:
    """Counts the records `places_S` of `test` whose inputs, targets or both also occur in a record of `train`.

    >>> records = {"inputs": TokenStream.of([[3], [4], [5]]), "targets": TokenStream.of([[7], [8], [9]])}
    >>> test = {"inputs": TokenStream.of([[3], [4], [6]]), "targets": TokenStream.of([[7], [9], [6]])}
    >>> found = count_in_training([records], test, np.arange(3), unk_id=2)
    >>> found.inputs, found.targets, found.both, found.complete
    (2, 2, 1, True)
    """
    texts = {name: Ragged.of(test[name][place].tolist() for place in places_S.tolist()) for name in (INPUTS, TARGETS)}
    sketches = {name: _sketches(text, 0, len(text)) for name, text in texts.items()}
    test_hashes = {name: _hashes(text, np.arange(len(text)), unk_id) for name, text in texts.items()}
    test_hashes[BOTH] = _pair_hashes(test_hashes[INPUTS], test_hashes[TARGETS])
    occurs = {name: np.zeros(len(places_S), bool) for name in test_hashes}
    searched, complete = 0, True
    for shards, first, last in _record_ranges(train):
        if searched >= SEARCHED_TOKENS:
            complete = False
            break
        searched += sum(int(shard.offsets[last] - shard.offsets[first]) for shard in shards.values())
        train_hashes = _hashes_of_candidates(shards, first, last, sketches, unk_id)
        for name, hash_S in test_hashes.items():
            occurs[name] |= np.isin(hash_S, train_hashes[name])
    counts = {name: int((occurs[name] & (test_hashes[name] != _NEVER)).sum()) for name in occurs}
    return InTraining(
        examples=len(places_S),
        inputs=counts[INPUTS],
        targets=counts[TARGETS],
        both=counts[BOTH],
        complete=complete,
    )


def _hashes_of_candidates(
    shards: Mapping[str, Shard], first: int, last: int, sketches: Mapping[str, np.ndarray], unk_id: int
) -> dict[str, np.ndarray]:
    """Hashes inputs, targets and both of records `first` to `last - 1`, uint64 [E].

    Only texts whose sketch is among `sketches` are hashed; the others get `_NEVER`.
    """
    hashes = {}
    for name, shard in shards.items():
        (candidates,) = np.nonzero(np.isin(_sketches(shard, first, last), sketches[name]))
        hashes[name] = np.full(last - first, _NEVER)
        hashes[name][candidates] = _hashes(shard, first + candidates, unk_id)
    return hashes | {BOTH: _pair_hashes(hashes[INPUTS], hashes[TARGETS])}


def _record_ranges(train: Sequence[Mapping[str, TokenStream]]) -> Iterator[tuple[dict[str, Shard], int, int]]:
    """Yields the two fields of a shard with a range [first, last) of its records."""
    for part in train:
        for inputs, targets in zip(part[INPUTS].shards, part[TARGETS].shards, strict=True):
            for first in range(0, len(inputs), RECORDS_TOGETHER):
                yield {INPUTS: inputs, TARGETS: targets}, first, min(first + RECORDS_TOGETHER, len(inputs))


def _sketches(shard: Shard, first: int, last: int) -> np.ndarray:
    """Hashes the length and three tokens of records `first` to `last - 1`, uint64 [E]; most texts differ in these."""
    offsets = np.asarray(shard.offsets[first : last + 1])
    length_E = np.diff(offsets)
    sketch_E = length_E.astype(np.uint64)
    (long,) = np.nonzero(length_E)
    for place_E in (offsets[:-1][long], (offsets[:-1] + offsets[1:])[long] // 2, offsets[1:][long] - 1):
        sketch_E[long] = _mix(sketch_E[long] + shard.tokens_P[place_E].astype(np.uint64))
    return sketch_E


def _hashes(shard: Shard, record_E: np.ndarray, unk_id: int) -> np.ndarray:
    """Hashes whole records, uint64 [E]: the sum over tokens of mix(token) * weight(its place), mixed with the length.

    Sums are differences of two prefix sums over the concatenated records. Texts that are never counted get `_NEVER`.
    """
    begin_E, end_E = (np.asarray(shard.offsets)[record_E + more] for more in (0, 1))
    # The chosen records, concatenated: record e is [offsets[e], offsets[e + 1]).
    offsets = np.concatenate([[0], np.cumsum(end_E - begin_E)])
    place_P = np.arange(offsets[-1]) - np.repeat(offsets[:-1], end_E - begin_E)
    tokens_P = shard.tokens_P[place_P + np.repeat(begin_E, end_E - begin_E)]
    weight_P = _mix(place_P.astype(np.uint64) + np.uint64(1 << 40)) | np.uint64(1)
    sums = np.zeros(len(tokens_P) + 1, np.uint64)
    np.cumsum(_mix(tokens_P.astype(np.uint64)) * weight_P, out=sums[1:])
    unknown = np.concatenate([[0], np.cumsum(tokens_P == unk_id)])
    usable_E = (end_E > begin_E) & (unknown[offsets[1:]] == unknown[offsets[:-1]])
    hash_E = _mix((sums[offsets[1:]] - sums[offsets[:-1]]) + (end_E - begin_E).astype(np.uint64))
    return np.where(usable_E, hash_E, _NEVER)


def _pair_hashes(inputs_E: np.ndarray, targets_E: np.ndarray) -> np.ndarray:
    """Combines hashes of inputs and targets, uint64 [E]."""
    both_E = _mix(inputs_E * np.uint64(3) + _mix(targets_E))
    return np.where((inputs_E != _NEVER) & (targets_E != _NEVER), both_E, _NEVER)


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies SplitMix64's finaliser (Steele et al. 2014), which spreads neighbouring numbers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
