"""Which stored tensor holds which parameter: tables of rules that serve reading and writing alike.

A leaf's name ends in its axes, one letter each (`query_DHC`), so a table needs only the sizes of the letters to know
every shape on both sides. A rule's layout says how the foreign tensor orders and merges the same axes:

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
"""So many keys are spelt out in an error message; of the others it says how many."""


@dataclasses.dataclass(frozen=True)
class LoadRule:
    """One line of a key table: a leaf of ours and where a foreign checkpoint keeps it."""

    leaf: str
    """Path with slashes; the letters after the last underscore are its axes, without that of stacked layers."""
    key: str
    """Name of the foreign tensor; `{layer}` where there is one for each layer."""
    layout: str
    """The foreign tensor's axes in the leaf's letters; `(H C)` is one axis, head-major."""
    aliases: tuple[str, ...] = ()
    """Further names under which a checkpoint may hold the same tensor, instead or besides."""
    part: int | None = None
    """Where several leaves lie in one tensor, side by side along its last axis: this one's place among them."""

    @property
    def letters(self) -> str:
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
    """A stored tensor that is no parameter: kept and written again as it is."""

    pattern: str
    """Regular expression for the whole name."""
    check: Callable[[str, np.ndarray], str | None] = lambda name, value: None
    """What is wrong with it, given its name and value; None where nothing is."""


class TensorInfo(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


class Checkpoint(Protocol):
    """Stored tensors by name, read in parts."""

    @property
    def where(self) -> str:
        """What messages call it."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of the first axis."""
        ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a stored tensor that is one leaf's (at one layer of it)."""

    rule: LoadRule
    layer: int | None
    sizes: Mapping[str, int]
    offset: int
    """First column of the last foreign axis; not zero only where several leaves share a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In the foreign layout."""
        return tuple(math.prod(self.sizes[letter] for letter in group) for group in self.rule.groups)

    @property
    def row_size(self) -> int:
        """Foreign rows that belong to one entry of the first row letter."""
        return math.prod(self.sizes[letter] for letter in self.rule.groups[0][1:])

    @property
    def row_axis(self) -> int:
        """The axis of the leaf (without layers) whose entries follow each other in the foreign rows."""
        return self.rule.letters.index(self.rule.groups[0][0])

    def ours(self, block: np.ndarray) -> np.ndarray:
        """Foreign rows, whole entries of the first row letter, as the leaf has them."""
        order = "".join(self.rule.groups)
        sizes = [-1, *(self.sizes[letter] for letter in order[1:])]
        return block.reshape(sizes).transpose([order.index(letter) for letter in self.rule.letters])

    def foreign(self, block: np.ndarray) -> np.ndarray:
        """The inverse of `ours`."""
        order = "".join(self.rule.groups)
        block = block.transpose([self.rule.letters.index(letter) for letter in order])
        return block.reshape(-1, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor that a checkpoint should have."""

    key: str
    aliases: tuple[str, ...]
    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].shape
        return (*first[:-1], sum(piece.shape[-1] for piece in self.pieces))

    @property
    def names(self) -> tuple[str, ...]:
        return (self.key, *self.aliases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A checkpoint format at given sizes."""

    rules: tuple[LoadRule, ...]
    sizes: Mapping[str, int]
    """By axis letter."""
    layers: Mapping[str, int]
    """How many, by the first part of a leaf's path, for leaves that stack layers in front."""
    extras: tuple[Extra, ...] = ()

    def leaves(self) -> dict[str, tuple[int, ...]]:
        """Shape of every leaf."""
        return {rule.leaf: (*self._stack(rule), *(self.sizes[x] for x in rule.letters)) for rule in self.rules}

    def tensors(self) -> dict[str, StoredTensor]:
        """By key, leaf after leaf and layer after layer."""
        pieces: dict[tuple[str, tuple[str, ...]], list[Piece]] = {}
        for rule in self.rules:
            for layer in range(*self._stack(rule)) if self._stack(rule) else (None,):
                key, *aliases = (name.format(layer=layer) for name in (rule.key, *rule.aliases))
                sharing = pieces.setdefault((key, tuple(aliases)), [])
                assert (rule.part or 0) == len(sharing), f"parts of {key} are out of order"
                sharing.append(Piece(rule, layer, self.sizes, sum(piece.shape[-1] for piece in sharing)))
        return {key: StoredTensor(key, aliases, tuple(shared)) for (key, aliases), shared in pieces.items()}

    def without_prefix(self, prefix: str) -> "Table":
        """The same table for a checkpoint whose names lack `prefix`."""
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
        return next((extra for extra in self.extras if re.fullmatch(extra.pattern, name)), None)

    def _stack(self, rule: LoadRule) -> tuple[int, ...]:
        return (self.layers[rule.leaf.partition("/")[0]],) if "{layer}" in rule.key else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """What each name of a checkpoint is."""

    tensors: dict[str, StoredTensor]
    """By the name that is read."""
    aliases: dict[str, str]
    """Names of further copies, and of what."""
    extras: tuple[str, ...]


def match(table: Table, checkpoint: Checkpoint) -> Match:
    """Finds the table's tensors in a checkpoint.

    Raises:
        UserError: listing every missing, superfluous and wrongly shaped key.
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
    superfluous = [name for name in rest if name not in extras]
    refuse_keys(checkpoint.where, missing, superfluous, misshapen)
    return Match(tensors=tensors, aliases=aliases, extras=extras)


def refuse_keys(where: str, missing: Sequence[str], superfluous: Sequence[str], misshapen: Sequence[str]) -> None:
    """Raises UserError that lists them, sorted, unless there are none."""
    parts = []
    for names, what in ((missing, "missing"), (superfluous, "superfluous"), (misshapen, "of another shape")):
        if names:
            more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
            parts.append(f"{len(names)} {what}: {', '.join(sorted(names)[:LISTED])}{more}")
    if parts:
        raise UserError(f"{where} does not have this model's keys; {'; '.join(parts)}")
