"""Configs as JSON and edited by overrides: exact round trips, and one clear line for what is refused."""

import dataclasses
import json
import math
import re
import struct
import sys
from typing import Any, Literal

import pytest

from common.config import apply_overrides, difference, from_earlier_json, from_json, to_json, without_defaults
from common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    kind: Literal["adamw"] = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion:
    """Has the same fields as AdamW, so only `kind` distinguishes them."""

    kind: Literal["lion"] = "lion"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd:
    kind: Literal["sgd"] = "sgd"
    learning_rate: float = 1e-1
    momentum: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average:
    decay: float = 0.99
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"decay is {self.decay}: it must be in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    d_ff: int
    activation: Literal["relu", "gelu"] = "relu"
    sides: Literal[1, 2] = 1
    name: str | None = None
    norm: Literal["rms", "layer"] | None = None
    tied: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 10
    optimizer: AdamW | Lion | Sgd = AdamW()
    warmup: AdamW | Lion | None = None
    average: Average | None = None
    stages: tuple[Average, ...] = ()
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    train: Train = Train()
    arms: dict[str, Model] = dataclasses.field(default_factory=dict)


BASE = Experiment(arms={"small": Model(d_ff=64), "large": Model(d_ff=256, name="1e3", tied=True)})
FULL = Experiment(
    train=Train(
        optimizer=Lion(betas=(0.1, 1 / 3)),
        warmup=AdamW(),
        average=Average(decay=0.5),
        stages=(Average(), Average(every=3)),
        weights={"a": 1.0, "": 1e-300},
    ),
    arms=BASE.arms,
)


def through_text(config: Any) -> Any:
    return from_json(type(config), json.loads(json.dumps(to_json(config), allow_nan=False)))


def edited(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Returns a deep copy with `value` at the path; `...` deletes the key."""
    data = json.loads(json.dumps(data))
    *parents, last = path.split(".")
    node = data
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return data


@pytest.mark.parametrize("config", [BASE, FULL, Experiment()])
def test_round_trip_restores_equal_objects(config):
    restored = through_text(config)
    assert restored == config and repr(restored) == repr(config)


@pytest.mark.parametrize("variant", [AdamW(), Lion(), Sgd(momentum=0.0)])
def test_variants_keep_their_types(variant):
    assert type(through_text(Train(optimizer=variant)).optimizer) is type(variant)


def test_a_variant_without_a_kind_is_refused():
    with pytest.raises(UserError, match="train.optimizer: 'kind' is missing; valid: adamw, lion, sgd"):
        from_json(Experiment, edited(to_json(BASE), "train.optimizer.kind", ...))


@pytest.mark.parametrize(
    "value", [0.1, 1 / 3, -0.0, 5e-324, sys.float_info.max, 1e22, 1e3, 2.0**53 + 2, struct.unpack("d", b"\x01" * 8)[0]]
)
def test_floats_restore_to_the_bit(value):
    restored = through_text(AdamW(learning_rate=value)).learning_rate
    assert struct.pack("d", restored) == struct.pack("d", value)


def test_integers_of_any_size_are_restored():
    assert through_text(Train(steps=2**80)).steps == 2**80


def test_a_whole_number_becomes_a_float_before_it_is_saved():
    assert repr(to_json(AdamW(learning_rate=1))["learning_rate"]) == "1.0"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_floats_are_refused_both_ways(value):
    with pytest.raises(UserError, match="learning_rate: expected float that is finite"):
        to_json(AdamW(learning_rate=value))
    with pytest.raises(UserError, match="learning_rate: expected float that is finite"):
        from_json(AdamW, {**to_json(AdamW()), "learning_rate": value})


def test_values_of_a_wrong_type_are_not_saved():
    with pytest.raises(UserError, match=re.escape('steps: expected int, got "10"')):
        to_json(Train(steps="10"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.stpes", 1, "unknown field 'stpes' in train: did you mean 'steps'?"),
        ("arms.small.dff", 1, "unknown field 'dff' in arms.small: did you mean 'd_ff'?"),
        ("trian", {}, "unknown field 'trian': did you mean 'train'?"),
        ("train.steps", ..., "train: 'steps' missing"),
        ("train.steps", "10", 'train.steps: expected int, got "10"'),
        ("train.steps", 10.0, "train.steps: expected int, got 10.0"),
        ("train.steps", True, "train.steps: expected int, got true"),
        ("train.steps", None, "train.steps: expected int, got null"),
        ("train.optimizer.learning_rate", "0.5", 'train.optimizer.learning_rate: expected float, got "0.5"'),
        ("train.optimizer.betas", [0.9], "train.optimizer.betas: expected tuple[float, float], got [0.9]"),
        ("train.optimizer.kind", "adam", "train.optimizer.kind: unknown kind \"adam\": did you mean 'adamw'?"),
        ("train.optimizer.kind", ["adamw"], 'train.optimizer.kind: unknown kind ["adamw"]: did you mean'),
        ("train.optimizer", 3, "train.optimizer: expected an object of kind adamw, lion, sgd, got 3"),
        ("train.average", {"decay": 1.5, "every": 1}, "train.average: decay is 1.5: it must be in [0, 1)"),
        ("train.stages", [{"decay": 2.0, "every": 1}], "train.stages.0: decay is 2.0: it must be in [0, 1)"),
        ("train.stages", {}, "train.stages: expected tuple["),
        ("train.weights", {"a": "b"}, 'train.weights: expected dict[str, float], got {"a": "b"}'),
        ("train", [], "train: expected Train, got []"),
        ("arms", [], "arms: expected dict["),
        ("arms.small", None, "arms.small: expected Model, got null"),
        ("arms.small.activation", "gelo", "arms.small.activation: unknown value 'gelo': did you mean 'gelu'?"),
        ("arms.small.sides", 1.0, "arms.small.sides: expected Literal[1, 2], got 1.0"),
        ("arms.small.sides", True, "arms.small.sides: expected Literal[1, 2], got true"),
        ("arms.small.name", 3, "arms.small.name: expected str | None, got 3"),
        ("arms.small.norm", "rmss", "arms.small.norm: unknown value 'rmss': did you mean 'rms'?"),
        ("arms.small.tied", 1, "arms.small.tied: expected bool, got 1"),
    ],
)
def test_json_is_refused_in_one_clear_line(path, value, message):
    with pytest.raises(UserError) as caught:
        from_json(Experiment, edited(to_json(BASE), path, value))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [BASE, FULL, Experiment()])
def test_fields_added_since_a_file_was_written_take_their_defaults(config):
    """Whatever is at its default may be absent, at every depth; nothing else is guessed."""
    assert from_earlier_json(Experiment, without_defaults(config)) == config
    assert from_earlier_json(Experiment, to_json(config)) == config
    for path, value in (("train.stpes", 1), ("train.steps", "10"), ("arms.small", {})):
        if path != "arms.small" or config.arms:
            with pytest.raises(UserError):
                from_earlier_json(Experiment, edited(to_json(config), path, value))


def test_what_identifies_a_config_holds_no_default():
    assert without_defaults(Experiment()) == {}
    assert without_defaults(BASE) == {
        "arms": {"small": {"d_ff": 64}, "large": {"d_ff": 256, "name": "1e3", "tied": True}}
    }
    assert without_defaults(FULL)["train"] == {
        "optimizer": {"kind": "lion", "betas": [0.1, 1 / 3]},
        "warmup": {"kind": "adamw"},
        "average": {"decay": 0.5},
        "stages": [{}, {"every": 3}],
        "weights": {"a": 1.0, "": 1e-300},
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=20"], Train(steps=20)),
        (["train.steps=20", "train.steps=30"], Train(steps=30)),
        (["train.optimizer.learning_rate=1e3"], Train(optimizer=AdamW(learning_rate=1000.0))),
        (["train.optimizer.learning_rate=1"], Train(optimizer=AdamW(learning_rate=1.0))),
        (["train.optimizer.betas=[0.5,1]"], Train(optimizer=AdamW(betas=(0.5, 1.0)))),
        (["train.optimizer.betas.1=0.5"], Train(optimizer=AdamW(betas=(0.9, 0.5)))),
        (["train.optimizer.kind=lion", "train.optimizer.learning_rate=2.0"], Train(optimizer=Lion(learning_rate=2.0))),
        (
            ["train.optimizer.momentum=0.9", "train.optimizer.kind=sgd"],
            Train(optimizer=Sgd(learning_rate=1e-3, momentum=0.9)),
        ),
        (['train.optimizer={"kind":"sgd","momentum":0.9}'], Train(optimizer=Sgd(momentum=0.9))),
        (["train.warmup.kind=lion"], Train(warmup=Lion())),
        (["train.average.decay=0.5"], Train(average=Average(decay=0.5))),
        (['train.average={"every":2}', "train.average.decay=0.5"], Train(average=Average(decay=0.5, every=2))),
        (["train.average=null"], Train()),
        (
            ['train.stages=[{"every":2},{}]', "train.stages.1.every=3"],
            Train(stages=(Average(every=2), Average(every=3))),
        ),
        (['train.weights={"a":1}', "train.weights.a=0.5"], Train(weights={"a": 0.5})),
    ],
)
def test_overrides_of_training(overrides, expected):
    assert repr(apply_overrides(BASE, overrides)) == repr(dataclasses.replace(BASE, train=expected))


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("arms.small.d_ff=512", "d_ff", 512),
        ("arms.small.activation=gelu", "activation", "gelu"),
        ("arms.small.tied=true", "tied", True),
        ("arms.small.name=a=b c", "name", "a=b c"),
        ("arms.small.name=", "name", ""),
        ('arms.small.name="512"', "name", "512"),
    ],
)
def test_overrides_change_one_entry_of_a_dict(override, field, value):
    result = apply_overrides(BASE, [override])
    assert result.arms["small"] == dataclasses.replace(BASE.arms["small"], **{field: value})
    assert result.arms["large"] == BASE.arms["large"] and result.train == BASE.train


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps"], "'train.steps' is not an override; valid: path.to.field=value"),
        (["=3"], "'=3' is not an override"),
        (["train..steps=3"], "'train..steps=3' is not an override"),
        (["train.optimiser.learning_rate=1"], "unknown field 'optimiser' in train: did you mean 'optimizer'?"),
        (["arms.smal.d_ff=1"], "unknown field 'smal' in arms: did you mean 'small'?"),
        (["train.steps.more=1"], "unknown field 'more' in train.steps: valid: none"),
        (['train.steps={"a":1}', "train.steps.a=2"], "unknown field 'a' in train.steps: valid: none"),
        (["train.steps=[1]", "train.steps.0=2"], "unknown field '0' in train.steps: valid: none"),
        (["train.steps=1e3"], "train.steps: expected int, got 1000.0"),
        (["train.steps=many"], 'train.steps: expected int, got "many"'),
        (
            ["train.optimizer.learning_rate=NaN"],
            "train.optimizer.learning_rate: expected float that is finite, got NaN",
        ),
        (["train.optimizer.learning_rate=1e999"], "train.optimizer.learning_rate: expected float that is finite"),
        (["arms.small.tied=True"], 'arms.small.tied: expected bool, got "True"'),
        (["arms.small.name=512"], "arms.small.name: expected str | None, got 512"),
        (["train.optimizer.kind=cosine"], 'train.optimizer.kind: unknown kind "cosine": valid: adamw, lion, sgd'),
        (["train.optimizer.kind=sgd"], "train.optimizer: 'momentum' missing"),
        (["train.optimizer.kind=sgd", "train.optimizer.betas=[0,0]"], "unknown field 'betas' in train.optimizer"),
        (["train.optimizer.momentum=0.9"], "unknown field 'momentum' in train.optimizer"),
        (["train.warmup.learning_rate=1"], "train.warmup: 'kind' is missing; valid: adamw, lion"),
        (['train.optimizer={"learning_rate":1}'], "train.optimizer: 'kind' is missing"),
        (["train=3", "train.steps=3"], "train: expected Train, got 3"),
        (["train.stages.0.decay=0.5"], "unknown field '0' in train.stages: valid: none"),
        (["train.average.decay=1.5"], "train.average: decay is 1.5: it must be in [0, 1)"),
        (["arms.small.d_ff=null"], "arms.small.d_ff: expected int, got null"),
    ],
)
def test_override_errors_are_one_clear_line(overrides, message):
    with pytest.raises(UserError) as caught:
        apply_overrides(BASE, overrides)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_difference_names_paths_and_both_values():
    other = apply_overrides(BASE, ["train.optimizer.kind=lion", "train.optimizer.betas.0=0.5", "arms.small.d_ff=1"])
    assert [str(change) for change in difference(to_json(BASE), to_json(other))] == [
        'train.optimizer.kind: "adamw" -> "lion"',
        "train.optimizer.betas.0: 0.9 -> 0.5",
        "arms.small.d_ff: 64 -> 1",
    ]
    assert difference(to_json(BASE), to_json(BASE)) == []


def test_difference_distinguishes_absent_from_null_and_true_from_one():
    changes = difference({"a": None, "b": 1, "c": []}, {"b": True, "c": [{}]})
    assert [str(change) for change in changes] == [
        "a: null -> (absent)",
        "b: 1 -> true",
        "c: [] -> (absent)",
        "c.0: (absent) -> {}",
    ]
