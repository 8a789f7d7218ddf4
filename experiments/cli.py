"""The command line: `twinstack list | plan | train | compare | report`.

Nothing heavy is imported until a command needs it, so that `twinstack --help` answers at once.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from common.errors import UserError, nearest

if TYPE_CHECKING:
    from experiments.config import Experiment

RUNS = Path("runs")


class _Parser(argparse.ArgumentParser):
    """Raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 2 for a mistake of the user's, 130 for an interruption."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except UserError as error:
        print(f"twinstack: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumable = arguments[:1] in (["train"], ["compare"])
        hint = f"; the same command resumes: twinstack {shlex.join(arguments)}" if resumable else ""
        print(f"\ntwinstack: interrupted{hint}", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    parser, commands = _parsers()
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    if first is not None and first not in commands:
        raise UserError(f"unknown command {first!r}: {nearest(first, commands)}")
    options, rest = parser.parse_known_args(arguments)
    _take_late_overrides(options, rest, commands.get(options.command, parser))
    if options.version:
        print(f"twinstack {_version()}")
    elif options.command is None:
        parser.print_help()
        return 2
    else:
        options.run(options)
    return 0


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(prog="twinstack", description="Trains sibling model families side by side.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, run: object, summary: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run=run)
        commands[name] = command
        return command

    add("list", _list, "print the experiments and the question that each asks")
    plan = add("plan", _plan, "print every arm's parameters, FLOPs, tokens, memory and config; trains nothing")
    train = add("train", _train, "train one arm, or go on with it where it stopped")
    compare = add("compare", _compare, "train all arms, print them side by side and write the report")
    report = add("report", _report, "write report.html from what a run directory holds")
    for command in (plan, train, compare):
        command.add_argument("name", metavar="NAME", help="an experiment of `twinstack list`")
        command.add_argument("overrides", metavar="path.to.field=value", nargs="*", help="replaces a config's field")
        command.add_argument("--print-config", action="store_true", help="print the resolved config as JSON and stop")
    for command in (train, compare):
        command.add_argument("--run-dir", type=Path, metavar="DIR", help=f"where results go (default: {RUNS}/NAME)")
    train.add_argument("--arm", required=True, metavar="ARM", help="which arm; `twinstack plan NAME` names them")
    report.add_argument("source", metavar="NAME_OR_RUN_DIR", help=f"an experiment under {RUNS}/, or a run directory")
    return parser, commands


def _take_late_overrides(options: argparse.Namespace, rest: list[str], command: argparse.ArgumentParser) -> None:
    """Adds overrides that follow an option, where argparse no longer looks for them; refuses anything else."""
    for argument in rest:
        if argument.startswith("-"):
            valid = set(re.findall(r"--[a-z-]+", command.format_help()))
            raise UserError(f"unknown option {argument.partition('=')[0]!r}: {nearest(argument, valid)}")
        if "overrides" not in options:
            raise UserError(f"unexpected argument {argument!r}; see {command.prog} --help")
    if rest:
        options.overrides = [*options.overrides, *rest]


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("twinstack")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _experiment(options: argparse.Namespace) -> "Experiment | None":
    """The experiment with its overrides; None if it was asked for in print only."""
    from experiments.registry import EXPERIMENTS, load

    if options.name not in EXPERIMENTS:
        raise UserError(f"unknown experiment {options.name!r}: {nearest(options.name, EXPERIMENTS)}")
    from common.config import apply_overrides, to_json

    experiment = apply_overrides(load(options.name), options.overrides)
    if not options.print_config:
        return experiment
    import json

    print(json.dumps(to_json(experiment), indent=2, ensure_ascii=False))
    return None


def _list(options: argparse.Namespace) -> None:
    from experiments.registry import EXPERIMENTS

    width = max(map(len, EXPERIMENTS), default=0)
    for name, question in EXPERIMENTS.items():
        print(f"{name:<{width}}  {question}")


def _plan(options: argparse.Namespace) -> None:
    if experiment := _experiment(options):
        from rich.console import Console

        from experiments.commands import plan

        plan(experiment, Console())


def _train(options: argparse.Namespace) -> None:
    if experiment := _experiment(options):
        if options.arm not in experiment.arms:
            raise UserError(f"unknown arm {options.arm!r}: {nearest(options.arm, experiment.arms)}")
        from experiments.commands import train

        train(experiment, options.arm, options.run_dir or RUNS / options.name)


def _compare(options: argparse.Namespace) -> None:
    if experiment := _experiment(options):
        from experiments.commands import compare

        compare(experiment, options.run_dir or RUNS / options.name)


def _report(options: argparse.Namespace) -> None:
    run_dir = next((path for path in (Path(options.source), RUNS / options.source) if _is_run(path)), None)
    if run_dir is None:
        runs = [path.name for path in RUNS.glob("*") if _is_run(path)]
        raise UserError(
            f"{options.source!r} is no run directory, nor is {RUNS / options.source}: {nearest(options.source, runs)}"
        )
    from experiments.commands import report

    print(report(run_dir))


def _is_run(path: Path) -> bool:
    return (path / "experiment.json").is_file()


if __name__ == "__main__":
    sys.exit(main())
