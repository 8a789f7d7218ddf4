"""The command line: `twinstack list | plan | data | train | compare | launch | report | convert | score | generate`.

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
PROFILE_STEPS = 5
DATA_ACTIONS = ("show", "prepare")


class _Parser(argparse.ArgumentParser):
    """Raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 2 for a mistake of the user's, 130 for an interruption.

    A run that SIGTERM ends is saved first, and raises SystemExit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except UserError as error:
        print(f"twinstack: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumable = arguments[:1] in (["train"], ["compare"])
        print(f"\ntwinstack: interrupted{_hint(arguments) if resumable else ''}", file=sys.stderr)
        return 130
    except SystemExit as stopped:
        if (step := getattr(stopped, "step", None)) is not None:
            print(f"\ntwinstack: asked to end, step {step} is saved{_hint(arguments)}", file=sys.stderr)
        raise


def _hint(arguments: Sequence[str]) -> str:
    return f"; the same command resumes: twinstack {shlex.join(arguments)}"


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
    plan = add("plan", _plan, "print every arm's cost and memory, here or on a TPU slice; trains nothing")
    _add_plan(plan)
    data = add("data", _data, "print what a model is trained on: `data show NAME`; or make it: `data prepare NAME`")
    data.add_argument("action", metavar="ACTION", help="show: rows as both families read them; prepare: ahead of a run")
    data.add_argument("--rows", type=int, default=2, metavar="N", help="show: how many rows (2)")
    data.add_argument("--workers", type=int, metavar="N", help="prepare: processes (as many as there are cores)")
    data.add_argument(
        "--to", metavar="FOLDER_OR_URL", help="prepare: put tokens there, for $TWINSTACK_PREPARED to name"
    )
    data.add_argument(
        "--beam",
        nargs=argparse.REMAINDER,
        metavar="--OPTION=VALUE",
        help="prepare: by Apache Beam, to which all that follows goes (--runner=DataflowRunner ...)",
    )
    train = add("train", _train, "train one arm, or go on with it where it stopped")
    compare = add("compare", _compare, "train all arms, print them side by side and write the report")
    launch = add("launch", _launch, "train on Cloud TPU: write what SkyPilot or gcloud needs, with --go submit it")
    report = add("report", _report, "write report.html from what a run directory holds")
    for command in (plan, data, train, compare, launch):
        command.add_argument("name", metavar="NAME", help="an experiment of `twinstack list`")
        command.add_argument("overrides", metavar="path.to.field=value", nargs="*", help="replaces a config's field")
        command.add_argument("--print-config", action="store_true", help="print the resolved config as JSON and stop")
    for command in (train, compare):
        command.add_argument("--run-dir", type=Path, metavar="DIR", help=f"where results go (default: {RUNS}/NAME)")
        command.add_argument(
            "--init-from",
            metavar="MODEL",
            help="begin with the parameters of a model folder or of another run (DIR, DIR@STEP; arm by arm where it is "
            "a whole comparison's); arms.ARM.init.rules says what becomes of parameters that differ",
        )
        command.add_argument(
            "--profile",
            type=int,
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
        command.add_argument("--processes", type=int, metavar="N", help="how many there are; 1: this one is alone")
        command.add_argument("--process", type=int, metavar="I", help="which one this is, 0 to N-1")
    train.add_argument("--arm", required=True, metavar="ARM", help="which arm; `twinstack plan NAME` names them")
    _add_launch(launch)
    convert = add("convert", _convert, "turn a foreign checkpoint into a model folder, or a model folder into another")
    convert.add_argument(
        "source", type=Path, metavar="SOURCE", help="Hugging Face folder, T5X checkpoint, model folder, run"
    )
    convert.add_argument("destination", type=Path, metavar="DESTINATION", help="a folder that does not exist yet")
    convert.add_argument("--to", metavar="FORM", help="what a model folder becomes: hf, gpt or t5like")
    convert.add_argument("--rung", type=int, metavar="N", help="with --to t5like: 0 (default) to 4 of the ladder")
    convert.add_argument("--config", metavar="SIZE", help="the size of a T5X checkpoint, where shapes are not enough")
    convert.add_argument("--tokenizer", type=Path, metavar="FILE", help="the SentencePiece model of a T5X checkpoint")
    score = add("score", _score, "log-likelihoods of a file's texts under a trained model")
    score.add_argument("model", metavar="MODEL", help="a model folder, or an arm's run directory (DIR, DIR@STEP)")
    score.add_argument(
        "--file",
        type=Path,
        required=True,
        metavar="JSONL",
        help="a line each: {inputs, targets}, {context, continuation} or {text}, of text or of token ids",
    )
    score.add_argument("--out", type=Path, required=True, metavar="JSONL", help="the same lines with their scores")
    score.add_argument("--eos", action="store_true", help="score the end of each text too")
    score.add_argument("--rows", type=int, default=8, metavar="N", help="packed rows at a time on each device (8)")
    score.add_argument("--lengths", metavar="N,N", help="tokens that a row may hold; the last bounds a text")
    score.add_argument("--dtype", default="float32", metavar="DTYPE", help="float32 (default) or bfloat16")
    _add_generate(add("generate", _generate, "text from a trained model: shown as it is made, or many as JSON lines"))
    report.add_argument("source", metavar="NAME_OR_RUN_DIR", help=f"an experiment under {RUNS}/, or a run directory")
    report.add_argument("--figure", type=Path, metavar="FILE", help="write the drawing of all arms too, as SVG")
    return parser, commands


def _add_launch(launch: argparse.ArgumentParser) -> None:
    launch.add_argument(
        "--topology",
        metavar="TPU",
        required=True,
        help="one slice by its grid of chips, v5p:4x4x8, or by its accelerator type, v5p-256",
    )
    launch.add_argument("--slices", type=int, default=1, metavar="N", help="with --engine gcloud: Multislice (1)")
    launch.add_argument("--engine", default="sky", metavar="ENGINE", help="sky (default): SkyPilot; or gcloud")
    launch.add_argument("--zone", metavar="ZONE", help="such as us-east5-a (default: the engine's)")
    launch.add_argument("--spot", action="store_true", help="capacity that may be taken away; asked for again then")
    launch.add_argument("--bucket", required=True, metavar="GS_URL", help="gs://BUCKET[/FOLDER] for all that must last")
    launch.add_argument(
        "--run", dest="run_name", metavar="NAME", help="the run's name: launched again, it goes on (default: from NAME)"
    )
    launch.add_argument("--arm", metavar="ARM", help="train this arm alone (default: compare all)")
    launch.add_argument("--out", type=Path, metavar="DIR", help=f"where files go (default: {RUNS}/launch/RUN)")
    launch.add_argument("--go", action="store_true", help="submit it; without, nothing leaves this machine")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--topology", metavar="TPU", help="compile for it instead: v5p:4x4x8, v5e-256, 2*v6e:16x16 (no TPU is needed)"
    )
    plan.add_argument("--slices", type=int, metavar="N", help="with --topology: so many of it, joined by DCN (1)")
    plan.add_argument("--mesh", metavar="AXIS=N,...", help="with --topology: data=, fsdp=, tensor= and others")
    plan.add_argument("--price", type=float, metavar="USD", help="with --topology: of a chip-hour, not the list price")
    plan.add_argument("--search", action="store_true", help="with --topology: find the best mesh, remat and rows")


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("model", metavar="MODEL", help="a model folder, or an arm's run directory (DIR, DIR@STEP)")
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    source.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help="a prompt a line, or JSON lines with `prompt`; without --prompt and --file lines of standard input",
    )
    generate.add_argument("--out", type=Path, metavar="JSONL", help="write there; the same command resumes")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="end token included (128)")
    generate.add_argument("--min-new-tokens", type=int, default=0, metavar="N", help="before an end token (0)")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    generate.add_argument("--temperature", type=float, metavar="T", help="draw at this temperature; 0 is greedy")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of this mass")
    generate.add_argument("--beams", type=int, metavar="N", help="beam search")
    generate.add_argument("--length-penalty", type=float, metavar="A", help="of beam search, as T5's (0.6)")
    generate.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (1)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    generate.add_argument("--rows", type=int, default=8, metavar="N", help="prompts at a time on each device (8)")
    generate.add_argument("--dtype", metavar="DTYPE", help="float32 or bfloat16 (default: float32 on CPU only)")


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

    experiment = load(options.name)
    experiment = apply_overrides(experiment, [*_init_overrides(options, experiment), *options.overrides])
    if not options.print_config:
        return experiment
    import json

    print(json.dumps(to_json(experiment), indent=2, ensure_ascii=False))
    return None


def _init_overrides(options: argparse.Namespace, experiment: "Experiment") -> list[str]:
    """`--init-from` as overrides of the arms that it is for."""
    if getattr(options, "init_from", None) is None:
        return []
    import json

    arms = [options.arm] if "arm" in options else experiment.arms
    return [f"arms.{arm}.init.path={json.dumps(_arm_of(options.init_from, arm))}" for arm in arms]


def _arm_of(model: str, arm: str) -> str:
    """The arm's own directory where `model` is that of a whole comparison, `DIR` or `DIR@STEP`; else `model` itself."""
    run_dir = re.sub(r"@\d+$", "", model)
    own = f"{Path(run_dir) / arm}{model.removeprefix(run_dir)}"
    return own if (Path(run_dir).expanduser() / arm / "config.json").is_file() else model


def _list(options: argparse.Namespace) -> None:
    from experiments.registry import EXPERIMENTS

    width = max(map(len, EXPERIMENTS), default=0)
    for name, question in EXPERIMENTS.items():
        print(f"{name:<{width}}  {question}")


def _plan(options: argparse.Namespace) -> None:
    given = [name for name in ("slices", "mesh", "price", "search") if getattr(options, name) not in (None, False)]
    if given and options.topology is None:
        raise UserError(f"--{given[0]} is for a TPU slice: name it by --topology, such as --topology v5e:4x4")
    if experiment := _experiment(options):
        from rich.console import Console

        from experiments.plan import Target, plan

        target = None
        if options.topology is not None:
            target = Target(
                topology=options.topology,
                slices=1 if options.slices is None else options.slices,
                mesh=options.mesh,
                price=options.price,
                search=options.search,
            )
        plan(experiment, Console(), target)


def _data(options: argparse.Namespace) -> None:
    if options.action not in DATA_ACTIONS:
        raise UserError(f"unknown action {options.action!r}: {nearest(options.action, DATA_ACTIONS)}")
    if options.rows < 1:
        raise UserError(f"--rows is {options.rows}; the least is 1")
    given = [name for name in ("workers", "to", "beam") if getattr(options, name) is not None]
    if options.action != "prepare" and given:
        raise UserError(f"--{given[0]} is for `twinstack data prepare`, not for {options.action}")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers is {options.workers}; the least is 1")
    if options.beam is not None and options.to is None:
        raise UserError("--beam needs a folder or url that its workers share: put --to before it")
    if experiment := _experiment(options):
        from rich.console import Console

        if options.action == "show":
            from experiments.show_data import show

            show(experiment, options.rows, Console())
        else:
            from experiments.prepare_data import prepare_data

            prepare_data(experiment, Console(), workers=options.workers, to=options.to, beam=options.beam)


def _train(options: argparse.Namespace) -> None:
    if experiment := _experiment(options):
        _check_arm(options.arm, experiment)
        from common.train.distributed import joined
        from experiments.commands import train

        with joined(options.coordinator, options.processes, options.process):
            train(experiment, options.arm, options.run_dir or RUNS / options.name, profile_steps=options.profile)


def _check_arm(arm: str, experiment: "Experiment") -> None:
    if arm not in experiment.arms:
        raise UserError(f"unknown arm {arm!r}: {nearest(arm, experiment.arms)}")


def _compare(options: argparse.Namespace) -> None:
    if experiment := _experiment(options):
        from common.train.distributed import joined
        from experiments.commands import compare

        with joined(options.coordinator, options.processes, options.process):
            compare(experiment, options.run_dir or RUNS / options.name, profile_steps=options.profile)


def _launch(options: argparse.Namespace) -> None:
    experiment = _experiment(options)
    if experiment is None:
        return
    from rich.console import Console

    from experiments.launching.job import Bucket, Job, run_name
    from experiments.launching.launch import ENGINES, launch
    from experiments.launching.slices import rentable
    from experiments.launching.source import committed

    if options.arm is not None:
        _check_arm(options.arm, experiment)
    if options.engine not in ENGINES:
        raise UserError(f"--engine {options.engine!r}: {nearest(options.engine, ENGINES)}")
    job = Job(
        run=options.run_name or run_name(options.name),
        experiment=options.name,
        overrides=tuple(options.overrides),
        arm=options.arm,
        topology=rentable(options.topology, options.slices),
        bucket=Bucket.of(options.bucket),
        zone=options.zone,
        spot=options.spot,
        commit=committed(),
    )
    folder = options.out or RUNS / "launch" / job.run
    launch(job, experiment.train.mesh, options.engine, folder, Console(), go=options.go)


def _report(options: argparse.Namespace) -> None:
    run_dir = next((path for path in (Path(options.source), RUNS / options.source) if _is_run(path)), None)
    if run_dir is None:
        runs = [path.name for path in RUNS.glob("*") if _is_run(path)]
        raise UserError(
            f"{options.source!r} is no run directory, nor is {RUNS / options.source}: {nearest(options.source, runs)}"
        )
    from experiments.commands import report

    print(report(run_dir, options.figure))


def _convert(options: argparse.Namespace) -> None:
    from rich.console import Console

    from experiments.console import Progress
    from experiments.convert import convert

    progress = Progress(Console(stderr=True))
    remarks = convert(
        options.source,
        options.destination,
        progress,
        to=options.to,
        rung=options.rung,
        config_name=options.config,
        tokenizer=options.tokenizer,
    )
    print(*remarks, sep="\n")


def _score(options: argparse.Namespace) -> None:
    if options.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {options.dtype}: {nearest(options.dtype, ('float32', 'bfloat16'))}")
    if options.rows < 1:
        raise UserError(f"--rows is {options.rows}: it must be 1 or more")
    if options.lengths is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.lengths):
        raise UserError(f"--lengths {options.lengths!r} must be whole numbers with commas, such as 32,128,512")
    from common.infer.score import LENGTHS
    from common.nn.recipe import Execution
    from experiments.score import score_file

    lengths = LENGTHS if options.lengths is None else tuple(map(int, options.lengths.split(",")))
    execution = Execution(dtype=options.dtype)
    score_file(
        options.model,
        options.file,
        options.out,
        execution=execution,
        rows=options.rows,
        lengths=lengths,
        eos=options.eos,
    )


def _generate(options: argparse.Namespace) -> None:
    from common.infer.config import Limits
    from experiments.generate import Job, execution_here, generate, method_of, read_prompts

    job = Job(
        method=method_of(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            beams=options.beams,
            length_penalty=options.length_penalty,
        ),
        limits=Limits(
            max_new_tokens=options.max_new_tokens, min_new_tokens=options.min_new_tokens, stop=tuple(options.stop)
        ),
        seed=options.seed,
        samples=options.samples,
        rows=options.rows,
    )
    prompts = options.prompt or read_prompts(options.file, sys.stdin)
    generate(options.model, prompts, job, execution=execution_here(options.dtype), out=options.out)


def _is_run(path: Path) -> bool:
    return (path / "experiment.json").is_file()


if __name__ == "__main__":
    sys.exit(main())
