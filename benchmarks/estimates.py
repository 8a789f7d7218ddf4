"""Estimates of `twinstack plan` next to published measurements: how far real steps fall short of a roofline.

The published figures are MaxText 0.2.5's for its own steps (causal-half FLOPs). Here rematerialisation is `full`, and
rows are as given below; MaxText may have used others.
"""

import dataclasses
from collections.abc import Iterator

from rich.console import Console

from common.compute.topology import parse_topology
from common.data.objectives.config import FullLM
from common.recipe import Execution
from common.sharding.shape import MeshShape
from common.train.config import AdamW, Cosine
from experiments.planning.compiling import PlannedProgram, compile_all
from experiments.planning.table import estimate_run
from experiments.run import Run
from experiments.xl import xl
from gpt.config import SIZES, GptConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A training step whose MFU was published."""

    model: GptConfig
    topology: str
    rows: int
    """Rows per device."""
    length: int
    published_mfu: float


def _llama_3_1(size: str, d_ff: int) -> GptConfig:
    """Llama 2's shapes with Llama 3.1's vocabulary, key-value heads and d_ff (arXiv 2407.21783)."""
    return dataclasses.replace(SIZES[size], vocab_size=128_256, num_kv_heads=8, d_ff=d_ff)


PUBLISHED = {
    "Llama 2 70B": PublishedRun(
        model=dataclasses.replace(SIZES["llama-2-70b"], vocab_size=32_128),
        topology="v5p:4x8x8",
        rows=4,
        length=4096,
        published_mfu=0.654,
    ),
    "Llama 3.1 8B": PublishedRun(
        model=_llama_3_1("llama-2-7b", 14_336),
        topology="v6e:16x16",
        rows=2,
        length=8192,
        published_mfu=0.455,
    ),
    "Llama 3.1 70B": PublishedRun(
        model=_llama_3_1("llama-2-70b", 28_672),
        topology="v6e:16x16",
        rows=2,
        length=8192,
        published_mfu=0.503,
    ),
}


def estimates(console: Console) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yields (name, MFU by causal-half FLOPs) of each run; the MFU ranges from no communication overlapped with compute
    to all of it."""
    for name, run in PUBLISHED.items():
        topology, planned = parse_topology(run.topology), _planned(run)
        (compiled,) = compile_all([PlannedProgram(name=name, run=planned, topology=topology)], console)
        yield name, estimate_run(planned, topology, compiled).mfu_causal_half


def _planned(run: PublishedRun) -> Run:
    """Returns a language model on rows of one text, fully sharded over all devices."""
    base, devices = xl().arms["gpt"], parse_topology(run.topology).devices
    return dataclasses.replace(
        base,
        model=run.model,
        learning_rate=1e-3,
        data=dataclasses.replace(
            base.data, objective=FullLM(), rows=run.rows * devices, input_length=0, target_length=run.length
        ),
        train=dataclasses.replace(
            base.train,
            optimizer=AdamW(),
            schedule=Cosine(),
            mesh=MeshShape(fsdp=devices),
            execution=Execution(remat="full"),
        ),
    )
