"""Streams of every objective: batches follow from the config alone, for any hosts, threads and restarts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data import examples as examples_module
from common.data import packing
from common.data.batch import HostBatch
from common.data.loader import Loader
from common.data.mixed_examples import MixedExamples
from common.data.objectives.config import (
    UL2,
    UL2R,
    BertStyle,
    CausalLM,
    Deshuffling,
    FullLM,
    IidDenoising,
    Objective,
    PrefixLM,
    SpanCorruption,
    Supervised,
)
from common.data.sources.config import ByRate, BySize, SourceConfig, Stage, Template
from common.data.staged_loader import StagedLoader
from common.data.streams import (
    Host,
    open_training,
    open_validation,
)
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from tests.common.data.stream_configs import LINES, ROWS, SLOTS, config_of, digest, mixture, pairs, text

STREAMS: dict[str, Any] = {
    "supervised": lambda folder: config_of(pairs(folder), Supervised()),
    "templates": lambda folder: config_of(pairs(folder, Template(inputs="{a}?", targets="{b}")), Supervised()),
    "documents": lambda folder: config_of(text(folder), CausalLM(), input_length=0, target_length=128),
    "full-lm": lambda folder: config_of(text(folder), FullLM(), input_length=0),
    "spans": lambda folder: config_of(text(folder), SpanCorruption()),
    "iid": lambda folder: config_of(text(folder), IidDenoising()),
    "bert": lambda folder: config_of(text(folder), BertStyle()),
    "deshuffling": lambda folder: config_of(text(folder), Deshuffling()),
    "prefix": lambda folder: config_of(text(folder), PrefixLM()),
    "pairs": lambda folder: config_of(text(folder), PrefixLM(complementary=True)),
    "ul2": lambda folder: config_of(text(folder), UL2()),
    "ul2r": lambda folder: config_of(text(folder), UL2R()),
    "by-size": lambda folder: config_of(mixture(folder, by=BySize(temperature=2.0)), SpanCorruption()),
    "curriculum": lambda folder: config_of(
        mixture(
            folder,
            by=ByRate(rates=(1.0, 0.0)),
            curriculum=(Stage(from_step=3, rates=(0.0, 1.0)), Stage(from_step=5, rates=(1.0, 1.0))),
        ),
        UL2(),
    ),
}
streams = pytest.mark.parametrize("name", STREAMS)


@pytest.mark.parametrize(
    ("name", "small_memory"),
    [
        pytest.param(name, small, marks=[] if (number + small) % 2 else pytest.mark.slow)  # each in one way
        for number, name in enumerate(STREAMS)
        for small in (False, True)
    ],
)
def test_the_stream_is_the_same_for_any_hosts_threads_and_restarts(
    folder: Path,
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    small_memory: bool,
) -> None:
    """With 1, 2 and 8 hosts and 0 to 3 threads, from the first or any step, planned whole or window by window."""
    if small_memory:
        monkeypatch.setattr(examples_module, "PLANNED_TOGETHER", 10)
        monkeypatch.setattr(examples_module, "WINDOW", 16)
        monkeypatch.setattr(MixedExamples, "window", 24)
    config, steps = STREAMS[name](folder), 9

    def stream(host: Host) -> Loader | StagedLoader:
        return open_training(config, tokenizer, tmp_path, host)

    alone = stream(Host())
    whole = [alone.batch(step) for step in range(steps)]
    assert len({each.fingerprint for each in whole}) == steps, "no step repeats another"
    assert len({each.source_fingerprint for each in whole}) == steps
    for count in (2, 8):
        hosts = [stream(Host(share.tolist())) for share in np.split(np.arange(ROWS), count)]
        for step in (7, 0, 4):  # any order, and each host on its own
            shares = [host.batch(step) for host in hosts]
            assert all(len(share.batch.inputs_BI) == ROWS // count for share in shares)
            for field in dataclasses.fields(shares[0].batch):
                joined = np.concatenate([getattr(share.batch, field.name) for share in shares])
                np.testing.assert_array_equal(joined, getattr(whole[step].batch, field.name))
            assert sum(share.fingerprint for share in shares) % 2**128 == whole[step].fingerprint
            assert sum(share.source_fingerprint for share in shares) % 2**128 == whole[step].source_fingerprint
    for threads, start in ((0, 0), (1, 4), (3, 2), (3, 8)):
        resumed = list(stream(Host()).iterate(start, steps, threads=threads, buffered=2))
        assert digest(*resumed) == digest(*whole[start:])
        for name in ("fingerprint", "source_fingerprint"):
            assert [getattr(each, name) for each in resumed] == [getattr(each, name) for each in whole[start:]]


def windows_of(stream: Loader | StagedLoader, step: int) -> int:
    """Counts the windows from the row before a step to the last row of the step."""
    if isinstance(stream, StagedLoader):
        stage = stream._stage(step)
        stream, step = stream._loader(stage), step - stream._first_steps[stage]
    first, last = (stream._plans.locate(row)[0] for row in (max(0, step * ROWS - 1), step * ROWS + ROWS - 1))
    return last - first + 1


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "PLANNED_TOGETHER", 10)
    monkeypatch.setattr(examples_module, "WINDOW", 16)
    monkeypatch.setattr(MixedExamples, "window", 24)


@streams
@pytest.mark.usefixtures("small_windows")
def test_a_stream_resumes_without_planning_earlier_windows(
    folder: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, planned = STREAMS[name](folder), []
    plan_epoch = packing.plan_epoch

    def counted(*lengths: np.ndarray, epoch: int, **limits: int) -> packing.PackingPlan:
        planned.append(epoch)
        return plan_epoch(*lengths, epoch=epoch, **limits)

    monkeypatch.setattr(packing, "plan_epoch", counted)

    def stream(cache: str) -> Loader | StagedLoader:
        (tmp_path / cache).mkdir()
        if cache != "before":  # it has tokens, but no plans
            (tmp_path / cache / "tokenized").symlink_to(tmp_path / "before" / "tokenized")
        return open_training(config, tokenizer, tmp_path / cache, Host())

    before = stream("before")
    stages = len(getattr(before, "_first_steps", [0]))
    whole = {step: before.batch(step).fingerprint for step in (0, 5, 39)}
    for step in (5, 39):
        landmarks = before.landmarks(step)
        assert landmarks == tuple(json.loads(json.dumps(landmarks)))
        after = stream(f"after {step}")
        after.recall(landmarks)
        planned.clear()
        assert after.batch(step).fingerprint == whole[step]
        assert len(planned) <= stages + windows_of(before, step), planned
        assert after.batch(0).fingerprint == whole[0]


@pytest.mark.usefixtures("small_windows")
def test_a_curriculum_reads_every_example_once_an_epoch(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    """However many of a window's rows a stage has come to."""
    rates = ((2, 0.1), (3, 0.0), (5, 0.3), (9, 0.0), (14, 0.2))
    stages = tuple(Stage(from_step=step, rates=(1.0, rate)) for step, rate in rates)
    source = mixture(folder, by=ByRate(rates=(1.0, 0.2)), curriculum=stages)
    config = config_of(source, CausalLM(), input_length=0, target_length=256, rows=2)
    loader = open_training(config, tokenizer, tmp_path, Host())
    seen: list[str] = []
    step = 0
    while len(seen) < len(LINES) + 30:  # a window of 24 may be open
        batch = loader.batch(step).batch
        for row, segments in zip(batch.targets_BT, batch.target_segments_BT, strict=True):
            texts = [tokenizer.decode(row[segments == segment].tolist()) for segment in range(1, segments.max() + 1)]
            seen += [text for text in texts if "end" in text]
        step += 1
    assert step > 20, "every stage was read"
    first = seen[: len(LINES) - 30]
    assert len(set(first)) == len(first), "no text twice"
    assert set(seen) == {line if line.startswith("0") else f" {line.strip()}" for line in LINES}, "none was dropped"


@streams
def test_rows_hold_what_their_objective_promises(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, name: str
) -> None:
    config = STREAMS[name](folder)
    for loader in (
        open_training(config, tokenizer, tmp_path, Host()),
        open_validation(config, tokenizer, tmp_path, Host()),
    ):
        made = loader.batch(0)
        assert made.examples > 0 and made.loss_tokens == int((made.batch.weights_BT > 0).sum()) > 0
        assert made.loss_tokens == int((made.batch.target_segments_BT > 0).sum())
    if name == "pairs":
        assert made.length_sums.inputs == made.length_sums.targets == ROWS * SLOTS, "no family has padding"
    if name == "full-lm":
        assert made.length_sums.targets == ROWS * SLOTS


def test_full_lm_joins_documents_with_eos(folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    config = config_of(text(folder), FullLM(), input_length=0, rows=1)
    found: dict[int, list[int]] = {}
    loader = open_training(config, tokenizer, tmp_path, Host())
    assert isinstance(loader, Loader)
    step = 0
    while loader.consumed(step + 1)[0] == loader.consumed(1)[0]:
        number = int(loader._plans.row(step)[0])
        found[number] = loader.batch(step).batch.targets_BT[0].tolist()
        step += 1
    expected = [token for line in LINES for token in [*tokenizer.encode(line).tolist(), 1]]
    together = [token for number in sorted(found) for token in found[number]]
    assert together[: len(expected)] == expected


def test_templates_and_fields_change_no_source_fingerprint(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    """Rows so long that any template packs the same examples; another file, split or slice differs."""

    def first(source: SourceConfig, objective: Objective) -> HostBatch:
        config = config_of(source, objective, rows=1, input_length=5000, target_length=5000)
        return open_training(config, tokenizer, tmp_path, Host()).batch(0)

    plain = pairs(folder)
    same = [
        first(plain, Supervised()),
        first(pairs(folder, Template(inputs="what is {a}? it is not {label}", targets="{b}")), Supervised()),
        first(
            pairs(folder, Template(inputs="{b}", targets="{a}"), Template(inputs="say {a}", targets="{b}{b}")),
            Supervised(),
        ),
        first(dataclasses.replace(plain, group="label"), Supervised()),
        first(dataclasses.replace(plain, inputs=None, targets=None, text="b"), CausalLM()),
    ]
    assert {made.examples for made in same} == {100}
    assert len({made.source_fingerprint for made in same}) == 1
    assert len({made.fingerprint for made in same}) == len(same) - 1  # a group is not read
    for change in ({"train_split": "validation"}, {"train_split": "train[:100]"}):
        assert (
            first(dataclasses.replace(plain, **change), Supervised()).source_fingerprint != same[0].source_fingerprint
        )
