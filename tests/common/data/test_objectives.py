import types
from typing import Any

import numpy as np
import pytest

from common.data.config import CausalLM, DataConfig, Objective, SourceConfig, Supervised
from common.data.objectives import Example, example_lengths, fields, make_example
from common.errors import UserError

IDS = types.SimpleNamespace(eos_id=1)
OBJECTIVES: list[Objective] = [
    Supervised(),
    Supervised(eos_after_inputs=False),
    Supervised(eos_after_targets=False),
    CausalLM(),
    CausalLM(eos=False),
]


def make(objective: Objective, tokens: dict[str, list[int]], index: int = 0) -> Example:
    arrays = {field: np.array(ids, np.int32) for field, ids in tokens.items()}
    return make_example(objective, seed=0, index=index, tokens=arrays, ids=IDS)


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
def test_worked_examples(objective: Objective, tokens: dict[str, list[int]], inputs: list, targets: list) -> None:
    example = make(objective, tokens)
    assert example.inputs_I.tolist() == inputs
    assert example.targets_T.tolist() == targets
    assert example.weights_T.tolist() == [1.0] * len(targets)
    dtypes = (example.inputs_I.dtype, example.targets_T.dtype, example.weights_T.dtype)
    assert dtypes == (np.int32, np.int32, np.float32)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_lengths_are_those_of_the_examples(objective: Objective) -> None:
    rng = np.random.default_rng(0)
    records = [
        {field: rng.integers(0, 9, rng.integers(0, 6)).tolist() for field in fields(objective)} for _ in range(50)
    ]
    lengths = {field: np.array([len(record[field]) for record in records]) for field in fields(objective)}
    inputs_E, targets_E = example_lengths(objective, lengths)
    made = [make(objective, record, i) for i, record in enumerate(records)]
    assert inputs_E.tolist() == [len(example.inputs_I) for example in made]
    assert targets_E.tolist() == [len(example.targets_T) for example in made]


def test_examples_do_not_alter_the_record() -> None:
    tokens = {"inputs": np.array([7, 8], np.int32), "targets": np.array([9], np.int32)}
    for objective in (Supervised(), Supervised(eos_after_inputs=False, eos_after_targets=False)):
        first = make_example(objective, seed=0, index=0, tokens=tokens, ids=IDS)
        second = make_example(objective, seed=0, index=0, tokens=tokens, ids=IDS)
        np.testing.assert_array_equal(first.inputs_I, second.inputs_I)
        assert tokens["inputs"].tolist() == [7, 8] and tokens["targets"].tolist() == [9]


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "tfd:x", "inputs": "a", "targets": "b"}, "did you mean 'tfds'"),
        ({"name": "jsonl:", "inputs": "a", "targets": "b"}, "nothing follows"),
        ({"name": "no_scheme", "inputs": "a", "targets": "b"}, "valid: jsonl"),
        ({"name": "jsonl:x", "inputs": "a", "targets": None}, "both inputs and targets"),
        ({"name": "jsonl:x", "inputs": "a", "targets": "b", "text": "c"}, "text alone"),
        ({"name": "jsonl:x", "inputs": None, "targets": None}, "text alone"),
    ],
)
def test_source_config_refuses(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SourceConfig(**wrong)
