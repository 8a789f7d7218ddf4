"""The options of each command, and their help texts."""

import argparse
import re
from pathlib import Path
from typing import NoReturn

from common.errors import UserError, nearest
from common.ranges import Range, Rows
from experiments.cli.elsewhere import add_elsewhere
from experiments.cli.options import AsDataAction, AsDtype, AsLengths, AsPath, AsStudy, real, whole

RUNS = Path("runs")
PROFILE_STEPS = 5
"""Steps that `--profile` without a number traces."""


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser of the command line, and those of its commands by name."""
    parser = Parser(prog="twinstack", description="Trains sibling model families side by side.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        commands[name] = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        return commands[name]

    add("list", "print the studies and the question that each asks")
    plan = add("plan", "print what a study costs and whether it fits, here or on a TPU slice; trains nothing")
    _add_plan(plan)
    data = add(
        "data", "print the data of training: `data show NAME`; or tokenize them ahead of a run: `data prepare NAME`"
    )
    _add_data(data)
    run = add("run", "train and score whatever is missing of a study, print the results and write the report")
    _add_status(add("status", "print how far the runs of a study are, from any terminal"))
    _add_results(add("results", "write one tidy table of everything that a study has measured"))
    _add_new(add("new", "write a study to start from"))
    launch = add("launch", "train on Cloud TPU: write the files for SkyPilot or gcloud, and with --go submit them")
    report = add("report", "write report.html from the results in a study's directory")
    for command in (plan, data, run, launch):
        command.add_argument(
            "name", action=AsStudy, metavar="STUDY", help="a study of `twinstack list`, or a Python file's path"
        )
        command.add_argument(
            "overrides",
            metavar="path.to.field=value",
            nargs="*",
            help="replaces a field of the study or of its arms; LABEL=VALUE selects arms",
        )
        command.add_argument("--print-config", action="store_true", help="print the resolved config as JSON and stop")
    for command in (plan, run, launch):
        command.add_argument(
            "--match", metavar="ARM", help="give each other arm the d_ff at which it takes as many FLOPs as this arm"
        )
    _add_training(run)
    add_elsewhere(run)
    _add_launch(launch)
    _add_convert(
        add(
            "convert",
            "convert a foreign checkpoint or a run into a model folder, or a model folder into another format",
        )
    )
    _add_score(add("score", "score the texts of a file: their log-likelihoods under a trained model"))
    _add_generate(add("generate", "generate text from a trained model: one text is streamed, several are JSON lines"))
    _add_report(report)
    return parser, commands


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("source", metavar="STUDY_OR_DIR", help=f"a study under {RUNS}/, or a study's directory")
    report.add_argument("--figure", action=AsPath, metavar="FILE", help="also write a figure of all arms, as SVG")


def _add_data(data: argparse.ArgumentParser) -> None:
    data.add_argument(
        "action",
        action=AsDataAction,
        metavar="ACTION",
        help="show: print rows as both families read them; prepare: tokenize the data before a run",
    )
    data.add_argument(
        "--rows", action=whole(Range(1, 10**4, unit="rows")), default=2, metavar="N", help="show: number of rows (2)"
    )
    data.add_argument(
        "--workers",
        action=whole(Range(1, 4096, unit="processes")),
        metavar="N",
        help="prepare: number of processes (default: one per core)",
    )
    data.add_argument(
        "--to", metavar="FOLDER_OR_URL", help="prepare: where tokens go; runs find them there by $TWINSTACK_PREPARED"
    )
    data.add_argument(
        "--beam",
        nargs=argparse.REMAINDER,
        metavar="--OPTION=VALUE",
        help="prepare: use Apache Beam; all further arguments are Beam's (--runner=DataflowRunner ...)",
    )


def _add_training(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run-dir", action=AsPath, metavar="DIR", help=f"where results go (default: {RUNS}/STUDY)")
    command.add_argument(
        "--config", action=AsPath, metavar="FILE", help="use the config that --print-config printed into FILE"
    )
    command.add_argument(
        "--jobs",
        action=whole(Range(1, 1024, unit="processes")),
        default=1,
        metavar="N",
        help="train N runs at a time, in processes that share the cores (1)",
    )
    command.add_argument("--worker", action=whole(Range(0, 1023)), metavar="I", help=argparse.SUPPRESS)
    command.add_argument(
        "--init-from",
        metavar="MODEL",
        help="start from the parameters of a model folder or of another run (DIR, DIR@STEP; each arm from its own arm "
        "if DIR is a study's); arms.ARM.init.rules sets how parameters that differ are loaded",
    )
    command.add_argument(
        "--profile",
        action=whole(Range(0, 10_000, unit="steps")),
        nargs="?",
        const=PROFILE_STEPS,
        default=0,
        metavar="STEPS",
        help=f"trace STEPS steps ({PROFILE_STEPS}) of each launch into DIR/RUN/profile, for XProf or TensorBoard",
    )
    command.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0; Cloud TPU, GKE, SLURM and Open MPI need none of these three options",
    )
    command.add_argument("--processes", action=whole(), metavar="N", help="number of processes; 1: this one is alone")
    command.add_argument("--process", action=whole(), metavar="I", help="index of this process, 0 to N-1")


def _add_status(status: argparse.ArgumentParser) -> None:
    status.add_argument(
        "source", nargs="?", metavar="STUDY_OR_DIR", help=f"a study under {RUNS}/, or its directory (default: all)"
    )


def _add_results(results: argparse.ArgumentParser) -> None:
    results.add_argument("source", metavar="STUDY_OR_DIR", help=f"a study under {RUNS}/, or its directory")
    results.add_argument(
        "rows", nargs="*", metavar="COLUMN=VALUE", help="write only the rows with this value: group=all compared=True"
    )
    results.add_argument(
        "--out", action=AsPath, required=True, metavar="FILE", help="where the table goes: .csv or .parquet"
    )


def _add_new(new: argparse.ArgumentParser) -> None:
    new.add_argument("name", metavar="NAME", help="the study's name; NAME.py is written")
    new.add_argument(
        "--data",
        action=AsPath,
        metavar="FILE",
        help="pairs to train on: .tsv with a header, or .jsonl",
    )


def _add_launch(launch: argparse.ArgumentParser) -> None:
    launch.add_argument(
        "--topology",
        metavar="TPU",
        required=True,
        help="a slice by its chip grid, v5p:4x4x8, or by its accelerator type, v5p-256",
    )
    launch.add_argument(
        "--slices",
        action=whole(Range(1, 4096, unit="slices")),
        default=1,
        metavar="N",
        help="with --engine gcloud: number of slices, as Multislice (1)",
    )
    launch.add_argument("--engine", default="sky", metavar="ENGINE", help="sky (default): SkyPilot; or gcloud")
    launch.add_argument("--zone", metavar="ZONE", help="such as us-east5-a (default: the engine's)")
    launch.add_argument(
        "--spot", action="store_true", help="use preemptible capacity; it is requested again after a preemption"
    )
    launch.add_argument(
        "--bucket",
        required=True,
        metavar="GS_URL",
        help="gs://BUCKET[/FOLDER] for everything that must outlive the slice",
    )
    launch.add_argument(
        "--run",
        metavar="NAME",
        help="the run's name; launching it again resumes it (default: made from the study's)",
    )
    launch.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable for the hosts, by default with its value here; no secrets: files hold it",
    )
    launch.add_argument(
        "--hours",
        action=whole(Range(1, 24 * 365, unit="hours")),
        metavar="N",
        help="with --engine gcloud: after so many hours a slice saves and is deleted, finished or not (168)",
    )
    launch.add_argument("--out", action=AsPath, metavar="DIR", help=f"where files go (default: {RUNS}/launch/RUN)")
    launch.add_argument("--go", action="store_true", help="submit the job; without it nothing leaves this machine")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--topology", metavar="TPU", help="compile for this slice: v5p:4x4x8, v5e-256, 2*v6e:16x16 (no TPU is needed)"
    )
    plan.add_argument(
        "--slices",
        action=whole(Range(1, 4096, unit="slices")),
        metavar="N",
        help="with --topology: number of slices, connected by DCN (1)",
    )
    plan.add_argument(
        "--mesh", metavar="AXIS=N,...", help="with --topology: sizes of data, fsdp, tensor and other axes"
    )
    plan.add_argument(
        "--price",
        action=real(Range(0, 10**6, "(]", "USD")),
        metavar="USD",
        help="with --topology: the price of a chip-hour (default: list price)",
    )
    plan.add_argument("--search", action="store_true", help="with --topology: find the best mesh, remat and rows")


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument(
        "source", action=AsPath, metavar="SOURCE", help="Hugging Face folder, T5X checkpoint, model folder, run"
    )
    convert.add_argument("destination", action=AsPath, metavar="DESTINATION", help="a folder that does not exist yet")
    convert.add_argument(
        "--to", metavar="FORM", help="convert further: to hf (Hugging Face), or to the other family, gpt or t5like"
    )
    convert.add_argument(
        "--rung", action=whole(Range(0, 4)), metavar="N", help="with --to t5like: rung of the ladder, 0 (default) to 4"
    )
    convert.add_argument(
        "--config", metavar="SIZE", help="the size's name, for a T5X checkpoint whose shapes do not determine it"
    )
    convert.add_argument(
        "--tokenizer", action=AsPath, metavar="FILE", help="the SentencePiece model for a T5X checkpoint"
    )


def _add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("model", metavar="MODEL", help="a model folder, or an arm's run directory (DIR, DIR@STEP)")
    score.add_argument(
        "--file",
        action=AsPath,
        required=True,
        metavar="JSONL",
        help="each line {inputs, targets}, {context, continuation} or {text}, each a text or a list of token ids",
    )
    score.add_argument("--out", action=AsPath, required=True, metavar="JSONL", help="the same lines with their scores")
    score.add_argument("--eos", action="store_true", help="also score the end token of each text")
    score.add_argument(
        "--rows", action=whole(Rows), default=8, metavar="N", help="packed rows per device and batch (8)"
    )
    score.add_argument(
        "--lengths",
        action=AsLengths,
        metavar="N,N",
        help="allowed lengths of rows in tokens; the longest limits a text",
    )
    score.add_argument(
        "--dtype", action=AsDtype, default="float32", metavar="DTYPE", help="float32 (default) or bfloat16"
    )


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("model", metavar="MODEL", help="a model folder, or an arm's run directory (DIR, DIR@STEP)")
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeatable")
    source.add_argument(
        "--file",
        action=AsPath,
        metavar="FILE",
        help="one prompt per line, or JSON lines with `prompt`; without --prompt and --file: lines of standard input",
    )
    generate.add_argument(
        "--out", action=AsPath, metavar="JSONL", help="write JSON lines there; the same command resumes"
    )
    generate.add_argument(
        "--max-new-tokens", action=whole(), default=128, metavar="N", help="including the end token (128)"
    )
    generate.add_argument(
        "--min-new-tokens", action=whole(), default=0, metavar="N", help="before the end token is allowed (0)"
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable"
    )
    generate.add_argument("--temperature", action=real(), metavar="T", help="sample at this temperature; 0 is greedy")
    generate.add_argument("--top-k", action=whole(), metavar="K", help="sample among the K likeliest tokens")
    generate.add_argument(
        "--top-p", action=real(), metavar="P", help="sample among the likeliest tokens with this probability mass"
    )
    generate.add_argument("--beams", action=whole(), metavar="N", help="beam search")
    generate.add_argument(
        "--length-penalty", action=real(), metavar="A", help="length penalty of beam search, as in T5 (0.6)"
    )
    generate.add_argument("--samples", action=whole(), default=1, metavar="N", help="texts per prompt (1)")
    generate.add_argument("--seed", action=whole(), default=0, metavar="N", help="seed of sampling (0)")
    generate.add_argument("--rows", action=whole(), default=8, metavar="N", help="prompts per device and batch (8)")
    generate.add_argument(
        "--dtype", action=AsDtype, metavar="DTYPE", help="float32 or bfloat16 (default: float32 on CPU)"
    )


def take_late_overrides(options: argparse.Namespace, rest: list[str], command: argparse.ArgumentParser) -> None:
    """Adds the overrides that follow an option to `options.overrides`.

    argparse reads the overrides that directly follow NAME, and returns later ones as unknown arguments, `rest`: of
    `run STUDY a=1 --jobs 2 b=2` it reads a=1 and leaves b=2.

    Raises UserError for unknown options, and for arguments of a command that takes no overrides.
    """
    for argument in rest:
        if argument.startswith("-"):
            valid = set(re.findall(r"--[a-z-]+", command.format_help()))
            raise UserError(f"unknown option {argument.partition('=')[0]!r}: {nearest(argument, valid)}")
        if "overrides" not in options:
            raise UserError(f"unexpected argument {argument!r}; see {command.prog} --help")
    if rest:
        options.overrides = [*options.overrides, *rest]
