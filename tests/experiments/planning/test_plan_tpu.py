"""Compiles steps for TPUs that are not here, by the processes that `plan` starts."""

import dataclasses
import importlib.util
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

from common.compute.aot import Compiled, environment
from common.compute.topology import parse_topology
from common.model import skeleton
from common.recipe import Execution
from common.sharding.shape import MeshShape
from common.train.config import Anomalies
from experiments.find import load
from experiments.planning.compiling import PlannedProgram, compile_all
from experiments.run import Run
from experiments.running.pipeline import make_setup
from tests.experiments.tiny_study import tiny_study, with_data, with_model, with_train

pytestmark = [
    pytest.mark.slow,  # libtpu is installed for them
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPU, is absent"),
]


def run_on(tmp_path: Path, arm: str, mesh: MeshShape) -> Run:
    """Returns a tiny run in bf16, with matrices that are large enough to be sharded."""
    run = with_data(tiny_study(tmp_path).arms[arm], rows=8)
    run = with_model(run, d_model=256, d_ff=512, num_heads=4, num_kv_heads=4, head_dim=64)
    return with_train(run, mesh=mesh, execution=Execution(remat="full"))


def compile_run(run: Run, topology: str) -> tuple[Compiled, str]:
    out = io.StringIO()
    program = PlannedProgram(name=run.model.kind, run=run, topology=parse_topology(topology))
    return compile_all([program], Console(file=out, width=200))[0], out.getvalue()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v4:2x2x1"])
def test_parameters_are_sharded_and_gathered_for_both_passes(tmp_path, topology) -> None:
    run = run_on(tmp_path, "gpt", MeshShape(fsdp=4))
    program, printed = compile_run(run, topology)
    assert "compiling gpt" in printed
    shapes = jax.tree.leaves(skeleton(make_setup(run).build).shapes)
    parameters = sum(math.prod(leaf.shape) for leaf in shapes)
    gathered = sum(one.bytes for one in program.collectives if one.kind == "all-gather" and one.axes == ("fsdp",))
    # In bf16, or in float32 where the partitioner gathers before it rounds.
    assert 2 * 2 * parameters * 0.5 < gathered < 2 * 4 * parameters * 1.1
    assert program.memory is not None and program.out_of_memory is None
    stored = program.memory.arguments["state.params"]
    assert 4 * parameters / 4 <= stored < 2 * parameters  # with padding
    assert program.memory.at_peak <= program.memory.temporaries
    ledger = run.model.flops(run.data.length_sums)
    but_kernels = dataclasses.replace(ledger, attention_full=0, attention_causal_half=0)
    assert program.has_kernels and 4 * program.flops == but_kernels.train_hardware(run.train.execution)
    again, printed = compile_run(run, topology)
    assert again == program and printed == ""


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:4x4x4", "v6e:16x16"])
def test_no_weight_is_gathered_by_an_all_reduce(tmp_path, topology) -> None:
    """In the optimised program, apart from the vectors of norms, which are so small that the compiler may sum them."""
    chips = parse_topology(topology).devices
    run = run_on(tmp_path, "gpt", MeshShape(fsdp=chips))
    run = with_data(with_model(run, d_model=1024, d_ff=2048, num_heads=8, num_kv_heads=8, head_dim=128), rows=chips)
    program, _ = compile_run(run, topology)
    gathered = sum(one.bytes for one in program.collectives if one.kind == "all-gather")
    norms = (2 * run.model.num_layers + 1) * run.model.d_model
    assert gathered > 2 * 2 * (run.model.param_count() - norms) * 0.5
    assert program.summed_gather_bytes <= 2 * 4 * norms


def test_the_update_needs_no_extra_memory(tmp_path) -> None:
    """In this step parameters take most memory. Besides gradients (more than VMEM holds) there is no tree of updates or
    new moments."""
    run = with_model(
        run_on(tmp_path, "gpt", MeshShape(fsdp=4)),
        **{"d_model": 2048, "d_ff": 8192, "num_heads": 16, "num_kv_heads": 16, "head_dim": 128, "num_layers": 8},
    )
    program, _ = compile_run(run, "v5e:2x2")
    assert program.memory is not None
    gradients = 4 * run.model.param_count() / 4
    assert program.memory.arguments["state.opt_state"] == pytest.approx(2 * gradients, rel=0.05)
    copies = gradients / 2  # of parameters, in bf16
    assert gradients < program.memory.at_peak < 1.1 * (gradients + copies)


@pytest.mark.parametrize("arm", ["gpt", "t5like"])
def test_one_device_computes_the_ledgers_flops_and_sends_nothing(tmp_path, arm) -> None:
    """With dropout, and in a step that skips the update if the loss is not finite."""
    run = run_on(tmp_path, arm, MeshShape())
    run = with_model(run, recipe=dataclasses.replace(run.model.recipe, dropout=0.1))
    run = with_train(run, anomalies=Anomalies(on_nonfinite="skip"))
    program, _ = compile_run(run, "v5e:1x1")
    assert program.collectives == () and program.has_kernels and program.memory is not None
    ledger = run.model.flops(run.data.length_sums)
    but_kernels = dataclasses.replace(ledger, attention_full=0, attention_causal_half=0)
    assert program.flops == but_kernels.train_hardware(run.train.execution)


COUNT = """
import sys
from common.compute.aot import devices_of
from common.compute.topology import parse_topology
from experiments.running.audit import count_step
from experiments.running.pipeline import make_setup
from experiments.find import load
for run in load("first_light").arms.values():
    print(count_step(make_setup(run), devices_of(parse_topology("v5e:1x1"))).flops)
"""


def test_the_audit_counts_the_program_that_the_tpu_compiler_gets(tmp_path) -> None:
    """For first_light three counts are equal: the ledger's, the audit's for a TPU's devices, and libtpu's."""
    variables = os.environ | environment(None)
    printed = subprocess.run([sys.executable, "-c", COUNT], env=variables, capture_output=True, text=True, check=True)
    found = []
    for run in load("first_light").arms.values():
        plain = with_train(run, execution=dataclasses.replace(run.train.execution, attention="plain"))
        found.append(compile_run(plain, "v5e:1x1")[0].flops)
    ledger = [run.flops_per_step for run in load("first_light").arms.values()]
    assert [float(line) for line in printed.stdout.split()] == found == ledger


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_memory_traffic_grows_linearly_with_layers(tmp_path, remat) -> None:
    """The loop over layers reads and writes stacked arrays: each layer moves its own part, not the whole stack."""
    base = with_train(run_on(tmp_path, "gpt", MeshShape(fsdp=4)), execution=Execution(remat=remat))
    base = with_data(base, rows=128, input_length=256, target_length=256)
    moved = []
    for layers in (8, 16, 24):
        program, _ = compile_run(with_model(base, num_layers=layers), "v5e:2x2")
        moved.append(program.traffic_bytes)
    few, more, many = moved
    assert many - more == pytest.approx(more - few, rel=0.1)


def test_two_slices_sum_gradients_between_them(tmp_path) -> None:
    program, _ = compile_run(run_on(tmp_path, "t5like", MeshShape(replica=2, fsdp=4)), "2*v5e:2x2")
    between = [one for one in program.collectives if "replica" in one.axes]
    assert between and all(one.kind == "all-reduce" for one in between)
    within = [one for one in program.collectives if one.kind == "reduce-scatter"]
    assert sum(one.bytes for one in within) > sum(one.bytes for one in between) / 8


def test_a_step_that_is_too_large_is_reported(tmp_path) -> None:
    run = with_data(run_on(tmp_path, "gpt", MeshShape(fsdp=4)), rows=2**15, input_length=512, target_length=512)
    run = with_train(run, execution=Execution(remat="none", attention="plain"))
    program, _ = compile_run(run, "v5e:2x2")
    assert program.out_of_memory is not None and program.memory is None
    assert program.out_of_memory.needed > program.out_of_memory.available == pytest.approx(15.75 * 2**30)


@pytest.mark.parametrize("arm", ["gpt", "t5like"])
def test_widths_that_do_not_divide_are_one_line(tmp_path, arm) -> None:
    run = run_on(tmp_path, arm, MeshShape(tensor=8))
    with pytest.raises(ValueError, match=r"train.mesh.tensor is 8, which does not divide .*nearest: tensor=4") as error:
        compile_run(run, "v5e:2x4")
    assert "\n" not in str(error.value)
