"""Batches: their layout by hand, the same stream for any threads and processes, and their fingerprints."""

import dataclasses
import hashlib
import itertools
import json
import types
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from common.compute.length_sums import LengthSums
from common.data.batch import Batch, HostBatch
from common.data.block_layout import build_batch
from common.data.examples import RecordExamples
from common.data.loader import Loader, chain
from common.data.objectives.apply import Example
from common.data.objectives.config import CausalLM, Supervised
from common.data.packing import RowPlans
from common.data.tokenized.token_store import TokenStream

ROWS, INPUTS, TARGETS = 4, 24, 30
BARE = Supervised(eos_after_inputs=False, eos_after_targets=False)


def special_ids(**change: int | str) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{"eos_id": 1, "pad_id": 0, "start_id": 0, "content_hash": "t", **change})


def examples_of(
    pairs: list[tuple[list[int], list[int]]],
    objective: Supervised = BARE,
    source: str = "s",
    **ids: int | str,
) -> RecordExamples:
    records = {"inputs": TokenStream.of(a for a, _ in pairs), "targets": TokenStream.of(b for _, b in pairs)}
    return RecordExamples(records, objective=objective, seed=0, tokenizer=special_ids(**ids), source_content_id=source)


def random_pairs(count: int = 150) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 99, rng.integers(0, 14)).tolist(), rng.integers(0, 99, rng.integers(0, 14)).tolist())
        for _ in range(count)
    ]


EXAMPLES = examples_of(random_pairs())


def loader_of(examples: RecordExamples = EXAMPLES, share: Sequence[int] | None = None, rows: int = ROWS) -> Loader:
    plans = RowPlans(examples, input_limit=INPUTS, target_limit=TARGETS, seed=0, cache_dir=None)
    return Loader(examples, plans, rows=rows, share=share)


def dealt(count: int) -> list[list[int]]:
    """Divides a batch's rows into contiguous shares."""
    return [share.tolist() for share in np.split(np.arange(ROWS), count)]


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    return {field.name: np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)}


def digest(made: HostBatch) -> str:
    """Hashes everything in a batch, independently of its own fingerprint."""
    parts = [f"{name}{a.dtype}{a.shape}".encode() + a.tobytes() for name, a in arrays(made.batch).items()]
    counted = repr((made.fingerprint, made.examples, made.length_sums, made.loss_tokens)).encode()
    return hashlib.sha256(b"".join([*parts, counted])).hexdigest()


def digests(batches: Iterator[HostBatch]) -> list[str]:
    return [digest(made) for made in batches]


# --- Layout


def test_two_packed_examples_by_hand() -> None:
    examples = examples_of([([7, 8, 1], [5, 6, 1]), ([9, 1], [4, 1])], start_id=3, pad_id=2)
    batch = arrays(build_batch(examples, [np.array([0, 1])], input_length=7, target_length=6).batch)
    expected = {
        "inputs_BI": [[7, 8, 1, 9, 1, 2, 2]],
        "input_segments_BI": [[1, 1, 1, 2, 2, 0, 0]],
        "input_positions_BI": [[0, 1, 2, 0, 1, 0, 0]],
        "decoder_inputs_BT": [[3, 5, 6, 3, 4, 2]],
        "targets_BT": [[5, 6, 1, 4, 1, 2]],
        "target_segments_BT": [[1, 1, 1, 2, 2, 0]],
        "target_positions_BT": [[3, 4, 5, 2, 3, 0]],
        "weights_BT": [[1, 1, 1, 1, 1, 0]],
    }
    assert {name: a.tolist() for name, a in batch.items()} == expected


def test_empty_inputs_empty_targets_and_id_zero_by_hand() -> None:
    """Four examples in one row: neither an empty side nor a token 0 (here also pad and start) shifts a segment."""
    pairs: list[tuple[list[int], list[int]]] = [([0, 8, 0], [5]), ([6, 7], []), ([], [0, 4]), ([9], [0])]
    made = build_batch(examples_of(pairs), [np.array([0, 1, 2, 3])], input_length=8, target_length=5)
    expected = {
        "inputs_BI": [[0, 8, 0, 6, 7, 9, 0, 0]],
        "input_segments_BI": [[1, 1, 1, 2, 2, 4, 0, 0]],
        "input_positions_BI": [[0, 1, 2, 0, 1, 0, 0, 0]],
        "decoder_inputs_BT": [[0, 0, 0, 0, 0]],
        "targets_BT": [[5, 0, 4, 0, 0]],
        "target_segments_BT": [[1, 3, 3, 4, 0]],
        "target_positions_BT": [[3, 0, 1, 1, 0]],
        "weights_BT": [[1, 1, 1, 1, 0]],
    }
    assert {name: a.tolist() for name, a in arrays(made.batch).items()} == expected
    assert (made.examples, made.loss_tokens) == (4, 4)
    assert made.length_sums == LengthSums(
        inputs=6, targets=4, inputs_squared=9 + 4 + 1, targets_squared=1 + 4 + 1, inputs_times_targets=3 + 1
    )


def test_no_input_slots_by_hand() -> None:
    """Rows of a language model have no inputs; here the second row is empty too."""
    records = {"text": TokenStream.of([[5, 6], [7]])}
    examples = RecordExamples(records, objective=CausalLM(), seed=0, tokenizer=special_ids(), source_content_id="s")
    rows = [np.array([1, 0]), np.array([], np.int64)]
    batch = arrays(build_batch(examples, rows, input_length=0, target_length=6).batch)
    assert batch["inputs_BI"].shape == (2, 0)
    assert batch["decoder_inputs_BT"].tolist() == [[0, 7, 0, 5, 6, 0], [0] * 6]
    assert batch["targets_BT"].tolist() == [[7, 1, 5, 6, 1, 0], [0] * 6]
    assert batch["target_positions_BT"].tolist() == [[0, 1, 0, 1, 2, 0], [0] * 6]
    assert batch["target_segments_BT"].tolist() == [[1, 1, 2, 2, 2, 0], [0] * 6]


def unpack(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Reads the packed examples back from segments alone, and checks every slot of each."""
    b = arrays(batch)
    found = []
    for r in range(len(b["inputs_BI"])):
        for segment in range(1, max(b["input_segments_BI"][r].max(initial=0), b["target_segments_BT"][r].max()) + 1):
            at_i, at_t = b["input_segments_BI"][r] == segment, b["target_segments_BT"][r] == segment
            inputs, targets = b["inputs_BI"][r][at_i].tolist(), b["targets_BT"][r][at_t].tolist()
            assert b["input_positions_BI"][r][at_i].tolist() == list(range(len(inputs)))
            assert b["target_positions_BT"][r][at_t].tolist() == [len(inputs) + j for j in range(len(targets))]
            assert b["decoder_inputs_BT"][r][at_t].tolist() == [0, *targets][: len(targets)]
            assert b["weights_BT"][r][at_t].tolist() == [1.0] * len(targets)
            found.append((inputs, targets))
        for side in ("input", "target"):
            segments = b[f"{side}_segments_BI" if side == "input" else f"{side}_segments_BT"][r]
            filled = int((segments > 0).sum())
            assert (np.diff(segments[:filled]) >= 0).all() and not segments[filled:].any(), "padding is at the end"
    return found


def test_an_epoch_has_every_example_once() -> None:
    loader = loader_of()
    found = [pair for made in loader.validation_batches() for pair in unpack(made.batch)]
    # An example without any token takes no slot, so only the count shows it.
    assert sorted(pair for pair in found if any(pair)) == sorted(pair for pair in random_pairs() if any(pair))
    assert sum(made.examples for made in loader.validation_batches()) == EXAMPLES.size


def test_dtypes() -> None:
    for name, a in arrays(loader_of().batch(0).batch).items():
        assert a.dtype == (np.float32 if name == "weights_BT" else np.int32), name


# --- The stream


def test_threads_and_buffers_change_nothing() -> None:
    expected = [digest(loader_of().batch(step)) for step in range(30)]
    assert len(set(expected)) == 30
    for threads, buffered in itertools.product((0, 1, 3), (1, 8)):
        assert digests(loader_of().iterate(0, 30, threads=threads, buffered=buffered)) == expected


@pytest.mark.parametrize("start", [0, 1, 7, 19, 20])
def test_a_resumed_stream_is_the_tail_of_the_whole(start: int) -> None:
    whole = digests(loader_of().iterate(0, 20))
    assert digests(loader_of().iterate(start, 20)) == whole[start:]


def test_a_budget_may_exceed_one_epoch() -> None:
    loader = loader_of()
    rows = sum(1 for _ in loader.validation_batches()) * ROWS
    steps = 5 * rows // ROWS
    seen = np.zeros(EXAMPLES.size, int)
    plans = RowPlans(EXAMPLES, input_limit=INPUTS, target_limit=TARGETS, seed=0, cache_dir=None)
    for row in range(steps * ROWS):
        np.add.at(seen, plans.row(row) % EXAMPLES.size, 1)
    assert seen.min() >= 4 and seen.max() - seen.min() <= 1
    assert len(set(digests(loader.iterate(0, steps)))) == steps, "no epoch repeats another's batches"


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_rows(count: int) -> None:
    for step in (0, 3, 17):
        whole = loader_of().batch(step)
        shares = [loader_of(share=share).batch(step) for share in dealt(count)]
        for name, expected in arrays(whole.batch).items():
            together = np.concatenate([arrays(share.batch)[name] for share in shares])
            np.testing.assert_array_equal(together, expected)
        assert sum(share.fingerprint for share in shares) % 2**128 == whole.fingerprint
        assert sum(share.source_fingerprint for share in shares) % 2**128 == whole.source_fingerprint
        assert sum(share.examples for share in shares) == whole.examples
        assert sum((share.length_sums for share in shares), LengthSums()) == whole.length_sums
        assert sum(share.loss_tokens for share in shares) == whole.loss_tokens


def test_each_process_reads_only_its_share() -> None:
    class Watched(RecordExamples):
        def make(self, number_E: np.ndarray) -> list[Example]:
            self.read = [*getattr(self, "read", []), *number_E.tolist()]
            return super().make(number_E)

    def reads(share: list[int]) -> list[int]:
        given: dict = {"objective": BARE, "seed": 0, "tokenizer": special_ids(), "source_content_id": "s"}
        examples = Watched(EXAMPLES._records, **given)
        list(loader_of(examples, share).iterate(2, 7))
        return examples.read

    shares = [reads(share) for share in dealt(4)]
    assert sorted(number for share in shares for number in share) == sorted(reads(list(range(ROWS))))
    assert all(not set(a) & set(b) for a, b in itertools.combinations(shares, 2))


def test_a_share_need_not_be_contiguous() -> None:
    """The mesh follows the devices' links, so a process may hold any rows."""
    whole, share = loader_of().batch(3), [0, 3]
    for name, found in arrays(loader_of(share=share).batch(3).batch).items():
        np.testing.assert_array_equal(found, arrays(whole.batch)[name][share])


def test_an_error_in_a_batch_reaches_the_consumer() -> None:
    class Broken(RecordExamples):
        def make(self, number_E: np.ndarray) -> list[Example]:
            raise RuntimeError("disk gone")

    broken = Broken(EXAMPLES._records, objective=Supervised(), seed=0, tokenizer=special_ids(), source_content_id="s")
    for threads in (0, 2):
        with pytest.raises(RuntimeError, match="disk gone"):
            next(loader_of(broken).iterate(0, 4, threads=threads))


# --- Validation


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_validation_ends_with_empty_rows(rows: int) -> None:
    batches = list(loader_of(rows=rows).validation_batches())
    assert all(made.batch.inputs_BI.shape == (rows, INPUTS) for made in batches)
    single = list(loader_of(rows=1).validation_batches())
    assert len(batches) == -(-len(single) // rows)
    empty = rows * len(batches) - len(single)
    if empty:
        for name, a in arrays(batches[-1].batch).items():
            assert not a[-empty:].any(), name
    assert sum(made.fingerprint for made in batches) % 2**128 == sum(made.fingerprint for made in single) % 2**128
    assert sum(made.loss_tokens for made in batches) == sum(made.loss_tokens for made in single)
    assert digests(iter(batches)) == digests(loader_of(rows=rows).validation_batches())
    assert digests(iter(batches[:2])) == digests(loader_of(rows=rows).validation_batches(limit=2))


def test_validation_divides_among_processes() -> None:
    whole = list(loader_of().validation_batches())
    shares = [list(loader_of(share=share).validation_batches()) for share in dealt(2)]
    assert [len(share) for share in shares] == [len(whole)] * 2
    for made, *parts in zip(whole, *shares, strict=True):
        assert made.fingerprint == sum(part.fingerprint for part in parts) % 2**128


# --- Fingerprints


def fingerprint(examples: RecordExamples, rows: list[list[int]]) -> int:
    indices = [np.array(row, np.int64) for row in rows]
    return build_batch(examples, indices, input_length=INPUTS, target_length=TARGETS).fingerprint


PAIRS: list[tuple[list[int], list[int]]] = [([7, 8], [5, 6]), ([9], [4]), ([3], []), ([], [2]), ([7, 8], [5, 6])]


def test_fingerprint_ignores_nothing_but_the_order_of_rows() -> None:
    base = fingerprint(examples_of(PAIRS), [[0, 1], [2], [3]])
    assert 0 < base < 2**128
    for rows in itertools.permutations([[0, 1], [2], [3]]):
        assert fingerprint(examples_of(PAIRS), list(rows)) == base
    assert fingerprint(examples_of(PAIRS), [[0, 1], [2], [3], []]) == base
    others = [
        [[1, 0], [2], [3]],  # order within a row
        [[0], [1, 2], [3]],  # the same examples in other rows
        [[4, 1], [2], [3]],  # equal tokens, another example
        [[0, 1], [2]],
        [[0, 1], [2], [3], [3]],
    ]
    found = [fingerprint(examples_of(PAIRS), rows) for rows in others]
    assert len({base, *found}) == len(others) + 1


def test_fingerprint_depends_on_content_and_on_every_token() -> None:
    changed: list[tuple[list[int], list[int]]] = [([7, 8], [5, 6]), ([9, 4], []), *PAIRS[2:]]
    variants = [
        examples_of(PAIRS),
        examples_of(PAIRS, source="other version"),
        examples_of(PAIRS, content_hash="other tokenizer"),
        examples_of(PAIRS, Supervised(eos_after_inputs=False)),
        examples_of(changed),
        examples_of([([7, 0], [5, 6]), *PAIRS[1:]]),
        examples_of([([7, 8], [0, 6]), *PAIRS[1:]]),
    ]
    assert len({fingerprint(examples, [[0, 1]]) for examples in variants}) == len(variants)


def test_fingerprint_depends_on_the_objective_even_if_tokens_agree() -> None:
    """Without eos, these two objectives make the same tokens from empty inputs, yet their fingerprints differ."""
    one = examples_of([([], [5, 6])], BARE)
    records = {"text": TokenStream.of([[5, 6]])}
    other = RecordExamples(
        records, objective=CausalLM(eos=False), seed=0, tokenizer=special_ids(), source_content_id="s"
    )
    np.testing.assert_array_equal(*(examples.make(np.array([0]))[0].targets_T for examples in (one, other)))
    assert fingerprint(one, [[0]]) != fingerprint(other, [[0]])


def test_chain_depends_on_content_and_order() -> None:
    def chained(content: str, fingerprints: list[int]) -> str:
        return list(itertools.accumulate(fingerprints, chain, initial=content))[-1]

    assert chained("c", [1, 2, 3]) == chain(chained("c", [1, 2]), 3)
    different = [("c", [1, 2, 3]), ("c", [2, 1, 3]), ("d", [1, 2, 3]), ("c", [1, 2]), ("c", [1, 2, 2**128 - 1])]
    found = {chained(content, fingerprints) for content, fingerprints in different}
    assert len(found) == len(different)
    assert all(len(value) == 32 and int(value, 16) >= 0 for value in found)
    expected = hashlib.blake2b(b"c" + (7).to_bytes(16, "little"), digest_size=16).hexdigest()
    assert chain("c", 7) == expected


def test_content_names_source_tokenizer_and_objective() -> None:
    content = json.loads(loader_of(examples_of(PAIRS, Supervised())).content)
    assert content["source"] == "s" and content["tokenizer"] == "t"
    assert content["objective"]["kind"] == "supervised"
