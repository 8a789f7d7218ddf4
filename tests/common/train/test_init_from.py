"""New runs that start from stored parameters: what is loaded, initialised or refused, and how the run continues."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from common.config import to_json
from common.errors import UserError
from common.files import read_json
from common.model import skeleton
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.train.config import Adafactor, AdamW, Budget, Constant, Fresh, InitRule, Rename, Resize
from common.train.init_from import load_parameters, make_load_plan
from common.train.loop import Fitted, fit
from common.train.run_files import RunFiles
from common.train.state import check_divides, init_state, state_shardings
from common.train.stored import FolderParameters, RunParameters, StoredParameters
from common.train.task import Initial, Task
from common.trees import flatten
from common.weights.folder import write_folder
from experiments.families import builder
from tests.helpers import EIGHT_DEVICES, ONE_DEVICE
from tests.tiny import EXECUTION, Observer, Stopped, loader, task, tiny

MODEL = skeleton(builder(tiny("gpt"), EXECUTION))
SHAPES = {name: tuple(leaf.shape) for name, leaf in flatten(MODEL.shapes).items()}
AXES = flatten(MODEL.logical_axes)
TABLE, HEAD = "embedding.table_VD", "output.weight_DV"


def same_bits(one: Any, other: Any) -> None:
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fitted]:
    """A finished run, with checkpoints of steps 6 and 8."""
    folder = tmp_path_factory.mktemp("runs") / "gpt"
    return folder, fit(task("gpt"), folder, Observer())


def stored_run(folder: Path, step: int | None = None) -> RunParameters:
    return RunParameters(folder / RunFiles.CHECKPOINTS, step)


def fresh(model: Any = MODEL, seed: int = 0) -> Any:
    shardings = state_shardings(model, optax.identity(), make_mesh(MeshShape()))
    return init_state(model, optax.identity(), seed, shardings).params


def load(stored: StoredParameters, model: Any = MODEL, mesh: MeshShape = ONE_DEVICE, **how: Any) -> Any:
    return load_parameters(stored, model, check_divides(model, make_mesh(mesh)), **how)


@dataclasses.dataclass
class Kept:
    """Stored parameters in memory."""

    leaves: dict[str, np.ndarray]
    origin: str = "somewhere"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: leaf.shape for name, leaf in self.leaves.items()}

    def read(self, wanted: Any) -> dict[str, jax.Array]:
        for name, leaf in wanted.items():
            assert leaf.shape == self.leaves[name].shape
        return {name: jax.device_put(self.leaves[name].astype(x.dtype), x.sharding) for name, x in wanted.items()}


def drawn(shapes: dict[str, tuple[int, ...]] = SHAPES) -> Kept:
    rng = np.random.default_rng(0)
    return Kept({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


# --- What is loaded


@pytest.mark.parametrize("mesh", [MeshShape(), EIGHT_DEVICES], ids=["one", "eight"])
def test_a_runs_parameters_come_back(source: tuple[Path, Fitted], mesh: MeshShape) -> None:
    """They are restored to the bit, onto the new run's mesh."""
    folder, fitted = source
    stored = stored_run(folder)
    params, plan = load(stored, mesh=mesh)
    same_bits(params, fitted.params)
    assert (stored.step, stored.origin) == (8, f"{folder}@8")
    assert params["embedding"]["table_VD"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert len(params["embedding"]["table_VD"].sharding.device_set) == mesh.devices
    assert plan.fresh == () and plan.unused == () and plan.sources == {name: name for name in SHAPES}


def test_an_older_step_can_be_named(source: tuple[Path, Fitted]) -> None:
    folder, fitted = source
    params, _ = load(stored_run(folder, 6))
    assert not np.array_equal(params["embedding"]["table_VD"], fitted.params["embedding"]["table_VD"])
    with pytest.raises(UserError, match="has no checkpoint of step 7; it has 6, 8"):
        stored_run(folder, 7)
    with pytest.raises(UserError, match="holds no checkpoint"):
        RunParameters(folder)


def test_another_dtype(source: tuple[Path, Fitted]) -> None:
    folder, fitted = source
    params, _ = load(stored_run(folder), dtype=jnp.bfloat16)
    same_bits(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), fitted.params))


@pytest.mark.parametrize("mesh", [MeshShape(), EIGHT_DEVICES], ids=["one", "eight"])
def test_a_model_folders_parameters_come_back(mesh: MeshShape, tmp_path: Path) -> None:
    kept = drawn()
    with write_folder(tmp_path / "model") as writer:
        writer.manifest(model=to_json(tiny("gpt")), text={}, source={})
        tree = {name.replace(".", "/"): leaf for name, leaf in kept.leaves.items()}
        tree[TABLE.replace(".", "/")] = tree[TABLE.replace(".", "/")].astype(jnp.bfloat16)
        for name, leaf in tree.items():
            handle = writer.create(name, leaf.shape, leaf.dtype, stacked=name.startswith("layers"))
            handle.write(leaf).result()
    params, _ = load(FolderParameters(tmp_path / "model"), mesh=mesh)
    expected = {**kept.leaves, TABLE: kept.leaves[TABLE].astype(jnp.bfloat16).astype(np.float32)}
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
        assert leaf.dtype == jnp.float32


# --- Rules


def test_fresh_parameters_are_those_of_a_new_model() -> None:
    kept = drawn()
    params, plan = load(kept, rules=(Fresh(leaves="output.*"), Fresh(leaves="layers.mlp.in_DF")), seed=3)
    new = flatten(fresh(seed=3))
    for name, leaf in flatten(params).items():
        expected = new[name] if name in (HEAD, "layers.mlp.in_DF") else kept.leaves[name]
        np.testing.assert_array_equal(leaf, expected, err_msg=name)
    assert set(plan.fresh) == set(plan.unused) == {HEAD, "layers.mlp.in_DF"}
    assert f"fresh: layers.mlp.in_DF, {HEAD}; not used: layers.mlp.in_DF, {HEAD}" in str(plan)


@pytest.mark.parametrize("mesh", [MeshShape(), EIGHT_DEVICES], ids=["one", "eight"])
@pytest.mark.parametrize("rows", [101, 150])
def test_a_table_of_another_length(rows: int, mesh: MeshShape) -> None:
    """Common rows come from the source, further rows are fresh; the source's length need not divide over the mesh."""
    width = SHAPES[TABLE][1]
    kept = drawn({**SHAPES, TABLE: (rows, width), HEAD: (width, rows)})
    params, plan = load(kept, mesh=mesh, rules=(Resize(leaves="embedding.*"), Resize(leaves=HEAD)))
    table, head = params["embedding"]["table_VD"], params["output"]["weight_DV"]
    new, common = flatten(fresh()), min(rows, SHAPES[TABLE][0])
    np.testing.assert_array_equal(table[:common], kept.leaves[TABLE][:common])
    np.testing.assert_array_equal(table[common:], new[TABLE][common:])
    np.testing.assert_array_equal(head[:, :common], kept.leaves[HEAD][:, :common])
    np.testing.assert_array_equal(head[:, common:], new[HEAD][:, common:])
    assert table.sharding.spec == PartitionSpec("tensor", "fsdp") and plan.resized == {TABLE: 0, HEAD: 1}


def test_renamed_and_doubled() -> None:
    """An encoder-decoder loads both stacks from one decoder: equal numbers, but no shared array."""
    model = skeleton(builder(tiny("t5like"), EXECUTION))
    kept = drawn()
    rules = (
        Rename(leaves="encoder.*", source="layers.*"),
        Rename(leaves="decoder.cross_attention.*", source="layers.attention.*"),
        Rename(leaves="decoder.cross_norm.*", source="layers.attention_norm.*"),
        Rename(leaves="decoder.*", source="layers.*"),
        Rename(leaves="encoder_norm.scale_D", source="final_norm.scale_D"),
        Rename(leaves="decoder_norm.scale_D", source="final_norm.scale_D"),
    )
    params, plan = load(kept, model, rules=rules)
    found = flatten(params)
    assert plan.unused == () and plan.fresh == ()
    for stack in ("encoder", "decoder"):
        np.testing.assert_array_equal(found[f"{stack}.mlp.in_DF"], kept.leaves["layers.mlp.in_DF"])
    cross = found["decoder.cross_attention.query_DHC"]
    np.testing.assert_array_equal(cross, kept.leaves["layers.attention.query_DHC"])
    addresses = [x.unsafe_buffer_pointer() for x in found.values()]
    assert len(set(addresses)) == len(addresses)


# --- What is refused


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in SHAPES.items() if name not in names}


@pytest.mark.parametrize(
    ("stored", "rules", "said"),
    [
        (
            without(HEAD),
            (),
            [f"1 of {len(SHAPES)}", f"{HEAD}: there is no {HEAD}", json.dumps(to_json(Fresh(leaves=HEAD)))],
        ),
        (
            {**SHAPES, TABLE: (64, 16), "layers.mlp.in_DF": (1, 16, 48)},
            (),
            [
                f"{TABLE}: [128, 16] here, [64, 16] there",
                "layers.mlp.in_DF: [1, 16, 32] here, [1, 16, 48] there",
                json.dumps(to_json(Resize(leaves=TABLE, axis="vocab"))),
                json.dumps(to_json(Fresh(leaves="layers.mlp.in_DF"))),
            ],
        ),
        (
            {**without("final_norm.scale_D"), "final_norms.scale_D": (16,)},
            (),
            [json.dumps(to_json(Rename(leaves="final_norm.scale_D", source="final_norms.scale_D")))],
        ),
        ({**SHAPES, TABLE: (64, 24)}, (Resize(leaves=TABLE),), [f"{TABLE}: [128, 16] here, [64, 24] there"]),
        ({**SHAPES, TABLE: (64, 16, 1)}, (Resize(leaves=TABLE),), ["[64, 16, 1] there"]),
        (SHAPES, (Fresh(leaves="outputs.*"),), ["no parameter matches 'outputs.*'", HEAD]),
        (
            {**SHAPES, TABLE: (64, 16)},
            (Resize(leaves=TABLE, axis="vocabulary"),),
            [f"{TABLE} has no axis 'vocabulary': did you mean 'vocab'"],
        ),
        (
            SHAPES,
            (Rename(leaves="layers.*", source="blocks.*"),),
            ["there is no blocks.attention.key_DGC", "and 4 more"],
        ),
    ],
    ids=["missing", "shapes", "renamed", "both-axes", "rank", "unmatched-rule", "no-axis", "wrong-rename"],
)
def test_what_is_not_accounted_for_is_listed(
    stored: dict[str, tuple[int, ...]], rules: tuple[InitRule, ...], said: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        make_load_plan(SHAPES, AXES, stored, rules, "somewhere")
    for text in said:
        assert text in str(caught.value)


def test_the_advice_works() -> None:
    """Loading works with the rules that the message proposes."""
    stored = {**without(HEAD, "final_norm.scale_D"), TABLE: (64, 16), "final_norms.scale_D": (16,)}
    with pytest.raises(UserError) as caught:
        make_load_plan(SHAPES, AXES, stored, (), "somewhere")
    listed = json.loads(str(caught.value).partition("init.rules=")[2])
    kinds = {"fresh": Fresh, "rename": Rename, "resize": Resize}
    rules = tuple(kinds[rule["kind"]](**rule) for rule in listed)
    plan = make_load_plan(SHAPES, AXES, stored, rules, "somewhere")
    assert plan.fresh == (HEAD,) and plan.resized == {TABLE: 0} and plan.unused == ()


@pytest.mark.parametrize(("leaves", "source"), [("a.*.*", "b.*.*"), ("a.*", "b"), ("a", "b.*")])
def test_a_rename_has_one_star_on_both_sides(leaves: str, source: str) -> None:
    with pytest.raises(UserError, match="both must have one"):
        Rename(leaves=leaves, source=source)


def test_a_torn_checkpoint_is_skipped_for_the_one_before(
    source: tuple[Path, Fitted], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a run resumes; the source run, which may still be training, stays unchanged."""
    folder = tmp_path / "gpt"
    shutil.copytree(source[0], folder)
    expected, _ = load(stored_run(folder, 6))
    # All of them, since the parameters may lie in any.
    data = [path for path in (folder / RunFiles.CHECKPOINTS / "8" / "state").glob("**/d/*") if path.is_file()]
    assert data
    for torn in data:
        torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    stored = stored_run(folder)
    same_bits(load(stored)[0], expected)
    assert stored.origin == f"{folder}@6"
    assert any("checkpoint 8" in message for message in caplog.messages)
    assert (folder / RunFiles.CHECKPOINTS / "8").exists()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(tried: 8\)"):
        load(stored_run(folder, 8))


def test_changed_numbers_are_noticed(source: tuple[Path, Fitted], tmp_path: Path) -> None:
    folder = tmp_path / "gpt"
    shutil.copytree(source[0], folder)
    path = folder / RunFiles.CHECKPOINTS / "8" / "progress" / "metadata"
    about = read_json(path)
    assert about["parameter_checksums"].keys() == SHAPES.keys()
    about["parameter_checksums"][TABLE] ^= 1
    path.write_text(json.dumps(about))
    stored = stored_run(folder)
    load(stored)
    assert stored.step == 6


# --- The run that follows


def tuned(folder: Path, rules: tuple[InitRule, ...] = (), **change: Any) -> Task:
    """Returns a new run with another optimizer, schedule and data that starts from the run in `folder`."""
    settings = {
        "optimizer": Adafactor(),
        "schedule": Constant(),
        "budget": Budget(unit="steps", amount=5),
        "checkpoint_every": 2,
        **change,
    }
    made = task("gpt", loader(text_seed=5), **settings)
    return dataclasses.replace(made, initial=Initial(open=lambda: stored_run(folder), rules=rules))


def never() -> StoredParameters:
    raise AssertionError("the source was opened")


def test_a_new_run_starts_from_anothers_last_parameters(source: tuple[Path, Fitted], tmp_path: Path) -> None:
    """A new run with almost no learning rate ends with the source's parameters."""
    folder, fitted = source
    watcher = Observer()
    new = tuned(folder, optimizer=AdamW(weight_decay=0.0), budget=Budget(unit="steps", amount=1))
    new = dataclasses.replace(new, setup=dataclasses.replace(new.setup, learning_rate=1e-30))
    still = fit(new, tmp_path, watcher)
    same_bits(still.params, fitted.params)
    assert still.progress.consumed_batches == 1
    assert watcher.notes == [f"begins as {folder}@8: {len(SHAPES)} parameters loaded"]
    record = read_json(tmp_path / RunFiles.INITIAL)
    assert record["origin"] == f"{folder}@8" and record["fresh"] == []


def test_it_resumes_from_its_own_checkpoints(source: tuple[Path, Fitted], tmp_path: Path) -> None:
    """It does not open the source again, and an interrupted run on a mesh ends as an unbroken one does."""
    new = tuned(source[0], (Fresh(leaves="output.*"),), mesh=EIGHT_DEVICES)
    whole = fit(new, tmp_path / "whole", Observer())
    with pytest.raises(Stopped):
        fit(new, tmp_path / "broken", Observer(stop_at=3))
    later = dataclasses.replace(new, initial=Initial(open=never, rules=()))
    observer = Observer()
    resumed = fit(later, tmp_path / "broken", observer)
    assert observer.notes == ["resuming after step 2 of 5"]
    same_bits(resumed.params, whole.params)
    fit(later, tmp_path / "whole", Observer())
