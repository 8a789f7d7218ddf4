"""Every number in every config has a range, and values outside it are errors."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from common.data.config import BytePairConfig, Reading, SentencePieceConfig
from common.data.objectives.config import BertStyle, IidDenoising, Mixture, MixturePart, SpanCorruption, Supervised
from common.data.sources.config import ByRate, BySize, SourceConfig, SourceMixture, Stage
from common.errors import UserError
from common.infer.config import Beam, GenerationConfig, Greedy, Limits, Sample
from common.ranges import ranges_of
from common.recipe import CompleteP
from common.report.claims import Parity
from common.train.config import WSD, Adafactor, AdamW, Anomalies, Budget, Constant, Cosine, InverseSqrt, Linear
from experiments import find
from experiments.cli.chosen import choose
from experiments.run import After, MultiTurn
from experiments.search import LogRange, Search, Values
from experiments.study import Study
from tests.tiny import tiny

FIRST_LIGHT = find.load("first_light")
SOURCE = SourceConfig(name="text:a", inputs=None, targets=None, text="text")
PART = MixturePart(objective=SpanCorruption())
EXAMPLES = [
    FIRST_LIGHT,
    *(Parity(), Search(rates=(1e-3, 2e-3)), After(arm="gpt")),
    *(Values(path="train.accumulation", values=(1, 2, 4)), LogRange(path="train.accumulation", low=1, high=4)),
    *(SentencePieceConfig(), BytePairConfig()),
    *(SpanCorruption(), IidDenoising(), BertStyle(), PART, Mixture(parts=(PART,))),
    *(SOURCE, ByRate(rates=(1.0,)), BySize(), Stage(from_step=1, rates=(1.0,)), SourceMixture(parts=(SOURCE,))),
    CompleteP(base_width=64, base_layers=2, base_head_dim=32),
    *(Linear(), Cosine(), WSD(), InverseSqrt(), Constant(), AdamW(), Adafactor()),
    *(Anomalies(), Budget(unit="flops", amount=1e20)),
    MultiTurn(turns=1, message_tokens=1, reply_tokens=1, repeats=1),
    *(tiny("gpt"), tiny("t5like")),
    *(Greedy(), Sample(), Beam(), Limits(), GenerationConfig(method=Sample(), limits=Limits())),
]
"""At least one of each config class with numbers, directly or inside another one."""

PROBES = (-1, 0, math.nan, math.inf, -math.inf, 2**110, 1e300)
"""Values written by mistake; 0 is valid only for the fields listed below."""

ZEROS = """
    Adafactor.min_factored AdamW.b1 AdamW.b2 AdamW.weight_decay BertStyle.random_share Beam.length_penalty
    ByRate.rates Stage.rates MixturePart.rate Stage.from_step Limits.min_new_tokens SentencePieceConfig.sentinels
    BytePairConfig.sentinels Linear.warmup_steps Cosine.warmup_steps WSD.warmup_steps Constant.warmup_steps
    Linear.final_fraction Cosine.final_fraction WSD.final_fraction Recipe.dropout Recipe.z_loss
    DataConfig.seed Reading.input_length TrainConfig.seed GenerationConfig.seed Parity.flops_within Search.extend
    Search.draw_seed Values.values
""".split()


def types_within(annotation: Any) -> Iterator[type]:
    """Yields all dataclasses that an annotation allows, and those inside them."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        yield annotation
        for hint in typing.get_type_hints(annotation).values():
            yield from types_within(hint)
    for argument in typing.get_args(annotation):
        yield from types_within(argument)


def objects_within(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from objects_within(getattr(value, field.name))
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
        yield from objects_within(item)


def is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(is_number, typing.get_args(annotation)))


def numbers(cls: type) -> list[str]:
    """Returns the fields that contain numbers. Labels may be any."""
    hints = typing.get_type_hints(cls)
    own = {name: hint for name, hint in hints.items() if not list(types_within(hint)) and name != "labels"}
    return [name for name, hint in own.items() if is_number(hint)]


CONFIGS = sorted({*types_within(Study), *map(type, EXAMPLES)}, key=lambda cls: cls.__qualname__)
READING = Reading(objective=Supervised(), input_length=8, target_length=8)
EXAMPLE_OF = {type(one): one for example in (*EXAMPLES, READING) for one in objects_within(example)}
FIELDS = [(cls, name) for cls in CONFIGS for name in numbers(cls)]


def test_every_number_has_a_range_with_two_ends():
    assert len(FIELDS) > 80
    for cls, name in FIELDS:
        stated = ranges_of(cls).get(name)
        assert stated is not None, f"{cls.__qualname__}.{name} states no range"
        assert stated.low < stated.high and math.isfinite(stated.low) and math.isfinite(stated.high)


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda x: x if isinstance(x, str) else x.__qualname__)
def test_mistaken_values_are_errors(cls, name):
    example = EXAMPLE_OF[cls]
    many = isinstance(getattr(example, name), tuple)
    dataclasses.replace(example)
    for probe in PROBES:
        field = f"{cls.__qualname__}.{name}"
        if (probe == 0 and field in ZEROS) or (probe == -1 and field == "Beam.length_penalty"):
            dataclasses.replace(example, **{name: (probe, *getattr(example, name)) if many else probe})
            continue
        with pytest.raises(UserError, match=f"^{name}(\\.0)? is .*: it must be"):
            dataclasses.replace(example, **{name: (probe,) if many else probe})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.schedule.warmup_steps=-5", "arms.t5like.train.schedule: warmup_steps is -5: it must be 0 or more"),
        (
            "train.schedule.final_fraction=-3",
            "arms.t5like.train.schedule: final_fraction is -3.0: it must be 0 or more",
        ),
        ("train.optimizer.b1=1.5", "arms.t5like.train.optimizer: b1 is 1.5: it must be less than 1"),
        ("train.optimizer.weight_decay=-1", "arms.t5like.train.optimizer: weight_decay is -1.0: it must be 0 or more"),
        ("train.optimizer.clip_norm=0", "arms.t5like.train.optimizer: clip_norm is 0.0: it must be more than 0"),
        ("train.seed=-1", "arms.t5like.train: seed is -1: it must be 0 or more"),
        ("data.rows=1099511627776", "arms.t5like.data: rows is 1,099,511,627,776: it must be at most 1,048,576 rows"),
        (
            "data.rows=1048576 data.input_length=1024",
            "arms.t5like.data: rows is 1048576: that makes 1,140,850,688 slots a step",
        ),
        (
            "train.budget.amount=1e9",
            "arms.t5like: train.budget is 1e+09 steps, that is 1,000,000,000 steps; the most is 16,777,216",
        ),
        ("arms.gpt.learning_rate=0", "arms.gpt: learning_rate is 0.0: it must be more than 0"),
        ("arms.gpt.model.num_layers=1000000000", "arms.gpt.model: num_layers is 1,000,000,000: it must be at most"),
    ],
)
def test_errors_of_overrides_have_the_path(override, message):
    with pytest.raises(UserError) as caught:
        choose("first_light", override.split())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_warm_up_longer_than_the_run_is_a_warning():
    def remarks(*overrides: str) -> list[str]:
        return choose("first_light", ["train.schedule.kind=linear", *overrides]).study.remarks()

    (line,) = remarks("train.schedule.warmup_steps=99", "train.budget.amount=10")
    assert line.startswith("train.schedule.warmup_steps is 99 and the run has 10 steps") and "10.0% of its peak" in line
    assert remarks("train.schedule.warmup_steps=10", "train.budget.amount=10")
    assert not remarks("train.schedule.warmup_steps=9", "train.budget.amount=10")
    assert not remarks("train.schedule.kind=inverse_sqrt", "train.schedule.warmup_steps=99", "train.budget.amount=10")
