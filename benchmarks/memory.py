"""What a training step wants of a TPU's memory, as the TPU's compiler plans it: no TPU is needed, `libtpu` is.

Beside MaxText 0.2.5's figures for the same models, measured with jax 0.11.1 and libtpu 0.0.46, full rematerialisation,
scanned layers, parameters and AdamW's state in float32 over all devices.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from common.compute.aot import environment
from common.recipe import Execution
from experiments.config import ModelConfig
from gpt.config import GptConfig
from t5like.config import SIZES

KEPT_SMALL = Execution(remat="full", mlp_chunk=512, loss_chunk=512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    model: ModelConfig
    topology: str
    rows: int
    """A device."""
    input_length: int = 0
    target_length: int
    execution: Execution = KEPT_SMALL
    maxtext_mib: tuple[int, int] | None = None
    """Arguments and temporaries of one device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """Bytes of one device; or what the compiler said where it found no room."""

    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    no_room: str = ""

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def _decoder(layers: int, d_model: int, heads: int, d_ff: int, vocab_size: int) -> GptConfig:
    return GptConfig(
        vocab_size=vocab_size,
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=d_model // heads,
        d_ff=d_ff,
    )


def _t5_xl(execution: Execution) -> Case:
    return Case(
        model=SIZES["t5-v1.1-xl"],
        topology="v5e:4x4",
        rows=2,
        input_length=4096,
        target_length=4096,
        execution=execution,
    )


CASES = {
    "134M decoder": Case(
        model=_decoder(12, 768, 12, 2048, 32128),
        topology="v5e:4x4",
        rows=16,
        target_length=1024,
        maxtext_mib=(117, 2746),
    ),
    "1.10B decoder": Case(
        model=_decoder(16, 2048, 16, 7168, 32000),
        topology="v5e:4x4",
        rows=12,
        target_length=2048,
        maxtext_mib=(791, 8881),
    ),
    "Llama-2-7B": Case(
        model=_decoder(32, 4096, 32, 11008, 32000),
        topology="v5e:8x8",
        rows=4,
        target_length=2048,
        maxtext_mib=(1205, 6514),
    ),
    "T5 v1.1 XL, bias in the kernel": _t5_xl(KEPT_SMALL),
    "T5 v1.1 XL, bias in HBM": _t5_xl(dataclasses.replace(KEPT_SMALL, attention="plain")),
}


def plan(name: str) -> Planned:
    """Compiles in a process of its own, which has to know before it imports JAX that no TPU is to be looked for.

    Machine code is written too, which the planner leaves out: it takes minutes, and nothing else of it is used here.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name],
        env=os.environ | environment(None),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"compiling {name} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return Planned(**json.loads(done.stdout.splitlines()[-1]))


def compile_case(case: Case) -> Planned:
    """In the process that knows."""
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
        return Planned(no_room=f"{room.needed / 2**30:.1f} GiB wanted, {room.available / 2**30:.2f} there")
    return Planned(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
    )


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(compile_case(CASES[sys.argv[1]]))))
