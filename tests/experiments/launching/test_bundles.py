"""`twinstack run --on sky`: a study's missing runs as managed jobs that share its directory in a bucket."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from common.data.tokenized import remote_folder
from common.train.run_files import RunFiles
from experiments.cli.chosen import choose
from experiments.cli.main import main
from experiments.launching import bundles, facts, source
from experiments.running.study_folder import StudyFolder
from tests.experiments.launching.jobs import program
from tests.experiments.launching.test_sky import ask_skypilot

ARGUMENTS = ["run", "first_light", "--on", "sky", "--topology", "v6e-4", "--bucket", "gs://my-bucket/me"]
CPUS = ["run", "first_light", "--on", "sky", "--cpus", "8", "--bucket", "gs://my-bucket/me"]
OVERRIDES = ["train.mesh.fsdp=4", "seeds=3"]
PATH = os.environ["PATH"]
JOBS = Path("runs/launch/first-light")
RUNS = ["t5like", "t5like-s1", "t5like-s2", "gpt", "gpt-s1", "gpt-s2"]


@pytest.fixture
def here(monkeypatch, tmp_path, repository) -> Path:
    """A folder to launch from, where the programs `gcloud` and `sky` note what they are called with."""
    commit = source.committed(repository)
    monkeypatch.setattr(source, "committed", lambda: commit)
    monkeypatch.setattr(bundles, "write_bundle", lambda path: source.write_bundle(path, repository))
    monkeypatch.setattr(remote_folder, "file_system", lambda url: fsspec.filesystem("memory"))  # in place of a bucket
    monkeypatch.setattr(facts, "has_compiler", lambda: False)
    programs = tmp_path / "programs"
    for name in ("git", "bash"):
        program(programs, name, f'exec {shutil.which(name)} "$@"')
    program(programs, "gcloud", 'case "$*" in *describe*) ;; *) echo "gcloud $*" >>calls ;; esac')
    program(programs, "sky", 'echo "sky $*" >>calls')
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tasks() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in JOBS.glob("*.yaml")]


def commands() -> list[str]:
    """Returns the `twinstack run` of each job, in order."""
    return sorted(line for task in tasks() for line in task["run"].split("\n") if "bin/twinstack run" in line)


def trained(task: dict[str, Any]) -> list[str]:
    """Returns the runs that a job's command selects."""
    [command] = [line for line in task["run"].split("\n") if "bin/twinstack run" in line]
    return next(word for word in command.split() if word.startswith("run=")).removeprefix("run=").split(",")


def finish(folder: StudyFolder, name: str, loss: float = 1.0) -> None:
    """Writes what makes a run count as done."""
    member = folder.member(name)
    assert member is not None
    (folder.path / name).mkdir(parents=True)
    result = {"made_from": member.made_from, "validation_loss": loss}
    (folder.path / name / RunFiles.RESULT).write_text(json.dumps(result))


def test_every_run_is_in_one_job_and_nothing_is_submitted_without_go(here, capsys):
    assert main([*ARGUMENTS, "--spot", "--bundle", "2", *OVERRIDES]) == 0
    assert sorted(name for task in tasks() for name in trained(task)) == sorted(RUNS)
    assert [len(trained(task)) for task in tasks()] == [2, 2, 2]
    assert all(task["resources"]["use_spot"] for task in tasks())
    printed = capsys.readouterr().out
    for task in tasks():
        assert f"then: sky jobs launch --yes --name {task['name']} {JOBS}/{task['name']}.yaml\n" in printed
    assert "done here: 0 of 6 runs\n" in printed and not (here / "calls").exists()
    assert (JOBS / "source.bundle").is_file()


def test_a_job_trains_its_runs_in_the_shared_directory(here):
    assert main([*ARGUMENTS, "--bundle", "4", *OVERRIDES]) == 0
    assert commands() == [
        ".venv/bin/twinstack run first_light train.mesh.fsdp=4 seeds=3 arm=gpt run=gpt-s1,gpt-s2 "
        "--run-dir /mnt/twinstack/me/runs/first-light &",
        ".venv/bin/twinstack run first_light train.mesh.fsdp=4 seeds=3 arm=t5like,gpt "
        "run=t5like,t5like-s1,t5like-s2,gpt --run-dir /mnt/twinstack/me/runs/first-light &",
    ]


def test_machines_without_accelerators_train_a_run_on_each_core(here, capsys):
    assert main([*CPUS, "--bundle", "6", "seeds=3"]) == 0
    [task] = tasks()
    assert task["resources"]["cpus"] == "8+" and "accelerators" not in task["resources"]
    assert "--editable '.[gcs]'" in task["setup"]
    [command] = commands()
    assert command.endswith(f"run={','.join(RUNS)} --jobs 8 --run-dir /mnt/twinstack/me/runs/first-light &")
    assert "jobs: 1, each on a machine of 8 cores\n" in capsys.readouterr().out


def test_names_of_jobs_are_distinct_and_stay_the_same(here):
    main([*ARGUMENTS, *OVERRIDES])
    names = {task["name"] for task in tasks()}
    main([*ARGUMENTS, *OVERRIDES])
    assert len(names) == len(RUNS) and names == {task["name"] for task in tasks()}


def test_only_what_is_missing_is_submitted_and_only_once(here, capsys):
    chosen = choose("first_light", OVERRIDES)
    finish(StudyFolder(here / "runs/first_light", chosen.study), "gpt-s1")
    assert main([*ARGUMENTS, "--bundle", "9", "--go", *OVERRIDES]) == 0
    missing = [name for name in RUNS if name != "gpt-s1"]
    [task] = tasks()
    assert trained(task) == missing
    upload, submission = (here / "calls").read_text().splitlines()
    assert upload.startswith(f"gcloud storage cp {JOBS}/source.bundle gs://my-bucket/me/source/")
    assert submission == f"sky jobs launch --yes --name {task['name']} {JOBS}/{task['name']}.yaml"
    assert main([*ARGUMENTS, "--bundle", "9", "--go", *OVERRIDES]) == 0
    assert len((here / "calls").read_text().splitlines()) == 2
    assert f"submitted before: {', '.join(missing)}; if their jobs ended" in capsys.readouterr().out


def test_a_failed_submission_leaves_its_runs_to_be_submitted(here, capsys):
    program(here / "programs", "sky", "exit 7")
    assert main([*ARGUMENTS, "--go", *OVERRIDES]) == 2
    assert "failed with status 7" in capsys.readouterr().err and not (JOBS / bundles.SENT).exists()


def test_a_failed_run_is_told_and_makes_the_status_1(here, capsys):
    folder = StudyFolder(here / "runs/first_light", choose("first_light", OVERRIDES).study)
    member = folder.member("gpt")
    assert member is not None
    folder.note_failure(member, "no space left", diverged=False)
    assert main([*ARGUMENTS, *OVERRIDES]) == 1
    assert "gpt FAILED: no space left\n" in capsys.readouterr().out


def test_of_a_search_the_trials_come_first(here, capsys):
    search = 'search={"rates":[0.001,0.002]}'
    assert main([*ARGUMENTS, *OVERRIDES, search]) == 0
    assert sorted(name for task in tasks() for name in trained(task)) == [
        f"{arm}-lr{rate}" for arm in ("gpt", "t5like") for rate in ("0.001", "0.002")
    ]
    assert "0 of 4 runs, and more follow from these\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "first_light", "--on", "slurm"], "--on 'slurm': valid: ray, sky"),
        (["run", "first_light", "--on", "sky"], "--on sky needs --bucket gs://BUCKET, and --topology"),
        (["run", "first_light", "--spot"], "--topology, --cpus, --bucket, --spot, --env and --go are for"),
        (["run", "first_light", "--on", "ray", "--jobs", "2"], "--on is without --jobs"),
        ([*ARGUMENTS, "--cpus", "8"], "--on sky needs --bucket gs://BUCKET, and --topology"),
        ([*CPUS, "train.mesh.fsdp=2"], "train.mesh fsdp=2 does not match a machine of 8 cores: each run has one core"),
        ([*ARGUMENTS, "train.mesh.fsdp=8"], "train.mesh fsdp=8 does not match 1 x v6e-4"),
        ([*ARGUMENTS, "train.mesh.fsdp=4", "run=gtp"], "no run has run=gtp: did you mean 'gpt'?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(here, capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"twinstack: error: {message}") and error.count("\n") == 1


@pytest.mark.slow  # SkyPilot is installed for it
@pytest.mark.parametrize("arguments", [[*ARGUMENTS, *OVERRIDES], [*CPUS, "seeds=3"]])
def test_skypilot_reads_the_jobs(here, monkeypatch, tmp_path, arguments):
    assert main([*arguments, "--bundle", "2"]) == 0
    monkeypatch.setenv("PATH", PATH)
    for task in tasks():
        checked = ask_skypilot((JOBS / f"{task['name']}.yaml").read_text(), tmp_path)
        assert checked.returncode == 0, checked.stderr
        assert json.loads(checked.stdout)[0] == task["name"]
