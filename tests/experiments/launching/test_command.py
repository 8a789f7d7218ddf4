"""`twinstack launch` as a user calls it."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import yaml

from common.compute.aot import OutOfMemory
from common.data.sources.config import parts_of
from common.data.tokenized import remote_folder
from common.data.tokenized.origins import keep_source
from experiments.cli.chosen import choose
from experiments.cli.main import main
from experiments.launching import facts, source
from experiments.launching import launch as launching
from tests.common.data.memory_source import MemorySource
from tests.experiments.launching.jobs import program

ARGUMENTS = ["launch", "first_light", "--topology", "v6e-4", "--bucket", "gs://my-bucket", "train.mesh.fsdp=4"]


COMPILED = {
    "t5like": SimpleNamespace(out_of_memory=None, memory=SimpleNamespace(total=3 * 2**29)),
    "gpt": SimpleNamespace(out_of_memory=OutOfMemory(needed=40 * 2**30, available=31 * 2**30), memory=None),
}
"""Stand-ins for the compiler's answers, which take a minute."""


@pytest.fixture
def here(monkeypatch, tmp_path, repository) -> Path:
    """A folder to launch from, on a machine with neither engine; the repository fixture stands in for the checkout."""
    commit = source.committed(repository)
    monkeypatch.setattr(source, "committed", lambda: commit)
    monkeypatch.setattr(launching, "write_bundle", lambda path: source.write_bundle(path, repository))
    monkeypatch.setattr(remote_folder, "file_system", lambda url: fsspec.filesystem("memory"))  # in place of a bucket
    monkeypatch.setattr(facts, "has_compiler", lambda: True)
    monkeypatch.setattr(facts, "compile_all", lambda steps, console: [COMPILED[step.name] for step in steps])
    program(tmp_path / "programs", "git", f'exec {shutil.which("git")} "$@"')
    program(tmp_path / "programs", "bash", f'exec {shutil.which("bash")} "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_launch_writes_a_task_and_prints_the_next_steps(here, capsys):
    assert main([*ARGUMENTS, "--run", "mine", "--spot"]) == 0
    printed = capsys.readouterr().out
    assert "twinstack data prepare first_light train.mesh.fsdp=4 --to gs://my-bucket/prepared\n" in printed
    assert "then: sky jobs launch --yes --name mine runs/launch/mine/sky.yaml\n" in printed
    folder = here / "runs/launch/mine"
    task = yaml.safe_load((folder / "sky.yaml").read_text())
    assert task["resources"]["accelerators"] == "tpu-v6e-4" and task["resources"]["use_spot"] is True
    assert "run first_light train.mesh.fsdp=4 --run-dir /mnt/twinstack/runs/mine &\n" in task["run"]
    assert {path.name for path in folder.iterdir()} == {"sky.yaml", "source.bundle"}


def test_launch_writes_scripts_for_gcloud(here, capsys):
    assert main([*ARGUMENTS, "--engine", "gcloud", "arm=gpt", "--out", "there"]) == 0
    assert "then: bash there/launch.sh\n" in capsys.readouterr().out
    assert {path.name for path in (here / "there").iterdir()} == {"launch.sh", "startup.sh", "source.bundle"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--go"], "--go needs the program 'gcloud', which is not installed"),
        (["--go", "--engine", "gcloud"], "--go needs the program 'gcloud', which is not installed"),
        (["--engine", "slurm"], "--engine 'slurm': valid: gcloud, sky"),
        (["arm=gtp"], "no arm has arm=gtp"),
        (
            ["train.mesh.fsdp=8"],
            "train.mesh fsdp=8 does not match 1 x v6e-4 (v6e:2x2: 4 chips); nearest: train.mesh.fsdp=4",
        ),
        (["train.mesh.fdsp=8"], "unknown field 'fdsp' in arms.t5like.train.mesh: did you mean 'fsdp'?"),
        (["--topology", "v6e:2x3"], "topology 'v6e:2x3': no slice has this shape; nearest: v6e:2x4"),
        (["--slices", "2", "train.mesh.replica=2"], "--slices 2: SkyPilot does not support Multislice"),
        (["--zone", "nowhere"], "--zone 'nowhere' must be a zone"),
        (["--run", "Mine"], "--run 'Mine' must be lower-case"),
        (["--bucket", "mine"], "--bucket 'mine' must be gs://BUCKET"),
        (["--hours", "9"], "--hours 9 is for --engine gcloud"),
        (["arms.gpt.train.mesh.fsdp=8"], "train.mesh fsdp=8 does not match 1 x v6e-4"),
        (["data.rows=6"], "data.rows is 6, which does not divide by replica x data x fsdp x accumulation"),
        (["--env", "ABSENT"], "--env ABSENT: it is not set here; give --env ABSENT=VALUE"),
        (["--env", "A B=1"], "--env 'A B=1' must be NAME=VALUE or NAME"),
        (["--env", "A=1\n2"], "--env A: its value holds a line break"),
        *[
            ([f"data.source.name={name}"], f"data.source.name={name} is on this machine, where hosts cannot read it")
            for name in ("tsv:/a/laptop/path/{split}.tsv", "jsonl:~/x.jsonl", "text:here/{split}", "parquet:/x")
        ],
        (
            ["data.tokenizer.path=/a/spiece.model"],
            "data.tokenizer.path /a/spiece.model is on this machine, where hosts cannot read it, and "
            "gs://my-bucket/prepared has nothing prepared from it: first `twinstack data prepare first_light",
        ),
        (
            ['arms.gpt.init={"path":"runs/first"}'],
            "arms.gpt.init.path runs/first is on this machine, where hosts cannot read it; copy it to "
            "gs://my-bucket/files (gcloud storage cp -r) and name it /mnt/twinstack/files/...",
        ),
        (
            ["data.source.name=tfds:c4/en"],
            "data.source.name=tfds:c4/en: hosts look for it in $TFDS_DATA_DIR, which is not set, and "
            "gs://my-bucket/prepared has nothing prepared from it: add --env TFDS_DATA_DIR=gs://my-bucket/tfds",
        ),
        (
            ["data.source.name=tfds:c4/en", "--env", "TFDS_DATA_DIR=/data/tfds"],
            "data.source.name=tfds:c4/en: hosts look for it in $TFDS_DATA_DIR, which is a folder of this machine "
            "(/data/tfds)",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(here, capsys, arguments, message):
    assert main([*ARGUMENTS, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"twinstack: error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["data.source.name=tsv:gs://my-bucket/data/{split}.tsv"],
        ["data.source.name=jsonl:/mnt/twinstack/data/{split}.jsonl"],
        ["data.tokenizer.path=/mnt/twinstack/files/spiece.model"],
        ["data.source.name=tfds:c4/en", "--env", "TFDS_DATA_DIR=gs://my-bucket/tfds"],
        ["data.source.name=corpus:multi30k"],
        ['arms.gpt.init={"path":"runs/first"}', "arm=t5like"],
    ],
)
def test_paths_that_hosts_can_read_are_launched(here, arguments):
    assert main([*ARGUMENTS, *arguments]) == 0


def test_a_study_in_a_file_is_refused(here, capsys):
    (here / "my_study.py").write_text("from experiments.first_light import first_light as study\n")
    assert main(["launch", "my_study.py", *ARGUMENTS[2:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("twinstack: error: my_study.py is a file of this machine") and error.count("\n") == 1


def test_the_data_of_every_arm_must_be_readable(here, capsys):
    path = "data.source.name=tsv:/a/laptop/path/{split}.tsv"
    assert main([*ARGUMENTS, f"arms.gpt.{path}"]) == 2
    assert f"{path} is on this machine" in capsys.readouterr().err
    assert main([*ARGUMENTS, f"arms.gpt.{path}", "family=t5like"]) == 0


def test_sources_prepared_in_the_bucket_need_no_files(here):
    overrides = ["data.source.name=tsv:/a/laptop/path/{split}.tsv"]
    (part,) = parts_of(choose("first_light", overrides).study.arms["gpt"].data.source)
    bucket = fsspec.filesystem("memory")
    try:
        for split in ("train", "validation", "test", "test_unseen_names"):
            assert main([*ARGUMENTS, *overrides]) == 2
            keep_source("gs://my-bucket/prepared", part, split, MemorySource([]), with_text=False)
        assert main([*ARGUMENTS, *overrides]) == 0
        assert main([*ARGUMENTS, *overrides, "--env", "TWINSTACK_PREPARED=gs://my-bucket/other"]) == 2
    finally:
        bucket.store.clear()


@pytest.mark.parametrize("engine", ["sky", "gcloud"])
def test_variables_are_passed_on(here, monkeypatch, engine):
    monkeypatch.setenv("HERE", "it's `here`")
    assert main([*ARGUMENTS, "--engine", engine, "--env", "HERE", "--env", "THERE=a=b", "--out", "there"]) == 0
    if engine == "sky":
        values = yaml.safe_load((here / "there/sky.yaml").read_text())["envs"]
    else:
        script = (here / "there/startup.sh").read_text().partition("\nif ")[0]
        printed = subprocess.run(
            ["bash", "-c", f"{script}\n/usr/bin/env -0"], capture_output=True, text=True, check=True
        ).stdout
        values = dict(line.split("=", 1) for line in printed.split("\0")[:-1])
    assert (values["HERE"], values["THERE"]) == ("it's `here`", "a=b")
    assert values["TWINSTACK_PREPARED"] == "gs://my-bucket/prepared"


def test_price_fit_region_and_remarks_are_printed_before_submitting(here, capsys):
    unequal = ["arms.gpt.model.d_ff=64", "--zone", "us-central1-b", "--engine", "gcloud"]
    program(here / "programs", "gcloud", 'case "$*" in *"buckets describe gs://my-bucket "*) echo US-EAST5 ;; esac')
    assert main([*ARGUMENTS, "--spot", *unequal]) == 0
    printed = capsys.readouterr().out
    assert "price: 5.40 USD an hour, 130 a day (spot, list price in us-east5)\n" in printed  # 4 chips
    assert "t5like fits, 1.50 GiB a device; gpt does NOT fit, it needs 40.00 GiB a device of 31.00" in printed
    assert "bucket: gs://my-bucket is in US-EAST5; the slices will be in us-central1-b: traffic between" in printed
    assert "longest life: 168 hours" in printed
    assert re.search(r"^warning: .*FLOPs", printed, re.MULTILINE)


def test_without_gcloud_the_region_is_unknown(here, capsys):
    assert main([*ARGUMENTS, "arm=t5like"]) == 0
    printed = capsys.readouterr().out
    assert "price: 10.80 USD an hour, 259 a day (on demand, list price in us-east5)\n" in printed
    assert "fit: t5like fits, 1.50 GiB a device\n" in printed
    assert "bucket: gs://my-bucket: its region is unknown (gcloud storage" in printed


def test_without_the_compiler_the_fit_is_unknown(here, monkeypatch, capsys):
    monkeypatch.setattr(facts, "has_compiler", lambda: False)
    assert main([*ARGUMENTS, "arm=t5like"]) == 0
    assert "fit: unknown: pip install 'twinstack[plan]', then twinstack plan first_light" in capsys.readouterr().out


def test_the_readme_launches_as_written(here, capsys):
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    commands = re.findall(r"`(twinstack launch [^`]+)`", readme.replace("\n", " "))
    assert commands
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 7])
def test_go_submits_to_the_engine(here, capsys, status):
    for name in ("gcloud", "sky"):
        program(here / "programs", name, f'echo "{name} $*" >>calls; exit {status if name == "sky" else 0}')
    assert main([*ARGUMENTS, "--go"]) == (2 if status else 0)
    region, upload, submit = (here / "calls").read_text().splitlines()
    assert region == "gcloud storage buckets describe gs://my-bucket --format=value(location)"
    assert upload.startswith("gcloud storage cp runs/launch/first-light/source.bundle gs://my-bucket/source/")
    assert submit == "sky jobs launch --yes --name first-light runs/launch/first-light/sky.yaml"
    assert ("failed with status 7" in capsys.readouterr().err) == bool(status)
