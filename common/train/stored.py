"""Stored parameters, in a run's checkpoint or a model folder, read by name onto any mesh."""

import hashlib
import json
import logging
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from common.errors import UserError
from common.progress import spinner, tracked
from common.train.checkpoints import changed_parameter, read_about, saved_steps
from common.trees import flatten, nest
from common.weights import folder

Read = TypeVar("Read")
Wanted = Mapping[str, jax.ShapeDtypeStruct]
"""Shape, dtype and sharding of each parameter to read, by dotted name."""
ADVICE = "choose another checkpoint"
"""What to do about a checkpoint of another schema."""

log = logging.getLogger(__name__)


class StoredParameters(Protocol):
    """Parameters that can be read by dotted name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def origin(self) -> str:
        """Where the parameters come from, for messages."""
        ...

    def read(self, wanted: Wanted) -> dict[str, jax.Array]:
        """Reads whole parameters, in the dtypes and with the shardings of `wanted`."""
        ...

    def content(self) -> str:
        """Returns a hash that identifies the parameters wherever they are stored, without reading them as arrays."""
        ...


class FolderParameters:
    """The parameters of a model folder (`common.weights.folder`); reads only each device's shard."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes = {name: leaf.shape for name, leaf in flatten(folder.leaf_shapes(path)).items()}

    @property
    def origin(self) -> str:
        return str(self.path)

    def read(self, wanted: Wanted) -> dict[str, jax.Array]:
        return {name: self._read(name, wanted[name]) for name in tracked(list(wanted), f"reading {self.path}")}

    def content(self) -> str:
        top, hashed = self.path / folder.PARAMETERS, hashlib.blake2b(digest_size=16)
        for path in tracked(sorted(path for path in top.glob("**/*") if path.is_file()), f"hashing {self.path}"):
            with path.open("rb") as file:
                of_file = hashlib.file_digest(file, "blake2b").hexdigest()
            hashed.update(f"{path.relative_to(top).as_posix()} {of_file}\n".encode())
        return hashed.hexdigest()

    def _read(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        handle = folder.read_leaf(self.path, name.replace(".", "/"))

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            try:
                return handle[index].read().result().astype(leaf.dtype)
            except ValueError as error:
                raise UserError(f"{self.path}: parameter {name} cannot be read ({str(error)[:200]})") from None

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def has_checkpoint(checkpoints: Path) -> bool:
    """Returns whether a run has saved a checkpoint."""
    return bool(saved_steps(checkpoints))


class RunParameters:
    """The parameters of a run, from its newest readable checkpoint or from a given one.

    Reads only the checkpoints and writes nothing, so the run may still be training.
    """

    def __init__(self, folder: Path, step: int | None = None):
        """Raises UserError if `folder` has no checkpoint, none of `step`, or none that can be read."""
        self.folder = folder
        found = saved_steps(folder)[::-1]
        if not found:
            raise UserError(f"{folder} holds no checkpoint")
        if step is not None and step not in found:
            listed = ", ".join(map(str, reversed(found)))
            raise UserError(f"{folder} has no checkpoint of step {step}; it has {listed}")
        self._steps = found if step is None else [step]
        self._handler = ocp.PyTreeCheckpointHandler()
        self.shapes = self._first_good(self._read_shapes)

    @property
    def step(self) -> int:
        """The step of the checkpoint; changes to the one before if this one turns out unreadable."""
        return self._steps[0]

    @property
    def origin(self) -> str:
        return f"{self.folder.parent}@{self.step}"

    def read(self, wanted: Wanted) -> dict[str, jax.Array]:
        with spinner(f"reading {self.origin}"):
            return self._first_good(lambda step: self._read(step, wanted))

    def content(self) -> str:
        """Returns a hash of the checksums that were saved with the parameters."""
        about = self._first_good(lambda step: read_about(self.folder, step, ADVICE))
        sums = about.get("parameter_checksums") or about["checksum"]  # the earliest have one checksum for all
        return hashlib.blake2b(json.dumps(sums, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _first_good(self, read: Callable[[int], Read]) -> Read:
        """Returns `read(step)` for the newest checkpoint for which it works; drops those for which it does not."""
        for step in self._steps:
            try:
                result = read(step)
            except UserError:
                raise
            except Exception as error:  # as in Checkpoints.restore
                why = textwrap.shorten(str(error.__cause__ or error), 200)
                log.warning("checkpoint %d in %s cannot be read (%s)", step, self.folder, why)
                continue
            self._steps = self._steps[self._steps.index(step) :]
            return result
        listed = ", ".join(map(str, self._steps))
        raise UserError(f"no checkpoint in {self.folder} can be read (tried: {listed})")

    def _read_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        read_about(self.folder, step, ADVICE)  # checks the schema
        metadata = self._handler.metadata(epath.Path(self._state(step)))
        return {name: tuple(leaf.shape) for name, leaf in flatten(metadata.tree["params"]).items()}

    def _read(self, step: int, wanted: Wanted) -> dict[str, jax.Array]:
        about = read_about(self.folder, step, ADVICE)
        # Reads the saved dtype, since the checksums are over its bits.
        whole = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding) for name, x in wanted.items()}
        tree = {"params": nest(whole)}
        args = ocp.args.PyTreeRestore(
            item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        found = flatten(self._handler.restore(epath.Path(self._state(step)), args=args)["params"])
        if changed := changed_parameter(found, about):
            raise ValueError(f"the checksum of {changed} differs from the saved one")
        return {name: x.astype(wanted[name].dtype) for name, x in found.items()}

    def _state(self, step: int) -> Path:
        return self.folder.resolve() / str(step) / "state"
