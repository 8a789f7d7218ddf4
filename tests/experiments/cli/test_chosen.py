"""Overrides and selections on the command line: what is a field of the study, of every arm, of some, or a label."""

import dataclasses
import json
from pathlib import Path

import pytest

from common.config import to_json
from common.errors import UserError
from common.train import run_dir as rd
from experiments import find
from experiments.cli.chosen import Chosen, choose, study_directory
from experiments.cli.main import main
from experiments.run import After, Run
from experiments.running.study_folder import StudyFolder
from experiments.study import Study
from tests.experiments.tiny_study import tiny_run, tiny_study


def of_width(family: str, width: int) -> Run:
    run = tiny_run(Path("/data"), family)
    return dataclasses.replace(run, labels={"family": family, "width": width})


STUDY = dataclasses.replace(
    tiny_study(Path("/data")),
    arms={f"{family}-{width}": of_width(family, width) for family in ("gpt", "t5like") for width in (64, 128)},
)


@pytest.fixture(autouse=True)
def only_this_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(find, "OWN", ("tiny",))
    monkeypatch.setattr(find, "load", lambda name: STUDY)
    monkeypatch.chdir(tmp_path)


def chosen(*overrides: str) -> Chosen:
    return choose("tiny", overrides)


def rates(study: Study) -> list[float]:
    return [run.learning_rate for run in study.arms.values()]


class TestOverrides:
    def test_a_field_of_the_study(self) -> None:
        assert chosen("seeds=5", "question=a = b").study == dataclasses.replace(STUDY, seeds=5, question="a = b")
        search = chosen('search={"rates": [0.001, 0.002]}').study.search
        assert search is not None and search.rates == (1e-3, 2e-3)

    def test_a_field_of_every_arm(self) -> None:
        study = chosen("train.seed=7").study
        assert study == STUDY.edited(lambda run: dataclasses.replace(run, train=dataclasses.replace(run.train, seed=7)))

    @pytest.mark.parametrize(
        ("pattern", "changed"),
        [
            ("gpt-64", [1, 0, 0, 0]),
            ("gpt*", [1, 1, 0, 0]),
            ("*-128", [0, 1, 0, 1]),
            ("*", [1, 1, 1, 1]),
            ("[a-h]*", [1, 1, 0, 0]),
        ],
    )
    def test_a_field_of_the_arms_that_match(self, pattern: str, changed: list[int]) -> None:
        expected = [1.0 if one else 1e-2 for one in changed]
        assert rates(chosen(f"arms.{pattern}.learning_rate=1").study) == expected

    def test_later_overrides_win(self) -> None:
        assert rates(chosen("learning_rate=1", "arms.gpt*.learning_rate=2").study) == [2, 2, 1, 1]
        assert rates(chosen("arms.gpt*.learning_rate=2", "learning_rate=1").study) == [1, 1, 1, 1]

    def test_a_value_may_look_like_a_path(self) -> None:
        study = chosen("arms.gpt*.about=arms.gpt*.about=x").study
        assert study.arms["gpt-128"].about == "arms.gpt*.about=x" and study.arms["t5like-64"].about == ""

    def test_all_arms_at_once(self) -> None:
        one = {"only": to_json(STUDY.arms["gpt-64"])}
        assert list(chosen(f"arms={json.dumps(one)}").study.arms) == ["only"]


class TestSelections:
    @pytest.mark.parametrize(
        ("words", "arms"),
        [
            ("", ["gpt-64", "gpt-128", "t5like-64", "t5like-128"]),
            ("family=gpt", ["gpt-64", "gpt-128"]),
            ("family=gpt,t5like width=64", ["gpt-64", "t5like-64"]),
            ("width=1*", ["gpt-128", "t5like-128"]),
            ("arm=gpt-64,*-128", ["gpt-64", "gpt-128", "t5like-128"]),
        ],
    )
    def test_arms_are_selected_by_label(self, words: str, arms: list[str]) -> None:
        found = chosen(*words.split())
        assert list(found.arms) == list(found.selected.arms) == arms
        assert found.study == STUDY, "the others stay in the study, which is one directory"

    def test_overrides_change_arms_that_are_not_selected_too(self) -> None:
        found = chosen("family=gpt", "learning_rate=1")
        assert rates(found.study) == [1, 1, 1, 1] and list(found.arms) == ["gpt-64", "gpt-128"]
        assert found.overrides == ("family=gpt", "learning_rate=1")

    def test_an_arm_that_starts_from_another_brings_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        later = dataclasses.replace(STUDY.arms["gpt-64"], after=After(arm="t5like-64"), labels={"family": "later"})
        study = dataclasses.replace(STUDY, arms={**STUDY.arms, "later": later})
        monkeypatch.setattr(find, "load", lambda name: study)
        assert chosen("family=later").arms == ("t5like-64", "later")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seds=3", "unknown field 'seds': did you mean 'seeds'?"),
        ("famly=gpt", "unknown field 'famly': did you mean 'family'?"),
        ("trian.seed=3", "unknown field 'trian': did you mean 'train'?"),
        ("family.size=3", "unknown field 'family'"),
        ("train.sed=3", "unknown field 'sed' in arms.gpt-64.train: did you mean 'seed'?"),
        ("arms.gpt.learning_rate=3", "unknown arm 'gpt' in arms: did you mean 'gpt-64'?"),
        ("arms.x*.learning_rate=3", "unknown arm 'x*' in arms"),
        ("arms.gpt*.learning_rat=3", "unknown field 'learning_rat' in arms.gpt-64: did you mean 'learning_rate'?"),
        ("family=llama", "no arm has family=llama; there are family=gpt,t5like"),
        ("width=256", "no arm has width=256; there are width=128,64"),
        ("seeds", "'seeds' is not an override; valid: path.to.field=value"),
        ("arms..learning_rate=3", "'arms..learning_rate=3' is not an override"),
        ("learning_rate=0", "arms.gpt-64: learning_rate is 0.0: it must be more than 0"),
    ],
)
def test_mistakes_name_the_nearest_choice(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen(override)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


class TestConfigFiles:
    def printed(self, capsys: pytest.CaptureFixture[str], *overrides: str) -> Path:
        assert main(["run", "tiny", "--print-config", *overrides]) == 0
        Path("config.json").write_text(capsys.readouterr().out)
        return Path("config.json")

    def test_what_was_printed_is_the_same_study(self, capsys: pytest.CaptureFixture[str]) -> None:
        overrides = ("seeds=3", "arms.gpt*.learning_rate=1", "question=größer?", "family=gpt")
        file = self.printed(capsys, *overrides)
        assert choose("tiny", (), config=file).study == chosen(*overrides).study

    def test_overrides_change_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        file = self.printed(capsys, "learning_rate=1")
        found = choose("tiny", ("arms.gpt*.learning_rate=2", "width=64"), config=file)
        assert rates(found.study) == [2, 2, 1, 1] and found.arms == ("gpt-64", "t5like-64")

    def test_a_studys_directory_holds_one_too(self) -> None:
        Path("study.json").write_text(json.dumps(rd.described(to_json(STUDY))))
        assert choose("tiny", (), config=Path("study.json")).study == STUDY
        earlier = json.loads(Path("study.json").read_text())
        del earlier["factors"]  # as an earlier version wrote it, which had no such field
        Path("study.json").write_text(json.dumps(earlier))
        assert choose("tiny", (), config=Path("study.json")).study == STUDY

    def test_it_is_read_strictly(self, capsys: pytest.CaptureFixture[str]) -> None:
        file = self.printed(capsys)
        file.write_text(file.read_text().replace('"seeds"', '"seds"'))
        with pytest.raises(UserError, match="config.json: unknown field 'seds': did you mean 'seeds'"):
            choose("tiny", (), config=file)


def test_the_directory_is_named_after_the_study(tmp_path: Path) -> None:
    assert study_directory("tiny", None) == Path("runs/tiny")
    assert study_directory("mine/my_study.py", None) == Path("runs/my_study")
    assert study_directory("tiny", tmp_path / "there") == tmp_path / "there"


class TestRuns:
    def test_a_selection_by_name_keeps_the_study_and_its_arms(self) -> None:
        found = chosen("run=gpt-64-s1,t5like*", "seeds=2")
        assert found.runs == ("gpt-64-s1", "t5like*") and found.arms == tuple(STUDY.arms)
        assert found.study == dataclasses.replace(STUDY, seeds=2)
        assert chosen().runs == ()

    def test_an_arm_cannot_have_the_label(self) -> None:
        labelled = dataclasses.replace(tiny_run(Path("/data")), labels={"run": "first"})
        with pytest.raises(UserError, match="'run', which every run gets by itself"):
            dataclasses.replace(STUDY, arms={"gpt": labelled})

    def test_the_wanted_runs_are_those_named_and_those_that_they_start_from(self, tmp_path: Path) -> None:
        tuned = dataclasses.replace(tiny_run(Path("/data")), after=After(arm="gpt-64"))
        study = dataclasses.replace(STUDY, arms={**STUDY.arms, "tuned": tuned}, seeds=2)
        folder = StudyFolder(tmp_path, study, runs=("tuned-s1", "t5like-64*"))
        names = [member.name for member in folder.wanted(tuple(study.arms))]
        assert names == ["gpt-64-s1", "t5like-64", "t5like-64-s1", "tuned-s1"]
        assert [member.name for member in folder.wanted(["t5like-64"])] == ["t5like-64", "t5like-64-s1"]
        assert len(StudyFolder(tmp_path, study).wanted(tuple(study.arms))) == 10

    def test_a_name_that_no_run_has(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no run has run=gtp-64: did you mean 'gpt-64'?"):
            StudyFolder(tmp_path, STUDY, runs=("gtp-64",)).wanted(tuple(STUDY.arms))
