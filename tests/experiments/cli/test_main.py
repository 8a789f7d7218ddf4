import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from rich.console import Console

from common import allocator
from common.config import to_json
from experiments import find
from experiments.cli import report
from experiments.cli.arguments import parsers
from experiments.cli.main import COMMANDS, load_command, main
from experiments.planning import plan
from experiments.running import pool, study_run
from experiments.running.study_folder import StudyFolder
from tests.experiments.tiny_study import tiny_study

ROOT = Path(__file__).parents[3]


BASE = dataclasses.replace(tiny_study(Path("/data")), name="first", question="Who learns?")
SECOND = dataclasses.replace(BASE, name="second", question="And why?")


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Records calls of the functions behind the commands; the mocks have the signatures of these functions."""
    calls: list[tuple] = []

    def stand_in(module, name, result=None):
        def called(*given, **named):
            values = (described(one) for one in (*given, *named.values()) if not isinstance(one, Console))
            calls.append((name, *values))
            return given[0] / "report.html" if name == "write_reports" else result

        monkeypatch.setattr(module, name, create_autospec(getattr(module, name), side_effect=called))

    monkeypatch.setattr(find, "OWN", ("first", "second"))
    monkeypatch.setattr(find, "load", {"first": BASE, "second": SECOND}.__getitem__)
    stand_in(study_run, "run_study", 0)
    stand_in(pool, "run_in_pool", 1)
    stand_in(pool, "be_worker", 0)
    stand_in(report, "write_reports")
    stand_in(plan, "plan")
    monkeypatch.chdir(tmp_path)
    return calls


def described(value):
    return (value.path, value.study) if isinstance(value, StudyFolder) else value


def of_slice(topology, **more):
    usual = {"slices": 1, "mesh": None, "price": None, "search": False}
    return plan.Target(topology=topology, **(usual | more))


BOTH = ("gpt", "t5like")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("plan first", ("plan", BASE, None)),
        ("plan first --topology v5e-16 --price 1.5", ("plan", BASE, of_slice("v5e-16", price=1.5))),
        (
            "plan --topology v5e:4x4 first --slices 2 --mesh fsdp=16 --search",
            ("plan", BASE, of_slice("v5e:4x4", slices=2, mesh="fsdp=16", search=True)),
        ),
        ("run first arm=gpt", ("run_study", (Path("runs/first"), BASE), ("gpt",), 0)),
        ("run --run-dir there first family=t5like", ("run_study", (Path("there"), BASE), ("t5like",), 0)),
        ("run first --profile", ("run_study", (Path("runs/first"), BASE), BOTH, 5)),
        ("run first", ("run_study", (Path("runs/first"), BASE), BOTH, 0)),
        ("run --profile 3 first", ("run_study", (Path("runs/first"), BASE), BOTH, 3)),
        ("run second --run-dir=there", ("run_study", (Path("there"), SECOND), BOTH, 0)),
        (
            "run first --jobs 2 --run-dir there",
            ("run_in_pool", (Path("there"), BASE), BOTH, 2, "run first --jobs 2 --run-dir there".split()),
        ),
        ("run first --jobs 2 --worker 1", ("be_worker", (Path("runs/first"), BASE), BOTH, 1, 2, 0)),
    ],
)
def test_commands_get_the_study_and_its_directory(calls, command, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", ["twinstack", *command.split()])
    assert main() == (1 if expected[0] == "run_in_pool" else 0)
    assert calls == [expected]


@pytest.mark.parametrize(
    "command",
    [
        "run first train.seed=20 arms.gpt.model.d_ff=8",
        "run first train.seed=20 --run-dir there arms.gpt.model.d_ff=8",
        "run --run-dir there first train.seed=1 train.seed=20 arms.gpt.model.d_ff=8",
    ],
)
def test_overrides_may_precede_and_follow_options(calls, command):
    assert main(command.split()) == 0
    (_, study), *_ = calls[0][1:]
    assert {run.train.seed for run in study.arms.values()} == {20}
    assert [run.model.d_ff for run in study.arms.values()] == [8, BASE.arms["t5like"].model.d_ff]


@pytest.mark.parametrize("command", ["plan first", "run first arm=gpt", "run first"])
def test_print_config_prints_the_resolved_config_and_stops(calls, capsys, command):
    assert main([*command.split(), "--print-config", "learning_rate=1"]) == 0
    expected = BASE.edited(lambda run: dataclasses.replace(run, learning_rate=1.0))
    assert json.loads(capsys.readouterr().out) == to_json(expected)
    assert calls == []


def test_list(calls, capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "first   Who learns?\nsecond  And why?\n"


@pytest.mark.parametrize("file", ["study.json", "experiment.json"])
@pytest.mark.parametrize("named", ["first", "runs/first", "elsewhere"])
def test_report_takes_a_name_or_a_studys_directory(calls, capsys, named, file):
    for run_dir in (Path("runs/first"), Path("elsewhere")):
        run_dir.mkdir(parents=True)
        (run_dir / file).write_text("{}")
    assert main(["report", named]) == 0
    run_dir = Path("elsewhere" if named == "elsewhere" else "runs/first")
    assert calls == [("write_reports", run_dir, None)]
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("rum first", "unknown command 'rum': did you mean 'run'?"),
        ("run frist", "unknown study 'frist': did you mean 'first'? Valid: first, second; a file's name ends in .py"),
        ("run frist.py", "frist.py is no file; `twinstack new frist` writes a study to start from"),
        ("run", "the following arguments are required: STUDY"),
        ("run first steps", "'steps' is not an override; valid: path.to.field=value"),
        ("run first trian.steps=3", "unknown field 'trian': did you mean 'train'?"),
        ("run first train.seed=1.5", "arms.gpt.train.seed: expected int, got 1.5"),
        ("run first arms.gpt.model.head_dim=3", "arms.gpt.model: head_dim is 3: RoPE needs an even number; nearest: 4"),
        ("run first --rundir x", "unknown option '--rundir': did you mean '--run-dir'?"),
        ("run first --rundir=x", "unknown option '--rundir': did you mean '--run-dir'?"),
        ("run first --print", "unknown option '--print': did you mean '--print-config'?"),
        ("run first --run-dir", "argument --run-dir: expected one argument"),
        ("--verbose", "unknown option '--verbose': did you mean '--version'?"),
        ("run first arm=gtp", "no arm has arm=gtp; there are arm=gpt,t5like"),
        ("run first --arm gpt", "unknown option '--arm'"),
        ("run first --jobs 2 --processes 2", "--jobs is for one machine: without --coordinator"),
        ("plan first --run-dir x", "unknown option '--run-dir'"),
        ("plan first --mesh fsdp=2", "--mesh is for a TPU slice: name it by --topology"),
        ("plan first --search", "--search is for a TPU slice: name it by --topology"),
        ("list all", "unexpected argument 'all'"),
        ("report first", "'first' is no study's directory, nor is runs/first: valid: none"),
    ],
)
def test_mistakes_are_one_line_and_status_2(calls, capsys, command, message):
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"twinstack: error: {message}")
    assert captured.err.count("\n") == 1 and captured.out == "" and calls == []


def test_report_names_the_nearest_run(calls, capsys):
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/study.json").write_text("{}")
    assert main(["report", "frist"]) == 2
    assert "did you mean 'first'?" in capsys.readouterr().err


def test_an_error_about_a_path_is_one_line_of_visible_characters(calls, monkeypatch, capsys, tmp_path):
    path = tmp_path / "a\x1b[2J\u202e[red]"
    monkeypatch.setattr(study_run, "run_study", lambda *_, **__: path.read_text())
    assert main(["run", "first"]) == 2
    error = capsys.readouterr().err
    assert error == f"twinstack: error: {tmp_path}/a\\u001b[2J\\u202e[red]: no such file or directory\n"


def test_a_closed_output_pipe_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", "list"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141


def test_other_errors_keep_their_traceback(calls, monkeypatch):
    def fail(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(study_run, "run_study", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["run", "first"])


@pytest.mark.parametrize(("command", "resumes"), [("run", True), ("plan", False)])
def test_an_interruption_prints_the_command_that_resumes(calls, monkeypatch, capsys, command, resumes):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((plan, "plan") if command == "plan" else (study_run, "run_study")), interrupt)
    assert main([command, "first", "name=a b"]) == 130
    error = capsys.readouterr().err.strip()
    assert error.startswith("twinstack: interrupted") and "\n" not in error
    assert error.endswith(f"resumes: twinstack {command} first 'name=a b'") == resumes


def test_without_a_command_help_is_printed(capsys):
    assert main([]) == 2
    assert "results" in capsys.readouterr().out


def in_new_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60)


def test_the_module_runs_commands_too():
    process = in_new_process("-m", "experiments.cli", "list")
    assert process.returncode == 0 and "first_light" in process.stdout


@pytest.mark.parametrize(
    ("vendors", "installed", "told"),
    [
        (["0x8086"], {"libtpu"}, {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}),
        (["0x10de"], {"libtpu", "jax_plugins"}, {"TPU_SKIP_MDS_QUERY": "1"}),
        (["0x8086", "0x1ae0"], {"libtpu"}, {}),
        (["0x8086"], set(), {}),
    ],
    ids=["a laptop", "a GPU", "a TPU", "no libtpu"],
)
def test_jax_does_not_search_for_absent_tpus(calls, monkeypatch, tmp_path, vendors, installed, told):
    for number, vendor in enumerate(vendors):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr("experiments.cli.main.PCI", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr("os.environ", {})
    assert main(["plan", "first"]) == 0
    assert os.environ == told


@pytest.mark.parametrize(
    ("command", "platforms", "installed", "kept"),
    [
        ("run first", None, set(), True),
        ("run first arm=gpt", "cpu", {"jax_plugins", "libtpu"}, True),
        ("run first", None, {"jax_plugins"}, False),
        ("run first", "cuda,cpu", {"jax_plugins"}, False),
        ("plan first", "cpu", set(), False),
    ],
)
def test_training_on_cpu_keeps_freed_memory(calls, monkeypatch, tmp_path, command, platforms, installed, kept):
    monkeypatch.setattr("experiments.cli.main.PCI", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr("os.environ", {} if platforms is None else {"JAX_PLATFORMS": platforms})
    keep = create_autospec(allocator.keep_freed_memory)
    monkeypatch.setattr(allocator, "keep_freed_memory", keep)
    assert main(command.split()) == 0
    assert keep.called == kept and len(calls) == 1


def test_every_command_is_a_function_of_its_options():
    _, parsers_of = parsers()
    assert list(COMMANDS) == list(parsers_of)
    for command, parser in parsers_of.items():
        options = {action.dest for action in parser._actions} - {"help"}
        assert options == inspect.signature(load_command(command)).parameters.keys()


def test_help_and_version_import_few_modules_and_none_of_other_packages():
    code = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "from experiments.cli.main import main\n"
        "main(['--version'])\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    process = in_new_process("-c", code)
    assert process.returncode == 0, process.stderr
    *shown, modules = process.stdout.splitlines()
    assert shown[0].startswith("twinstack ") and any("results" in line for line in shown)
    imported = json.loads(modules)
    ours = [name for name in imported if name.partition(".")[0] in ("common", "experiments")]
    others = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"common", "experiments"}
    assert not others and len(ours) <= 20 and len(imported) <= 200
