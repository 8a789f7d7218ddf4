"""A study from the user's own files to the report; what is done is not done again."""

import csv
import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config import from_json, to_json
from common.errors import UserError
from common.files import read_json, write_rows
from common.report.certificate import certify
from common.report.results import ArmResult
from common.report.run_files import read_study
from common.train import run_dir as rd
from common.train.config import InitFrom
from common.train.loop import fit
from common.train.run_files import RunFiles, StudyFiles
from experiments.cli.main import main
from experiments.models.finding import find_model
from experiments.run import After, Run
from experiments.running import execute
from experiments.running.execute import StudyWorker
from experiments.running.pipeline import open_data
from experiments.running.study_folder import StudyFolder
from experiments.running.study_run import run_study
from experiments.study import Study
from tests.experiments.running.finished import STEPS, Done, worked
from tests.experiments.tiny_study import with_data, with_evaluation, with_train


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the steps that are trained, by the name of the run's directory."""
    counts: Counter[str] = Counter()

    def counted(task: Any, run_dir: Path, watcher: Any) -> Any:
        step = watcher.step

        def count(*row: Any) -> None:
            counts[run_dir.name] += 1
            step(*row)

        watcher.step = count
        return fit(task, run_dir, watcher)

    monkeypatch.setattr(execute, "fit", counted)
    return counts


# --- The whole path


def test_every_result_is_complete_before_its_audit(done: Done) -> None:
    runs = read_study(done.path)
    for whole, run in zip(done.before_the_audit, runs.runs, strict=True):
        found = from_json(ArmResult, whole)
        assert found.xla_flops_per_step is None and "ended before" in found.why_not_counted
        counted = {"xla_flops_per_step": run.result.xla_flops_per_step, "why_not_counted": ""}
        assert dataclasses.replace(found, **counted) == run.result


def test_what_the_files_hold(done: Done) -> None:
    runs = read_study(done.path)
    assert [run.name for run in runs.runs] == ["gpt", "t5like"] and runs.listed.complete and not runs.unfinished
    for run in runs.runs:
        assert run.result.steps == STEPS == len(run.metrics)
        assert run.result.validation_loss == run.metrics[-1].validation_loss
        assert run.result.flops.full_attention == run.metrics[-1].flops
        assert len(run.samples) == 8 == run.result.scores[0].examples
        assert 0 < run.result.target_fill <= 1 and run.result.flops.useful_full_attention > 0
        assert run.listed.labels == {"arm": run.name, "family": run.name, "seed": 0, "learning_rate": 1e-2}
    assert runs.runs[0].result.fingerprint == runs.runs[1].result.fingerprint
    checks = {check.name: check.agrees for check in certify(runs).checks}
    assert checks["ledger = XLA within 2 %"] and not checks["training FLOPs within 1 %"]  # these two are not matched
    assert from_json(Study, {k: v for k, v in read_json(done.path / "study.json").items() if k != "schema_version"})


def test_what_is_printed_without_a_terminal(done: Done) -> None:
    for name in ("gpt", "t5like"):
        steps = [f"{name}: {step}" for step in ("compiling", "decoding 8 examples of validation", "counting")]
        assert all(step in done.said for step in steps)
    assert done.said.count("validation: of 8 examples, the training data hold") == 1
    assert "<svg" in (done.path / StudyFiles.REPORT).read_text()


def test_commands_read_the_directory(done: Done, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(copied)]) == 0
    shown = capsys.readouterr().out
    assert "2 runs: 2 done" in shown and f"{STEPS} of {STEPS}" in shown
    page = (copied / StudyFiles.REPORT).read_bytes()
    (copied / StudyFiles.REPORT).unlink()
    assert main(["report", str(copied)]) == 0
    assert (copied / StudyFiles.REPORT).read_bytes() == page
    table = copied / "table.csv"
    assert main(["results", str(copied), "--out", str(table)]) == 0
    assert {"gpt", "t5like"} <= set(table.read_text().replace("\n", ",").split(","))
    assert main(["results", str(copied), "arm=t5*,none", "metric=loss", "--out", str(table)]) == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["arm"] for row in rows} == {"t5like"} and {row["metric"] for row in rows} == {"loss"}
    capsys.readouterr()
    for selection, error in (
        ("arms=gpt", "unknown column 'arms': did you mean 'arm'?"),
        ("arm=gtp", "no row has arm=gtp; arm is gpt, t5like"),
        ("gpt", "'gpt' selects no rows; valid: COLUMN=VALUE"),
    ):
        assert main(["results", str(copied), selection, "--out", str(table)]) == 2
        assert error in capsys.readouterr().err


# --- What is done is not done again


@pytest.mark.usefixtures("refused")
def test_finished_work_is_skipped(done: Done, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != RunFiles.WORKER}
    assert run_study(StudyFolder(copied, done.study), tuple(done.study.arms)) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: trained and scored already, step {STEPS}" in said for name in ("gpt", "t5like"))
    assert files == {path: path.read_bytes() for path in files}


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (RunFiles.SAMPLES, lambda text: "".join(text.splitlines(keepends=True)[:-1])),
        (RunFiles.METRICS, lambda text: ""),
        (RunFiles.RESULT, lambda text: json.dumps(json.loads(text) | {"made_from": "0"})),
        (RunFiles.RESULT, lambda text: json.dumps(json.loads(text) | {"steps": STEPS - 1})),
        (RunFiles.RESULT, lambda text: "{"),
    ],
    ids=["samples", "metrics", "another evaluation", "fewer steps", "cut"],
)
def test_incomplete_results_are_made_again(done: Done, copied: Path, name: str, damage: Any) -> None:
    path = copied / "gpt" / name
    path.write_text(damage(path.read_text()))
    assert worked(copied, done.study).failed == {"gpt": "AssertionError: work"}


@pytest.mark.usefixtures("refused")
def test_prose_and_labels_make_no_work(done: Done, copied: Path) -> None:
    """Nor do fields that today's version did not know when the run was trained; its config then gets them."""
    for name in done.study.arms:
        path = copied / name / RunFiles.CONFIG
        stored = json.loads(path.read_text())
        del stored["about"], stored["labels"], stored["after"], stored["evaluation"]
        del stored["train"]["anomalies"], stored["model"]["recipe"]["dropout"]
        path.write_text(json.dumps(stored))

    def reworded(run: Run) -> Run:
        watched = with_train(run, validate_every=7, checkpoint_every=2, keep_last=5)
        return dataclasses.replace(watched, about="Another sentence.", labels={"size": "tiny"})

    changed = dataclasses.replace(done.study.edited(reworded), name="renamed", expected="Something else.")
    outcome = worked(copied, changed)
    assert (outcome.trained, outcome.failed, outcome.waiting) == ([], {}, [])
    config = json.loads((copied / "gpt" / RunFiles.CONFIG).read_text())
    assert config["about"] == "Another sentence." and config["train"]["anomalies"] and "dropout" in str(config["model"])
    listed = json.loads((copied / StudyFiles.RUNS).read_text())["runs"]
    assert [row["labels"]["size"] for row in listed] == ["tiny", "tiny"]


@pytest.mark.usefixtures("refused")
def test_finished_runs_need_no_model_to_start_from(done: Done, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is checked in the directory of a run without a checkpoint, if the arm has one."""
    checked: dict[str, Path | None] = {}
    monkeypatch.setattr(execute, "check_initial", lambda name, run, run_dir: checked.update({name: run_dir}) or [])
    worked(copied, done.study)
    assert checked == {name: copied / name for name in done.study.arms}
    StudyWorker(
        StudyFolder(copied, dataclasses.replace(done.study, seeds=2)), Console(quiet=True), arms=["gpt"]
    ).check()
    assert checked["gpt"] == copied / "gpt-s1"


def test_additions_train_only_what_is_new(done: Done, copied: Path, steps: Counter[str]) -> None:
    """An evaluation, a label, a sentence, a seed, and an arm that starts from another one."""

    def more(run: Run) -> Run:
        labels = {**run.labels, "width": 16}
        return dataclasses.replace(with_evaluation(run, examples=4), labels=labels, about="Another sentence.")

    study = dataclasses.replace(done.study.edited(more), seeds=2)
    tuned = dataclasses.replace(study.arms["gpt"], after=After(arm="gpt"), learning_rate=1e-3)
    study = dataclasses.replace(study, arms={"tuned": tuned, **study.arms})
    outcome = worked(copied, study, "gpt", "tuned")
    assert steps == {"gpt-s1": STEPS, "tuned": STEPS, "tuned-s1": STEPS}
    assert outcome.trained == ["gpt", "gpt-s1", "tuned", "tuned-s1"] and not outcome.failed  # the first: scored only
    assert len((copied / "gpt" / RunFiles.SAMPLES).read_text().splitlines()) == 4
    for name, before in (("tuned", "gpt"), ("tuned-s1", "gpt-s1")):
        assert str(copied / before) in (copied / name / RunFiles.INITIAL).read_text()
    rows = [json.loads((copied / name / RunFiles.RESULT).read_text())["fingerprint"] for name in ("gpt", "gpt-s1")]
    assert rows[0] != rows[1], "another seed is another order of the data"
    again = worked(copied, study, "gpt", "tuned")
    assert (again.trained, again.failed) == ([], {}) and steps.total() == 3 * STEPS


@pytest.mark.slow  # trains a run; the rule itself is tested with the models that runs start from
def test_a_run_whose_initial_weights_were_replaced_is_another_run(
    done: Done, copied: Path, steps: Counter[str]
) -> None:
    source = copied / "gpt"
    tuned = dataclasses.replace(done.study.arms["gpt"], init=InitFrom(path=str(source)), learning_rate=1e-3)
    study = Study(name="tuned", question="Better?", arms={"tuned": tuned})
    path = copied.parent / "tuned"
    assert worked(path, study).trained == ["tuned"]
    environment = read_json(path / "tuned" / RunFiles.ENVIRONMENT)
    assert environment["initial_content"] == find_model(str(source)).parameters.content()
    assert worked(path, study).trained == []
    shutil.rmtree(source / RunFiles.CHECKPOINTS / str(STEPS))  # an earlier checkpoint is in its place now
    with pytest.raises(UserError, match="tuned began from other weights than"):
        worked(path, study)
    del environment["initial_content"]
    (path / "tuned" / RunFiles.ENVIRONMENT).write_text(json.dumps(environment))
    assert worked(path, study).trained == [], "earlier versions recorded no hash"
    shutil.rmtree(source)
    outcome = worked(path, study)
    assert (outcome.trained, outcome.failed, steps) == ([], {}, {"tuned": STEPS})


@pytest.mark.usefixtures("refused")
class TestNeighbours:
    """Studies in one folder share the runs that they both contain."""

    def other(self, done: Done, **changes: Any) -> Study:
        same = dataclasses.replace(done.study.arms["gpt"], labels={"kind": "same"}, about="By another name.", **changes)
        return Study(name="other", question="Again?", arms={"shared": same})

    def test_a_neighbours_run_is_not_trained_again(self, done: Done, copied: Path) -> None:
        path = copied.parent / "other"
        assert run_study(StudyFolder(path, self.other(done)), ("shared",)) == 0
        assert not (path / "shared").exists()
        (row,) = json.loads((path / StudyFiles.RUNS).read_text())["runs"]
        assert (row["folder"], row["labels"]["kind"]) == ("../tiny/gpt", "same")
        (run,) = read_study(path).runs
        assert run.arm == "shared" and run.result.steps == STEPS

    def test_a_neighbours_run_that_is_scored_otherwise_is_copied(self, done: Done, copied: Path) -> None:
        evaluation = dataclasses.replace(self.other(done).arms["shared"].evaluation, examples=3)
        folder = StudyFolder(copied.parent / "other", self.other(done, evaluation=evaluation))
        (member,) = folder.members().members
        own = folder.path / "shared"
        assert folder.run_dir(member) == own and folder.adopt(member) and not folder.adopt(member)
        assert (own / RunFiles.TIMINGS).read_bytes() == (copied / "gpt" / RunFiles.TIMINGS).read_bytes()
        assert not (own / RunFiles.RESULT).exists() and (copied / "gpt" / RunFiles.RESULT).exists()

    def test_another_run_is(self, done: Done, copied: Path) -> None:
        other = self.other(done, learning_rate=3e-3)
        assert worked(copied.parent / "other", other).failed == {"shared": "AssertionError: work"}

    def test_an_unfinished_run_is_not_shared(self, done: Done, copied: Path) -> None:
        (copied / "gpt" / RunFiles.RESULT).unlink()
        assert worked(copied.parent / "other", self.other(done)).failed == {"shared": "AssertionError: work"}
        assert (copied.parent / "other" / "shared" / RunFiles.FAILURE).exists()

    def test_a_study_elsewhere_shares_nothing(self, done: Done, copied: Path, tmp_path: Path) -> None:
        assert worked(tmp_path / "elsewhere" / "other", self.other(done)).failed


# --- Mistakes before training


def test_a_mistake_before_training_claims_no_directory(done: Done, tmp_path: Path) -> None:
    """The corrected command may use the same directory; after a trained step, another config may not."""
    study, path = done.study, tmp_path / "run"
    with pytest.raises(UserError, match="tset"):
        run_study(StudyFolder(path, study.edited(lambda run: with_evaluation(run, splits=("tset",)))), ("gpt",))
    assert not path.exists()

    def check() -> None:
        StudyWorker(StudyFolder(path, study), Console(quiet=True), arms=["gpt"]).check()

    rd.claim(path / "gpt", to_json(with_train(study.arms["gpt"], seed=1)), {}, {})
    check()
    write_rows(path / "gpt" / RunFiles.METRICS, [{"step": 1}])
    with pytest.raises(UserError, match=r"run/gpt holds another config of gpt .train\.seed: 1 -> 0.: choose another"):
        check()
    (path / "gpt" / RunFiles.CONFIG).write_text("null")
    with pytest.raises(UserError, match=r"config\.json does not hold a JSON object"):
        check()


def test_each_seed_changes_only_its_part(done: Done) -> None:
    """data.seed changes the batches, train.seed does not; a further seed of a study changes both."""
    run = done.study.arms["gpt"]
    other = StudyFolder(done.path, dataclasses.replace(done.study, seeds=2)).member("gpt-s1")
    assert other is not None
    runs = (run, with_train(run, seed=1), with_data(run, seed=1), other.run)
    first, same, second, third = (open_data("gpt", each).train.batch(0).fingerprint for each in runs)
    assert first == same != second == third and other.run.train.seed == run.train.seed + 1
