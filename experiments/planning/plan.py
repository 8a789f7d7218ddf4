"""`twinstack plan`: what an experiment costs and whether it fits, on this machine or on a TPU slice elsewhere."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.table import Table

from common.compute.aot import Compiled
from common.compute.length_sums import LengthSums
from common.compute.topology import Topology, parse_topology
from common.config import to_json
from common.errors import UserError, nearest
from common.sharding.shape import MESH_AXES, MeshShape
from common.terminal import harmless, marked_up
from common.train.programs import check_rows
from experiments.config import Experiment
from experiments.models.initial import check_initial
from experiments.planning.compiling import PlannedProgram, compile_all
from experiments.planning.search import candidates_table, search
from experiments.planning.table import advice, plan_table
from experiments.running.jax_setup import set_up_jax
from experiments.running.pipeline import check_devices, compiled_step, make_setup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The hardware to plan for, as given on the command line."""

    topology: str
    slices: int = 1
    mesh: str | None = None
    price: float | None = None
    """USD per chip-hour; None: the list price."""
    search: bool = False


def plan(experiment: Experiment, console: Console, target: Target | None = None) -> None:
    """Prints each arm's size, cost and memory; compiles the training step for `target` (None: this machine) only."""
    experiment.check_arms(experiment.arms)
    if target is None:
        _plan_here(experiment, console)
    else:
        _plan_for_target(experiment, console, target)
    for line in experiment.remarks():
        console.print(marked_up(f"warning: {line}"))


def _plan_for_target(experiment: Experiment, console: Console, target: Target) -> None:
    topology = parse_topology(target.topology, target.slices)
    if target.price is not None and not target.price > 0:
        raise UserError(f"--price is {target.price:g}: it must be more than 0, in USD per chip-hour")
    if target.search:
        found = search(experiment, topology, console, _parse_mesh(target.mesh, topology))
        console.print(candidates_table(experiment, found, topology))
        return
    experiment = on_mesh(experiment, topology, _parse_mesh(target.mesh, topology))
    compiled = _compile(experiment, topology, console)
    console.print(plan_table(experiment, topology, compiled, target.price))
    for line in [*advice(experiment, topology, compiled), *_try_smaller(experiment, topology, compiled, console)]:
        console.print(marked_up(line))


def on_mesh(experiment: Experiment, topology: Topology, mesh: MeshShape | None) -> Experiment:
    """Returns the experiment on `mesh`, else on its own mesh if that has the topology's devices, else on fsdp alone.

    Raises UserError if its rows do not divide over the mesh.
    """
    own = experiment.train.mesh
    if mesh is None:
        fits = own.devices == topology.devices and own.replica == topology.slices
        default = MeshShape(replica=topology.slices, fsdp=topology.devices // topology.slices)
        mesh = own if fits else default
    changed = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, mesh=mesh))
    check_rows(make_setup(changed, next(iter(changed.arms.values()))))
    return changed


def _parse_mesh(text: str | None, topology: Topology) -> MeshShape | None:
    """Parses a mesh such as `data=2,fsdp=8`, which must have the topology's devices; `replica` need not be named."""
    if text is None:
        return None
    sizes = {"replica": topology.slices}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES:
            raise UserError(f"--mesh {text}: unknown axis {axis!r}, {nearest(axis, MESH_AXES)}")
        if not re.fullmatch(r"[0-9]{1,9}", size):
            raise UserError(f"--mesh {text}: {part!r} must be AXIS=NUMBER, such as fsdp=8")
        sizes[axis] = int(size)
    mesh = MeshShape(**sizes)
    if mesh.replica != topology.slices:
        raise UserError(f"--mesh {text}: replica counts slices, and {topology} has {topology.slices}")
    if mesh.devices != topology.devices:
        others = mesh.devices // mesh.fsdp
        close = max(1, topology.devices // others)
        raise UserError(
            f"--mesh {text} has {mesh.devices} devices, {topology} has {topology.devices}; nearest: "
            f"{dataclasses.replace(mesh, fsdp=close)}"
        )
    return mesh


def _compile(experiment: Experiment, topology: Topology, console: Console) -> dict[str, Compiled]:
    programs = [PlannedProgram(experiment=experiment, arm=arm, topology=topology) for arm in experiment.arms]
    return dict(zip(experiment.arms, compile_all(programs, console), strict=True))


def _try_smaller(
    experiment: Experiment, topology: Topology, compiled: dict[str, Compiled], console: Console
) -> list[str]:
    """If some arms do not fit, compiles smaller variants until one fits for all of them; returns a line about it."""
    too_large = [arm for arm, program in compiled.items() if program.out_of_memory]
    if not too_large:
        return []
    only = dataclasses.replace(experiment, arms={arm: experiment.arms[arm] for arm in too_large})
    for changed, words in _smaller_variants(only):
        console.print(marked_up(f"trying {words}"))
        if not any(program.out_of_memory for program in _compile(changed, topology, console).values()):
            return [f"With {words} {' and '.join(too_large)} would fit."]
    return ["None of these variants fits: try --search for other meshes, or take more chips or fewer data.rows."]


def _smaller_variants(experiment: Experiment) -> Sequence[tuple[Experiment, str]]:
    """Variants that need less memory for the same batch, each with the overrides that make it."""
    train, rows = experiment.train, experiment.data.rows
    execution = dataclasses.replace(train.execution, remat="full")
    found = []
    for accumulation in (train.accumulation * factor for factor in (1, 2, 4, 8)):
        if rows % (train.mesh.row_parts * accumulation):
            break
        changed = dataclasses.replace(train, execution=execution, accumulation=accumulation)
        if changed != train:
            words = "train.execution.remat=full" + (
                f" train.accumulation={accumulation}" if accumulation > train.accumulation else ""
            )
            found.append((dataclasses.replace(experiment, train=changed), words))
    mesh = MeshShape(replica=train.mesh.replica, fsdp=train.mesh.devices // train.mesh.replica)
    if mesh != train.mesh and rows % mesh.row_parts == 0:
        changed = dataclasses.replace(train, execution=execution, mesh=mesh)
        found.append((dataclasses.replace(experiment, train=changed), f"--mesh {mesh} train.execution.remat=full"))
    return found


def _plan_here(experiment: Experiment, console: Console) -> None:
    set_up_jax()
    check_devices(experiment, experiment.arms)
    for line in check_initial(experiment, None):
        console.print(marked_up(line))
    steps, slots = experiment.steps(), experiment.row_slots()
    padded = LengthSums.of_rows(*slots)
    shape = f"{slots[0]} rows x ({slots[1]} + {slots[2]}) slots"
    table = Table(title=marked_up(f"{experiment.name}: {steps:,} steps of {shape}"))
    columns = {}
    for name, arm in experiment.arms.items():
        flops = arm.model.flops(padded)
        with console.status(marked_up(f"compiling {name} for {jax.devices()[0].device_kind}")):
            memory: Any = compiled_step(experiment, arm).memory_analysis()
        columns[name] = {
            "parameters": f"{arm.model.param_count():,}",
            "FLOPs per step": f"{flops.train_full_attention:.4g}",
            "training FLOPs": f"{steps * flops.train_full_attention:.3e}",
            "  causal half": f"{steps * flops.train_causal_half:.3e}",
            "  6ND": f"{steps * flops.train_six_nd:.3e}",
            "token slots": f"{steps * slots[0] * (slots[1] + slots[2]):,}",
            "state and batch": f"{memory.argument_size_in_bytes / 2**20:,.0f} MiB",
            "temporaries": f"{memory.temp_size_in_bytes / 2**20:,.0f} MiB",
        }
    table.add_column("")
    for name in columns:
        table.add_column(marked_up(name), justify="right")
    for label in next(iter(columns.values())):
        table.add_row(label, *(column[label] for column in columns.values()))
    console.print(table)
    console.print(
        "FLOPs count full attention and padding, unless named otherwise. Memory is per device, as XLA plans it."
    )
    config = json.dumps(to_json(experiment), indent=2, ensure_ascii=False)
    console.print(JSONHighlighter()(harmless(config)), soft_wrap=True)
