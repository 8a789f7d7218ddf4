"""Prints what a study takes on this machine: runs, FLOPs, disk and time as a whole, then each arm."""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from common.report.units import duration, scientific, si
from common.terminal import harmless, marked_up
from experiments.models.initial import check_initial
from experiments.planning.timing import Measured, StepTime, measure, shape, step_time, to_measure
from experiments.planning.totals import RunCount, describe_runs, kept_checkpoints, state_bytes
from experiments.run import Run
from experiments.running.jax_setup import set_up_jax
from experiments.running.pipeline import check_devices
from experiments.study import Study

COLUMNS = 4
"""Up to so many arms are columns of a table with all facts; more arms are lines with a few facts."""
BUSY = 1.5
"""Runnable processes per core above which the machine is busy with more than this program."""


def plan_here(study: Study, console: Console) -> None:
    """Compiles and times the steps of a few arms and prints the plan; the study's steps are already equal."""
    set_up_jax()
    for name, run in study.arms.items():
        for line in check_initial(name, run, None):
            console.print(marked_up(line))
    shapes = {shape(run): run for run in study.arms.values()}
    bytes_of: dict[Hashable, int] = {}
    for key, run in shapes.items():
        check_devices(run)
        bytes_of[key] = state_bytes(run)
    names = {shape(run): name for name, run in reversed(study.arms.items())}
    measured: dict[Hashable, Measured] = {}
    for run in to_measure(list(shapes.values())):
        with console.status(marked_up(f"timing {names[shape(run)]} on {jax.devices()[0].device_kind}")):
            measured[shape(run)] = measure(run, measured)
    times = {name: step_time(run, measured) for name, run in study.arms.items()}
    untimed = [f"{names[key]} is not timed: {one.untimed}" for key, one in measured.items() if one.untimed]
    for line in [*totals(study, bytes_of, times), *untimed, *_busy()]:
        console.print(harmless(line), markup=False, highlight=False, soft_wrap=True)
    show = _columns if len(study.arms) <= COLUMNS else _lines
    console.print(show(study, bytes_of, measured, times))
    console.print(
        "FLOPs count full attention and padding, unless named otherwise. Memory is per device, as XLA plans it."
    )


def totals(study: Study, bytes_of: Mapping[Hashable, int], times: Mapping[str, StepTime | None]) -> list[str]:
    """Returns lines about the whole study: runs, FLOPs, disk and time.

    `bytes_of`: shape -> bytes of a checkpoint. `times`: arm -> time of its step, None where it is unknown.
    """
    count, arms = RunCount.of(study), study.arms
    flops = count.over({name: run.steps * run.flops_per_step for name, run in arms.items()})
    disk = count.over({name: kept_checkpoints(run) * bytes_of[shape(run)] for name, run in arms.items()})
    ratios = [bytes_of[shape(run)] / run.model.param_count() for run in arms.values()]
    kept = [kept_checkpoints(run) for run in arms.values()]
    lines = [
        f"runs: {describe_runs(study, count)}",
        f"training FLOPs: {_span(flops, lambda value: scientific(value, 3))}",
        f"checkpoints: {_span(disk, _size)} at most; a run keeps up to {_range(kept, '{:.0f}')} of them, each with "
        f"parameters and the optimizer's state, {_range(ratios, '{:.3g}')} bytes a parameter",
    ]
    known = {name: one for name, one in times.items() if one is not None}
    if len(known) < len(arms):
        return [*lines, "time here: unknown"]
    seconds = count.over({name: arms[name].steps * one.seconds for name, one in known.items()})
    by_flops = sum(one.by_flops for one in known.values())
    estimated = f"; {by_flops} of {len(arms)} arms by FLOPs from the timed ones" if by_flops else ""
    return [
        *lines,
        f"training here, one run at a time: {_span(seconds, duration)}{estimated}; start-up, compiling, validation and "
        "evaluation come on top",
    ]


def _busy() -> list[str]:
    """Returns a warning if other programs take part of this machine's time."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cores:
        return []
    return [f"other programs are running (load {load:.1f} on {cores} cores): alone, steps take less time"]


def _columns(
    study: Study,
    bytes_of: Mapping[Hashable, int],
    measured: Mapping[Hashable, Measured],
    times: Mapping[str, StepTime | None],
) -> Table:
    """Returns a table with a column for each arm; "-" stands for what is unknown."""
    table = Table("", title=marked_up(study.name))
    columns = []
    for name, run in study.arms.items():
        flops, one = run.model.flops(run.data.length_sums), measured.get(shape(run))
        steps, (rows, inputs, targets) = run.steps, run.row_slots
        seconds, training = _step_and_training(run, times[name])
        columns.append(
            {
                "parameters": f"{run.model.param_count():,}",
                "steps": f"{steps:,}",
                "rows": f"{rows:,} x ({inputs} + {targets}) slots",
                "FLOPs per step": f"{flops.train_full_attention:.4g}",
                "training FLOPs": f"{steps * flops.train_full_attention:.3e}",
                "  causal half": f"{steps * flops.train_causal_half:.3e}",
                "  6ND": f"{steps * flops.train_six_nd:.3e}",
                "token slots": f"{steps * rows * (inputs + targets):,}",
                "checkpoint": _size(bytes_of[shape(run)]),
                "state and batch": "-" if one is None else _size(one.arguments_bytes),
                "temporaries": "-" if one is None else _size(one.temporaries_bytes),
                "step here": seconds,
                "training here": training,
            }
        )
        table.add_column(marked_up(name), justify="right")
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def _lines(
    study: Study,
    bytes_of: Mapping[Hashable, int],
    measured: Mapping[Hashable, Measured],
    times: Mapping[str, StepTime | None],
) -> Table:
    """Returns a table with a line for each arm, for 80 columns; "-" stands for what is unknown."""
    table = Table(title=marked_up(study.name), box=SIMPLE_HEAD, padding=0)
    table.add_column("arm", overflow="fold", min_width=12)
    for label in ("parameters", "steps", "FLOPs", "checkpoint", "memory", "step", "training"):
        table.add_column(label, justify="right", no_wrap=True)
    for name, run in study.arms.items():
        one = measured.get(shape(run))
        table.add_row(
            marked_up(name),
            si(run.model.param_count()),
            f"{run.steps:,}",
            scientific(run.steps * run.flops_per_step),
            _size(bytes_of[shape(run)]),
            "-" if one is None else _size(one.arguments_bytes + one.temporaries_bytes),
            *_step_and_training(run, times[name]),
        )
    return table


def _step_and_training(run: Run, time: StepTime | None) -> tuple[str, str]:
    """Returns the time of a step and that of all steps; "~" marks an estimate by FLOPs."""
    if time is None:
        return "-", "-"
    about = "~" if time.by_flops else ""
    return f"{about}{time.seconds:.3g} s", f"{about}{duration(run.steps * time.seconds)}"


def _span(pair: tuple[float, float], show: Callable[[float], str]) -> str:
    least, most = map(show, pair)
    return least if least == most else f"{least} to {most}"


def _range(values: Sequence[float], form: str) -> str:
    """
    >>> _range([3, 3], "{:.0f}"), _range([12.0001, 4.2], "{:.3g}")
    ('3', '4.2 to 12')
    """
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _size(size: float) -> str:
    """
    >>> _size(2**21), _size(3 * 2**30)
    ('2 MiB', '3.0 GiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
