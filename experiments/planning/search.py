"""The best of all meshes, remat policies and micro-batches for a topology, by estimate.

A simple model of memory and time ranks all candidates in a moment. The first mesh is compiled with each remat policy,
then the next few candidates of the policy that proved best; of those that fit the one with the least estimate wins.
Every candidate trains on the same rows a step, so that what is learned stays the same: only how many of them a device
takes at a time differs. All arms share the config `train`, so one choice is made for all, by the sum of their steps.
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
from experiments.planning.guess import Guess, guess
from experiments.planning.jobs import Job, compile_all
from experiments.planning.table import outlook

MORE_MESHES = 2
"""Candidates that are compiled with the remat policy that proved best, beside the first mesh with each policy."""
SHOWN = 12
MOST_TENSOR = 8
ROOM = 0.9
"""Share of a device's memory that the simple model may fill."""
REMATS: tuple[Any, ...] = typing.get_args(typing.get_type_hints(Execution)["remat"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    experiment: Experiment
    guesses: dict[str, Guess]
    compiled: dict[str, Compiled] | None = None

    @property
    def bytes(self) -> float:
        return max(guess.bytes for guess in self.guesses.values())

    @property
    def guessed_seconds(self) -> float:
        """Nothing hidden, all arms."""
        return sum(guess.time.seconds[1] for guess in self.guesses.values())

    @property
    def fits(self) -> bool:
        return self.compiled is not None and all(answer.no_room is None for answer in self.compiled.values())

    def seconds(self, topology: Topology) -> tuple[float, float]:
        """By the compiled programs, all arms."""
        assert self.compiled
        times = [outlook(self.experiment, topology, arm, answer).time.seconds for arm, answer in self.compiled.items()]
        return sum(low for low, _ in times), sum(high for _, high in times)


def search(experiment: Experiment, topology: Topology, console: Console, mesh: MeshShape | None) -> list[Candidate]:
    """Candidates in the order of what the simple model says, those that were compiled with their answers.

    Raises UserError where no candidate's rows and widths divide.
    """
    all_ = [
        Candidate(experiment=changed, guesses={arm: guess(changed, topology, arm) for arm in changed.arms})
        for changed in _candidates(experiment, topology, mesh)
    ]
    if not all_:
        raise UserError(
            f"data.rows is {experiment.data.rows}, which divides over no mesh of {topology}; "
            f"nearest: {max(1, round(experiment.data.rows / topology.devices)) * topology.devices}"
        )
    usable = topology.facts.usable_hbm_bytes or topology.facts.hbm_bytes
    ranked = sorted(all_, key=lambda one: (max(1.0, one.bytes / (ROOM * usable)), one.guessed_seconds))
    console.print(f"{len(ranked)} candidates; compiling one mesh with each remat policy, then more meshes")
    alike = [(i, one) for i, one in enumerate(ranked) if one.experiment.train.mesh == ranked[0].experiment.train.mesh]
    firsts = {one.experiment.train.execution.remat: i for i, one in reversed(alike)}
    ranked = _compiled(ranked, sorted(firsts.values()), topology, console)
    best = best_of(ranked, topology)
    remat = (best or ranked[0]).experiment.train.execution.remat
    others = [i for i, one in enumerate(ranked) if one.experiment.train.execution.remat == remat and not one.compiled]
    return _compiled(ranked, others[:MORE_MESHES], topology, console)


def _compiled(
    candidates: Sequence[Candidate], chosen: Sequence[int], topology: Topology, console: Console
) -> list[Candidate]:
    """The same, with the compiler's answers for those at the places `chosen`."""
    found = list(candidates)
    answers = iter(
        compile_all(
            [
                Job(experiment=found[i].experiment, arm=arm, topology=topology)
                for i in chosen
                for arm in found[i].experiment.arms
            ],
            console,
        )
    )
    for i in chosen:
        found[i] = dataclasses.replace(found[i], compiled={arm: next(answers) for arm in found[i].experiment.arms})
    return found


def best_of(candidates: Sequence[Candidate], topology: Topology) -> Candidate | None:
    """The compiled one that fits and takes least, in the middle of its estimate; None where none fits."""
    return min((one for one in candidates if one.fits), key=lambda one: sum(one.seconds(topology)), default=None)


def candidates_table(base: Experiment, candidates: Sequence[Candidate], topology: Topology) -> Table:
    """What was chosen from: the first by the simple model, all that were compiled, and which is best.

    Rows are those of a device at one time, and how many times; seconds are those of all arms.
    """
    best = best_of(candidates, topology)
    first = candidates[0].experiment
    shown = [one for i, one in enumerate(candidates) if i < SHOWN or one.compiled]
    table = Table(
        title=marked_up(
            f"{first.name} on {topology}: {len(candidates)} candidates, {first.data.rows:,} rows a step; rows of a "
            "device at a time, seconds of all arms"
        ),
        box=box.SIMPLE_HEAD,
        padding=0,  # fits 80 columns
        caption=marked_up(
            f"best: {overrides(base, best.experiment)}"
            if best
            else "none of those that were compiled fits: take more chips, or chips with more memory"
        ),
    )
    meshes = [one.experiment.train.mesh.sizes() for one in shown]
    axes = [axis for axis in MESH_AXES if any(mesh[axis] > 1 for mesh in meshes)]
    for column in (*axes, "remat", "rows", "guess\nGiB", "guess\ns", "libtpu\nGiB", "libtpu\ns"):
        table.add_column(column, justify="right", no_wrap=True)
    for one, mesh in zip(shown, meshes, strict=True):
        train = one.experiment.train
        table.add_row(
            *(str(mesh[axis]) for axis in axes),
            train.execution.remat,
            f"{first.data.rows / train.mesh.row_parts / train.accumulation:g}"
            + (f" x {train.accumulation}" if train.accumulation > 1 else ""),
            f"{one.bytes / 2**30:.1f}",
            f"{one.guessed_seconds:.3g}",
            "" if not one.compiled else _compiled_gib(one.compiled),
            "" if not one.fits else "{:.3g}-{:.3g}".format(*one.seconds(topology)),
            style="bold" if one is best else None,
        )
    return table


def overrides(base: Experiment, changed: Experiment) -> str:
    """What the command line takes to run `base` like this."""
    train, before = changed.train, base.train
    words = [
        f"train.mesh.{axis}={size}" for axis, size in train.mesh.sizes().items() if before.mesh.sizes()[axis] != size
    ]
    if train.execution != before.execution:
        words.append(f"train.execution.remat={train.execution.remat}")
    if train.accumulation != before.accumulation:
        words.append(f"train.accumulation={train.accumulation}")
    return " ".join(words) or "as the experiment has it"


def _candidates(experiment: Experiment, topology: Topology, mesh: MeshShape | None) -> Iterator[Experiment]:
    for shape, remat in itertools.product([mesh] if mesh else _meshes(experiment, topology), REMATS):
        share = experiment.data.rows // shape.row_parts
        if experiment.data.rows % shape.row_parts:
            continue
        for accumulation in (2**power for power in range(share.bit_length())):
            if share % accumulation == 0:
                execution = dataclasses.replace(experiment.train.execution, remat=remat)
                train = dataclasses.replace(
                    experiment.train, mesh=shape, execution=execution, accumulation=accumulation
                )
                yield dataclasses.replace(experiment, train=train)


def _meshes(experiment: Experiment, topology: Topology) -> Iterator[MeshShape]:
    """Over data, fsdp, context and tensor, where every arm's widths and the lengths divide; slices are replicas."""
    devices = topology.devices // topology.slices
    models = [arm.model for arm in experiment.arms.values()]
    widths = [n for m in models for n in (m.num_heads, m.num_kv_heads, m.d_ff, m.vocab_size)]
    _, *lengths = experiment.row_slots()
    for tensor, context in itertools.product(range(1, MOST_TENSOR + 1), _divisors(devices)):
        of_rows, left = divmod(devices, tensor * context)
        if left or any(width % tensor for width in widths) or any(length % context for length in lengths):
            continue
        for fsdp in _divisors(of_rows):
            if all(model.d_model % fsdp == 0 for model in models):
                sizes = {"data": of_rows // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}
                yield MeshShape(replica=topology.slices, **sizes)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _compiled_gib(compiled: dict[str, Compiled]) -> str:
    if any(answer.no_room for answer in compiled.values()):
        return "no room"
    return f"{max(answer.memory.total for answer in compiled.values() if answer.memory) / 2**30:.1f}"
