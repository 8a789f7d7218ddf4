"""Maps the tensors of a foreign checkpoint to our parameters, by tables that serve both reading and writing.

"Leaf" is one of our parameters, named by its path with slashes. A leaf's name ends in its axes, one letter each
(`query_DHC`), so a table needs only the size of each letter to know every shape on both sides. A rule's layout states
how the foreign tensor orders and merges the same axes:

>>> table = Table(
...     rules=(LoadRule("layers/attention/query_DHC", "model.layers.{layer}.self_attn.q_proj.weight", "(H C) D"),),
...     sizes={"D": 6, "H": 2, "C": 4},
...     layers={"layers": 3},
... )
>>> table.leaves()
{'layers/attention/query_DHC': (3, 6, 2, 4)}
>>> {key: tensor.shape for key, tensor in table.tensors().items()}["model.layers.2.self_attn.q_proj.weight"]
(8, 6)
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from common.errors import UserError

LISTED = 20
"""How many keys an error message lists; it counts the rest."""


@dataclasses.dataclass(frozen=True)
class LoadRule:
    """One line of a key table: a leaf, and the foreign tensor that holds it."""

    leaf: str
    """Path with slashes. The letters after the last underscore are its axes, without the axis of stacked layers."""
    key: str
    """Name of the foreign tensor; contains `{layer}` if there is one tensor per layer."""
    layout: str
    """Axes of the foreign tensor in the leaf's letters; `(H C)` is one axis, head-major."""
    aliases: tuple[str, ...] = ()
    """Other names under which a checkpoint may hold the same tensor, instead of `key` or in addition to it."""
    part: int | None = None
    """Position of this leaf in a tensor that several leaves share, side by side along its last axis."""

    @property
    def letters(self) -> str:
        """The leaf's axes, without the axis of stacked layers."""
        return self.leaf.rpartition("_")[2]

    @property
    def groups(self) -> tuple[str, ...]:
        """The letters of each foreign axis.

        >>> LoadRule("query_DHC", "q", "(H C) D").groups
        ('HC', 'D')
        """
        return tuple(group.replace(" ", "").strip("()") for group in re.findall(r"\([^)]*\)|\w", self.layout))


@dataclasses.dataclass(frozen=True)
class Extra:
    """A stored tensor that is not a parameter, such as a constant mask; it is kept and written back unchanged."""

    pattern: str
    """Regular expression that matches the whole name."""
    check: Callable[[str, np.ndarray], str | None] = lambda name, value: None
    """Returns what is wrong with the tensor, given its name and value; None if nothing is."""


class TensorInfo(Protocol):
    """Shape and dtype of a stored tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


class Checkpoint(Protocol):
    """The stored tensors of a checkpoint, by name, read in blocks of rows."""

    @property
    def where(self) -> str:
        """What error messages call the checkpoint."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of the first axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a stored tensor that belongs to one leaf, or to one layer of a stacked leaf."""

    rule: LoadRule
    layer: int | None
    sizes: Mapping[str, int]
    offset: int
    """First column along the last foreign axis; nonzero only if several leaves share the tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the foreign layout."""
        return tuple(math.prod(self.sizes[letter] for letter in group) for group in self.rule.groups)

    @property
    def row_size(self) -> int:
        """How many foreign rows one entry of the first row letter covers: C for rows `(H C)`, 1 for rows `D`."""
        return math.prod(self.sizes[letter] for letter in self.rule.groups[0][1:])

    @property
    def row_axis(self) -> int:
        """The axis of the leaf (not counting layers) that the foreign rows run along."""
        return self.rule.letters.index(self.rule.groups[0][0])

    def to_leaf(self, block: np.ndarray) -> np.ndarray:
        """Reorders foreign rows into the leaf's axes; `block` holds whole entries of the first row letter."""
        order = "".join(self.rule.groups)
        sizes = [-1, *(self.sizes[letter] for letter in order[1:])]
        return block.reshape(sizes).transpose([order.index(letter) for letter in self.rule.letters])

    def to_foreign(self, block: np.ndarray) -> np.ndarray:
        """The inverse of `to_leaf`."""
        order = "".join(self.rule.groups)
        block = block.transpose([self.rule.letters.index(letter) for letter in order])
        return block.reshape(-1, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that a checkpoint should have, with the leaves that it holds."""

    key: str
    aliases: tuple[str, ...]
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].shape
        return (*first[:-1], sum(piece.shape[-1] for piece in self.pieces))

    @property
    def names(self) -> tuple[str, ...]:
        """The key and its aliases, in order of preference."""
        return (self.key, *self.aliases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """All tensors of a checkpoint format, for a model of given sizes."""

    rules: tuple[LoadRule, ...]
    sizes: Mapping[str, int]
    """Size of each axis letter."""
    layers: Mapping[str, int]
    """Number of layers, by the first component of a leaf's path, for leaves with layers stacked in front."""
    extras: tuple[Extra, ...] = ()

    def leaves(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf."""
        return {rule.leaf: (*self._layers(rule), *(self.sizes[x] for x in rule.letters)) for rule in self.rules}

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by key, in the order of the rules, then of the layers."""
        pieces: dict[tuple[str, tuple[str, ...]], list[Piece]] = {}
        for rule in self.rules:
            for layer in range(*self._layers(rule)) if self._layers(rule) else (None,):
                key, *aliases = (name.format(layer=layer) for name in (rule.key, *rule.aliases))
                sharing = pieces.setdefault((key, tuple(aliases)), [])
                assert (rule.part or 0) == len(sharing), f"parts of {key} are out of order"
                sharing.append(Piece(rule, layer, self.sizes, sum(piece.shape[-1] for piece in sharing)))
        return {key: StoredTensor(key, aliases, tuple(shared)) for (key, aliases), shared in pieces.items()}

    def without_prefix(self, prefix: str) -> "Table":
        """This table for a checkpoint whose names lack `prefix`."""
        rules = (
            dataclasses.replace(
                rule,
                key=rule.key.removeprefix(prefix),
                aliases=tuple(alias.removeprefix(prefix) for alias in rule.aliases),
            )
            for rule in self.rules
        )
        return dataclasses.replace(self, rules=tuple(rules))

    def extra(self, name: str) -> Extra | None:
        """The entry of `extras` that matches `name`, if any."""
        return next((extra for extra in self.extras if re.fullmatch(extra.pattern, name)), None)

    def _layers(self, rule: LoadRule) -> tuple[int, ...]:
        """(number of layers,) for a stacked leaf, else ()."""
        return (self.layers[rule.leaf.partition("/")[0]],) if "{layer}" in rule.key else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """What each name in a checkpoint stands for."""

    tensors: dict[str, StoredTensor]
    """By the name to read."""
    aliases: dict[str, str]
    """Names of additional copies, and the name of what each one copies."""
    extras: tuple[str, ...]


def match(table: Table, checkpoint: Checkpoint) -> Match:
    """Finds the table's tensors in a checkpoint.

    Raises:
        UserError: listing every missing, unexpected and wrongly shaped key.
    """
    found = checkpoint.tensors
    tensors: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    missing, misshapen = [], []
    for tensor in table.tensors().values():
        present = [name for name in tensor.names if name in found]
        if not present:
            missing.append(tensor.key)
            continue
        tensors[present[0]] = tensor
        aliases |= dict.fromkeys(present[1:], present[0])
        for name in present:
            if tuple(found[name].shape) != tensor.shape:
                misshapen.append(f"{name} is {list(found[name].shape)}, expected {list(tensor.shape)}")
    rest = [name for name in found if name not in tensors and name not in aliases]
    extras = tuple(name for name in rest if table.extra(name))
    unexpected = [name for name in rest if name not in extras]
    refuse_keys(checkpoint.where, missing, unexpected, misshapen)
    return Match(tensors=tensors, aliases=aliases, extras=extras)


def refuse_keys(where: str, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> None:
    """Raises UserError that lists the keys, sorted, unless there are none."""
    parts = []
    for names, what in ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape")):
        if names:
            more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
            parts.append(f"{len(names)} {what}: {', '.join(sorted(names)[:LISTED])}{more}")
    if parts:
        raise UserError(f"{where} does not have this model's keys; {'; '.join(parts)}")
