"""What each command of the command line takes."""

import argparse
import re
from pathlib import Path
from typing import NoReturn

from common.errors import UserError, nearest
from common.ranges import Range, Rows
from experiments.cli.options import AsPath, Lengths, real, whole

RUNS = Path("runs")
PROFILE_STEPS = 5


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line's parser, and each command's by its name."""
    parser = Parser(prog="twinstack", description="Trains sibling model families side by side.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        commands[name] = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        return commands[name]

    add("list", "print the experiments and the question that each asks")
    plan = add("plan", "print every arm's cost and memory, here or on a TPU slice; trains nothing")
    _add_plan(plan)
    data = add("data", "print what a model is trained on: `data show NAME`; or make it: `data prepare NAME`")
    _add_data(data)
    train = add("train", "train one arm, or go on with it where it stopped")
    compare = add("compare", "train all arms, print them side by side and write the report")
    launch = add("launch", "train on Cloud TPU: write what SkyPilot or gcloud needs, with --go submit it")
    report = add("report", "write report.html from what a run directory holds")
    for command in (plan, data, train, compare, launch):
        command.add_argument("name", metavar="NAME", help="an experiment of `twinstack list`")
        command.add_argument("overrides", metavar="path.to.field=value", nargs="*", help="replaces a config's field")
        command.add_argument("--print-config", action="store_true", help="print the resolved config as JSON and stop")
    for command in (plan, train, compare, launch):
        command.add_argument(
            "--match", metavar="ARM", help="give the other arms the d_ff with which they take as many FLOPs as this one"
        )
    for command in (train, compare):
        _add_training(command)
    train.add_argument("--arm", required=True, metavar="ARM", help="which arm; `twinstack plan NAME` names them")
    _add_launch(launch)
    _add_convert(add("convert", "turn a foreign checkpoint into a model folder, or a model folder into another"))
    _add_score(add("score", "log-likelihoods of a file's texts under a trained model"))
    _add_generate(add("generate", "text from a trained model: shown as it is made, or many as JSON lines"))
    report.add_argument(
        "source", action=AsPath, metavar="NAME_OR_RUN_DIR", help=f"an experiment under {RUNS}/, or a run directory"
    )
    report.add_argument("--figure", action=AsPath, metavar="FILE", help="write the drawing of all arms too, as SVG")
    return parser, commands


def _add_data(data: argparse.ArgumentParser) -> None:
    data.add_argument("action", metavar="ACTION", help="show: rows as both families read them; prepare: ahead of a run")
    data.add_argument(
        "--rows", action=whole(Range(1, 10**4, unit="rows")), default=2, metavar="N", help="show: how many rows (2)"
    )
    data.add_argument(
        "--workers",
        action=whole(Range(1, 4096, unit="processes")),
        metavar="N",
        help="prepare: processes (as many as there are cores)",
    )
    data.add_argument(
        "--to", metavar="FOLDER_OR_URL", help="prepare: put tokens there, for $TWINSTACK_PREPARED to name"
    )
    data.add_argument(
        "--beam",
        nargs=argparse.REMAINDER,
        metavar="--OPTION=VALUE",
        help="prepare: by Apache Beam, to which all that follows goes (--runner=DataflowRunner ...)",
    )


def _add_training(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run-dir", action=AsPath, metavar="DIR", help=f"where results go (default: {RUNS}/NAME)")
    command.add_argument(
        "--init-from",
        metavar="MODEL",
        help="begin with the parameters of a model folder or of another run (DIR, DIR@STEP; arm by arm where it is "
        "a whole comparison's); arms.ARM.init.rules says what becomes of parameters that differ",
    )
    command.add_argument(
        "--profile",
        action=whole(Range(0, 10_000, unit="steps")),
        nargs="?",
        const=PROFILE_STEPS,
        default=0,
        metavar="STEPS",
        help=f"trace some steps ({PROFILE_STEPS}) of each launch into DIR/ARM/profile, for XProf or TensorBoard",
    )
    command.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 of several listens; Cloud TPU, GKE, SLURM and Open MPI need none of these three",
    )
    command.add_argument("--processes", action=whole(), metavar="N", help="how many there are; 1: this one is alone")
    command.add_argument("--process", action=whole(), metavar="I", help="which one this is, 0 to N-1")


def _add_launch(launch: argparse.ArgumentParser) -> None:
    launch.add_argument(
        "--topology",
        metavar="TPU",
        required=True,
        help="one slice by its grid of chips, v5p:4x4x8, or by its accelerator type, v5p-256",
    )
    launch.add_argument(
        "--slices",
        action=whole(Range(1, 4096, unit="slices")),
        default=1,
        metavar="N",
        help="with --engine gcloud: Multislice (1)",
    )
    launch.add_argument("--engine", default="sky", metavar="ENGINE", help="sky (default): SkyPilot; or gcloud")
    launch.add_argument("--zone", metavar="ZONE", help="such as us-east5-a (default: the engine's)")
    launch.add_argument("--spot", action="store_true", help="capacity that may be taken away; asked for again then")
    launch.add_argument("--bucket", required=True, metavar="GS_URL", help="gs://BUCKET[/FOLDER] for all that must last")
    launch.add_argument(
        "--run", dest="run_name", metavar="NAME", help="the run's name: launched again, it goes on (default: from NAME)"
    )
    launch.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the hosts, with its value here or another; it is written into files: no place for secrets",
    )
    launch.add_argument(
        "--hours",
        action=whole(Range(1, 24 * 365, unit="hours")),
        metavar="N",
        help="with --engine gcloud: slices that are so old save and are given back, whatever they do (168)",
    )
    launch.add_argument("--arm", metavar="ARM", help="train this arm alone (default: compare all)")
    launch.add_argument("--out", action=AsPath, metavar="DIR", help=f"where files go (default: {RUNS}/launch/RUN)")
    launch.add_argument("--go", action="store_true", help="submit it; without, nothing leaves this machine")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--topology", metavar="TPU", help="compile for it instead: v5p:4x4x8, v5e-256, 2*v6e:16x16 (no TPU is needed)"
    )
    plan.add_argument(
        "--slices",
        action=whole(Range(1, 4096, unit="slices")),
        metavar="N",
        help="with --topology: so many of it, joined by DCN (1)",
    )
    plan.add_argument("--mesh", metavar="AXIS=N,...", help="with --topology: data=, fsdp=, tensor= and others")
    plan.add_argument(
        "--price",
        action=real(Range(0, 10**6, "(]", "USD")),
        metavar="USD",
        help="with --topology: of a chip-hour, not the list price",
    )
    plan.add_argument("--search", action="store_true", help="with --topology: find the best mesh, remat and rows")


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument(
        "source", action=AsPath, metavar="SOURCE", help="Hugging Face folder, T5X checkpoint, model folder, run"
    )
    convert.add_argument("destination", action=AsPath, metavar="DESTINATION", help="a folder that does not exist yet")
    convert.add_argument("--to", metavar="FORM", help="what it becomes beyond a model folder: hf, gpt or t5like")
    convert.add_argument(
        "--rung", action=whole(Range(0, 4)), metavar="N", help="with --to t5like: 0 (default) to 4 of the ladder"
    )
    convert.add_argument("--config", metavar="SIZE", help="the size of a T5X checkpoint, where shapes are not enough")
    convert.add_argument(
        "--tokenizer", action=AsPath, metavar="FILE", help="the SentencePiece model of a T5X checkpoint"
    )


def _add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("model", metavar="MODEL", help="a model folder, or an arm's run directory (DIR, DIR@STEP)")
    score.add_argument(
        "--file",
        action=AsPath,
        required=True,
        metavar="JSONL",
        help="a line each: {inputs, targets}, {context, continuation} or {text}, of text or of token ids",
    )
    score.add_argument("--out", action=AsPath, required=True, metavar="JSONL", help="the same lines with their scores")
    score.add_argument("--eos", action="store_true", help="score the end of each text too")
    score.add_argument(
        "--rows", action=whole(Rows), default=8, metavar="N", help="packed rows at a time on each device (8)"
    )
    score.add_argument(
        "--lengths", action=Lengths, metavar="N,N", help="tokens that a row may hold; the last bounds a text"
    )
    score.add_argument("--dtype", default="float32", metavar="DTYPE", help="float32 (default) or bfloat16")


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("model", metavar="MODEL", help="a model folder, or an arm's run directory (DIR, DIR@STEP)")
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    source.add_argument(
        "--file",
        action=AsPath,
        metavar="FILE",
        help="a prompt a line, or JSON lines with `prompt`; without --prompt and --file lines of standard input",
    )
    generate.add_argument("--out", action=AsPath, metavar="JSONL", help="write there; the same command resumes")
    generate.add_argument("--max-new-tokens", action=whole(), default=128, metavar="N", help="end token included (128)")
    generate.add_argument("--min-new-tokens", action=whole(), default=0, metavar="N", help="before an end token (0)")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    generate.add_argument("--temperature", action=real(), metavar="T", help="draw at this temperature; 0 is greedy")
    generate.add_argument("--top-k", action=whole(), metavar="K", help="draw among the K likeliest tokens")
    generate.add_argument("--top-p", action=real(), metavar="P", help="draw among the likeliest tokens of this mass")
    generate.add_argument("--beams", action=whole(), metavar="N", help="beam search")
    generate.add_argument("--length-penalty", action=real(), metavar="A", help="of beam search, as T5's (0.6)")
    generate.add_argument("--samples", action=whole(), default=1, metavar="N", help="texts for each prompt (1)")
    generate.add_argument("--seed", action=whole(), default=0, metavar="N", help="of what is drawn (0)")
    generate.add_argument("--rows", action=whole(), default=8, metavar="N", help="prompts at a time on each device (8)")
    generate.add_argument("--dtype", metavar="DTYPE", help="float32 or bfloat16 (default: float32 on CPU only)")


def take_late_overrides(options: argparse.Namespace, rest: list[str], command: argparse.ArgumentParser) -> None:
    """Adds overrides that follow an option, where argparse no longer looks for them; refuses anything else."""
    for argument in rest:
        if argument.startswith("-"):
            valid = set(re.findall(r"--[a-z-]+", command.format_help()))
            raise UserError(f"unknown option {argument.partition('=')[0]!r}: {nearest(argument, valid)}")
        if "overrides" not in options:
            raise UserError(f"unexpected argument {argument!r}; see {command.prog} --help")
    if rest:
        options.overrides = [*options.overrides, *rest]
