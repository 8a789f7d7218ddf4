"""Made-up results of a compiler: one step that fits on a slice of four chips, and one that does not."""

import dataclasses

from common.compute.aot import Compiled, OutOfMemory
from common.compute.collectives import Collective
from common.compute.memory import Buffer, Memory
from common.compute.topology import parse_topology

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
    summed_gather_bytes=0,
    flops=int(CHIP.flops_per_second),
    has_kernels=False,
    traffic_bytes=int(CHIP.hbm_bytes_per_second) // 2,
    seconds=1.0,
)
TOO_LARGE = dataclasses.replace(FITS, memory=None, out_of_memory=OutOfMemory(needed=47 * 2**30, available=15 * 2**30))
