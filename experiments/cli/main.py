"""The command line: `twinstack list | plan | data | train | compare | launch | report | convert | score | generate`.

Nothing heavy is imported until a command needs it, so that `twinstack --help` answers at once.
"""

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError, nearest
from common.paths import check_folder, user_path
from common.terminal import harmless
from common.train.run_files import ExperimentFiles, RunFiles
from experiments.cli.arguments import RUNS, parsers, take_late_overrides
from experiments.cli.endings import ending
from experiments.cli.options import check_text

if TYPE_CHECKING:
    from experiments.config import Experiment

DATA_ACTIONS = ("show", "prepare")
PCI, GOOGLE = Path("/sys/bus/pci/devices"), "0x1ae0"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 2 for a mistake of the user's, 130 for an interruption.

    A run that SIGTERM ends is saved first, and raises SystemExit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return ending(lambda: _run(arguments), arguments)


def _run(arguments: list[str]) -> int:
    check_text(arguments)
    parser, commands = parsers()
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    if first is not None and first not in commands:
        raise UserError(f"unknown command {first!r}: {nearest(first, commands)}")
    options, rest = parser.parse_known_args(arguments)
    take_late_overrides(options, rest, commands.get(options.command, parser))
    if options.version:
        print(f"twinstack {_version()}")
    elif options.command is None:
        parser.print_help()
        return 2
    else:
        tell_jax_where_no_tpu_is()
        COMMANDS[options.command](options)
    return 0


def tell_jax_where_no_tpu_is() -> None:
    """To be called before JAX is imported.

    Where libtpu is installed for planning alone, JAX would ask the network about its TPUs, and complain.
    """
    no_libtpu = importlib.util.find_spec("libtpu") is None
    if no_libtpu or any(path.read_text().strip() == GOOGLE for path in PCI.glob("*/vendor")):
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if importlib.util.find_spec("jax_plugins") is None:  # nor any other accelerator's
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


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
    if (arm := getattr(options, "arm", None)) is not None and arm not in experiment.arms:
        raise UserError(f"unknown arm {arm!r}: {nearest(arm, experiment.arms)}")
    experiment = apply_overrides(experiment, [*_init_overrides(options, experiment), *options.overrides])
    if (reference := getattr(options, "match", None)) is not None:
        widths = experiment.matching(reference)
        print(harmless(f"--match {reference}: {' '.join(widths) or 'all arms do'}"), file=sys.stderr)
        options.overrides = [*options.overrides, *widths]  # a launched job is given them too
        experiment = apply_overrides(experiment, widths)
    if not options.print_config:
        return experiment
    import json

    print(harmless(json.dumps(to_json(experiment), indent=2, ensure_ascii=False)))
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
    return own if (user_path(run_dir) / arm / RunFiles.CONFIG).is_file() else model


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

        from experiments.planning.plan import Target, plan

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
    given = [name for name in ("workers", "to", "beam") if getattr(options, name) is not None]
    if options.action != "prepare" and given:
        raise UserError(f"--{given[0]} is for `twinstack data prepare`, not for {options.action}")
    if options.beam is not None and options.to is None:
        raise UserError("--beam needs a folder or url that its workers share: put --to before it")
    if experiment := _experiment(options):
        from rich.console import Console

        if options.action == "show":
            from experiments.cli.show_data import show

            show(experiment, options.rows, Console())
        else:
            from experiments.cli.prepare_data import prepare_data

            prepare_data(experiment, Console(), workers=options.workers, to=options.to, beam=options.beam)


def _train(options: argparse.Namespace) -> None:
    if experiment := _experiment(options):
        run_dir = _run_dir(options)
        from common.train.distributed import joined
        from experiments.running.comparison import train

        with joined(options.coordinator, options.processes, options.process):
            train(experiment, options.arm, run_dir, profile_steps=options.profile)


def _run_dir(options: argparse.Namespace) -> Path:
    run_dir = RUNS / options.name if options.run_dir is None else options.run_dir
    check_folder(run_dir, "--run-dir")
    return run_dir


def _compare(options: argparse.Namespace) -> None:
    if experiment := _experiment(options):
        run_dir = _run_dir(options)
        from common.train.distributed import joined
        from experiments.running.comparison import compare

        with joined(options.coordinator, options.processes, options.process):
            compare(experiment, run_dir, profile_steps=options.profile)


def _launch(options: argparse.Namespace) -> None:
    experiment = _experiment(options)
    if experiment is None:
        return
    from rich.console import Console

    from experiments.launching.job import Bucket, Job, run_name, variables
    from experiments.launching.launch import ENGINES, launch
    from experiments.launching.readable import check_readable
    from experiments.launching.slices import rentable
    from experiments.launching.source import committed

    if options.engine not in ENGINES:
        raise UserError(f"--engine {options.engine!r}: {nearest(options.engine, ENGINES)}")
    job = Job(
        run=run_name(options.name) if options.run_name is None else options.run_name,
        experiment=options.name,
        overrides=tuple(options.overrides),
        arm=options.arm,
        topology=rentable(options.topology, options.slices),
        bucket=Bucket.of(options.bucket),
        zone=options.zone,
        spot=options.spot,
        commit=committed(),
        variables=variables(options.env, os.environ),
        hours=options.hours,
    )
    arms = list(experiment.arms) if options.arm is None else [options.arm]
    experiment.check_arms(arms)
    check_readable(experiment, arms, job)
    folder = RUNS / "launch" / job.run if options.out is None else options.out
    check_folder(folder, "--out")
    launch(job, experiment, options.engine, folder, Console(), go=options.go)


def _report(options: argparse.Namespace) -> None:
    run_dir = next((path for path in (options.source, RUNS / options.source) if _is_run(path)), None)
    if run_dir is None:
        runs = [path.name for path in RUNS.glob("*") if _is_run(path)]
        raise UserError(
            f"{str(options.source)!r} is no run directory, nor is {RUNS / options.source}: "
            f"{nearest(str(options.source), runs)}"
        )
    from experiments.running.comparison import report

    print(harmless(str(report(run_dir, options.figure))))


def _convert(options: argparse.Namespace) -> None:
    from rich.console import Console

    from experiments.models.convert import convert
    from experiments.running.console import Progress

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
    print(*map(harmless, remarks), sep="\n")


def _score(options: argparse.Namespace) -> None:
    if options.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {options.dtype}: {nearest(options.dtype, ('float32', 'bfloat16'))}")
    from common.infer.score import LENGTHS
    from common.recipe import Execution
    from experiments.cli.score import score_file

    execution = Execution(dtype=options.dtype)
    score_file(
        options.model,
        options.file,
        options.out,
        execution=execution,
        rows=options.rows,
        lengths=LENGTHS if options.lengths is None else options.lengths,
        eos=options.eos,
    )


def _generate(options: argparse.Namespace) -> None:
    from common.infer.config import Limits
    from experiments.cli.generate import Job, execution_here, generate, method_of, read_prompts

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
    return (path / ExperimentFiles.EXPERIMENT).is_file()


COMMANDS = {
    "list": _list,
    "plan": _plan,
    "data": _data,
    "train": _train,
    "compare": _compare,
    "launch": _launch,
    "report": _report,
    "convert": _convert,
    "score": _score,
    "generate": _generate,
}
