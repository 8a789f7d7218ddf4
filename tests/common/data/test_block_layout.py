"""Source fingerprints: a hash of what was read, whatever was made of it."""

import hashlib
import types

import numpy as np

from common.data.block_layout import build_batch
from common.data.examples import Examples, RecordExamples
from common.data.objectives.config import CausalLM, Supervised
from common.data.tokenized.token_store import TokenStream

BARE = Supervised(eos_after_inputs=False, eos_after_targets=False)
PAIRS: list[tuple[list[int], list[int]]] = [([7, 8], [5, 6]), ([9], [4]), ([3], []), ([], [2]), ([7, 8], [5, 6])]


def special_ids(content_hash: str = "t") -> types.SimpleNamespace:
    return types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash=content_hash)


def examples_of(
    pairs: list[tuple[list[int], list[int]]], objective: Supervised = BARE, source: str = "s", content_hash: str = "t"
) -> RecordExamples:
    records = {"inputs": TokenStream.of(a for a, _ in pairs), "targets": TokenStream.of(b for _, b in pairs)}
    ids = special_ids(content_hash)
    return RecordExamples(records, objective=objective, seed=0, tokenizer=ids, source_content_id=source)


def source_fingerprint(examples: Examples, rows: list[list[int]]) -> int:
    indices = [np.array(row, np.int64) for row in rows]
    return build_batch(examples, indices, input_length=24, target_length=30).source_fingerprint


def test_source_fingerprint_is_the_hash_of_origins() -> None:
    """Counted here: source, epoch, record and 1 for each example, as little-endian int64, row by row."""
    source = int.from_bytes(hashlib.blake2b(b"s", digest_size=7).digest(), "little")
    rows = [[(source, 0, 3, 1), (source, 0, 1, 1)], [(source, 1, 2, 1)]]
    hashes = [hashlib.blake2b(np.array(row, "<i8").tobytes(), digest_size=16).digest() for row in rows]
    expected = sum(int.from_bytes(each, "little") for each in hashes) % 2**128
    assert source_fingerprint(examples_of(PAIRS), [[3, 1], [7], []]) == expected


def test_source_fingerprint_depends_on_nothing_but_source_records_epoch_and_order() -> None:
    base = source_fingerprint(examples_of(PAIRS), [[0, 1], [2], [3]])
    other_tokens: list[tuple[list[int], list[int]]] = [([5, 5, 5], [6]), ([], [9, 9]), ([2], [2]), ([], []), ([], [])]
    text = {"text": TokenStream.of([[5, 6], [7], [8], [9], []])}
    given: dict = {"seed": 3, "tokenizer": special_ids(content_hash="u"), "source_content_id": "s"}
    for examples in (
        examples_of(other_tokens),
        examples_of(PAIRS, Supervised(), content_hash="other tokenizer"),
        RecordExamples(text, objective=CausalLM(), **given),
    ):
        for rows in ([[0, 1], [2], [3]], [[3], [0, 1], [2], []]):
            assert source_fingerprint(examples, rows) == base
    others = [
        [[1, 0], [2], [3]],
        [[0], [1, 2], [3]],
        [[4, 1], [2], [3]],  # equal tokens, another record
        [[5, 1], [2], [3]],  # in its second epoch
        [[0, 1], [2]],
        [[0, 1], [2], [3], [3]],
    ]
    found = [source_fingerprint(examples_of(PAIRS), rows) for rows in others]
    found.append(source_fingerprint(examples_of(PAIRS, source="t"), [[0, 1], [2], [3]]))
    assert len({base, *found}) == len(others) + 2
