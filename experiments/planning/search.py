"""Searches the meshes, remat policies and micro-batches of a topology for the one with the shortest estimated step.

A simple model of memory and time (`guess`) ranks all candidates in a moment. The mesh of the best candidate is compiled
with each remat policy, then the next few candidates that have the best of these policies. Among the compiled candidates
that fit, the one with the shortest estimate wins. Every candidate trains on the same rows per step, so the result of
training stays the same; only how many rows a device computes at a time differs. All arms share the config `train`, so
the search compares the seconds of one step of every arm, summed.
"""

import dataclasses
import itertools
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from common.compute.aot import Compiled
from common.compute.topology import Topology
from common.errors import UserError
from common.recipe import Execution
from common.sharding.shape import MESH_AXES, MeshShape
from common.terminal import marked_up
from experiments.config import Experiment
from experiments.planning.compiling import PlannedProgram, compile_all
from experiments.planning.guess import Guess, guess
from experiments.planning.table import estimate_arm

MORE_CANDIDATES = 2
"""How many candidates with the best remat policy are compiled after it is known."""
SHOWN = 12
"""How many of the best candidates by the simple model the table shows; it also shows every compiled one."""
MOST_TENSOR = 8
"""The largest size of the tensor axis."""
ROOM = 0.9
"""The share of a device's usable memory that a candidate may fill by the simple model before its rank falls."""
REMATS: tuple[Any, ...] = typing.get_args(typing.get_type_hints(Execution)["remat"])
"""Every remat policy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One choice of mesh, remat policy and accumulation, with what is known of each arm."""

    experiment: Experiment
    """The experiment with this choice in its config `train`."""
    guesses: dict[str, Guess]
    """Arm -> the simple model's memory and time."""
    compiled: dict[str, Compiled] | None = None
    """Arm -> its compiled step; None until the search compiles this candidate."""

    @property
    def mesh(self) -> MeshShape:
        return self.experiment.train.mesh

    @property
    def remat(self) -> str:
        return self.experiment.train.execution.remat

    @property
    def bytes(self) -> float:
        """Bytes that the largest arm needs on one device, by the simple model."""
        return max(of_arm.bytes for of_arm in self.guesses.values())

    @property
    def guessed_seconds(self) -> float:
        """Seconds of one step of every arm, summed, by the upper end of the simple model: no communication overlaps."""
        return sum(of_arm.time.seconds[1] for of_arm in self.guesses.values())

    @property
    def fits(self) -> bool:
        """Whether every arm is compiled and fits in a device's memory."""
        return self.compiled is not None and all(program.out_of_memory is None for program in self.compiled.values())

    def seconds(self, topology: Topology) -> tuple[float, float]:
        """Returns the lower and upper estimate of one step of every arm, summed, from the compiled programs."""
        assert self.compiled
        estimates = (estimate_arm(self.experiment, topology, arm, program) for arm, program in self.compiled.items())
        times = [estimate.time.seconds for estimate in estimates]
        return sum(low for low, _ in times), sum(high for _, high in times)


def search(experiment: Experiment, topology: Topology, console: Console, mesh: MeshShape | None) -> list[Candidate]:
    """Returns all candidates, best first by the simple model, of which the most promising few are compiled.

    `mesh` (None: any) restricts the search to one mesh. Raises UserError if the rows divide over no mesh, or not over
    `mesh`.
    """
    candidates = [
        Candidate(experiment=changed, guesses={arm: guess(changed, topology, arm) for arm in changed.arms})
        for changed in _changed_experiments(experiment, topology, mesh)
    ]
    if not candidates:
        rows, parts = experiment.data.rows, topology.devices if mesh is None else mesh.row_parts
        where = (
            f"divides over no mesh of {topology}" if mesh is None else f"does not divide over the mesh's {parts} parts"
        )
        raise UserError(f"data.rows is {rows}, which {where}; nearest: {max(1, round(rows / parts)) * parts}")
    usable = topology.chip_spec.usable_hbm_bytes or topology.chip_spec.hbm_bytes
    # Candidates that fit come first, by time; then the others, by memory.
    ranked = sorted(candidates, key=lambda one: (max(1.0, one.bytes / (ROOM * usable)), one.guessed_seconds))
    console.print(f"{len(ranked)} candidates; compiling the first mesh with each remat policy, then a few more")
    same_mesh = [(i, one.remat) for i, one in enumerate(ranked) if one.mesh == ranked[0].mesh]
    # Reversed, so that of each policy's candidates the best one is assigned last and stays.
    best_with_remat = {remat: i for i, remat in reversed(same_mesh)}
    ranked = _compile(ranked, sorted(best_with_remat.values()), topology, console)
    remat = (best_of(ranked, topology) or ranked[0]).remat
    others = [i for i, one in enumerate(ranked) if one.remat == remat and not one.compiled]
    return _compile(ranked, others[:MORE_CANDIDATES], topology, console)


def _compile(
    candidates: Sequence[Candidate], chosen: Sequence[int], topology: Topology, console: Console
) -> list[Candidate]:
    """Returns all candidates, in the same order, after compiling those at the indices `chosen`."""
    experiments = [candidates[i].experiment for i in chosen]
    programs = [
        PlannedProgram(experiment=experiment, arm=arm, topology=topology)
        for experiment in experiments
        for arm in experiment.arms
    ]
    compiled = iter(compile_all(programs, console))
    result = list(candidates)
    for i, experiment in zip(chosen, experiments, strict=True):
        result[i] = dataclasses.replace(result[i], compiled={arm: next(compiled) for arm in experiment.arms})
    return result


def best_of(candidates: Sequence[Candidate], topology: Topology) -> Candidate | None:
    """Returns the candidate that fits with the shortest step, by the middle of its estimate; None if none fits."""
    return min((one for one in candidates if one.fits), key=lambda one: sum(one.seconds(topology)), default=None)


def candidates_table(base: Experiment, candidates: Sequence[Candidate], topology: Topology) -> Table:
    """Returns a table of the best candidates by the simple model and of all compiled ones, with the best in bold.

    The column `rows` has the rows of one micro-batch on one device, then the micro-batches of a step if there are
    several: `4 x 2`. The columns `guess` are from the simple model, `libtpu` from the compiled programs.
    """
    best = best_of(candidates, topology)
    experiment = candidates[0].experiment
    shown = [one for i, one in enumerate(candidates) if i < SHOWN or one.compiled]
    title = (
        f"{experiment.name} on {topology}: {len(candidates)} candidates, {experiment.data.rows:,} rows a step; "
        "below, rows are those of a device at a time, GiB of the largest arm, s of all arms"
    )
    caption = "none of the compiled candidates fits: take more chips, or chips with more memory"
    if best:
        caption = f"best: {overrides(base, best.experiment)}"
    table = Table(title=marked_up(title), box=box.SIMPLE_HEAD, padding=0, caption=marked_up(caption))  # fits 80 columns
    axes = [axis for axis in MESH_AXES if any(one.mesh.sizes()[axis] > 1 for one in shown)]
    for column in (*axes, "remat", "rows", "guess\nGiB", "guess\ns", "libtpu\nGiB", "libtpu\ns"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in shown:
        table.add_row(*_candidate_cells(one, axes, topology), style="bold" if one is best else None)
    return table


def _candidate_cells(candidate: Candidate, axes: Sequence[str], topology: Topology) -> list[str]:
    """Returns the cells of one line of the table: sizes of the mesh `axes`, then the other columns."""
    experiment, sizes = candidate.experiment, candidate.mesh.sizes()
    accumulation = experiment.train.accumulation
    rows = f"{experiment.data.rows / candidate.mesh.row_parts / accumulation:g}"
    return [
        *(str(sizes[axis]) for axis in axes),
        candidate.remat,
        f"{rows} x {accumulation}" if accumulation > 1 else rows,
        f"{candidate.bytes / 2**30:.1f}",
        f"{candidate.guessed_seconds:.3g}",
        _compiled_gib(candidate.compiled) if candidate.compiled else "",
        "{:.3g}-{:.3g}".format(*candidate.seconds(topology)) if candidate.fits else "",
    ]


def overrides(base: Experiment, changed: Experiment) -> str:
    """Returns the command-line overrides that turn `base` into `changed`."""
    train, before = changed.train, base.train
    words = [
        f"train.mesh.{axis}={size}" for axis, size in train.mesh.sizes().items() if before.mesh.sizes()[axis] != size
    ]
    if train.execution != before.execution:
        words.append(f"train.execution.remat={train.execution.remat}")
    if train.accumulation != before.accumulation:
        words.append(f"train.accumulation={train.accumulation}")
    return " ".join(words) or "the experiment's own settings"


def _changed_experiments(experiment: Experiment, topology: Topology, mesh: MeshShape | None) -> Iterator[Experiment]:
    """Yields the experiment with every mesh (or only `mesh`), remat policy and accumulation that its rows divide over.

    Accumulation is a power of two.
    """
    for shape, remat in itertools.product([mesh] if mesh else _meshes(experiment, topology), REMATS):
        device_rows = experiment.data.rows // shape.row_parts
        if experiment.data.rows % shape.row_parts:
            continue
        for accumulation in (2**power for power in range(device_rows.bit_length())):
            if device_rows % accumulation == 0:
                execution = dataclasses.replace(experiment.train.execution, remat=remat)
                train = dataclasses.replace(
                    experiment.train, mesh=shape, execution=execution, accumulation=accumulation
                )
                yield dataclasses.replace(experiment, train=train)


def _meshes(experiment: Experiment, topology: Topology) -> Iterator[MeshShape]:
    """Yields the meshes that use every device of the topology and divide every arm evenly; each slice is a replica.

    Tensor divides heads, `d_ff` and the vocabulary; context divides the lengths of a row; fsdp divides `d_model`.
    """
    devices = topology.devices // topology.slices
    models = [arm.model for arm in experiment.arms.values()]
    widths = [n for m in models for n in (m.num_heads, m.num_kv_heads, m.d_ff, m.vocab_size)]
    _, inputs, targets = experiment.row_slots()
    for tensor, context in itertools.product(range(1, MOST_TENSOR + 1), _divisors(devices)):
        data_and_fsdp, rest = divmod(devices, tensor * context)
        if rest or any(width % tensor for width in widths) or inputs % context or targets % context:
            continue
        for fsdp in _divisors(data_and_fsdp):
            if all(model.d_model % fsdp == 0 for model in models):
                sizes = {"data": data_and_fsdp // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}
                yield MeshShape(replica=topology.slices, **sizes)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _compiled_gib(compiled: dict[str, Compiled]) -> str:
    """Returns the memory of the arm that needs most on one device, or "no room" if an arm does not fit."""
    if any(program.out_of_memory for program in compiled.values()):
        return "no room"
    return f"{max(program.memory.total for program in compiled.values() if program.memory) / 2**30:.1f}"
