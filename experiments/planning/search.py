"""The best of all meshes, remat policies and micro-batches for a topology, by estimate.

A simple model of memory and time ranks all candidates in a moment. The first mesh is compiled with each remat policy,
then the next few candidates of the policy that proved best; of those that fit the one with the least estimate wins.
Every candidate trains on the same rows a step, so that what is learned stays the same: only how many of them a device
takes at a time differs. All arms share the config `train`, so one choice is made for all, by the sum of their steps.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from common.compute.aot import Compiled
from common.compute.ledger import attention_parameters, mlp_parameters
from common.compute.length_sums import LengthSums
from common.compute.roofline import Estimate
from common.compute.topology import Topology
from common.errors import UserError
from common.recipe import Execution
from common.sharding.shape import MESH_AXES, MeshShape
from common.terminal import marked_up
from common.train.config import AdamW
from experiments.config import Arm, Experiment
from experiments.planning.jobs import Job, compile_all
from experiments.planning.table import outlook
from gpt.config import GptConfig

MORE_MESHES = 2
"""Candidates that are compiled with the remat policy that proved best, beside the first mesh with each policy."""
SHOWN = 12
MOST_TENSOR = 8
ROOM = 0.9
"""Share of a device's memory that the simple model may fill."""
REMATS: tuple[Any, ...] = typing.get_args(typing.get_type_hints(Execution)["remat"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """What the simple model says of one arm."""

    bytes: float
    time: Estimate


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


def guess(experiment: Experiment, topology: Topology, arm: str) -> Guess:
    """The simple model, of one device: state and gradients divided by fsdp and tensor, what remat keeps of each layer,
    one layer's weights, keys, values and logits at work; weights gathered for every pass, gradients scattered and
    summed, the residual stream summed along tensor, keys and values gathered along context. Padding, copies and the
    compiler's choices are not in it."""
    model, train, chip = experiment.arms[arm].model, experiment.train, topology.facts
    mesh, remat = train.mesh, train.execution.remat
    fsdp, data, context, tensor = mesh.fsdp, mesh.data, mesh.context, mesh.tensor
    recompute = 0 if remat in ("none", "dots") else 1
    rows, inputs, targets = experiment.row_slots()
    at_once = rows / mesh.row_parts / train.accumulation
    passes = train.accumulation * (2 + recompute)
    parameters = model.param_count() / tensor
    state = 4 + (8 if isinstance(train.optimizer, AdamW) else 0) + 4 * (1 + (train.accumulation > 1))
    stacks = _stacks(experiment.arms[arm], inputs, targets)
    tokens = at_once * sum(layers * slots for layers, slots in stacks) / context
    kept, whole = _activation_bytes(experiment.arms[arm], tensor)
    seen = 4 * model.num_kv_heads * model.head_dim / tensor  # a token's keys and values in a layer, bf16
    layer = (attention_parameters(model) + mlp_parameters(model)) / tensor
    logits = min(train.execution.loss_chunk, at_once * targets / context) * model.vocab_size / tensor
    queries = min(train.execution.attention_block, inputs / context)
    scores = at_once * model.num_heads / tensor * queries * (inputs + targets)
    # Without rematerialisation what lies between the products is kept too.
    held = tokens * {"none": 3 * whole, "dots": whole, "attention": 2 * kept, "full": kept, "offload": 0}[remat]
    work = 4 * layer + 8 * scores + 8 * logits + at_once * max(slots for _, slots in stacks) * seen
    head = model.d_model * model.vocab_size / tensor
    flops = model.flops(LengthSums.of_rows(rows, inputs, targets)).of_slowest(context).train_hardware(train.execution)
    sent = 2 * parameters * (passes + train.accumulation) * (fsdp - 1) / fsdp / _links(fsdp, topology)
    for summed in (data, context):
        sent += 4 * parameters / fsdp * (summed - 1) / summed / _links(summed, topology)
    sent += passes * tokens * seen * (context - 1) / _links(context, topology)
    sums = (4 + 2 * recompute) * train.accumulation * tokens * model.d_model * 2
    sent += sums * 2 * (tensor - 1) / tensor / _links(tensor, topology)
    between = 4 * parameters / fsdp * (topology.slices - 1) / topology.slices
    moved = 4 * parameters * passes + (6 + 2 * recompute) * train.accumulation * tokens * whole
    return Guess(
        bytes=state * parameters / fsdp + held + work + 4 * head,
        time=Estimate(
            compute=flops / topology.devices / chip.flops_per_second,
            memory=(moved + 2 * state * parameters / fsdp) / chip.hbm_bytes_per_second,
            links=sent * chip.devices_per_chip / chip.link_bytes_per_second,
            data_centre=between * chip.devices_per_chip / chip.dcn_bytes_per_second,
        ),
    )


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


def _stacks(arm: Arm, inputs: int, targets: int) -> list[tuple[int, int]]:
    """(layers, slots that pass them) of each stack."""
    model = arm.model
    if isinstance(model, GptConfig):
        return [(model.num_layers, inputs + targets)]
    return [(model.encoder_layers, inputs), (model.decoder_layers, targets)]


def _activation_bytes(arm: Arm, tensor: int) -> tuple[int, int]:
    """Of one token in one layer, in bf16: the stream that enters it, and the results of all its matrix products."""
    model = arm.model
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    mlp = (2 if model.recipe.gated_mlp else 1) * model.d_ff
    return 2 * model.d_model, 2 * (3 * model.d_model + (heads + mlp) // tensor)


def _links(size: int, topology: Topology) -> float:
    """How many links carry a ring of so many devices: two for each direction that it needs."""
    chips = math.ceil(size / topology.facts.devices_per_chip)
    directions = 0
    for side in sorted(topology.grid):
        if chips > 1:
            chips, directions = math.ceil(chips / side), directions + 1
    return 2.0 * max(directions, 1)


def _compiled_gib(compiled: dict[str, Compiled]) -> str:
    if any(answer.no_room for answer in compiled.values()):
        return "no room"
    return f"{max(answer.memory.total for answer in compiled.values() if answer.memory) / 2**30:.1f}"
