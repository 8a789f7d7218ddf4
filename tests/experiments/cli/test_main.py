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
from common.errors import UserError
from experiments import registry
from experiments.cli.arguments import parsers
from experiments.cli.main import COMMANDS, load_command, main
from experiments.planning import plan
from experiments.running import comparison

ROOT = Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 10
    learning_rate: float = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    d_ff: int = 64

    def __post_init__(self) -> None:
        if self.d_ff % 2:
            raise UserError(f"d_ff is {self.d_ff}:\n  it must be even")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    name: str
    question: str
    train: Train = Train()
    arms: dict[str, Model]


BASE = Experiment(name="first", question="Who learns?", arms={"left": Model(), "right": Model(d_ff=32)})


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Records calls of the functions behind the commands; the mocks have the signatures of these functions."""
    calls: list[tuple] = []

    def stand_in(module, name, result=lambda *given: None):
        def called(*given, **named):
            calls.append((name, *(one for one in (*given, *named.values()) if not isinstance(one, Console))))
            return result(*given)

        monkeypatch.setattr(module, name, create_autospec(getattr(module, name), side_effect=called))

    monkeypatch.setattr(registry, "EXPERIMENTS", {"first": "Who learns?", "second": "And why?"})
    monkeypatch.setattr(registry, "load", lambda name: dataclasses.replace(BASE, name=name))
    stand_in(comparison, "train")
    stand_in(comparison, "compare")
    stand_in(comparison, "report", lambda run_dir, figure: run_dir / "report.html")
    stand_in(plan, "plan")
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("plan first", ("plan", BASE, None)),
        (
            "plan first --topology v5e-16 --price 1.5",
            (
                "plan",
                BASE,
                plan.Target(topology="v5e-16", slices=1, mesh=None, price=1.5, search=False),
            ),
        ),
        (
            "plan --topology v5e:4x4 first --slices 2 --mesh fsdp=16 --search",
            (
                "plan",
                BASE,
                plan.Target(topology="v5e:4x4", slices=2, mesh="fsdp=16", price=None, search=True),
            ),
        ),
        ("train first --arm left", ("train", BASE, "left", Path("runs/first"), 0)),
        ("train --arm right --run-dir there first", ("train", BASE, "right", Path("there"), 0)),
        ("train first --arm left --profile", ("train", BASE, "left", Path("runs/first"), 5)),
        ("compare first", ("compare", BASE, Path("runs/first"), 0)),
        ("compare --profile 3 first", ("compare", BASE, Path("runs/first"), 3)),
        ("compare second --run-dir=there", ("compare", dataclasses.replace(BASE, name="second"), Path("there"), 0)),
    ],
)
def test_commands_get_the_experiment_and_the_run_directory(calls, command, expected):
    assert main(command.split()) == 0
    assert calls == [expected]


@pytest.mark.parametrize(
    "command",
    [
        "compare first train.steps=20 arms.left.d_ff=8",
        "compare first train.steps=20 --run-dir there arms.left.d_ff=8",
        "compare --run-dir there first train.steps=1 train.steps=20 arms.left.d_ff=8",
    ],
)
def test_overrides_may_precede_and_follow_options(calls, command):
    assert main(command.split()) == 0
    assert calls[0][1].train == Train(steps=20)
    assert calls[0][1].arms == {"left": Model(d_ff=8), "right": Model(d_ff=32)}


@pytest.mark.parametrize("command", ["plan first", "train first --arm left", "compare first"])
def test_print_config_prints_the_resolved_config_and_stops(calls, capsys, command):
    assert main([*command.split(), "--print-config", "train.learning_rate=1"]) == 0
    expected = dataclasses.replace(BASE, train=Train(learning_rate=1.0))
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(expected)
    assert calls == []


def test_list(calls, capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "first   Who learns?\nsecond  And why?\n"


@pytest.mark.parametrize("named", ["first", "runs/first", "elsewhere"])
def test_report_takes_a_name_or_a_run_directory(calls, capsys, named):
    for run_dir in (Path("runs/first"), Path("elsewhere")):
        run_dir.mkdir(parents=True)
        (run_dir / "experiment.json").write_text("{}")
    assert main(["report", named]) == 0
    run_dir = Path("elsewhere" if named == "elsewhere" else "runs/first")
    assert calls == [("report", run_dir, None)]
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compar first", "unknown command 'compar': did you mean 'compare'?"),
        ("compare frist", "unknown experiment 'frist': did you mean 'first'? Valid: first, second"),
        ("compare", "the following arguments are required: NAME"),
        ("compare first steps", "'steps' is not an override; valid: path.to.field=value"),
        ("compare first trian.steps=3", "unknown field 'trian': did you mean 'train'?"),
        ("compare first train.steps=1.5", "train.steps: expected int, got 1.5"),
        ("compare first arms.left.d_ff=3", "arms.left: d_ff is 3: it must be even"),
        ("compare first --rundir x", "unknown option '--rundir': did you mean '--run-dir'?"),
        ("compare first --rundir=x", "unknown option '--rundir': did you mean '--run-dir'?"),
        ("compare first --print", "unknown option '--print': did you mean '--print-config'?"),
        ("compare first --run-dir", "argument --run-dir: expected one argument"),
        ("--verbose", "unknown option '--verbose': did you mean '--version'?"),
        ("train first", "the following arguments are required: --arm"),
        ("train first --arm lef", "unknown arm 'lef': did you mean 'left'? Valid: left, right"),
        ("plan first --run-dir x", "unknown option '--run-dir'"),
        ("plan first --mesh fsdp=2", "--mesh is for a TPU slice: name it by --topology"),
        ("plan first --search", "--search is for a TPU slice: name it by --topology"),
        ("list all", "unexpected argument 'all'"),
        ("report first", "'first' is no run directory, nor is runs/first: valid: none"),
    ],
)
def test_mistakes_are_one_line_and_status_2(calls, capsys, command, message):
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"twinstack: error: {message}")
    assert captured.err.count("\n") == 1 and captured.out == "" and calls == []


def test_report_names_the_nearest_run(calls, capsys):
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/experiment.json").write_text("{}")
    assert main(["report", "frist"]) == 2
    assert "did you mean 'first'?" in capsys.readouterr().err


def test_an_error_about_a_path_is_one_line_of_visible_characters(calls, monkeypatch, capsys, tmp_path):
    path = tmp_path / "a\x1b[2J\u202e[red]"
    monkeypatch.setattr(sys.modules["experiments.running.comparison"], "compare", lambda *_, **__: path.read_text())
    assert main(["compare", "first"]) == 2
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

    monkeypatch.setattr(sys.modules["experiments.running.comparison"], "compare", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["compare", "first"])


@pytest.mark.parametrize(("command", "resumes"), [("compare", True), ("plan", False)])
def test_an_interruption_prints_the_command_that_resumes(calls, monkeypatch, capsys, command, resumes):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    module = "experiments.planning.plan" if command == "plan" else "experiments.running.comparison"
    monkeypatch.setattr(sys.modules[module], command, interrupt)
    assert main([command, "first", "name=a b"]) == 130
    error = capsys.readouterr().err.strip()
    assert error.startswith("twinstack: interrupted") and "\n" not in error
    assert error.endswith(f"resumes: twinstack {command} first 'name=a b'") == resumes


def test_without_a_command_help_is_printed(capsys):
    assert main([]) == 2
    assert "compare" in capsys.readouterr().out


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
        ("compare first", None, set(), True),
        ("train first --arm left", "cpu", {"jax_plugins", "libtpu"}, True),
        ("compare first", None, {"jax_plugins"}, False),
        ("compare first", "cuda,cpu", {"jax_plugins"}, False),
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
    assert shown[0].startswith("twinstack ") and any("compare" in line for line in shown)
    imported = json.loads(modules)
    ours = [name for name in imported if name.partition(".")[0] in ("common", "experiments")]
    others = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"common", "experiments"}
    assert not others and len(ours) <= 20 and len(imported) <= 200
