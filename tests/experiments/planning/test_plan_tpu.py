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
from common.compute.length_sums import LengthSums
from common.compute.topology import parse_topology
from common.model import skeleton
from common.recipe import Execution
from common.sharding.shape import MeshShape
from common.train.config import Anomalies
from experiments.config import Experiment
from experiments.planning.compiling import PlannedProgram, compile_all
from experiments.registry import load
from experiments.running.pipeline import make_setup
from tests.experiments.tiny_experiment import tiny_experiment

pytestmark = [
    pytest.mark.slow,  # libtpu is installed for them
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPU, is absent"),
]


def experiment_on(tmp_path: Path, mesh: MeshShape) -> Experiment:
    """A tiny experiment in bf16, with matrices that are large enough to be sharded."""
    base = tiny_experiment(tmp_path)
    arms = {
        name: dataclasses.replace(
            arm, model=dataclasses.replace(arm.model, d_model=256, d_ff=512, num_heads=4, num_kv_heads=4, head_dim=64)
        )
        for name, arm in base.arms.items()
    }
    train = dataclasses.replace(base.train, mesh=mesh, execution=Execution(remat="full"))
    return dataclasses.replace(base, arms=arms, train=train, data=dataclasses.replace(base.data, rows=8))


def compile_arm(experiment: Experiment, arm: str, topology: str) -> tuple[Compiled, str]:
    out = io.StringIO()
    program = PlannedProgram(experiment=experiment, arm=arm, topology=parse_topology(topology))
    return compile_all([program], Console(file=out, width=200))[0], out.getvalue()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v4:2x2x1"])
def test_parameters_are_sharded_and_gathered_for_both_passes(tmp_path, topology) -> None:
    experiment = experiment_on(tmp_path, MeshShape(fsdp=4))
    program, printed = compile_arm(experiment, "gpt", topology)
    assert "compiling gpt" in printed
    shapes = jax.tree.leaves(skeleton(make_setup(experiment, experiment.arms["gpt"]).build).shapes)
    parameters = sum(math.prod(leaf.shape) for leaf in shapes)
    gathered = sum(one.bytes for one in program.collectives if one.kind == "all-gather" and one.axes == ("fsdp",))
    # In bf16, or in float32 where the partitioner gathers before it rounds.
    assert 2 * 2 * parameters * 0.5 < gathered < 2 * 4 * parameters * 1.1
    assert program.memory is not None and program.out_of_memory is None
    stored = program.memory.arguments["state.params"]
    assert 4 * parameters / 4 <= stored < 2 * parameters  # with padding
    assert program.memory.at_peak <= program.memory.temporaries
    ledger = experiment.arms["gpt"].model.flops(LengthSums.of_rows(*experiment.row_slots()))
    but_kernels = dataclasses.replace(ledger, attention_full=0, attention_causal_half=0)
    assert program.has_kernels and 4 * program.flops == but_kernels.train_hardware(experiment.train.execution)
    again, printed = compile_arm(experiment, "gpt", topology)
    assert again == program and printed == ""


def test_the_update_needs_no_extra_memory(tmp_path) -> None:
    """In this step parameters take most memory. Besides gradients (more than VMEM holds) there is no tree of updates or
    new moments."""
    base = experiment_on(tmp_path, MeshShape(fsdp=4))
    wide = dataclasses.replace(
        base.arms["gpt"].model, d_model=2048, d_ff=8192, num_heads=16, num_kv_heads=16, head_dim=128, num_layers=8
    )
    experiment = dataclasses.replace(base, arms={"gpt": dataclasses.replace(base.arms["gpt"], model=wide)})
    program, _ = compile_arm(experiment, "gpt", "v5e:2x2")
    assert program.memory is not None
    gradients = 4 * wide.param_count() / 4
    assert program.memory.arguments["state.opt_state"] == pytest.approx(2 * gradients, rel=0.05)
    copies = gradients / 2  # of parameters, in bf16
    assert gradients < program.memory.at_peak < 1.1 * (gradients + copies)


@pytest.mark.parametrize("arm", ["gpt", "t5like"])
def test_one_device_computes_the_ledgers_flops_and_sends_nothing(tmp_path, arm) -> None:
    """With dropout, and in a step that skips the update if the loss is not finite."""
    experiment = experiment_on(tmp_path, MeshShape())
    arms = {
        name: dataclasses.replace(
            arm, model=dataclasses.replace(arm.model, recipe=dataclasses.replace(arm.model.recipe, dropout=0.1))
        )
        for name, arm in experiment.arms.items()
    }
    experiment = dataclasses.replace(experiment, arms=arms)
    train = dataclasses.replace(experiment.train, anomalies=Anomalies(on_nonfinite="skip"))
    experiment = dataclasses.replace(experiment, train=train)
    program, _ = compile_arm(experiment, arm, "v5e:1x1")
    assert program.collectives == () and program.has_kernels and program.memory is not None
    ledger = experiment.arms[arm].model.flops(LengthSums.of_rows(*experiment.row_slots()))
    but_kernels = dataclasses.replace(ledger, attention_full=0, attention_causal_half=0)
    assert program.flops == but_kernels.train_hardware(experiment.train.execution)


COUNT = """
import sys
from common.compute.aot import devices_of
from common.compute.topology import parse_topology
from experiments.running.audit import count_step
from experiments.running.pipeline import make_setup
from experiments.registry import load
experiment = load("first_light")
for arm in experiment.arms.values():
    print(count_step(make_setup(experiment, arm), devices_of(parse_topology("v5e:1x1"))).flops)
"""


def test_the_audit_counts_the_program_that_the_tpu_compiler_gets(tmp_path) -> None:
    """For first_light three counts are equal: the ledger's, the audit's for a TPU's devices, and libtpu's."""
    variables = os.environ | environment(None)
    printed = subprocess.run([sys.executable, "-c", COUNT], env=variables, capture_output=True, text=True, check=True)
    base = load("first_light")
    execution = dataclasses.replace(base.train.execution, attention="plain")
    experiment = dataclasses.replace(base, train=dataclasses.replace(base.train, execution=execution))
    found = [compile_arm(experiment, arm, "v5e:1x1")[0].flops for arm in experiment.arms]
    ledger = [experiment.flops_per_step(arm) for arm in experiment.arms.values()]
    assert [float(line) for line in printed.stdout.split()] == found == ledger


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_memory_traffic_grows_linearly_with_layers(tmp_path, remat) -> None:
    """The loop over layers reads and writes stacked arrays: each layer moves its own part, not the whole stack."""
    base = experiment_on(tmp_path, MeshShape(fsdp=4))
    data = dataclasses.replace(base.data, rows=128, input_length=256, target_length=256)
    train = dataclasses.replace(base.train, execution=Execution(remat=remat))
    moved = []
    for layers in (8, 16, 24):
        deep = dataclasses.replace(base.arms["gpt"].model, num_layers=layers)
        arms = {"gpt": dataclasses.replace(base.arms["gpt"], model=deep)}
        program, _ = compile_arm(dataclasses.replace(base, arms=arms, train=train, data=data), "gpt", "v5e:2x2")
        moved.append(program.traffic_bytes)
    few, more, many = moved
    assert many - more == pytest.approx(more - few, rel=0.1)


def test_two_slices_sum_gradients_between_them(tmp_path) -> None:
    program, _ = compile_arm(experiment_on(tmp_path, MeshShape(replica=2, fsdp=4)), "t5like", "2*v5e:2x2")
    between = [one for one in program.collectives if "replica" in one.axes]
    assert between and all(one.kind == "all-reduce" for one in between)
    within = [one for one in program.collectives if one.kind == "reduce-scatter"]
    assert sum(one.bytes for one in within) > sum(one.bytes for one in between) / 8


def test_a_step_that_is_too_large_is_reported(tmp_path) -> None:
    base = experiment_on(tmp_path, MeshShape(fsdp=4))
    data = dataclasses.replace(base.data, rows=2**15, input_length=512, target_length=512)
    train = dataclasses.replace(base.train, execution=Execution(remat="none", attention="plain"))
    program, _ = compile_arm(dataclasses.replace(base, data=data, train=train), "gpt", "v5e:2x2")
    assert program.out_of_memory is not None and program.memory is None
    assert program.out_of_memory.needed > program.out_of_memory.available == pytest.approx(15.75 * 2**30)


@pytest.mark.parametrize("arm", ["gpt", "t5like"])
def test_widths_that_do_not_divide_are_one_line(tmp_path, arm) -> None:
    experiment = experiment_on(tmp_path, MeshShape(tensor=8))
    with pytest.raises(ValueError, match=r"train.mesh.tensor is 8, which does not divide .*nearest: tensor=4") as error:
        compile_arm(experiment, arm, "v5e:2x4")
    assert "\n" not in str(error.value)
