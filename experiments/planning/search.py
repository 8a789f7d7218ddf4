"""Searches the meshes, remat policies and micro-batches of a topology for the one with the shortest estimated step.

A simple model of memory and time (`guess`) ranks all candidates in a moment. The mesh of the best candidate is compiled
with each remat policy, then the next few candidates that have the best of these policies. Among the compiled candidates
that fit, the one with the shortest estimate wins. Every candidate trains on the same rows per step, so the result of
training stays the same; only how many rows a device computes at a time differs. All arms get the same mesh, policy and
number of micro-batches, so the search compares the seconds of one step of every arm, summed.
"""

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Callable, Iterator, Sequence
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
from common.train.config import TrainConfig
from experiments.planning.compiling import PlannedProgram, compile_all
from experiments.planning.guess import Guess, guess
from experiments.planning.table import estimate_run
from experiments.run import Run
from experiments.study import Study

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

    study: Study
    """The study with this choice in every arm."""
    guesses: dict[str, Guess]
    """Arm -> the simple model's memory and time."""
    compiled: dict[str, Compiled] | None = None
    """Arm -> its compiled step; None until the search compiles this candidate."""

    @property
    def train(self) -> TrainConfig:
        """The first arm's; mesh, remat policy and accumulation are those of all."""
        return next(iter(self.study.arms.values())).train

    @property
    def mesh(self) -> MeshShape:
        return self.train.mesh

    @property
    def remat(self) -> str:
        return self.train.execution.remat

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
        times = [
            estimate_run(self.study.arms[arm], topology, program).time.seconds for arm, program in self.compiled.items()
        ]
        return sum(low for low, _ in times), sum(high for _, high in times)


def search(study: Study, topology: Topology, console: Console, mesh: MeshShape | None) -> list[Candidate]:
    """Returns all candidates, best first by the simple model, of which the most promising few are compiled.

    `mesh` (None: any) restricts the search to one mesh. Raises UserError if not all arms' rows divide over a mesh, or
    over `mesh`.
    """
    candidates = [
        Candidate(study=changed, guesses={arm: guess(run, topology) for arm, run in changed.arms.items()})
        for changed in _changed_studies(study, topology, mesh)
    ]
    if not candidates:
        rows, parts = _batch_rows(study), topology.devices if mesh is None else mesh.row_parts
        where = (
            f"divides over no mesh of {topology}" if mesh is None else f"does not divide over the mesh's {parts} parts"
        )
        near = " and ".join(str(max(1, round(each / parts)) * parts) for each in rows)
        raise UserError(f"data.rows is {' and '.join(map(str, rows))}, which {where}; nearest: {near}")
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
    programs = [
        PlannedProgram(name=arm, run=run, topology=topology)
        for i in chosen
        for arm, run in candidates[i].study.arms.items()
    ]
    compiled = iter(compile_all(programs, console))
    result = list(candidates)
    for i in chosen:
        result[i] = dataclasses.replace(result[i], compiled={arm: next(compiled) for arm in result[i].study.arms})
    return result


def best_of(candidates: Sequence[Candidate], topology: Topology) -> Candidate | None:
    """Returns the candidate that fits with the shortest step, by the middle of its estimate; None if none fits."""
    return min((one for one in candidates if one.fits), key=lambda one: sum(one.seconds(topology)), default=None)


def candidates_table(base: Study, candidates: Sequence[Candidate], topology: Topology) -> Table:
    """Returns a table of the best candidates by the simple model and of all compiled ones, with the best in bold.

    The column `rows` has the rows of one micro-batch on one device, then the micro-batches of a step if there are
    several: `4 x 2`. The columns `guess` are from the simple model, `libtpu` from the compiled programs.
    """
    best = best_of(candidates, topology)
    shown = [one for i, one in enumerate(candidates) if i < SHOWN or one.compiled]
    title = (
        f"{base.name} on {topology}: {len(candidates)} candidates, {_joined(_batch_rows(base))} rows a step; "
        "below, rows are those of a device at a time, GiB of the largest arm, s of all arms"
    )
    caption = "none of the compiled candidates fits: take more chips, or chips with more memory"
    if best:
        caption = f"best: {overrides(base, best)}"
    table = Table(title=marked_up(title), box=box.SIMPLE_HEAD, padding=0, caption=marked_up(caption))  # fits 80 columns
    axes = [axis for axis in MESH_AXES if any(one.mesh.sizes()[axis] > 1 for one in shown)]
    for column in (*axes, "remat", "rows", "guess\nGiB", "guess\ns", "libtpu\nGiB", "libtpu\ns"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in shown:
        table.add_row(*_candidate_cells(one, axes, topology), style="bold" if one is best else None)
    return table


def _candidate_cells(candidate: Candidate, axes: Sequence[str], topology: Topology) -> list[str]:
    """Returns the cells of one line of the table: sizes of the mesh `axes`, then the other columns."""
    sizes, accumulation = candidate.mesh.sizes(), candidate.train.accumulation
    rows = _joined([rows // candidate.mesh.row_parts // accumulation for rows in _batch_rows(candidate.study)])
    return [
        *(str(sizes[axis]) for axis in axes),
        candidate.remat,
        f"{rows} x {accumulation}" if accumulation > 1 else rows,
        f"{candidate.bytes / 2**30:.1f}",
        f"{candidate.guessed_seconds:.3g}",
        _compiled_gib(candidate.compiled) if candidate.compiled else "",
        "{:.3g}-{:.3g}".format(*candidate.seconds(topology)) if candidate.fits else "",
    ]


def overrides(base: Study, best: Candidate) -> str:
    """Returns the command-line overrides that give every arm of `base` this choice."""

    def differs(value: Callable[[TrainConfig], Any]) -> bool:
        return any(value(run.train) != value(best.train) for run in base.arms.values())

    words = [
        f"train.mesh.{axis}={size}"
        for axis, size in best.mesh.sizes().items()
        if differs(lambda train, axis=axis: train.mesh.sizes()[axis])  # type: ignore[misc]
    ]
    if differs(lambda train: train.execution.remat):
        words.append(f"train.execution.remat={best.remat}")
    if differs(lambda train: train.accumulation):
        words.append(f"train.accumulation={best.train.accumulation}")
    return " ".join(words) or "the study's own settings"


def with_choice(run: Run, mesh: MeshShape, remat: Any, accumulation: int) -> Run:
    """Returns the run with this mesh, remat policy and accumulation, which change no result."""
    execution = dataclasses.replace(run.train.execution, remat=remat)
    train = dataclasses.replace(run.train, mesh=mesh, execution=execution, accumulation=accumulation)
    return dataclasses.replace(run, train=train)


def _changed_studies(study: Study, topology: Topology, mesh: MeshShape | None) -> Iterator[Study]:
    """Yields the study with every mesh (or only `mesh`), remat policy and accumulation that divides every arm's rows.

    Accumulation is a power of two.
    """
    rows = math.gcd(*_batch_rows(study))  # what divides all, divides this
    for shape in [mesh] if mesh else _meshes(study, topology):
        device_rows = rows // shape.row_parts
        if rows % shape.row_parts:
            continue
        for remat, power in itertools.product(REMATS, range(device_rows.bit_length())):
            if device_rows % 2**power == 0:
                choice = functools.partial(with_choice, mesh=shape, remat=remat, accumulation=2**power)
                yield study.edited(choice)


def _batch_rows(study: Study) -> list[int]:
    """Returns the rows of a batch, each number once: arms may differ."""
    return sorted({run.data.rows for run in study.arms.values()})


def _joined(numbers: Sequence[int]) -> str:
    return "/".join(f"{number:,}" for number in numbers)


def _meshes(study: Study, topology: Topology) -> Iterator[MeshShape]:
    """Yields the meshes that use every device of the topology and divide every arm evenly; each slice is a replica.

    Tensor divides heads, `d_ff` and the vocabulary; context divides the lengths of a row; fsdp divides `d_model`.
    """
    devices = topology.devices // topology.slices
    models = [run.model for run in study.arms.values()]
    widths = [n for m in models for n in (m.num_heads, m.num_kv_heads, m.d_ff, m.vocab_size)]
    lengths = {length for run in study.arms.values() for length in run.row_slots[1:]}
    for tensor, context in itertools.product(range(1, MOST_TENSOR + 1), _divisors(devices)):
        data_and_fsdp, rest = divmod(devices, tensor * context)
        if rest or any(width % tensor for width in widths) or any(length % context for length in lengths):
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
