"""Objectives and data configs: examples worked by hand, lengths without tokens, and refused configs."""

import types
from typing import Any

import numpy as np
import pytest

from common.data.config import DataConfig, SentencePieceConfig
from common.data.objectives.apply import (
    Example,
    example_of_record,
    examples_of_pieces,
    fields,
    piece_lengths,
    record_lengths,
)
from common.data.objectives.config import (
    UL2,
    UL2R,
    BertStyle,
    CausalLM,
    Deshuffling,
    FullLM,
    IidDenoising,
    Mixture,
    MixturePart,
    PrefixLM,
    RawText,
    Single,
    SpanCorruption,
    Supervised,
    needs_of,
    raw_parts,
)
from common.data.sources.config import SourceConfig
from common.errors import UserError

SENTINELS = 20
IDS = types.SimpleNamespace(
    eos_id=1, ordinary_ids=np.arange(3, 100), sentinels=SENTINELS, sentinel_id=lambda k: 119 - k
)
OBJECTIVES: list[Single] = [
    Supervised(),
    Supervised(eos_after_inputs=False),
    Supervised(eos_after_targets=False),
    CausalLM(),
    CausalLM(eos=False),
    SpanCorruption(),
    SpanCorruption(density=0.5, mean_span=2.0),
    IidDenoising(density=0.4),
    BertStyle(),
    Deshuffling(),
    PrefixLM(),
    PrefixLM(complementary=True),
    FullLM(),
]


def make(objective: Single, tokens: dict[str, list[int]], number: int = 0) -> Example:
    arrays = {field: np.array(ids, np.int32) for field, ids in tokens.items()}
    if isinstance(objective, Supervised | CausalLM):
        return example_of_record(objective, arrays, IDS.eos_id)
    return examples_of_pieces(objective, arrays["text"][None], seed=0, number_E=np.array([number]), ids=IDS, mode=())[0]


@pytest.mark.parametrize(
    ("objective", "tokens", "inputs", "targets"),
    [
        (Supervised(), {"inputs": [7, 0, 9], "targets": [4]}, [7, 0, 9, 1], [4, 1]),
        (Supervised(), {"inputs": [], "targets": []}, [1], [1]),
        (Supervised(eos_after_inputs=False), {"inputs": [], "targets": [0]}, [], [0, 1]),
        (Supervised(eos_after_targets=False), {"inputs": [3], "targets": []}, [3, 1], []),
        (CausalLM(), {"text": [0, 0]}, [], [0, 0, 1]),
        (CausalLM(), {"text": []}, [], [1]),
        (CausalLM(eos=False), {"text": [5, 1, 6]}, [], [5, 1, 6]),
    ],
)
def test_worked_examples(objective: Single, tokens: dict[str, list[int]], inputs: list, targets: list) -> None:
    example = make(objective, tokens)
    assert example.inputs_I.tolist() == inputs
    assert example.targets_T.tolist() == targets
    assert example.weights_T.tolist() == [1.0] * len(targets)
    dtypes = (example.inputs_I.dtype, example.targets_T.dtype, example.weights_T.dtype)
    assert dtypes == (np.int32, np.int32, np.float32)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_lengths_are_those_of_the_examples(objective: Single) -> None:
    rng = np.random.default_rng(0)
    least = 2 if isinstance(objective, RawText) else 0
    records = [
        {field: rng.integers(0, 9, rng.integers(least, 40)).tolist() for field in fields(objective)} for _ in range(50)
    ]
    lengths = {field: np.array([len(record[field]) for record in records]) for field in fields(objective)}
    made = [make(objective, record, i) for i, record in enumerate(records)]
    if isinstance(objective, Supervised | CausalLM):
        found = list(zip(*record_lengths(objective, lengths), strict=True))
    else:
        found = [
            tuple(side[0] for side in piece_lengths(objective, length, seed=0, number_E=np.array([i]), ids=IDS))
            for i, length in enumerate(lengths["text"].tolist())
        ]
    assert found == [(len(example.inputs_I), len(example.targets_T)) for example in made]


@pytest.mark.parametrize("objective", [one for one in OBJECTIVES if isinstance(one, RawText)], ids=str)
def test_a_piece_gives_the_same_example_alone_and_among_others(objective: RawText) -> None:
    tokens_EL = np.random.default_rng(0).integers(0, 90, (6, 17)).astype(np.int32)
    number_E = np.array([4, 9, 2, 3, 100, 7])
    for mode in ((), (55, 66)):
        together = examples_of_pieces(objective, tokens_EL, seed=5, number_E=number_E, ids=IDS, mode=mode)
        inputs_E, targets_E = piece_lengths(objective, 17, seed=5, number_E=number_E, ids=IDS)
        for e, found in enumerate(together):
            alone = examples_of_pieces(objective, tokens_EL[[e]], seed=5, number_E=number_E[[e]], ids=IDS, mode=mode)[0]
            assert found.inputs_I.tolist() == alone.inputs_I.tolist()
            assert found.targets_T.tolist() == alone.targets_T.tolist()
            assert found.inputs_I[: len(mode)].tolist() == list(mode)
            assert (len(found.inputs_I) - len(mode), len(found.targets_T)) == (inputs_E[e], targets_E[e])
            assert found.weights_T.tolist() == [1.0] * len(found.targets_T)
            assert (found.inputs_I.dtype, found.targets_T.dtype) == (np.int32, np.int32)


def test_examples_do_not_alter_the_record() -> None:
    tokens = {"inputs": np.array([7, 8], np.int32), "targets": np.array([9], np.int32)}
    for objective in (Supervised(), Supervised(eos_after_inputs=False, eos_after_targets=False)):
        first, second = (example_of_record(objective, tokens, eos_id=1) for _ in range(2))
        np.testing.assert_array_equal(first.inputs_I, second.inputs_I)
        assert tokens["inputs"].tolist() == [7, 8] and tokens["targets"].tolist() == [9]


def test_an_example_holds_the_tokens_of_its_piece() -> None:
    """Inputs and targets together hold the piece's tokens, sentinels and an eos each, and nothing else."""
    text = np.arange(2, 42).tolist()
    for objective in (SpanCorruption(), SpanCorruption(density=0.5), IidDenoising(), PrefixLM()):
        example = make(objective, {"text": text}, number=3)
        assert example.inputs_I[-1] == example.targets_T[-1] == 1
        both = [*example.inputs_I[:-1].tolist(), *example.targets_T[:-1].tolist()]
        assert sorted(token for token in both if token < 100) == text
        assert all(token in text or 100 <= token < 120 for token in both)


PAIRS = SourceConfig(name="jsonl:x", inputs="a", targets="b")
TEXT = SourceConfig(name="text:x", inputs=None, targets=None, text="line")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"input_length": 0}, "input_length is 0"),
        ({"target_length": -5}, "target_length is -5"),
        ({"seed": -1}, "seed is -1"),
        ({"objective": CausalLM()}, "reads text"),
        ({"source": TEXT}, "reads inputs and targets"),
    ],
)
def test_data_config_refuses(change: dict, message: str) -> None:
    valid: dict[str, Any] = {"source": PAIRS, "rows": 4, "input_length": 8, "target_length": 8}
    DataConfig(**valid)
    DataConfig(**{**valid, "source": TEXT, "objective": CausalLM(), "input_length": 0})
    with pytest.raises(UserError, match=message):
        DataConfig(**{**valid, **change})


RAW: dict[str, Any] = {"source": TEXT, "rows": 4, "input_length": 512, "target_length": 114}
PIECES = SentencePieceConfig(sentinels=100, vocab_size=2000)


@pytest.mark.parametrize(
    ("objective", "target_length", "piece"),
    [
        (SpanCorruption(), 114, 568),
        (SpanCorruption(mean_span=8.0), 100, 588),
        (SpanCorruption(density=0.5, mean_span=8.0), 512, 908),
        (IidDenoising(), 192, 511),
        (BertStyle(), 512, 511),
        (Deshuffling(), 512, 511),
        (PrefixLM(), 512, 512),
        (PrefixLM(complementary=True), 512, 512),
        (FullLM(), 2048, 2048),
    ],
    ids=str,
)
def test_whole_pieces_fit(objective: RawText, target_length: int, piece: int) -> None:
    """Whatever is drawn. Targets of i.i.d. denoising have no bound, but hardly ever exceed the required slots."""
    change = {"objective": objective, "target_length": target_length, "tokenizer": PIECES}
    config = DataConfig(**RAW | change | ({"input_length": 0} if objective == FullLM() else {}))
    assert needs_of(objective, config.input_length, config.target_length).piece == piece
    ids = types.SimpleNamespace(
        eos_id=1, ordinary_ids=np.arange(3, 1900), sentinels=100, sentinel_id=lambda k: 1999 - k
    )
    inputs_E, targets_E = piece_lengths(objective, piece, seed=0, number_E=np.arange(300), ids=ids)
    assert inputs_E.max() <= 512
    assert targets_E.max() <= target_length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_length": 100}, "span_corruption at input_length 512 makes targets of 114; nearest: 114"),
        (
            {"tokenizer": SentencePieceConfig(sentinels=27)},
            "needs 28 sentinels, tokenizer.sentinels is 27; nearest: 2",
        ),
        ({"objective": SpanCorruption(density=0.5), "target_length": 512}, "needs 128 sentinels"),
        ({"input_length": 2048, "target_length": 456}, "needs 114 sentinels"),
        ({"objective": IidDenoising(), "tokenizer": SentencePieceConfig()}, "makes targets of 192; nearest: 192"),
        ({"objective": IidDenoising(), "target_length": 192, "tokenizer": SentencePieceConfig()}, "needs 67 sentinels"),
        ({"objective": FullLM()}, "input_length is 512, but full_lm has no inputs; nearest: 0"),
        ({"objective": BertStyle(), "tokenizer": SentencePieceConfig()}, "needs 1 sentinels"),
        ({"objective": Deshuffling(), "target_length": 2}, "target_length is 2: it must be 4 or more"),
        ({"input_length": 3}, "input_length is 3: it must be 4 or more"),
        ({"objective": PrefixLM(complementary=True)}, "as many input as target slots.*nearest: target_length=512"),
        ({"source": PAIRS}, "reads text"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    valid = {**RAW, "objective": SpanCorruption(), "tokenizer": PIECES}
    DataConfig(**valid)
    with pytest.raises(UserError, match=message):
        DataConfig(**{**valid, **change})


def test_ul2_has_the_denoisers_of_the_paper() -> None:
    """Seven denoisers, each with its own length of piece; 512 slots need 128 sentinels, and T5 has only 100."""
    parts = raw_parts(UL2())
    assert sum(part.rate for part in parts) == pytest.approx(1.0)
    pieces = [needs_of(part.objective, 512, 512).piece for part in parts]
    assert pieces == [568, 588, 512, 766, 908, 600, 1006]
    config = {**RAW, "objective": UL2(), "target_length": 512}
    DataConfig(**config, tokenizer=SentencePieceConfig(sentinels=128, vocab_size=2000))
    with pytest.raises(UserError, match="'span_corruption' at input_length 512 needs 128 sentinels"):
        DataConfig(**config, tokenizer=PIECES)
    with pytest.raises(UserError, match="makes targets of 512; nearest: 512"):
        DataConfig(**{**config, "target_length": 511}, tokenizer=PIECES)


def test_ul2r_has_four_denoisers() -> None:
    parts = raw_parts(UL2R())
    assert sum(part.rate for part in parts) == pytest.approx(1.0)
    assert [needs_of(part.objective, 512, 512).piece for part in parts] == [568, 598, 766, 512]


def test_a_mixture_of_nothing_is_refused() -> None:
    for parts in ((), (MixturePart(objective=PrefixLM(), rate=0.0),)):
        with pytest.raises(UserError, match="mixture of nothing"):
            Mixture(parts=parts)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SpanCorruption, {"density": 0.0}, "density is 0.0"),
        (SpanCorruption, {"mean_span": 0.5}, "mean_span is 0.5: it must be 1 or more"),
        (IidDenoising, {"density": 1.0}, "density is 1.0: it must be less than 1"),
        (BertStyle, {"random_share": 1.5}, "random_share is 1.5"),
    ],
)
def test_objectives_refuse_values_out_of_range(kind: Any, values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "tfd:x", "inputs": "a", "targets": "b"}, "did you mean 'tfds'"),
        ({"name": "jsonl:", "inputs": "a", "targets": "b"}, "nothing after the colon"),
        ({"name": "no_scheme", "inputs": "a", "targets": "b"}, "valid: arrayrecord, corpus, jsonl"),
        ({"name": "tfds:c4/en:train[:1%]", "inputs": None, "targets": None}, "name=tfds:c4/en train_split=train"),
        ({"name": "jsonl:x", "inputs": "a", "targets": None}, "both inputs and targets"),
        ({"name": "jsonl:x", "inputs": "a", "targets": "b", "text": "c"}, "text alone"),
        ({"name": "jsonl:x", "inputs": None, "targets": None}, "text alone"),
    ],
)
def test_source_config_refuses(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SourceConfig(**wrong)
