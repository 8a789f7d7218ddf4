"""Streams of mixtures: rates, temperatures, stages of a curriculum, and templates of several tasks."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.data.batch import HostBatch
from common.data.loader import Loader
from common.data.objectives.config import (
    UL2,
    CausalLM,
    Objective,
    Supervised,
)
from common.data.sources.config import ByRate, BySize, SourceMixture, Stage, Template
from common.data.staged_loader import StagedLoader
from common.data.streams import (
    Host,
    open_records,
    open_training,
    open_validation,
)
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.errors import UserError
from tests.common.data.stream_configs import SLOTS, config_of, mixture, pairs, text


def parts_in(batch: HostBatch, tokenizer: SentencePieceTokenizer) -> Counter[bool]:
    """Counts the packed examples by whether they come from the file `few`."""
    seen: Counter[bool] = Counter()
    both = zip(batch.batch.targets_BT, batch.batch.target_segments_BT, strict=True)
    for row, segments in both:
        for segment in range(1, segments.max() + 1):
            seen["other" in tokenizer.decode(row[segments == segment].tolist())] += 1
    return seen


def test_a_curriculum_changes_its_rates_at_its_steps(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    stages = (Stage(from_step=4, rates=(0.0, 1.0)), Stage(from_step=6, rates=(1.0, 1.0)))
    source = mixture(folder, by=ByRate(rates=(1.0, 0.0)), curriculum=stages)
    config = config_of(source, CausalLM(), input_length=0, target_length=128)
    loader = open_training(config, tokenizer, tmp_path, Host())
    seen = [parts_in(loader.batch(step), tokenizer) for step in range(12)]
    assert all(not each[True] for each in seen[:4]) and all(not each[False] for each in seen[4:6])
    later = sum(seen[6:], Counter())
    assert 0.35 < later[True] / later.total() < 0.65


def test_temperature_raises_the_share_of_the_smaller_part(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    shares = []
    for temperature in (1.0, 100.0):
        source = mixture(folder, by=BySize(temperature=temperature))
        config = config_of(source, CausalLM(), input_length=0, target_length=128)
        loader = open_training(config, tokenizer, tmp_path, Host())
        seen = sum((parts_in(loader.batch(step), tokenizer) for step in range(10)), Counter())
        shares.append(seen[True] / seen.total())
    assert shares[0] < 0.15 and 0.4 < shares[1] < 0.6, "20 of 320 examples, and nearly half"


@pytest.mark.parametrize("objective", [CausalLM(), UL2()])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_part_without_examples_is_named(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, objective: Objective, split: str
) -> None:
    """Wherever its rate is positive, even in a later stage of a curriculum."""
    for each in ("train", "validation"):
        lines = "" if each == split else "some words\n" * 30
        (tmp_path / f"small.{each}.txt").write_text(lines)
    source = mixture(folder, by=ByRate(rates=(1.0, 1.0)))
    source = dataclasses.replace(source, parts=(*source.parts[:1], text(tmp_path, "small")))
    target_length = 128 if objective == CausalLM() else SLOTS

    def opened(source: SourceMixture) -> Loader | StagedLoader:
        config = config_of(source, objective, target_length=target_length)
        opens = open_training if split == "train" else open_validation
        return opens(config, tokenizer, tmp_path / "cache", Host())

    named = rf"parts\[1\] \(text:{tmp_path}/small.* has no examples in split '{split}', but rate 1"
    with pytest.raises(UserError, match=named):
        opened(source)
    nothing = dataclasses.replace(source, by=ByRate(rates=(1.0, 0.0)))
    later = dataclasses.replace(nothing, curriculum=(Stage(from_step=2, rates=(1.0, 1.0)),))
    if split == "train":
        with pytest.raises(UserError, match=named):
            opened(later)
    assert opened(nothing).batch(0).examples > 0


def test_templates_turn_records_into_texts(folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    templates = (
        Template(inputs="Is {a} odd? {{yes or no}}", targets="{label}", words={"0": "no", "1": "yes"}),
        Template(inputs="What of {a}?", targets="{b}."),
    )
    config = config_of(pairs(folder, *templates), Supervised())
    records = open_records(config, pairs(folder, *templates), "train", tokenizer, tmp_path)
    found = [(records.text(i)["inputs"], records.text(i)["targets"]) for i in range(100)]
    either = [
        ((f"Is {n} odd? {{yes or no}}", ("no", "yes")[n % 2]), (f"What of {n}?", f"it is {n}.")) for n in range(100)
    ]
    assert all(made in both for made, both in zip(found, either, strict=True))
    assert 30 < sum(made == both[0] for made, both in zip(found, either, strict=True)) < 70
    made = records.examples.make(np.array([7]))[0]
    assert tokenizer.decode(made.inputs_I) == found[7][0] and tokenizer.decode(made.targets_T) == found[7][1]


def test_instructions_of_several_tasks_are_mixed(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    """Each source uses its own templates; validation has the same rates; each source's tests are apart."""
    odd = pairs(folder, Template(inputs="Is {a} odd?", targets="{label}", words={"0": "no", "1": "yes"}))
    say = pairs(folder, Template(inputs="Say {a}.", targets="{b}"), Template(inputs="What is {a}?", targets="{b}"))
    source = SourceMixture(parts=(odd, say), by=ByRate(rates=(1.0, 2.0)))
    config = config_of(source, Supervised())
    for loader in (
        open_training(config, tokenizer, tmp_path, Host()),
        open_validation(config, tokenizer, tmp_path, Host()),
    ):
        seen: Counter[str] = Counter()
        for step in range(10):
            batch = loader.batch(step).batch
            for row, segments in zip(batch.inputs_BI, batch.input_segments_BI, strict=True):
                for segment in range(1, segments.max() + 1):
                    seen[tokenizer.decode(row[segments == segment].tolist()).split()[0]] += 1
        assert set(seen) == {"Is", "Say", "What"}
        assert abs(seen["Is"] / seen.total() - 1 / 3) < 0.05
        assert abs(seen["Say"] - seen["What"]) < 0.25 * seen.total()
    for part, first in ((odd, ("Is 0 odd?", "no")), (say, None)):
        records = open_records(config, part, "validation", tokenizer, tmp_path)
        text = records.text(0)
        assert first is None or (text["inputs"], text["targets"]) == first


def test_a_label_without_a_word_is_skipped_and_named(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    source = pairs(folder, Template(inputs="{a}", targets="{label}", words={"0": "no"}))
    records = open_records(config_of(source, Supervised()), source, "train", tokenizer, tmp_path)
    assert records.examples.size == 50 and records.prepared.manifest["problems"]["count"] == 50
    assert [records.text(place)["inputs"] for place in range(3)] == ["0", "2", "4"]
    assert "field 'label' is '1', for which template 0 has no word" in records.prepared.manifest["problems"]["first"][0]
    strict = dataclasses.replace(source, strict=True)
    with pytest.raises(UserError, match="record 1: field 'label' is '1'"):
        open_records(config_of(strict, Supervised()), strict, "train", tokenizer, tmp_path)
