"""Checkpoints of a small state: which are kept, and what damage is noticed."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common.errors import UserError
from common.files import read_json
from common.train.checkpoints import Checkpoints, Progress, saved_steps
from common.train.checksums import leaf_checksums
from common.train.state import TrainState
from common.train.stored import RunParameters

LAYERS = np.arange(12, dtype=np.float32).reshape(3, 4)


def state(w: np.ndarray = LAYERS) -> TrainState:
    params = {"w": jnp.asarray(w), "v": jnp.ones(2, jnp.float32)}
    return TrainState(step=jnp.int32(0), params=params, opt_state=(jnp.asarray(w * 0.5),))


def save(folder: Path, saved: dict[int, TrainState], keep_last: int = 9) -> Path:
    with contextlib.closing(Checkpoints(folder, keep_last=keep_last)) as checkpoints:
        for step, learnt in saved.items():
            progress = Progress(consumed_batches=step, fingerprint="f" * step, losses=((step, 0.1),), skipped=(1,))
            checkpoints.save(learnt, progress, seed=0, validation_loss=1.0 / step)
    return folder


def restore(folder: Path) -> tuple[TrainState, Progress] | None:
    with contextlib.closing(Checkpoints(folder, keep_last=9)) as checkpoints:
        return checkpoints.restore(state(), seed=0)


def read(folder: Path) -> np.ndarray:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"w": jax.ShapeDtypeStruct(LAYERS.shape, jnp.float32, sharding=sharding)}
    return np.asarray(RunParameters(folder).read(wanted)["w"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2; the parameters of step 1 are negative."""
    return save(tmp_path_factory.mktemp("two") / "checkpoints", {1: state(-LAYERS), 2: state()})


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two, tmp_path / "checkpoints")


# --- Which are kept


@pytest.mark.parametrize("reopened", [False, True])
def test_the_last_and_the_best_are_kept(reopened: bool, tmp_path: Path) -> None:
    """The best stays the best for a process that did not write it; one saved between validations is never the best."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, loss in enumerate([3.0, None, 1.0, 2.0, None, 1.5, 1.25], start=1):
        checkpoints.save(state(), Progress(consumed_batches=step, fingerprint=""), seed=0, validation_loss=loss)
        if reopened:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.close()
    assert checkpoints.steps() == [3, 6, 7]


# --- Checksums


SWAPS = {
    "two elements": [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11],
    "two layers": [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11],
    "two ends": [11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0],
}


@pytest.mark.parametrize("order", SWAPS.values(), ids=SWAPS.keys())
def test_swapped_numbers_are_noticed(order: list[int], two: Path, copy: Path, tmp_path: Path) -> None:
    """Both readers notice, although every file is intact: the arrays hold the same numbers in another order."""
    other = save(tmp_path / "other", {2: state(LAYERS.reshape(-1)[order].reshape(3, 4))})
    shutil.rmtree(copy / "2" / "state")
    shutil.copytree(other / "2" / "state", copy / "2" / "state")
    np.testing.assert_array_equal(read(copy), -LAYERS)
    restored = restore(copy)
    assert restored is not None and restored[1].consumed_batches == 1


def test_checksums_depend_on_positions_and_bits_but_not_on_sharding() -> None:
    """Uses numbers with few significant bits, for which a position-weighted sum would miss some swaps."""
    rng = np.random.default_rng(0)
    w = rng.choice(np.array([0.0, -0.0, 1.0, 2.0, 0.5], np.float32), (8, 16))
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    whole = int(leaf_checksums({"w": w})["w"])
    for spec in (PartitionSpec("a", "b"), PartitionSpec("b", None), PartitionSpec(None, "a")):
        assert int(leaf_checksums({"w": jax.device_put(w, NamedSharding(mesh, spec))})["w"]) == whole
    seen = {whole}
    pairs = [
        (i, j)
        for i in range(0, w.size, 5)
        for j in range(i)
        if w.reshape(-1)[i].tobytes() != w.reshape(-1)[j].tobytes()
    ]
    for i, j in pairs[:300]:
        swapped = w.copy().reshape(-1)
        swapped[[i, j]] = swapped[[j, i]]
        seen.add(int(leaf_checksums({"w": swapped.reshape(w.shape)})["w"]))
    assert len(seen) == 1 + 300


# --- Damage


def damages(content: bytes) -> dict[str, bytes]:
    flipped = bytearray(content or b"0")
    flipped[len(flipped) // 2] ^= 2
    return {
        "empty": b"",
        "garbage": b"\x00[]{",
        "number": b"7",
        "flipped": bytes(flipped),
        "half": content[: len(content) // 2],
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that Orbax gives up
def test_with_any_damaged_file_the_state_is_right_or_an_earlier_one_is_restored(two: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(two) for path in (two / "2").rglob("*") if path.is_file())
    contents = {file: (two / file).read_bytes() for file in files} | {Path("2/metrics/metrics"): b"{}"}  # of old ones
    taken = []
    for file, content in contents.items():
        for name, damaged in damages(content).items():
            folder = shutil.copytree(two, tmp_path / f"{len(taken)}")
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(damaged)
            restored = restore(folder)
            assert restored is not None, (file, name)
            found, progress = restored
            step = progress.consumed_batches
            assert progress == Progress(
                consumed_batches=step, fingerprint="f" * step, losses=((step, 0.1),), skipped=(1,)
            ), (file, name)
            np.testing.assert_array_equal(found.params["w"], LAYERS if step == 2 else -LAYERS)
            taken.append(step)
    assert set(taken) == {1, 2} and len(contents) > 5


@pytest.mark.parametrize("key", ["tokens", "losses", "fingerprint", "validation_loss"])
def test_the_metadata_of_a_checkpoint_is_verified_too(key: str, copy: Path) -> None:
    path = copy / "2" / "progress" / "metadata"
    path.write_text(json.dumps({**read_json(path), key: 7}))
    restored = restore(copy)
    assert restored is not None and restored[1].consumed_batches == 1


def test_a_checkpoint_of_another_step_than_its_folders_name_is_skipped(copy: Path, caplog: Any) -> None:
    (copy / "2").rename(copy / "9")
    np.testing.assert_array_equal(read(copy), -LAYERS)
    restored = restore(copy)
    assert restored is not None and restored[1].consumed_batches == 1
    assert sum("checkpoint 9" in message and "it belongs to step 2" in message for message in caplog.messages) == 2


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is not a directory"):
        Checkpoints(tmp_path / "checkpoints", keep_last=1)


# --- Schemas


LATER = ("digest", "validation_loss", "source_fingerprint")
"""Keys that the first schema lacks."""


def as_first_schema(checkpoint: Path, learnt: TrainState, loss: float) -> None:
    """A checkpoint written before checksums depended on the order of elements."""

    def plain(x: Any) -> int:
        return int(np.asarray(x).reshape(-1).view(np.uint32).sum(dtype=np.uint32))

    path, total = checkpoint / "progress" / "metadata", 0
    about = {key: value for key, value in read_json(path).items() if key not in LATER}
    for leaf in (learnt.opt_state[0], learnt.params["v"], learnt.params["w"], learnt.step):
        total = (total * 31 + plain(leaf)) % 2**32
    sums = {name: plain(x) for name, x in learnt.params.items()}
    path.write_text(json.dumps({**about, "schema_version": 1, "checksum": total, "parameter_checksums": sums}))
    (checkpoint / "metrics").mkdir()
    (checkpoint / "metrics" / "metrics").write_text(json.dumps({"validation_loss": loss}))


def test_checkpoints_of_the_first_schema_are_read(copy: Path) -> None:
    as_first_schema(copy / "1", state(-LAYERS), loss=math.inf)
    as_first_schema(copy / "2", state(), loss=0.125)
    np.testing.assert_array_equal(read(copy), LAYERS)
    restored = restore(copy)
    assert restored is not None and restored[1].consumed_batches == 2 and restored[1].losses == ((2, 0.1),)
    assert restored[1].source_fingerprint is None
    save(copy, {3: state(), 4: state()}, keep_last=1)
    assert saved_steps(copy) == [2, 4]  # the best and the last
    as_first_schema(copy / "4", state(-LAYERS), loss=1.0)
    np.testing.assert_array_equal(read(copy), LAYERS)


def test_a_later_schema_is_an_error(copy: Path) -> None:
    path = copy / "2" / "progress" / "metadata"
    path.write_text(json.dumps({**read_json(path), "schema_version": 3}))
    for reader in (restore, read):
        with pytest.raises(UserError, match="checkpoints/2 has checkpoint schema 3, this version reads 1 to 2"):
            reader(copy)
