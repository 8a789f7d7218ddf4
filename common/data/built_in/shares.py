"""Assigns texts to splits by hash, so that a text's split does not depend on other texts."""

import hashlib
import itertools
from collections.abc import Mapping

SPLIT_PER_MILLE = {"train": 950, "validation": 25, "test": 25}


def split_by_hash(text: str, shares: Mapping[str, int] = SPLIT_PER_MILLE) -> str:
    """Returns the split of a text; a split gets its share of the sum of all `shares`.

    >>> split_by_hash("apple"), split_by_hash("lime"), split_by_hash("apple")
    ('train', 'test', 'train')
    """
    slot = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % sum(shares.values())
    bounds = zip(shares, itertools.accumulate(shares.values()), strict=True)
    return next(name for name, bound in bounds if slot < bound)
