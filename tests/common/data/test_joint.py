"""Joint plans: arms of other objectives, templates and row lengths read the same source examples step by step."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import apply_overrides, from_earlier_json, from_json, to_json, without_defaults
from common.data import examples as examples_module
from common.data.batch import HostBatch
from common.data.config import DataConfig, Reading, SentencePieceConfig
from common.data.examples import RecordExamples
from common.data.joint import JointLengths
from common.data.loader import Loader
from common.data.mixed_examples import MixedExamples
from common.data.objectives.config import (
    UL2,
    BertStyle,
    CausalLM,
    FullLM,
    IidDenoising,
    PrefixLM,
    SpanCorruption,
    Supervised,
)
from common.data.sources.config import ByRate, SourceConfig, SourceMixture, Stage, Template
from common.data.staged_loader import StagedLoader
from common.data.streams import Host, open_tokenizer_of, open_training, open_training_text, open_validation, shard_tasks
from common.data.tokenized.token_store import TokenStream
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.errors import UserError
from tests.common.data.stream_configs import ROWS, SLOTS, config_of, mixture, pairs, text

STEPS = 20
LONG = Template(inputs="please answer: what is {a}, if it is not {label} and not another number?", targets="{b}, sure")


def words(folder: Path) -> SourceConfig:
    return dataclasses.replace(pairs(folder), inputs=None, targets=None, text="b")


ARMS: dict[str, Any] = {
    "pieces": lambda folder: (
        config_of(text(folder), SpanCorruption()),
        Reading(objective=PrefixLM()),
        Reading(objective=BertStyle()),
        Reading(objective=IidDenoising()),
    ),
    "lm": lambda folder: (
        config_of(text(folder), SpanCorruption()),
        Reading(objective=FullLM(), input_length=0, target_length=2 * SLOTS + 6),
        Reading(objective=PrefixLM(), input_length=SLOTS + 3, target_length=SLOTS + 3),
    ),
    "pairs": lambda folder: (
        config_of(text(folder), PrefixLM(complementary=True)),
        Reading(objective=SpanCorruption(), input_length=2 * SLOTS, target_length=SLOTS),
    ),
    "templates": lambda folder: (
        config_of(pairs(folder), Supervised(), input_length=4 * SLOTS),
        Reading(objective=Supervised(), source=pairs(folder, LONG)),
        Reading(objective=CausalLM(), source=words(folder)),
    ),
    "records": lambda folder: (
        config_of(words(folder), PrefixLM(), input_length=2 * SLOTS),
        Reading(objective=SpanCorruption()),
        Reading(objective=FullLM(), input_length=0),
        Reading(objective=Supervised(), source=pairs(folder, LONG), input_length=3 * SLOTS),
    ),
    "curriculum": lambda folder: (
        config_of(
            mixture(
                folder,
                by=ByRate(rates=(1.0, 0.0)),
                curriculum=(Stage(from_step=3, rates=(0.0, 1.0)), Stage(from_step=5, rates=(1.0, 1.0))),
            ),
            SpanCorruption(),
        ),
        Reading(objective=PrefixLM()),
    ),
}
studies = pytest.mark.parametrize("name", ARMS)


def arms_of(name: str, folder: Path) -> list[DataConfig]:
    """Returns the config of each arm of a study; each names all others."""
    first, *readings = ARMS[name](folder)
    own = Reading(objective=first.objective, source=first.source, **lengths(first))
    arms = [first, *(arm for arm in dataclasses.replace(first, joint=tuple(readings)).arms()[1:])]
    everyone = [own, *(Reading(objective=arm.objective, source=arm.source, **lengths(arm)) for arm in arms[1:])]
    rotated = [(*everyone[i:], *everyone[:i]) for i in range(len(arms))]  # the order in which arms are named is free
    return [dataclasses.replace(arm, joint=joint) for arm, joint in zip(arms, rotated, strict=True)]


def lengths(config: DataConfig) -> dict[str, int]:
    return {"input_length": config.input_length, "target_length": config.target_length}


def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "PLANNED_TOGETHER", 10)
    monkeypatch.setattr(examples_module, "WINDOW", 16)
    monkeypatch.setattr(MixedExamples, "window", 24)


def source_fingerprints(stream: Loader | StagedLoader) -> list[int]:
    return [stream.batch(step).source_fingerprint for step in range(STEPS)]


@pytest.mark.parametrize(
    ("name", "small"), [(name, small) for name in ARMS for small in (False, True) if small or name != "curriculum"]
)
def test_arms_read_the_same_source_examples(
    folder: Path,
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    small: bool,
) -> None:
    """In the same steps and rows, planned whole or window by window, in training and validation; no row overflows."""
    if small:
        small_memory(monkeypatch)
    arms = arms_of(name, folder)
    of_arms = [open_training(arm, tokenizer, tmp_path, Host()) for arm in arms]
    found = [source_fingerprints(stream) for stream in of_arms]
    assert all(each == found[0] for each in found) and len(set(found[0])) == STEPS
    checked = [[open_validation(arm, tokenizer, tmp_path, Host()).batch(0)] for arm in arms]
    assert len({made.source_fingerprint for (made,) in checked}) == 1
    for step in (0, 7, STEPS - 1):
        batches = [stream.batch(step) for stream in of_arms]
        for arm, made in zip(arms, batches, strict=True):
            assert made.batch.inputs_BI.shape == (ROWS, arm.input_length)
            assert made.batch.targets_BT.shape == (ROWS, arm.target_length)
        assert len({made.fingerprint for made in batches}) == len(arms)
        segments = [made.batch.target_segments_BT.max(axis=1).tolist() for made in batches]
        assert all(each == segments[0] for each in segments), "as many examples in each row"


@studies
def test_a_plan_for_one_arm_alone_differs(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    small_memory(monkeypatch)
    arms = arms_of(name, folder)
    joint = source_fingerprints(open_training(arms[0], tokenizer, tmp_path, Host()))
    alone = [
        source_fingerprints(open_training(dataclasses.replace(arm, joint=()), tokenizer, tmp_path, Host()))
        for arm in arms
    ]
    assert any(each != joint for each in alone)


@studies
def test_a_joint_stream_is_the_same_for_any_hosts_and_restarts(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    small_memory(monkeypatch)
    config = arms_of(name, folder)[0]
    whole = open_training(config, tokenizer, tmp_path, Host())
    for count in (2, 8):
        hosts = [
            open_training(config, tokenizer, tmp_path, Host(share.tolist()))
            for share in np.split(np.arange(ROWS), count)
        ]
        for step in (7, 2):
            shares, made = [host.batch(step) for host in hosts], whole.batch(step)
            for field in ("fingerprint", "source_fingerprint"):
                assert sum(getattr(share, field) for share in shares) % 2**128 == getattr(made, field)
    after = open_training(config, tokenizer, tmp_path, Host())
    after.recall(json.loads(json.dumps(whole.landmarks(15))))
    assert same(after.batch(15), whole.batch(15))


def same(one: HostBatch, other: HostBatch) -> bool:
    fields = [field.name for field in dataclasses.fields(one.batch)]
    arrays = all(np.array_equal(getattr(one.batch, name), getattr(other.batch, name)) for name in fields)
    return arrays and (one.fingerprint, one.source_fingerprint) == (other.fingerprint, other.source_fingerprint)


@studies
def test_prepared_tokens_are_those_that_all_arms_need(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every arm lists the same tasks, and opening any of them makes no other."""
    arms = arms_of(name, folder)
    keys = [{task.key() for _, task in shard_tasks(arm, tokenizer, tmp_path)} for arm in arms]
    assert all(each == keys[0] for each in keys)
    for arm in arms:
        open_training(arm, tokenizer, tmp_path, Host()).batch(0)
        open_validation(arm, tokenizer, tmp_path, Host()).batch(0)
    assert {path.name for path in (tmp_path / "tokenized").iterdir() if not path.name.startswith(".")} == keys[0]
    own, others = (
        {task.source.content_id for _, task in shard_tasks(each, tokenizer, tmp_path, ("train[:5]",))}
        for each in (dataclasses.replace(arms[0], joint=()), arms[0])
    )
    assert own <= others


def test_arms_with_other_templates_share_a_trained_tokenizer(folder: Path, tmp_path: Path) -> None:
    arms = [
        dataclasses.replace(arm, tokenizer=SentencePieceConfig(vocab_size=290)) for arm in arms_of("templates", folder)
    ]
    texts = [open_training_text(arm, tmp_path) for arm in arms]
    assert len({each.content_id for each in texts}) == 1 and len(texts[0]) == 300
    found = {open_tokenizer_of(arm, each, tmp_path).content_hash for arm, each in zip(arms, texts, strict=True)}
    assert len(found) == 1
    trained = SentencePieceConfig(vocab_size=290, sentinels=20)
    of_pieces = [dataclasses.replace(arm, tokenizer=trained) for arm in arms_of("lm", folder)]
    alone = dataclasses.replace(of_pieces[0], joint=())
    ids = {open_training_text(arm, tmp_path).content_id for arm in (*of_pieces, alone)}
    assert len(ids) == 1, "all read one text"


# --- Lengths


def records_of(*inputs: int, targets: int = 1, source: str = "s") -> RecordExamples:
    ids = types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash="")
    texts = {"inputs": [[5] * n for n in inputs], "targets": [[6] * targets] * len(inputs)}
    streams = {field: TokenStream.of(each) for field, each in texts.items()}
    bare = Supervised(eos_after_inputs=False, eos_after_targets=False)
    return RecordExamples(streams, objective=bare, seed=0, tokenizer=ids, source_content_id=source)


def test_joint_lengths_fit_exactly_where_every_arm_fits() -> None:
    """For any set of examples that is one example: it fits the joint row if and only if it fits each arm's row."""
    rng = np.random.default_rng(0)
    limits = [(int(i), int(t)) for i, t in rng.integers(1, 40, (3, 2))]
    arms = [records_of(*rng.integers(0, 45, 200).tolist(), targets=int(t)) for _, t in limits]
    joint = JointLengths(arms, limits)
    sides = zip(joint.lengths(np.arange(200)), joint.limits, strict=True)
    fits_E = np.logical_and(*(side_E <= limit for side_E, limit in sides))
    expected_E = np.ones(200, bool)
    for arm, own in zip(arms, limits, strict=True):
        for side, limit in zip(arm.lengths(np.arange(200)), own, strict=True):
            expected_E &= side <= limit
    np.testing.assert_array_equal(fits_E, expected_E)
    assert 0 < fits_E.sum() < 200
    full = JointLengths([records_of(3, 4), records_of(5, 5)], [(7, 2), (10, 2)])
    assert full.lengths(np.arange(2))[0].tolist() == [35, 40] and full.limits[0] == 70, "1 part would be too many"


def test_arms_that_read_other_records_are_refused() -> None:
    with pytest.raises(UserError, match="arms of data.joint read 2 and 3 examples of the source"):
        JointLengths([records_of(1, 2), records_of(1, 2, 3)], [(4, 4), (4, 4)])
    with pytest.raises(UserError, match="arms of data.joint read different records of the source"):
        JointLengths([records_of(1, 2), records_of(1, 2, source="t")], [(4, 4), (4, 4)]).lengths(np.arange(2))
    with pytest.raises(UserError, match="huge common multiple"):
        JointLengths([records_of(1)] * 3, [(2**24, 1), (2**24 - 1, 1), (2**24 - 3, 1)])


def test_a_template_without_a_word_for_some_records_is_refused(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    partial = Template(inputs="{a}", targets="{label}", words={"0": "even"})
    reading = Reading(objective=Supervised(), source=pairs(folder, partial))
    with pytest.raises(UserError, match="100 and 50 examples"):
        open_training(config_of(pairs(folder), Supervised(), joint=(reading,)), tokenizer, tmp_path, Host())


def test_messages_name_the_rows_of_all_arms(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    reading = Reading(objective=Supervised(), source=pairs(folder, LONG), input_length=66)
    open_training(config_of(pairs(folder), Supervised(), joint=(reading,)), tokenizer, tmp_path, Host()).batch(0)
    assert "are longer than a row of one arm (64 + 64 or 66 + 64 slots) and are skipped" in caplog.text
    short = dataclasses.replace(reading, input_length=5)
    with pytest.raises(UserError, match=r"none of 100 examples fits a row of one arm \(64 \+ 64 or 5 \+ 64 slots\)"):
        open_training(config_of(pairs(folder), Supervised(), joint=(short,)), tokenizer, tmp_path, Host()).batch(0)


# --- Configs


@pytest.mark.parametrize(
    ("objective", "reading", "message"),
    [
        (PrefixLM(), Reading(objective=UL2()), "joint: objective 'ul2' cuts the text anew for each of its parts"),
        (UL2(), Reading(objective=PrefixLM()), "joint: objective 'ul2' cuts .* the same examples as prefix_lm"),
        (
            PrefixLM(complementary=True),
            Reading(objective=CausalLM()),
            "joint: complementary pairs need pieces of equal length, but 'causal_lm' reads records",
        ),
        (PrefixLM(), Reading(objective=Supervised()), r"joint\[0\]: objective 'supervised' reads inputs and targets"),
        (PrefixLM(), Reading(objective=FullLM()), r"joint\[0\]: input_length is 64, but full_lm has no inputs"),
        (PrefixLM(), Reading(objective=SpanCorruption(), target_length=5), r"joint\[0\]: target_length is 5"),
    ],
)
def test_readings_that_cannot_be_joint_are_refused(objective: Any, reading: Reading, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(text(Path("x")), objective, joint=(reading,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "text:other.{split}.txt"}, "must read the records of source: name is 'text:other"),
        ({"train_split": "train[:50%]"}, "train_split is 'train.:50%.', not 'train'"),
        ({"strict": True}, "strict is True, not False"),
        ({"text": "body"}, "text is 'body', not 'text'"),
    ],
)
def test_readings_of_other_records_are_refused(change: dict[str, Any], message: str) -> None:
    source = text(Path("x"))
    reading = Reading(objective=SpanCorruption(), source=dataclasses.replace(source, **change))
    with pytest.raises(UserError, match=message):
        config_of(source, PrefixLM(), joint=(reading,))
    mixed = SourceMixture(parts=(source, source))
    assert isinstance(reading.source, SourceConfig)
    changed = dataclasses.replace(reading, source=SourceMixture(parts=(source, reading.source)))
    with pytest.raises(UserError, match="parts.1.: " + message.rpartition(": ")[2]):
        config_of(mixed, PrefixLM(), joint=(changed,))
    for other in (source, SourceMixture(parts=(source,)), dataclasses.replace(mixed, by=ByRate(rates=(1.0, 2.0)))):
        with pytest.raises(UserError, match="it has other parts|its parts have other rates"):
            config_of(mixed, PrefixLM(), joint=(Reading(objective=PrefixLM(), source=other),))


def test_held_out_splits_by_other_fields_are_refused() -> None:
    source = SourceConfig(name="jsonl:a.jsonl", inputs="a", targets="b", held_out=0.1)
    other = dataclasses.replace(source, inputs=None, targets=None, text="b")
    with pytest.raises(UserError, match="held_out divides by text, not by inputs"):
        config_of(source, Supervised(), joint=(Reading(objective=CausalLM(), source=other),))


def test_without_other_arms_nothing_changes(folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    """An arm may name itself; a config of an earlier version has no `joint`, and no identity changes."""
    config = config_of(text(folder), UL2())
    itself = dataclasses.replace(config, joint=(Reading(objective=UL2()),))
    assert itself.arms() == config.arms() == (config,)
    one, other = (open_training(each, tokenizer, tmp_path, Host()) for each in (config, itself))
    assert one.content == other.content and same(one.batch(3), other.batch(3))
    assert "joint" not in without_defaults(config)
    earlier = {name: value for name, value in to_json(config).items() if name != "joint"}
    assert from_earlier_json(DataConfig, earlier) == config


def test_readings_come_back_from_json_and_follow_overrides() -> None:
    config = config_of(text(Path("x")), PrefixLM(), joint=(Reading(objective=SpanCorruption(), input_length=70),))
    assert from_json(DataConfig, json.loads(json.dumps(to_json(config)))) == config
    changed = apply_overrides(
        config, ["rows=4", "seed=7", "target_length=80", "source.name=text:y", "joint.0.objective.density=0.5"]
    )
    assert [(arm.rows, arm.seed, arm.source.name) for arm in changed.arms()] == [(4, 7, "text:y")] * 2
    assert [(arm.input_length, arm.target_length) for arm in changed.arms()] == [(64, 80), (70, 80)]
