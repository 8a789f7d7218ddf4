"""From a config to batches: the stream follows from the config alone, whoever reads it and however often it resumes."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data import examples as examples_module
from common.data import packing
from common.data.batch import HostBatch
from common.data.config import BytePairConfig, DataConfig, SentencePieceConfig
from common.data.loader import Loader
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
    raw_parts,
)
from common.data.sources.config import ByRate, BySize, SourceConfig, SourceMixture, Stage, Template
from common.data.streams import (
    Host,
    StagedLoader,
    open_records,
    open_tokenizer_of,
    open_training,
    open_training_text,
    open_validation,
)
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
from common.errors import UserError

LINES = [" ".join(f"{n} is {n + 1} less one" for n in range(i % 9)) + f" end {i}" for i in range(300)]
ROWS, SLOTS = 8, 64


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_model(LINES, SentencePieceConfig(vocab_size=277)), sentinels=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split, lines in (("train", LINES), ("validation", LINES[:40])):
        (folder / f"lines.{split}.txt").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"few.{split}.txt").write_text("".join(f"other words {n} here\n" for n in range(20)))
        rows = [json.dumps({"a": str(n), "b": f"it is {n}", "label": n % 2}) for n in range(100)]
        (folder / f"pairs.{split}.jsonl").write_text("\n".join(rows))
    return folder


def text(folder: Path, name: str = "lines") -> SourceConfig:
    return SourceConfig(name=f"text:{folder}/{name}.{{split}}.txt", inputs=None, targets=None, text="text")


def pairs(folder: Path, *templates: Template) -> SourceConfig:
    fields: dict[str, Any] = {"inputs": None, "targets": None} if templates else {"inputs": "a", "targets": "b"}
    return SourceConfig(name=f"jsonl:{folder}/pairs.{{split}}.jsonl", templates=templates, **fields)


def config_of(source: SourceConfig | SourceMixture, objective: Objective, **change: Any) -> DataConfig:
    given = {"rows": ROWS, "input_length": SLOTS, "target_length": SLOTS, "seed": 1, **change}
    return DataConfig(source=source, objective=objective, tokenizer=SentencePieceConfig(path="given"), **given)


def digest(*batches: HostBatch) -> str:
    arrays = [getattr(each.batch, field.name) for each in batches for field in dataclasses.fields(each.batch)]
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()


def mixture(folder: Path, **change: Any) -> SourceMixture:
    return SourceMixture(parts=(text(folder), text(folder, "few")), **change)


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


@streams
@pytest.mark.parametrize("small_memory", [False, True])
def test_the_stream_is_the_same_for_any_hosts_workers_and_resume(
    folder: Path,
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    small_memory: bool,
) -> None:
    """1, 2 and 8 hosts, 0 to 3 threads, from the beginning or from any step, planned whole or window by window."""
    if small_memory:
        monkeypatch.setattr(examples_module, "PLANNED_TOGETHER", 10)
        monkeypatch.setattr(examples_module, "WINDOW", 16)
        monkeypatch.setattr(examples_module, "MIXED_WINDOW", 24)
        monkeypatch.setattr(examples_module.MixedExamples, "window", 24)
    config, steps = STREAMS[name](folder), 9

    def stream(host: Host) -> Loader | StagedLoader:
        return open_training(config, tokenizer, tmp_path, host)

    alone = stream(Host())
    whole = [alone.batch(step) for step in range(steps)]
    assert len({each.fingerprint for each in whole}) == steps, "no step repeats another"
    for count in (2, 8):
        hosts = [stream(Host(share.tolist())) for share in np.split(np.arange(ROWS), count)]
        for step in (7, 0, 4):  # any order, and each host on its own
            shares = [host.batch(step) for host in hosts]
            assert all(len(share.batch.inputs_BI) == ROWS // count for share in shares)
            for field in dataclasses.fields(shares[0].batch):
                joined = np.concatenate([getattr(share.batch, field.name) for share in shares])
                np.testing.assert_array_equal(joined, getattr(whole[step].batch, field.name))
            assert sum(share.fingerprint for share in shares) % 2**128 == whole[step].fingerprint
    for threads, start in ((0, 0), (1, 4), (3, 2), (3, 8)):
        resumed = list(stream(Host()).iterate(start, steps, threads=threads, buffered=2))
        assert digest(*resumed) == digest(*whole[start:])
        assert [each.fingerprint for each in resumed] == [each.fingerprint for each in whole[start:]]


def windows_of(stream: Loader | StagedLoader, step: int) -> int:
    """How many windows lie between the row before a step and its last row."""
    if isinstance(stream, StagedLoader):
        stage = stream._stage(step)
        stream, step = stream._loader(stage), step - stream._first_steps[stage]
    first, last = (stream._plans.locate(row)[0] for row in (max(0, step * ROWS - 1), step * ROWS + ROWS - 1))
    return last - first + 1


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "PLANNED_TOGETHER", 10)
    monkeypatch.setattr(examples_module, "WINDOW", 16)
    monkeypatch.setattr(examples_module.MixedExamples, "window", 24)


@streams
@pytest.mark.usefixtures("small_windows")
def test_a_stream_is_read_on_without_planning_what_lies_before(
    folder: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, planned = STREAMS[name](folder), []
    plan_epoch = packing.plan_epoch

    def counted(*lengths: np.ndarray, epoch: int, **limits: int) -> packing.PackingPlan:
        planned.append(epoch)
        return plan_epoch(*lengths, epoch=epoch, **limits)

    monkeypatch.setattr(packing, "plan_epoch", counted)

    def stream(place: str) -> Loader | StagedLoader:
        (tmp_path / place).mkdir()
        if place != "before":  # tokens are there, plans are not
            (tmp_path / place / "tokenized").symlink_to(tmp_path / "before" / "tokenized")
        return open_training(config, tokenizer, tmp_path / place, Host())

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
    assert step > 20, "all stages were gone through"
    first = seen[: len(LINES) - 30]
    assert len(set(first)) == len(first), "none came twice"
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


def test_documents_end_with_eos_in_a_language_model_alone(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    config = config_of(text(folder), FullLM(), input_length=0, rows=1)
    found: dict[int, list[int]] = {}
    loader = open_training(config, tokenizer, tmp_path, Host())
    assert isinstance(loader, Loader)
    step = 0
    while loader.read(step + 1)[0] == loader.read(1)[0]:
        number = int(loader._plans.row(step)[0])
        found[number] = loader.batch(step).batch.targets_BT[0].tolist()
        step += 1
    expected = [token for line in LINES for token in [*tokenizer.encode(line).tolist(), 1]]
    together = [token for number in sorted(found) for token in found[number]]
    assert together[: len(expected)] == expected


def test_ul2s_modes_come_at_their_rates(folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    config = config_of(text(folder), UL2())
    loader = open_training(config, tokenizer, tmp_path, Host())
    names = {part.mode: tokenizer.encode(part.mode).tolist() for part in raw_parts(UL2())}
    assert isinstance(loader, Loader)
    seen: Counter[str] = Counter()
    for made in loader._examples.make(np.arange(1000)):
        inputs = made.inputs_I.tolist()
        seen[next(mode for mode, ids in names.items() if inputs[: len(ids)] == ids)] += 1
    for mode, rate in (("[NLU]", 0.33), ("[S2S]", 0.34), ("[NLG]", 0.33)):
        assert abs(seen[mode] - 1000 * rate) < 6


@pytest.mark.parametrize("objective", [UL2(), UL2R()], ids=["ul2", "ul2r"])
@pytest.mark.parametrize(
    "how",
    [SentencePieceConfig(vocab_size=300, sentinels=20, model_type="bpe"), BytePairConfig(vocab_size=300, sentinels=20)],
)
def test_a_mode_is_one_token_of_a_trained_tokenizer(
    folder: Path, tmp_path: Path, objective: Objective, how: SentencePieceConfig | BytePairConfig
) -> None:
    config = dataclasses.replace(config_of(text(folder), objective), tokenizer=how)
    source = open_training_text(config, tmp_path)
    trained = open_tokenizer_of(config, source, tmp_path)
    assert sorted(trained.modes.values()) == [3, 4, 5] and trained.vocab_size == 300
    loader = open_training(config, trained, tmp_path, Host())
    assert isinstance(loader, Loader)
    plain = open_tokenizer_of(dataclasses.replace(config, objective=SpanCorruption()), source, tmp_path)
    assert plain.modes == {} and plain.content_hash != trained.content_hash
    for made in loader._examples.make(np.arange(50)):
        assert 3 <= made.inputs_I[0] <= 5 and not np.isin([*made.inputs_I[1:], *made.targets_T], [3, 4, 5]).any()
    for mode, token in trained.modes.items():
        assert not np.isin(trained.encode(f"{mode} 1 is"), [3, 4, 5]).any(), "a text is a text"
        assert trained.decode(trained.encode(f"{mode} 1 is")) == f"{mode} 1 is"
        prompt = trained.encode_with_sentinels(f"{mode} 1 is <extra_id_0> less").tolist()
        assert prompt == [token, *trained.encode_with_sentinels("1 is <extra_id_0> less")]
    assert not np.isin(trained.ordinary_ids, [0, 1, 2, 3, 4, 5]).any()


def test_templates_put_records_in_words(folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
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
    """Each source by its own templates; validation at the same rates; the tests of each on their own."""
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


def test_a_label_without_a_word_is_left_out_and_named(
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


def parts_in(batch: HostBatch, tokenizer: SentencePieceTokenizer) -> Counter[bool]:
    """Of each packed example, whether it is from the source of few words."""
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


def test_temperature_raises_the_share_of_the_small(
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
    """Wherever its rate is positive, also in a later stage of a curriculum."""
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


def test_random_tokens_of_bert_style_are_ordinary_ones(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    """Neither special nor sentinels, and all others alike."""
    loader = open_training(config_of(text(folder), BertStyle(random_share=1.0)), tokenizer, tmp_path, Host())
    assert isinstance(loader, Loader)
    texts = [made.inputs_I[:-1] for made in loader._examples.make(np.arange(4000))]
    seen = np.concatenate([inputs[inputs != tokenizer.sentinel_id(0)] for inputs in texts])
    assert seen.min() == 3 and seen.max() == tokenizer.pieces - 1
    assert tokenizer.ordinary_ids.tolist() == list(range(3, tokenizer.pieces))


def test_tokens_are_shared_by_objectives(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for objective in (SpanCorruption(), PrefixLM(), UL2(), BertStyle()):
        open_training(config_of(text(folder), objective), tokenizer, tmp_path, Host())
    assert len(list((tmp_path / "tokenized").glob("[!.]*"))) == 1
    open_training(config_of(text(folder), FullLM(), input_length=0), tokenizer, tmp_path, Host())
    assert len(list((tmp_path / "tokenized").glob("[!.]*"))) == 2


def test_a_tokenizer_with_too_few_sentinels_is_refused(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    few = SentencePieceTokenizer(tokenizer.serialized(), sentinels=1)
    with pytest.raises(UserError, match="needs 3 sentinels, tokenizer.sentinels is 1; nearest: 3"):
        open_training(config_of(text(folder), SpanCorruption()), few, tmp_path, Host())


def test_a_tokenizer_is_trained_on_all_parts(folder: Path, tmp_path: Path) -> None:
    config = config_of(mixture(folder), SpanCorruption())
    trained = dataclasses.replace(config, tokenizer=SentencePieceConfig(sentinels=100))
    source = open_training_text(trained, tmp_path)
    assert len(source) == 320
    assert [source[i]["text"] for i in (0, 299, 300)] == [LINES[0], LINES[299], "other words 0 here"]
    assert [record["text"] for record in source.read([301, 5, 6])] == ["other words 1 here", *LINES[5:7]]  # type: ignore[index]
    with pytest.raises(IndexError):
        source[320]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda f: mixture(f, by=ByRate(rates=(1.0,))), "there are 1 rates \\[1.0\\], but 2 parts"),
        (lambda f: mixture(f, by=ByRate(rates=(0.0, 0.0))), "mixture of nothing"),
        (lambda f: mixture(f, by=BySize(temperature=0.0)), "temperature is 0.0"),
        (lambda f: mixture(f, by=BySize(cap=0)), "cap is 0"),
        (lambda f: mixture(f, curriculum=(Stage(from_step=0, rates=(1.0, 1.0)),)), "must ascend from 1 on"),
        (lambda f: mixture(f, curriculum=(Stage(from_step=2, rates=(0.0, 0.0)),)), "mixture of nothing"),
        (lambda f: SourceMixture(parts=()), "a mixture needs at least one part"),
        (lambda f: Template(inputs="{a.b}", targets="x"), "must be a field's name alone"),
        (lambda f: Template(inputs="{0}", targets="x"), "must be a field's name alone"),
        (lambda f: Template(inputs="{a!r}", targets="x"), "must be a field's name alone"),
        (lambda f: Template(inputs="{a", targets="x"), "template '{a'"),
        (lambda f: config_of(mixture(f), PrefixLM(complementary=True)), "cannot come from a mixture"),
        (lambda f: config_of(mixture(f), Supervised()), "reads inputs and targets"),
    ],
)
def test_what_cannot_work_is_refused_at_once(folder: Path, wrong: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrong(folder)
