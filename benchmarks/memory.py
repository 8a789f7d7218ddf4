"""Memory of a training step on TPU, as the TPU compiler plans it. This needs `libtpu`, but no TPU.

MaxText 0.2.5's figures for the same models were measured with jax 0.11.1 and libtpu 0.0.46, full rematerialisation,
scanned layers, and parameters and AdamW's state in float32, sharded over all devices.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from common.compute.aot import environment
from common.recipe import Execution
from experiments.families import GPT, T5LIKE, ModelConfig

KEPT_SMALL = Execution(remat="full", mlp_chunk=512, loss_chunk=512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """A training step to compile."""

    model: ModelConfig
    topology: str
    rows: int
    """Rows per device."""
    input_length: int = 0
    target_length: int
    execution: Execution = KEPT_SMALL
    maxtext_mib: tuple[int, int] | None = None
    """(arguments, temporaries) of one device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """Bytes of one device, or the compiler's message if the step does not fit."""

    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    no_room: str = ""

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def _t5_xl(execution: Execution) -> MemoryCase:
    return MemoryCase(
        model=T5LIKE.sizes["t5-v1.1-xl"],
        topology="v5e:4x4",
        rows=2,
        input_length=4096,
        target_length=4096,
        execution=execution,
    )


CASES = {
    "134M decoder": MemoryCase(
        model=GPT.sized(width=768, layers=12, d_ff=2048, vocab_size=32128),
        topology="v5e:4x4",
        rows=16,
        target_length=1024,
        maxtext_mib=(117, 2746),
    ),
    "1.10B decoder": MemoryCase(
        model=GPT.sized(width=2048, layers=16, heads=16, d_ff=7168, vocab_size=32000),
        topology="v5e:4x4",
        rows=12,
        target_length=2048,
        maxtext_mib=(791, 8881),
    ),
    "Llama-2-7B": MemoryCase(
        model=GPT.sized(width=4096, layers=32, heads=32, d_ff=11008, vocab_size=32000),
        topology="v5e:8x8",
        rows=4,
        target_length=2048,
        maxtext_mib=(1205, 6514),
    ),
    "T5 v1.1 XL, bias in the kernel": _t5_xl(KEPT_SMALL),
    "T5 v1.1 XL, bias in HBM": _t5_xl(dataclasses.replace(KEPT_SMALL, attention="plain")),
}


def plan(name: str) -> PlannedMemory:
    """Compiles a case in a separate process, which must know before it imports JAX not to look for a TPU.

    Unlike `twinstack plan` it generates machine code too, which takes minutes and is not used.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name],
        env=os.environ | environment(None),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"compiling {name} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return PlannedMemory(**json.loads(done.stdout.splitlines()[-1]))


def compile_case(case: MemoryCase) -> PlannedMemory:
    """Compiles a case; only for the process that `plan` starts."""
    import jax

    from common.compute.aot import devices_of, parse_out_of_memory
    from common.compute.topology import parse_topology
    from common.sharding.shape import MeshShape
    from common.train.config import AdamW, Budget, Linear, TrainConfig
    from common.train.programs import Setup, lower_step, make_programs
    from experiments.families import builder

    devices = devices_of(parse_topology(case.topology))
    steps = 1000
    train = TrainConfig(
        budget=Budget(unit="steps", amount=steps),
        optimizer=AdamW(),
        schedule=Linear(),
        validate_every=steps,
        checkpoint_every=steps,
        mesh=MeshShape(fsdp=len(devices)),
        execution=case.execution,
    )
    setup = Setup(
        build=builder(case.model, case.execution),
        model=case.model,
        train=train,
        learning_rate=1e-3,
        steps=steps,
        row_slots=(case.rows * len(devices), case.input_length, case.target_length),
    )
    programs = make_programs(setup, devices)
    try:
        memory: Any = lower_step(setup, programs).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        room = parse_out_of_memory(str(error))
        if room is None:
            raise
        return PlannedMemory(no_room=f"{room.needed / 2**30:.1f} GiB needed, {room.available / 2**30:.2f} available")
    return PlannedMemory(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
    )


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(compile_case(CASES[sys.argv[1]]))))
