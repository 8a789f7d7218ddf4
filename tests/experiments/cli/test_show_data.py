"""`twinstack data show`: how rows of training data are printed."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from common.data.config import BytePairConfig, SentencePieceConfig
from common.data.objectives.config import SpanCorruption
from common.data.sources.config import SourceConfig
from experiments.cli.main import main
from experiments.cli.show_data import show
from experiments.study import Study
from tests.experiments.tiny_study import tiny_study, with_data, with_evaluation, with_model, write_data

AS_TEXT = ("data.source.inputs=null", "data.source.targets=null", "data.source.text=en")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    write_data(tmp_path)
    return tiny_study(tmp_path)


def shown(study: Study, rows: int = 1, arm: str = "gpt") -> str:
    out = io.StringIO()
    show(study, arm, rows, Console(file=out, width=300))
    return out.getvalue()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("│")]


def test_slots_of_both_families_tile_their_rows(study: Study) -> None:
    text = shown(study)
    encoder, decoder, only = (
        [cells(line) for line in part.splitlines() if line.startswith("│")]
        for part in text.split("encoder of an")[1].replace("decoder-only", "its decoder").split("its decoder")
    )
    for lines, length in ((encoder, 24), (decoder, 24), (only, 48)):
        slots = [int(end) for line in lines if line[0] for end in (line[0].split("-") * 2)[:2]]
        assert slots[0] == 0 and slots[-1] == length - 1
        assert all(b == a + 1 for a, b in zip(slots[1:-1:2], slots[2::2], strict=True))
    assert [line[3] for line in only] == [line[3] for line in (*encoder, *decoder)] or "empty" in text
    predicting = [line for line in decoder if line[1] != "empty"]
    assert all(line[3].startswith("⟨start⟩|") and line[4].endswith("|⟨eos⟩") for line in predicting)
    assert all(line[3].removeprefix("⟨start⟩|") == line[4].removesuffix("|⟨eos⟩") for line in predicting)
    counts = [line[5].split(" of ") for line in predicting]
    assert all(loss == slots for loss, slots in counts)


def test_target_positions_continue_from_input_positions(study: Study) -> None:
    only = shown(study).split("decoder-only")[1]
    lines = [cells(line) for line in only.splitlines() if line.startswith("│") and "empty" not in line]
    inputs = {line[1]: line[2] for line in lines if not line[4]}
    for line in lines:
        if line[4] and line[1] in inputs:
            assert int(line[2].split("-")[0]) == int(inputs[line[1]].split("-")[-1]) + 1


def test_rows_of_several_batches(study: Study) -> None:
    assert shown(study, 6).count("decoder-only") == 6


def test_an_arm_with_other_rows_is_shown_by_name(study: Study) -> None:
    """Its FLOPs are of its own rows, and only the arms that read these are listed."""
    short = with_data(study.arms["gpt"], input_length=20, target_length=20)
    study = dataclasses.replace(study, arms={**study.arms, "short": short})
    text = shown(study, arm="short")
    assert "rows of 20 + 20 slots; 1 arm reads them, and 2 others read other rows: arm=NAME shows those" in text
    assert "FLOPs of short" in text and "FLOPs of gpt" not in text
    assert "rows of 24 + 24 slots; 2 arms read them, and 1 other reads other rows" in shown(study, arm="t5like")


def test_text_with_sentinels_and_markup(tmp_path: Path, study: Study) -> None:
    """Text is shown unchanged: square brackets are no markup."""
    lines = [
        json.dumps({"text": f"one [red]two[/red] three four five six seven {n} eight nine ten"}) for n in range(60)
    ]
    for split in ("train", "validation"):
        (tmp_path / f"raw_{split}.jsonl").write_text("\n".join(lines) + "\n")
    study = study.edited(lambda run: with_evaluation(run, splits=())).edited(
        lambda run: with_data(
            run,
            source=SourceConfig(name=f"jsonl:{tmp_path}/raw_{{split}}.jsonl", inputs=None, targets=None, text="text"),
            tokenizer=SentencePieceConfig(vocab_size=42, sentinels=4, byte_fallback=False, character_coverage=1.0),
            objective=SpanCorruption(),
        )
    )
    text = shown(study)
    assert "span_corruption" in text and "⟨0⟩" in text and "[red]" in text


@pytest.mark.parametrize(
    ("kind", "lengths", "marks"),
    [
        ("span_corruption", (64, 64), ["⟨0⟩", "⟨1⟩"]),
        ("iid_denoising", (64, 64), ["⟨0⟩", "⟨1⟩"]),
        ("bert_style", (64, 64), ["⟨0⟩"]),
        ("deshuffling", (64, 64), []),
        ("prefix_lm", (64, 64), []),
        ("full_lm", (0, 64), []),
        ("ul2", (64, 64), ["[NLU]", "[S2S]", "[NLG]"]),
        ("ul2r", (64, 64), ["[NLU]", "[S2S]", "[NLG]"]),
    ],
)
def test_objectives_of_t5_and_ul2_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, lengths: tuple[int, int], marks: list[str]
) -> None:
    """Each objective shows its own sentinels or mode tokens."""
    words = "one two three four five six seven eight nine ten".split()
    for split in ("train", "validation"):
        lines = [" ".join(words[(n * k) % 10] for k in range(1, 40)) for n in range(1, 60)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    overrides = [
        f"data.source.name=text:{tmp_path}/{{split}}.txt",
        f"data.objective.kind={kind}",
        f"data.input_length={lengths[0]}",
        f"data.target_length={lengths[1]}",
        "data.tokenizer.vocab_size=310",
        "data.tokenizer.sentinels=32",
    ]
    assert main(["data", "show", "pydocs", "--rows", "16", *overrides]) == 0
    shown = capsys.readouterr().out
    assert f"objective {kind}" in shown and "FLOPs of t5like" in shown
    assert all(mark in shown for mark in marks)
    assert kind not in ("deshuffling", "prefix_lm", "full_lm") or "⟨0⟩" not in shown


def test_a_joint_plan_names_the_other_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("".join(f"one two {n} four five six {n}\n" for n in range(200)))
    overrides = [
        f"data.source.name=text:{tmp_path}/{{split}}.txt",
        *("data.objective.kind=prefix_lm", "data.input_length=64", "data.target_length=64"),
        *("data.tokenizer.vocab_size=292", "data.tokenizer.sentinels=10"),
        'data.joint=[{"objective": {"kind": "span_corruption"}, "input_length": 60}]',
    ]
    assert main(["data", "show", "pydocs", "--rows", "1", *overrides]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "rows hold only what fits those of span_corruption (60 + 64) too" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shw", "first_light"], "unknown action 'shw': did you mean 'show'?"),
        (["show", "first_ligt"], "did you mean 'first_light'?"),
        (["show", "first_light", "--rows", "0"], "--rows is 0: it must be 1 or more"),
        (["show", "first_light", "data.objective.kind=span_corruption"], "reads text"),
        (["show", "first_light", *AS_TEXT, "data.objective.kind=causal_lm"], "nearest: evaluation.splits=[]"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_control_characters_and_markup_in_data_are_escaped(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07 [red]one[/blue] \x9b2J \u202etwo"
    for split in ("train", "validation"):
        lines = [json.dumps({"en": f"{evil} {i}", "reversed": evil}) + "\n" for i in range(40)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    study = tiny_study(tmp_path).edited(lambda run: with_model(run, vocab_size=384))
    study = study.edited(
        lambda run: with_data(run, tokenizer=BytePairConfig(vocab_size=275), input_length=96, target_length=96)
    )
    arms = {f"[bold]{name}": run for name, run in study.arms.items()}
    text = shown(dataclasses.replace(study, arms=arms), arm="[bold]gpt")
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)
    examples = text.partition("\nexamples")[2].partition("encoder of an")[0]
    assert r"\u001b]0;owned\u0007 [red]one[/blue] \u009b2J \u202etwo" in examples
    assert "FLOPs of [bold]gpt" in text
