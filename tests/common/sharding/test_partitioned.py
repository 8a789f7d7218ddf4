"""The training step after XLA's partitioner: the shapes on a device, and the collectives."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from common.sharding.shape import MeshShape
from common.train.programs import lower_step, make_programs
from common.train.state import abstract_state
from tests.tiny import EXECUTION, jax_settings, setup, tiny, train_config

ROWS, INPUTS, TARGETS, CHUNK = 24, 24, 48, 24
WIDTHS = {"vocab_size": 1024, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "d_ff": 176}
"""Chosen so that no activation has the shape or the number of elements of a weight."""
LAYERS = 5
MESHES = [MeshShape(data=2, fsdp=4), MeshShape(fsdp=4, tensor=2), MeshShape(fsdp=2, context=4)]
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\((.*)$")

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: Shape
    kind: str
    operands: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Partitioned:
    """One device's program."""

    instructions: tuple[Instruction, ...]
    stored: tuple[Shape, ...]
    """Shape of each parameter's shard."""
    whole: tuple[Shape, ...]
    """Shape of each parameter."""

    def users(self, name: str) -> list[Instruction]:
        """Returns the instructions that use a result, also through copies and reshapes."""
        found = [user for user in self.instructions if name in user.operands]
        through = [u for user in found if user.kind in ("bitcast", "copy", "reshape") for u in self.users(user.name)]
        return through + [user for user in found if user.kind not in ("bitcast", "copy", "reshape")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((family, mesh), id=f"{family}-{mesh}", marks=[] if family == first else pytest.mark.slow)
        for mesh, first in zip(MESHES, ("gpt", "t5like", "gpt"), strict=True)
        for family in ("gpt", "t5like")
    ],
)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Partitioned:
    family, mesh = request.param
    layers = {"num_layers": LAYERS} if family == "gpt" else {"encoder_layers": LAYERS, "decoder_layers": LAYERS}
    model = dataclasses.replace(tiny(family), **WIDTHS, **layers)
    execution = dataclasses.replace(EXECUTION, scan_layers=True, remat="full", loss_chunk=CHUNK)
    made_of = setup(model, train_config(mesh=mesh, execution=execution))
    made_of = dataclasses.replace(made_of, row_slots=(ROWS, INPUTS, TARGETS))
    made = make_programs(made_of)
    folder = tmp_path_factory.mktemp("hlo")
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "spmd-partitioning"}
    with jax_settings({"jax_enable_compilation_cache": False}):  # a program from the cache is not dumped
        lower_step(made_of, made).compile(compiler_options=options)
    (path,) = folder.glob("*after_spmd-partitioning*")
    leaves = jax.tree.leaves(abstract_state(made.model, made.optimizer, made.shardings).params)
    return Partitioned(
        instructions=tuple(_instructions(path)),
        stored=tuple(x.sharding.shard_shape(x.shape) for x in leaves),
        whole=tuple(x.shape for x in leaves),
    )


def _instructions(path: Path) -> Iterator[Instruction]:
    for line in path.read_text().splitlines():
        if found := _INSTRUCTION.match(line):
            name, _, dims, kind, rest = found.groups()
            shape = tuple(int(size) for size in dims.split(",") if size)
            yield Instruction(name, shape, kind, tuple(re.findall(r"%[\w.-]+", rest.partition(")")[0])))


def test_parameters_and_moments_are_sharded(program: Partitioned) -> None:
    """A device's arguments are shards of the parameters and both moments; no array is a whole stack of layers."""
    parameters = [one.shape for one in program.instructions if one.kind == "parameter"]
    for stored, whole in zip(program.stored, program.whole, strict=True):
        assert math.prod(stored) < math.prod(whole)
        assert parameters.count(stored) >= 3
        if whole[0] == LAYERS and len(whole) > 2:
            assert not [one for one in program.instructions if one.shape == whole]


def test_gradients_are_reduce_scattered(program: Partitioned) -> None:
    """A matrix gradient that is summed over devices is sliced immediately to the shard that the device stores."""
    parts = {math.prod(stored[1:]) for stored in program.stored if stored[0] == LAYERS and len(stored) > 2}
    sums = [
        one
        for one in program.instructions
        if one.kind in ("all-reduce", "reduce-scatter") and len(one.shape) > 1 and math.prod(one.shape) >= min(parts)
    ]
    assert sums
    matrices = {math.prod(whole[1:]) for whole in program.whole if whole[0] == LAYERS and len(whole) > 2}
    for one in sums:
        if one.kind == "all-reduce" and math.prod(one.shape) in matrices:
            assert {user.kind for user in program.users(one.name)} == {"dynamic-slice"}, one


def test_logits_never_exist_for_all_rows(program: Partitioned) -> None:
    """No array with the vocabulary's length is larger than the logits of one chunk of a device's own rows."""
    vocab, largest = WIDTHS["vocab_size"], max(map(math.prod, program.whole))
    with_vocab = [one for one in program.instructions if {vocab, vocab // 2} & set(one.shape)]
    assert with_vocab
    assert max(math.prod(one.shape) for one in with_vocab) < ROWS * TARGETS * vocab / 8
    gathered = [one for one in with_vocab if one.kind == "all-gather"]
    assert all(math.prod(one.shape) <= WIDTHS["d_model"] * vocab for one in gathered)
    assert largest < ROWS * TARGETS * vocab / 8
