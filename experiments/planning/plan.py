"""`twinstack plan`: what a study costs and whether it fits, on this machine or on a TPU slice elsewhere."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from rich.console import Console

from common.compute.aot import Compiled
from common.compute.topology import Topology, parse_topology
from common.errors import UserError, nearest
from common.sharding.shape import MESH_AXES, MeshShape
from common.terminal import marked_up
from common.train.programs import check_rows
from experiments.planning.compiling import PlannedProgram, compile_all
from experiments.planning.here import plan_here
from experiments.planning.search import candidates_table, search, with_choice
from experiments.planning.table import advice, plan_table
from experiments.run import Run
from experiments.running.pipeline import make_setup
from experiments.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The hardware to plan for, as given on the command line."""

    topology: str
    slices: int = 1
    mesh: str | None = None
    price: float | None = None
    """USD per chip-hour; None: the list price."""
    search: bool = False


def plan(study: Study, console: Console, target: Target | None = None) -> None:
    """Prints each arm's size, cost and memory; compiles the training step for `target` (None: this machine) only."""
    study.check()
    if target is None:
        plan_here(study, console)
    else:
        _plan_for_target(study, console, target)
    for line in study.remarks():
        console.print(marked_up(f"warning: {line}"))


def _plan_for_target(study: Study, console: Console, target: Target) -> None:
    topology = parse_topology(target.topology, target.slices)
    if target.price is not None and not target.price > 0:
        raise UserError(f"--price is {target.price:g}: it must be more than 0, in USD per chip-hour")
    mesh = _parse_mesh(target.mesh, topology)
    if target.search:
        found = search(study, topology, console, mesh)
        console.print(candidates_table(study, found, topology))
        return
    study = study.edited(lambda run: on_mesh(run, topology, mesh))
    compiled = _compile(study, topology, console)
    console.print(plan_table(study, topology, compiled, target.price))
    for line in [*advice(study, topology, compiled), *_try_smaller(study, topology, compiled, console)]:
        console.print(marked_up(line))


def on_mesh(run: Run, topology: Topology, mesh: MeshShape | None) -> Run:
    """Returns the run on `mesh`, else on its own mesh if that has the topology's devices, else on fsdp alone.

    Raises UserError if its rows do not divide over the mesh.
    """
    own = run.train.mesh
    if mesh is None:
        fits = own.devices == topology.devices and own.replica == topology.slices
        mesh = own if fits else _fsdp_alone(topology)
    changed = dataclasses.replace(run, train=dataclasses.replace(run.train, mesh=mesh))
    check_rows(make_setup(changed))
    return changed


def _fsdp_alone(topology: Topology) -> MeshShape:
    return MeshShape(replica=topology.slices, fsdp=topology.devices // topology.slices)


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


def _compile(study: Study, topology: Topology, console: Console) -> dict[str, Compiled]:
    programs = [PlannedProgram(name=arm, run=run, topology=topology) for arm, run in study.arms.items()]
    return dict(zip(study.arms, compile_all(programs, console), strict=True))


def _try_smaller(study: Study, topology: Topology, compiled: dict[str, Compiled], console: Console) -> list[str]:
    """If some arms do not fit, compiles smaller variants until one fits for all of them; returns a line about it."""
    too_large = {arm: study.arms[arm] for arm, program in compiled.items() if program.out_of_memory}
    if not too_large:
        return []
    for changes, words in _smaller_variants(list(too_large.values()), topology):
        console.print(marked_up(f"trying {words}"))
        programs = [
            PlannedProgram(name=arm, run=run, topology=topology) for arm, run in zip(too_large, changes, strict=True)
        ]
        if not any(program.out_of_memory for program in compile_all(programs, console)):
            return [f"With {words} {' and '.join(too_large)} would fit."]
    return ["None of these variants fits: try --search for other meshes, or take more chips or fewer data.rows."]


def _smaller_variants(runs: Sequence[Run], topology: Topology) -> Iterator[tuple[list[Run], str]]:
    """Yields the runs with settings that need less memory for the same batch, and the overrides that make them so."""
    own = max(run.train.accumulation for run in runs)
    for accumulation in (own, 2 * own, 4 * own, 8 * own):
        if any(run.data.rows % (run.train.mesh.row_parts * accumulation) for run in runs):
            break
        changed = [with_choice(run, run.train.mesh, "full", accumulation) for run in runs]
        if changed != runs:
            more = any(run.train.accumulation != accumulation for run in runs)
            yield changed, "train.execution.remat=full" + (f" train.accumulation={accumulation}" if more else "")
    mesh = _fsdp_alone(topology)
    if any(run.train.mesh != mesh for run in runs) and not any(run.data.rows % mesh.row_parts for run in runs):
        changed = [with_choice(run, mesh, "full", run.train.accumulation) for run in runs]
        yield changed, f"--mesh {mesh} train.execution.remat=full"
