"""What `twinstack plan` estimates beside what others measured and published: how far true steps stay behind a roofline.

Published are the figures of MaxText 0.2.5 for its own steps (causal-half FLOPs). Rematerialisation is `full` here, and
rows are as many as are named; neither need be what MaxText took.
"""

import dataclasses
from collections.abc import Iterator

from rich.console import Console

from common.compute.topology import parse_topology
from common.data.objectives.config import FullLM
from common.recipe import Execution
from common.sharding.shape import MeshShape
from common.train.config import AdamW, Cosine
from experiments.config import Arm, Experiment
from experiments.planning.compiling import PlannedProgram, compile_all
from experiments.planning.table import estimate_arm
from experiments.xl import xl
from gpt.config import SIZES, GptConfig

ARM = "gpt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    model: GptConfig
    topology: str
    rows: int
    """A device."""
    length: int
    published_mfu: float


def _llama_3_1(size: str, d_ff: int) -> GptConfig:
    """Llama 2's shapes with Llama 3.1's vocabulary, key-value heads and d_ff (arXiv 2407.21783)."""
    return dataclasses.replace(SIZES[size], vocab_size=128_256, num_kv_heads=8, d_ff=d_ff)


CASES = {
    "Llama 2 70B": Case(
        model=dataclasses.replace(SIZES["llama-2-70b"], vocab_size=32_128),
        topology="v5p:4x8x8",
        rows=4,
        length=4096,
        published_mfu=0.654,
    ),
    "Llama 3.1 8B": Case(
        model=_llama_3_1("llama-2-7b", 14_336),
        topology="v6e:16x16",
        rows=2,
        length=8192,
        published_mfu=0.455,
    ),
    "Llama 3.1 70B": Case(
        model=_llama_3_1("llama-2-70b", 28_672),
        topology="v6e:16x16",
        rows=2,
        length=8192,
        published_mfu=0.503,
    ),
}


def estimates(console: Console) -> Iterator[tuple[str, tuple[float, float]]]:
    """MFU by causal-half FLOPs of each case, from nothing that is sent hidden behind computing to all of it."""
    for name, case in CASES.items():
        topology, experiment = parse_topology(case.topology), _experiment(case)
        (compiled,) = compile_all([PlannedProgram(experiment=experiment, arm=ARM, topology=topology)], console)
        yield name, estimate_arm(experiment, topology, ARM, compiled).mfu_causal_half


def _experiment(case: Case) -> Experiment:
    """A language model on rows of one text, everything divided over all devices."""
    base, devices = xl(), parse_topology(case.topology).devices
    return dataclasses.replace(
        base,
        name="estimate",
        varies=(),
        arms={ARM: Arm(model=case.model, learning_rate=1e-3)},
        data=dataclasses.replace(
            base.data, objective=FullLM(), rows=case.rows * devices, input_length=0, target_length=case.length
        ),
        train=dataclasses.replace(
            base.train,
            optimizer=AdamW(),
            schedule=Cosine(),
            mesh=MeshShape(fsdp=devices),
            execution=Execution(remat="full"),
        ),
    )
