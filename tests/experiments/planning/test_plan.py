"""`plan --topology`: which programs it compiles and what it prints of them. The compiler's results are made up here."""

import dataclasses
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from common.compute.aot import Compiled, OutOfMemory
from common.compute.collectives import Collective
from common.compute.memory import Buffer, Memory
from common.compute.topology import parse_topology
from common.config import from_json, to_json
from common.errors import UserError
from common.sharding.shape import MeshShape
from experiments.config import Experiment
from experiments.planning import compiling, plan, search, table
from experiments.planning.compiling import PlannedProgram
from experiments.planning.guess import guess
from experiments.planning.plan import Target, on_mesh
from experiments.registry import load
from experiments.running import pipeline
from tests.experiments.tiny_experiment import tiny_experiment

V5E = parse_topology("v5e:2x2")
CHIP = V5E.chip_spec
FITS = Compiled(
    memory=Memory(
        arguments={"state.params": 2**28, "state.opt_state": 2**29, "batch.inputs_BI": 2**20},
        outputs=0,
        temporaries=2**30,
        at_peak=2**29,
        largest=(Buffer(bytes=2**28, array="f32[8,4]", made_by="jit(train_step)/while/dot_general"),),
    ),
    out_of_memory=None,
    collectives=(Collective(kind="reduce-scatter", axes=("fsdp",), group=4, times=3, bytes=int(4e9)),),
    ring_links={"fsdp": 2.0},
    scattered_bytes=int(1e9),
    flops=int(CHIP.flops_per_second),
    has_kernels=False,
    traffic_bytes=int(CHIP.hbm_bytes_per_second) // 2,
    seconds=1.0,
)
TOO_LARGE = dataclasses.replace(FITS, memory=None, out_of_memory=OutOfMemory(needed=47 * 2**30, available=15 * 2**30))


class FakeCompiler:
    """Stands in for the compilers' processes; records the programs."""

    def __init__(self, compile_: Callable[[PlannedProgram], Compiled]):
        self.compile = compile_
        self.programs: list[PlannedProgram] = []

    def __call__(self, programs: list[PlannedProgram], console: Console) -> list[Compiled]:
        self.programs += programs
        return [self.compile(program) for program in programs]


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return tiny_experiment(tmp_path)


def run_plan(
    monkeypatch: pytest.MonkeyPatch,
    experiment: Experiment,
    target: Target,
    compile_: Callable[[PlannedProgram], Compiled],
) -> tuple[str, FakeCompiler]:
    compiler, out = FakeCompiler(compile_), io.StringIO()
    monkeypatch.setattr(plan, "compile_all", compiler)
    monkeypatch.setattr(search, "compile_all", compiler)
    plan.plan(experiment, Console(file=out, width=200), target)
    return out.getvalue(), compiler


def cells(text: str) -> dict[str, list[str]]:
    lines = (line.split("│") for line in text.splitlines())
    return {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines if len(line) > 2}


def test_time_and_money_follow_from_peaks(monkeypatch, experiment) -> None:
    """One second of products, half a second of HBM, and 4 GB of gradients: a quarter is reduce-scattered and the rest
    all-reduced, so that a device sends 3/4 x 1 + 3/2 x 3 GB."""
    text, compiler = run_plan(monkeypatch, experiment, Target(topology="v5e:2x2", price=36.0), lambda program: FITS)
    shown = cells(text)
    sending = 5.25 / (2 * CHIP.link_bytes_per_second / 1e9)
    steps = experiment.steps()
    assert [program.arm for program in compiler.programs] == list(experiment.arms)
    assert {str(program.experiment.train.mesh) for program in compiler.programs} == {"fsdp=4"}
    assert shown["matrix products"] == ["1 s"] * 2
    assert shown["HBM"] == ["0.5 s"] * 2
    assert shown["links (ICI)"] == [f"{1000 * sending:.3g} ms"] * 2
    assert shown["step"] == [f"1 s to {1 + sending:.3g} s"] * 2
    assert shown["reduce-scatters kept"] == ["25 %"] * 2
    # Four chips at a cent a second.
    assert shown["USD at 36.00 per chip-hour"] == [f"{steps * 0.04:.2f} to {steps * 0.04 * (1 + sending):.2f}"] * 2
    flops = [experiment.flops_per_step(arm) for arm in experiment.arms.values()]
    assert all(flop < FITS.flops * 4 for flop in flops)
    assert "libtpu all-reduces gradients" in text and "estimate" in text


def test_memory_is_shown_in_parts(monkeypatch, experiment) -> None:
    text, _ = run_plan(monkeypatch, experiment, Target(topology="v5e-4"), lambda program: FITS)
    shown = cells(text)
    assert shown["fits"] == ["yes"] * 2
    assert shown["parameters"] == [f"{arm.model.param_count():,}" for arm in experiment.arms.values()]
    assert shown["stored parameters"] == ["256 MiB"] * 2
    assert shown["optimizer state"] == ["512 MiB"] * 2
    assert shown["largest at peak"] == ["256 MiB f32[8,4] (dot_general)"] * 2


def test_a_smaller_variant_is_found_for_an_arm_that_does_not_fit(monkeypatch, experiment) -> None:
    def compile_(program: PlannedProgram) -> Compiled:
        train = program.experiment.train
        roomy = train.execution.remat == "full" and train.accumulation == 2
        return FITS if roomy or program.arm == "gpt" else TOO_LARGE

    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, rows=32))
    text, compiler = run_plan(monkeypatch, experiment, Target(topology="v5e:2x2"), compile_)
    assert cells(text)["fits"] == ["yes", "no"]
    assert "t5like: does not fit: a device needs 47.0 GiB, and 15.00 can be used." in text
    assert "With train.execution.remat=full train.accumulation=2 t5like would fit." in text
    assert [program.arm for program in compiler.programs] == ["gpt", "t5like", "t5like", "t5like"]


def test_another_mesh_may_be_the_variant_that_fits(monkeypatch, experiment) -> None:
    divided = MeshShape(fsdp=4)
    text, _ = run_plan(
        monkeypatch,
        dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, rows=32)),
        Target(topology="v5e:2x2", mesh="data=4"),
        lambda program: FITS if program.experiment.train.mesh == divided else TOO_LARGE,
    )
    assert "With --mesh fsdp=4 train.execution.remat=full gpt and t5like would fit." in text


def test_a_message_says_that_nothing_fits(monkeypatch, experiment) -> None:
    text, _ = run_plan(monkeypatch, experiment, Target(topology="v5e:2x2"), lambda program: TOO_LARGE)
    assert "None of these variants fits" in text
    assert "step" not in cells(text) and "days" not in cells(text)


def test_a_search_compiles_a_few_and_names_the_best(monkeypatch, experiment) -> None:
    """`dots` and `full` fit, and data parallelism is fastest: the search prints the overrides for it."""
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, rows=32))

    def compile_(program: PlannedProgram) -> Compiled:
        train = program.experiment.train
        if train.execution.remat == "none":
            return TOO_LARGE
        slower = 1 + (train.execution.remat != "dots") + (train.mesh.data != 4)
        return dataclasses.replace(FITS, traffic_bytes=slower * int(CHIP.hbm_bytes_per_second) * 10)

    text, compiler = run_plan(monkeypatch, experiment, Target(topology="v5e:2x2", search=True), compile_)
    compiled_remats = {program.experiment.train.execution.remat for program in compiler.programs}
    assert compiled_remats == set(search.REMATS)
    assert {program.experiment.data.rows for program in compiler.programs} == {32}
    assert len(compiler.programs) == 2 * (len(search.REMATS) + search.MORE_CANDIDATES)
    chosen = [line for line in text.splitlines() if "best:" in line]
    assert "train.execution.remat=dots" in chosen[0]


@pytest.mark.parametrize("topology", ["v5e:4x4", "tpu7x:2x2x1", "2*v5p:2x2x1"])
def test_every_candidate_has_the_topologys_devices_and_the_experiments_rows(experiment, topology) -> None:
    experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, rows=64))
    wanted = parse_topology(topology)
    found = list(search._changed_experiments(experiment, wanted, None))
    assert len({str(one.train.mesh) + one.train.execution.remat + str(one.train.accumulation) for one in found}) == len(
        found
    )
    for one in found:
        mesh = one.train.mesh
        assert (mesh.devices, mesh.replica, one.data.rows) == (wanted.devices, wanted.slices, 64)
        assert 64 % (mesh.row_parts * one.train.accumulation) == 0
        assert all(arm.model.num_heads % mesh.tensor == 0 for arm in one.arms.values())
        assert all(slots % mesh.context == 0 for slots in one.row_slots()[1:])
    assert {one.train.mesh.context for one in found} > {1, 2}


def test_few_long_rows_are_split_along_their_length(monkeypatch, experiment) -> None:
    """With one row per step for four devices, only `context` and `tensor` can use them all."""
    data = dataclasses.replace(experiment.data, rows=1, input_length=2**15, target_length=2**15)
    experiment = dataclasses.replace(experiment, data=data)
    text, compiler = run_plan(monkeypatch, experiment, Target(topology="v5e:2x2", search=True), lambda program: FITS)
    assert all(program.experiment.train.mesh.row_parts == 1 for program in compiler.programs)
    assert all(program.experiment.train.mesh.context > 1 for program in compiler.programs)
    assert "best: train.mesh.context=" in text


def test_the_last_queries_of_causal_attention_make_the_others_wait(experiment) -> None:
    """Checked on a row in four parts, by counting the pairs that the last part sees."""
    mesh = MeshShape(context=4)
    split = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, mesh=mesh))
    _, inputs, targets = experiment.row_slots()
    length = inputs + targets
    seen = np.tril(np.ones((length, length)))
    seen -= np.eye(length) / 2  # as the ledger halves the square
    share = seen[-length // 4 :].sum() / (seen.sum() / 4)
    unseen = dataclasses.replace(FITS, flops=0, has_kernels=True)
    times = [table.estimate_arm(one, V5E, "gpt", unseen).time.compute for one in (experiment, split)]
    assert times[1] / times[0] == pytest.approx(share)


def test_the_simple_model_keeps_less_with_remat_and_less_of_a_sharded_state() -> None:
    xl = load("xl")

    def gib(**execution) -> float:
        train = dataclasses.replace(xl.train, execution=dataclasses.replace(xl.train.execution, **execution))
        changed = dataclasses.replace(xl, train=train)
        return guess(changed, parse_topology("v5e:16x16"), "t5like").bytes / 2**30

    sizes = [gib(remat=remat) for remat in ("offload", "full", "attention", "dots", "none")]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    sharded, replicated = (
        dataclasses.replace(xl, train=dataclasses.replace(xl.train, mesh=mesh))
        for mesh in (MeshShape(fsdp=256), MeshShape(data=256))
    )
    bytes_ = [guess(one, parse_topology("v5e:16x16"), "t5like").bytes for one in (sharded, replicated)]
    state = 8 * xl.arms["t5like"].model.param_count()  # parameters and gradients; Adafactor keeps next to nothing
    assert bytes_[1] - bytes_[0] == pytest.approx(state * 255 / 256)


def test_the_experiments_own_mesh_is_used_if_it_has_the_devices(experiment) -> None:
    own = MeshShape(data=2, fsdp=2)
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, mesh=own))
    assert on_mesh(experiment, V5E, None).train.mesh == own
    assert on_mesh(experiment, parse_topology("v5e:1x1"), None).train.mesh == MeshShape()
    two = on_mesh(experiment, parse_topology("2*v5e:1x1"), None)
    assert two.train.mesh == MeshShape(replica=2)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(topology="v5e:3x3"), "no slice has this shape; nearest: v5e:2x4"),
        (Target(topology="v5e-5"), "no slice has this shape; nearest: v5e:2x2"),
        (Target(topology="v5q:2x2"), "unknown chip 'v5q', did you mean 'v5p'?"),
        (Target(topology="H100"), "must be CHIP:GRID"),
        (Target(topology="2*v5e:2x2", slices=2), "remove --slices"),
        (Target(topology="v5e:2x2", slices=0), "there must be at least 1 slice"),
        (Target(topology="v5e:2x2", mesh="fsdp=3"), "has 3 devices, v5e:2x2 has 4; nearest: fsdp=4"),
        (Target(topology="v5e:2x2", mesh="fsdp=x"), "must be AXIS=NUMBER"),
        (Target(topology="v5e:2x2", mesh="fsp=4"), "unknown axis 'fsp', did you mean 'fsdp'?"),
        (Target(topology="v5e:2x2", mesh="replica=2,fsdp=2"), "replica counts slices"),
        (Target(topology="v5e:2x4"), "data.rows is 4, which does not divide"),
        (Target(topology="v5e:2x2", price=-1.0), "--price is -1"),
        (
            Target(topology="v5e:16x16", search=True),
            "data.rows is 4, which divides over no mesh of v5e:16x16; nearest: 256",
        ),
        (
            Target(topology="v5e:2x4", mesh="data=8", search=True),
            "data.rows is 4, which does not divide over the mesh's 8 parts; nearest: 8",
        ),
    ],
)
def test_a_plan_that_is_impossible_is_one_line(monkeypatch, experiment, target, message) -> None:
    with pytest.raises(UserError) as error:
        run_plan(monkeypatch, experiment, target, lambda program: pytest.fail("compiled"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_libtpu_one_line_names_what_to_install(monkeypatch, experiment) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        compiling.compile_all([PlannedProgram(experiment=experiment, arm="gpt", topology=V5E)], Console())


def test_the_cache_key_depends_on_what_the_program_depends_on(monkeypatch, experiment) -> None:
    """Names and data sources change nothing; sizes, topology and versions do."""
    monkeypatch.setattr(compiling.importlib.metadata, "version", lambda name: "1")
    program = PlannedProgram(experiment=experiment, arm="gpt", topology=V5E)
    renamed = dataclasses.replace(experiment, name="other", question="?")
    assert dataclasses.replace(program, experiment=renamed).key() == program.key()
    more_rows = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, rows=8))
    accumulated = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, accumulation=2))
    others = [
        dataclasses.replace(program, arm="t5like"),
        dataclasses.replace(program, topology=parse_topology("v5p:2x2x1")),
        dataclasses.replace(program, experiment=more_rows),
        dataclasses.replace(program, experiment=accumulated),
    ]
    monkeypatch.setattr(compiling.importlib.metadata, "version", lambda name: "1")
    keys = {program.key(), *(other.key() for other in others)}
    monkeypatch.setattr(compiling.importlib.metadata, "version", lambda name: "2")
    assert len(keys | {program.key()}) == 6


def test_the_cache_key_depends_on_every_module_that_makes_the_program() -> None:
    """Checked for every module of this project that the tests have loaded, which includes all that a compiler loads."""
    loaded = {Path(found) for module in list(sys.modules.values()) if (found := getattr(module, "__file__", None))}
    packages = [compiling.ROOT / name for name in ("common", "experiments", "gpt", "t5like")]
    ours = {file for file in loaded if any(file.is_relative_to(package) for package in packages)}
    assert Path(pipeline.__file__) in ours
    assert ours <= set(compiling._source_files())


def test_results_survive_json() -> None:
    assert from_json(Compiled, to_json(FITS)) == FITS
    assert from_json(Compiled, to_json(TOO_LARGE)) == TOO_LARGE


@pytest.mark.parametrize(("remat", "products"), [("none", 9), ("attention", 9), ("dots", 11), ("full", 11)])
def test_the_ledger_counts_the_flops_inside_kernels(experiment: Experiment, remat: Any, products: int) -> None:
    """2 products forward, run once or twice, and 7 backward, of 2 x pairs x width FLOPs each, come on top."""
    execution = dataclasses.replace(experiment.train.execution, remat=remat)
    changed = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, execution=execution))
    model = changed.arms["gpt"].model
    rows, inputs, targets = changed.row_slots()
    pairs = rows * (inputs + targets) ** 2 / 2
    width = model.num_layers * model.num_heads * model.head_dim
    unseen = dataclasses.replace(FITS, flops=1000, has_kernels=True)
    time = table.estimate_arm(changed, V5E, "gpt", unseen).time
    expected = 1000 + products * 2 * pairs * width / V5E.devices
    assert time.compute * CHIP.flops_per_second == pytest.approx(expected, rel=1e-6)


def test_xl_is_matched_in_training_flops() -> None:
    xl = load("xl")
    t5like, gpt = (xl.flops_per_step(arm) for arm in xl.arms.values())
    assert abs(gpt / t5like - 1) < 0.01
