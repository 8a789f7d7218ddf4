"""`plan --topology`: which programs it compiles and what it prints of them. The compiler's results are made up here."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from common.compute.aot import Compiled
from common.compute.topology import parse_topology
from common.errors import UserError
from common.sharding.shape import MeshShape
from experiments.find import load
from experiments.planning import plan, search, table
from experiments.planning.compiling import PlannedProgram
from experiments.planning.guess import guess
from experiments.planning.plan import Target, on_mesh
from experiments.study import Study
from tests.experiments.planning.compiled import CHIP, FITS, TOO_LARGE, V5E
from tests.experiments.tiny_study import tiny_study, with_data, with_train


class FakeCompiler:
    """Stands in for the compilers' processes; records the programs."""

    def __init__(self, compile_: Callable[[PlannedProgram], Compiled]):
        self.compile = compile_
        self.programs: list[PlannedProgram] = []

    def __call__(self, programs: list[PlannedProgram], console: Console) -> list[Compiled]:
        self.programs += programs
        return [self.compile(program) for program in programs]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return tiny_study(tmp_path)


def run_plan(
    monkeypatch: pytest.MonkeyPatch,
    study: Study,
    target: Target,
    compile_: Callable[[PlannedProgram], Compiled],
) -> tuple[str, FakeCompiler]:
    compiler, out = FakeCompiler(compile_), io.StringIO()
    monkeypatch.setattr(plan, "compile_all", compiler)
    monkeypatch.setattr(search, "compile_all", compiler)
    plan.plan(study, Console(file=out, width=200), target)
    return out.getvalue(), compiler


def cells(text: str) -> dict[str, list[str]]:
    lines = (line.split("│") for line in text.splitlines())
    return {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines if len(line) > 2}


def test_time_and_money_follow_from_peaks(monkeypatch, study) -> None:
    """One second of products, half a second of HBM, and 4 GB of gradients: a quarter is reduce-scattered and the rest
    all-reduced, so that a device sends 3/4 x 1 + 3/2 x 3 GB."""
    text, compiler = run_plan(monkeypatch, study, Target(topology="v5e:2x2", price=36.0), lambda program: FITS)
    shown = cells(text)
    sending = 5.25 / (2 * CHIP.link_bytes_per_second / 1e9)
    (steps,) = {run.steps for run in study.arms.values()}
    assert [program.name for program in compiler.programs] == list(study.arms)
    assert {str(program.run.train.mesh) for program in compiler.programs} == {"fsdp=4"}
    assert shown["matrix products"] == ["1 s"] * 2
    assert shown["HBM"] == ["0.5 s"] * 2
    assert shown["links (ICI)"] == [f"{1000 * sending:.3g} ms"] * 2
    assert shown["step"] == [f"1 s to {1 + sending:.3g} s"] * 2
    assert shown["reduce-scatters kept"] == ["25 %"] * 2
    # Four chips at a cent a second.
    assert shown["USD at 36.00 per chip-hour"] == [f"{steps * 0.04:.2f} to {steps * 0.04 * (1 + sending):.2f}"] * 2
    flops = [run.flops_per_step for run in study.arms.values()]
    assert all(flop < FITS.flops * 4 for flop in flops)
    assert "libtpu all-reduces gradients" in text and "estimate" in text


def test_memory_is_shown_in_parts(monkeypatch, study) -> None:
    text, _ = run_plan(monkeypatch, study, Target(topology="v5e-4"), lambda program: FITS)
    shown = cells(text)
    assert shown["fits"] == ["yes"] * 2
    assert shown["parameters"] == [f"{run.model.param_count():,}" for run in study.arms.values()]
    assert shown["stored parameters"] == ["256 MiB"] * 2
    assert shown["optimizer state"] == ["512 MiB"] * 2
    assert shown["largest at peak"] == ["256 MiB f32[8,4] (dot_general)"] * 2


def test_a_smaller_variant_is_found_for_an_arm_that_does_not_fit(monkeypatch, study) -> None:
    def compile_(program: PlannedProgram) -> Compiled:
        train = program.run.train
        roomy = train.execution.remat == "full" and train.accumulation == 2
        return FITS if roomy or program.name == "gpt" else TOO_LARGE

    study = study.edited(lambda run: with_data(run, rows=32))
    text, compiler = run_plan(monkeypatch, study, Target(topology="v5e:2x2"), compile_)
    assert cells(text)["fits"] == ["yes", "no"]
    assert "t5like: does not fit: a device needs 47.0 GiB, and 15.00 can be used." in text
    assert "With train.execution.remat=full train.accumulation=2 t5like would fit." in text
    assert [program.name for program in compiler.programs] == ["gpt", "t5like", "t5like", "t5like"]


def test_another_mesh_may_be_the_variant_that_fits(monkeypatch, study) -> None:
    divided = MeshShape(fsdp=4)
    text, _ = run_plan(
        monkeypatch,
        study.edited(lambda run: with_data(run, rows=32)),
        Target(topology="v5e:2x2", mesh="data=4"),
        lambda program: FITS if program.run.train.mesh == divided else TOO_LARGE,
    )
    assert "With --mesh fsdp=4 train.execution.remat=full gpt and t5like would fit." in text


def test_a_message_says_that_nothing_fits(monkeypatch, study) -> None:
    text, _ = run_plan(monkeypatch, study, Target(topology="v5e:2x2"), lambda program: TOO_LARGE)
    assert "None of these variants fits" in text
    assert "step" not in cells(text) and "days" not in cells(text)


def test_a_search_compiles_a_few_and_names_the_best(monkeypatch, study) -> None:
    """`dots` and `full` fit, and data parallelism is fastest: the search prints the overrides for it."""
    study = study.edited(lambda run: with_data(run, rows=32))

    def compile_(program: PlannedProgram) -> Compiled:
        train = program.run.train
        if train.execution.remat == "none":
            return TOO_LARGE
        slower = 1 + (train.execution.remat != "dots") + (train.mesh.data != 4)
        return dataclasses.replace(FITS, traffic_bytes=slower * int(CHIP.hbm_bytes_per_second) * 10)

    text, compiler = run_plan(monkeypatch, study, Target(topology="v5e:2x2", search=True), compile_)
    compiled_remats = {program.run.train.execution.remat for program in compiler.programs}
    assert compiled_remats == set(search.REMATS)
    assert {program.run.data.rows for program in compiler.programs} == {32}
    assert len(compiler.programs) == 2 * (len(search.REMATS) + search.MORE_CANDIDATES)
    chosen = [line for line in text.splitlines() if "best:" in line]
    assert "train.execution.remat=dots" in chosen[0]


@pytest.mark.parametrize("topology", ["v5e:4x4", "tpu7x:2x2x1", "2*v5p:2x2x1"])
def test_every_candidate_has_the_topologys_devices_and_the_studys_rows(study, topology) -> None:
    study = study.edited(lambda run: with_data(run, rows=64))
    wanted = parse_topology(topology)
    found = list(search._changed_studies(study, wanted, None))
    trains = [run.train for one in found for run in one.arms.values()]
    assert len({f"{train.mesh} {train.execution.remat} {train.accumulation}" for train in trains}) == len(found)
    for one in found:
        assert len({run.train for run in one.arms.values()}) == 1
        for run in one.arms.values():
            mesh = run.train.mesh
            assert (mesh.devices, mesh.replica, run.data.rows) == (wanted.devices, wanted.slices, 64)
            assert 64 % (mesh.row_parts * run.train.accumulation) == 0
            assert run.model.num_heads % mesh.tensor == 0
            assert all(slots % mesh.context == 0 for slots in run.row_slots[1:])
    assert {train.mesh.context for train in trains} > {1, 2}


def test_a_choice_divides_the_rows_of_every_arm(study) -> None:
    """Arms of 8 and of 12 rows, on 4 devices: only what divides 4 rows of a micro-batch divides both."""
    rows = {"gpt": 8, "t5like": 12}
    study = dataclasses.replace(study, arms={k: with_data(study.arms[k], rows=n) for k, n in rows.items()})
    found = list(search._changed_studies(study, V5E, None))
    parts = {(run.train.mesh.row_parts, run.train.accumulation) for one in found for run in one.arms.values()}
    assert parts == {(a, b) for a in (1, 2, 4) for b in (1, 2, 4) if a * b <= 4}
    with pytest.raises(UserError, match="data.rows is 8 and 12, which divides over no mesh of v5e:16x16; nearest: 256"):
        search.search(study, parse_topology("v5e:16x16"), Console(file=io.StringIO()), None)


def test_few_long_rows_are_split_along_their_length(monkeypatch, study) -> None:
    """With one row per step for four devices, only `context` and `tensor` can use them all."""
    study = study.edited(lambda run: with_data(run, rows=1, input_length=2**15, target_length=2**15))
    text, compiler = run_plan(monkeypatch, study, Target(topology="v5e:2x2", search=True), lambda program: FITS)
    assert all(program.run.train.mesh.row_parts == 1 for program in compiler.programs)
    assert all(program.run.train.mesh.context > 1 for program in compiler.programs)
    assert "best: train.mesh.context=" in text


def test_the_last_queries_of_causal_attention_make_the_others_wait(study) -> None:
    """Checked on a row in four parts, by counting the pairs that the last part sees."""
    whole = study.arms["gpt"]
    split = with_train(whole, mesh=MeshShape(context=4))
    _, inputs, targets = whole.row_slots
    length = inputs + targets
    seen = np.tril(np.ones((length, length)))
    seen -= np.eye(length) / 2  # as the ledger halves the square
    share = seen[-length // 4 :].sum() / (seen.sum() / 4)
    unseen = dataclasses.replace(FITS, flops=0, has_kernels=True)
    times = [table.estimate_run(one, V5E, unseen).time.compute for one in (whole, split)]
    assert times[1] / times[0] == pytest.approx(share)


def test_the_simple_model_keeps_less_with_remat_and_less_of_a_sharded_state() -> None:
    t5like, pod = load("xl").arms["t5like"], parse_topology("v5e:16x16")

    def gib(**execution) -> float:
        changes = dataclasses.replace(t5like.train.execution, **execution)
        return guess(with_train(t5like, execution=changes), pod).bytes / 2**30

    sizes = [gib(remat=remat) for remat in ("offload", "full", "attention", "dots", "none")]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    sharded, replicated = (
        guess(with_train(t5like, mesh=mesh), pod).bytes for mesh in (MeshShape(fsdp=256), MeshShape(data=256))
    )
    state = 8 * t5like.model.param_count()  # parameters and gradients; Adafactor keeps next to nothing
    assert replicated - sharded == pytest.approx(state * 255 / 256)


def test_a_runs_own_mesh_is_used_if_it_has_the_devices(study) -> None:
    own = MeshShape(data=2, fsdp=2)
    run = with_train(study.arms["gpt"], mesh=own)
    assert on_mesh(run, V5E, None).train.mesh == own
    assert on_mesh(run, parse_topology("v5e:1x1"), None).train.mesh == MeshShape()
    assert on_mesh(run, parse_topology("2*v5e:1x1"), None).train.mesh == MeshShape(replica=2)


def test_what_arms_share_is_in_the_title_and_what_differs_in_the_table(monkeypatch, study) -> None:
    arms = {"few": study.arms["gpt"], "many": with_data(study.arms["gpt"], rows=8)}
    text, _ = run_plan(
        monkeypatch, dataclasses.replace(study, arms=arms), Target(topology="v5e:2x2"), lambda program: FITS
    )
    assert "mesh fsdp=4, steps 40, remat none, accumulation 1" in text
    assert cells(text)["rows"] == ["4 x (24 + 24) slots", "8 x (24 + 24) slots"]


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
def test_a_plan_that_is_impossible_is_one_line(monkeypatch, study, target, message) -> None:
    with pytest.raises(UserError) as error:
        run_plan(monkeypatch, study, target, lambda program: pytest.fail("compiled"))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("remat", "products"), [("none", 9), ("attention", 9), ("dots", 11), ("full", 11)])
def test_the_ledger_counts_the_flops_inside_kernels(study: Study, remat: Any, products: int) -> None:
    """2 products forward, run once or twice, and 7 backward, of 2 x pairs x width FLOPs each, come on top."""
    run = study.arms["gpt"]
    run = with_train(run, execution=dataclasses.replace(run.train.execution, remat=remat))
    model = run.model
    rows, inputs, targets = run.row_slots
    pairs = rows * (inputs + targets) ** 2 / 2
    width = model.num_layers * model.num_heads * model.head_dim
    unseen = dataclasses.replace(FITS, flops=1000, has_kernels=True)
    time = table.estimate_run(run, V5E, unseen).time
    expected = 1000 + products * 2 * pairs * width / V5E.devices
    assert time.compute * CHIP.flops_per_second == pytest.approx(expected, rel=1e-6)


def test_xl_is_matched_in_training_flops() -> None:
    t5like, gpt = (run.flops_per_step for run in load("xl").arms.values())
    assert abs(gpt / t5like - 1) < 0.01
