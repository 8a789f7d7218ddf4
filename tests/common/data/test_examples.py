"""Examples by number: every epoch has each once, draws are fresh, and mixtures continue where they stopped."""

import tracemalloc
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.data import examples as module
from common.data.block_layout import build_batch
from common.data.examples import Examples, Order, PieceExamples, RecordExamples
from common.data.mixed_examples import MixedExamples
from common.data.objectives.config import FullLM, PrefixLM, RawText, SpanCorruption, Supervised
from common.data.objectives.draws import shuffled
from common.data.packing import RowPlans
from common.data.tokenized.token_store import TokenStream

IDS = types.SimpleNamespace(
    eos_id=1, pad_id=0, start_id=0, content_hash="t", vocab_size=200, sentinels=40, sentinel_id=lambda k: 199 - k
)
TEXT = TokenStream.of(np.split(np.arange(2, 152), [10, 10, 60, 61, 130]))


def pieces(objective: RawText, piece: int = 8, text: TokenStream = TEXT, seed: int = 0, **change: object):
    given: dict = {"tokenizer": IDS, "source_content_id": "s", **change}
    return PieceExamples(text, piece=piece, objective=objective, seed=seed, **given)


def tokens_of(examples: Examples, numbers: np.ndarray) -> list[tuple[list[int], list[int]]]:
    return [(made.inputs_I.tolist(), made.targets_T.tolist()) for made in examples.make(numbers)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_the_shuffle_is_a_permutation_by_seed_and_epoch(size: int) -> None:
    every = np.arange(size)
    found = [shuffled(every, size, seed, np.full(size, epoch)) for seed, epoch in ((0, 0), (1, 0), (0, 1))]
    for order in found:
        assert sorted(order.tolist()) == every.tolist()
    assert shuffled(every[::-1], size, 0, np.zeros(size, np.int64)).tolist() == found[0][::-1].tolist()
    if size >= 64:
        assert len({tuple(order.tolist()) for order in found}) == 3
        assert abs(np.corrcoef(found[0], every)[0, 1]) < 4 / np.sqrt(size)


def test_a_huge_corpus_is_shuffled_without_memory() -> None:
    size = 10**12 + 39
    numbers = np.array([0, 1, size - 1, size // 2])
    found = shuffled(numbers, size, 3, np.zeros(4, np.int64))
    assert len(set(found.tolist())) == 4 and (found < size).all() and (found >= 0).all()
    assert shuffled(numbers[2:3], size, 3, np.zeros(1, np.int64))[0] == found[2]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("most", [4, 1 << 20])
def test_every_epoch_visits_each_place_once(monkeypatch: pytest.MonkeyPatch, mixed: bool, most: int) -> None:
    monkeypatch.setattr(module, "PLANNED_TOGETHER", most)
    order = Order(size=10, seed=5, mixed=mixed)
    epochs = order.place(np.arange(40)).reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == (4 if mixed or most == 4 else 1)
    numbers = np.array([39, 3, 17, 3])
    assert order.place(numbers).tolist() == epochs.ravel()[numbers].tolist()


def test_pieces_join_to_the_text() -> None:
    examples = pieces(FullLM())
    assert examples.size == 19 and examples.window == 19
    found = [token for _, targets in tokens_of(examples, np.arange(19)) for token in targets]
    assert found == list(range(2, 152))
    assert examples.lengths(np.arange(19))[1].tolist() == [8] * 18 + [6]


def test_a_text_is_the_same_over_any_shards() -> None:
    records = [TEXT[i] for i in range(len(TEXT))]
    for cuts in ([3], [1, 2], [0, 0, 4], [6]):
        groups = [records[a:b] for a, b in zip([0, *cuts], [*cuts, len(records)], strict=True)]
        sharded = TokenStream(tuple(TokenStream.of(group).shards[0] for group in groups))
        assert len(sharded) == len(TEXT) and sharded.tokens == TEXT.tokens
        assert sharded.lengths(np.arange(6)[::-1]).tolist() == TEXT.lengths(np.arange(6)[::-1]).tolist()
        assert [sharded[i].tolist() for i in range(6)] == [record.tolist() for record in records]
        for start, stop in ((0, 150), (5, 14), (59, 131), (149, 150)):
            assert sharded.slice(start, stop).tolist() == TEXT.slice(start, stop).tolist()
    with pytest.raises(IndexError):
        TEXT[6]


@pytest.mark.parametrize("objective", [SpanCorruption(density=0.3, mean_span=2.0), PrefixLM()], ids=str)
def test_a_later_epoch_corrupts_anew(objective: RawText) -> None:
    examples = pieces(objective, piece=50)
    first, second = (tokens_of(examples, np.arange(3) + 3 * epoch) for epoch in range(2))
    assert first != second

    def words(pair: tuple[list[int], list[int]]) -> list[int]:
        return sorted(token for side in pair for token in side if 1 < token < 152)

    assert [words(pair) for pair in first] == [words(pair) for pair in second]
    for numbers in (np.arange(6), np.array([5, 0, 3])):
        inputs_E, targets_E = examples.lengths(numbers)
        made = tokens_of(examples, numbers)
        assert [(len(a), len(b)) for a, b in made] == list(zip(inputs_E, targets_E, strict=True))
    assert tokens_of(examples, np.array([4, 1])) == [second[1], first[1]]


def test_complementary_pairs_fill_their_rows() -> None:
    examples = pieces(PrefixLM(complementary=True), piece=50)
    assert (examples.size, examples.together, examples.window) == (2, 2, 2)
    for numbers in (np.array([0, 1]), np.array([2, 3]), np.array([100, 101])):
        inputs_E, targets_E = examples.lengths(numbers)
        assert inputs_E.sum() == targets_E.sum() == 50 and inputs_E.min() > 0
        both = [token for pair in tokens_of(examples, numbers) for side in pair for token in side]
        assert sorted(both) == list(range(2, 102)), "nothing is added, nothing is lost"


def test_a_text_shorter_than_a_piece_is_one_piece() -> None:
    assert pieces(SpanCorruption(), piece=568).size == 1
    assert pieces(SpanCorruption(), piece=568, text=TokenStream.of([[5]])).size == 0
    assert pieces(PrefixLM(complementary=True), piece=100).size == 0


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Rows from all over 8 billion tokens (a sparse file) need memory only for themselves and one window's plan."""
    tokens, records_E = 1 << 33, np.array([0, 1 << 33])
    path = tmp_path / "00000.text.tokens.npy"
    with path.open("wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * tokens)
    np.save(tmp_path / "00000.text.offsets.npy", records_E)
    tracemalloc.start()
    objective = SpanCorruption()
    examples = pieces(objective, piece=568, text=TokenStream.open(tmp_path.joinpath, "text", [(1, tokens)]))
    plans = RowPlans(examples, input_limit=512, target_limit=114, seed=0, cache_dir=None)
    batch = build_batch(examples, [plans.row(row) for row in range(64)], input_length=512, target_length=114)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.examples == 64 and batch.length_sums.inputs == 64 * 512
    assert examples.size == -(-tokens // 568) and examples.order.place(np.arange(64)).max() > examples.size // 2
    assert peak < 100e6, "the corpus has 17 GB"


def records(count: int, first: int, name: str) -> RecordExamples:
    texts = TokenStream.of([[first + n] for n in range(count)])
    given: dict = {"objective": Supervised(), "seed": 0, "tokenizer": IDS, "source_content_id": name, "mixed": True}
    return RecordExamples({"inputs": texts, "targets": texts}, **given)


def test_origins_of_pieces_are_stretches_of_one_joined_text() -> None:
    """Equal for every objective with the same pieces; other pieces, text, tokenizer or ends of records differ."""
    numbers = np.array([0, 3, 18, 19, 37])
    found = pieces(SpanCorruption()).origins(numbers)
    assert found[:, 1:].tolist() == [[0, 0, 8], [0, 24, 8], [0, 144, 6], [1, 0, 8], [1, 144, 6]]
    assert len(set(found[:, 0].tolist())) == 1
    np.testing.assert_array_equal(pieces(PrefixLM(), mode=[9], seed=4).origins(numbers), found)
    other_ids = types.SimpleNamespace(**{**vars(IDS), "content_hash": "u"})
    for other in (
        pieces(SpanCorruption(), source_content_id="t"),
        pieces(SpanCorruption(), tokenizer=other_ids),
        pieces(FullLM()),
    ):
        assert other.origins(numbers)[0, 0] != found[0, 0]
        np.testing.assert_array_equal(other.origins(numbers)[:, 1:], found[:, 1:])


def test_origins_of_a_mixture_are_those_of_its_parts() -> None:
    parts = [records(5, 10, "a"), records(3, 50, "b")]
    mixed = MixedExamples(parts, (1.0, 1.0), seed=0)
    numbers = np.arange(20)
    tokens = [made.inputs_I[0] for made in mixed.make(numbers)]
    for part, first, count in zip(parts, (10, 50), (5, 3), strict=True):
        own = [(n, token - first) for n, token in enumerate(tokens) if first <= token < first + count]
        assert len(own) > 5
        wanted = [(part.origins(np.array([0]))[0, 0], rank // count, place, 1) for rank, (_, place) in enumerate(own)]
        assert [tuple(row) for row in mixed.origins(numbers)[[n for n, _ in own]].tolist()] == wanted


def test_parts_of_a_mixture_run_through_their_own_epochs() -> None:
    parts = [records(5, 10, "a"), records(40, 100, "b")]
    mixed = MixedExamples(parts, (1.0, 3.0), seed=0)
    found = [made[0][0] for made in tokens_of(mixed, np.arange(160))]
    seen = Counter(found)
    assert all(abs(seen[10 + n] - 8) <= 1 for n in range(5)), "40 examples of 5 records"
    assert sorted(n for n in seen if n >= 100) == list(range(100, 140))
    order = np.random.default_rng(0).permutation(160)
    assert tokens_of(mixed, order) == [([found[n], 1], [found[n], 1]) for n in order.tolist()]
    assert mixed.lengths(order)[0].tolist() == [2] * 160


def test_a_mixture_continues_where_another_stopped() -> None:
    parts = [records(50, 10, "a"), records(60, 100, "b")]
    first = MixedExamples(parts, (1.0, 1.0), seed=0)
    pending = np.array([3, 4, 11, 19])
    read = np.setdiff1d(np.arange(20), pending)
    second = MixedExamples(parts, (1.0, 4.0), seed=0, unread=first.unread_after(20, pending))
    third = MixedExamples(parts, (0.0, 1.0), seed=0, unread=second.unread_after(30, np.array([0, 29])))
    then = np.arange(1, 29)
    fourth = MixedExamples(parts, (1.0, 1.0), seed=0, unread=third.unread_after(1, np.zeros(0, np.int64)))
    seen = tokens_of(first, read) + tokens_of(second, then) + tokens_of(third, np.arange(1))
    before = [inputs[0] for inputs, _ in seen]
    assert len(set(before)) == len(before) == 16 + 28 + 1, "no record twice"
    left = 110 - len(before)
    later = [inputs[0] for inputs, _ in tokens_of(fourth, np.arange(200))]
    small = [n for n in later if n < 100][: 50 - sum(n < 100 for n in before)]
    large = [n for n in later if n >= 100][: 60 - sum(n >= 100 for n in before)]
    assert sorted([*before, *small, *large]) == [*range(10, 60), *range(100, 160)], "and each once an epoch"
    assert len(small) + len(large) == left
