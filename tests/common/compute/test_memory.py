"""Reads files of XLA's buffer assignment in the form that libtpu writes."""

import pytest

from common.compute.hlo import parse
from common.compute.memory import read_memory

PROGRAM = r"""
ENTRY %main (p: f32[8,128], q: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="state.params[\'mlp\'][\'in_DF\']"}
  %q = f32[8,128]{1,0:T(8,128)} parameter(1), metadata={op_name="batch.targets_BT"}
  %early = f32[16,128]{1,0:T(8,128)} fusion(%p), metadata={op_name="jit(train_step)/early"}
  %late = f32[24,128]{1,0:T(8,128)} fusion(%early), metadata={op_name="jit(train_step)/late"}
  ROOT %out = f32[8,128]{1,0:T(8,128)} fusion(%late, %q)
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 64, page 0, thread-local:
 value: <1 add @0> (size=64,offset=0): f32[]
allocation 1: size 4096, page 0, parameter 0, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <2 p @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 2: size 4096, page 0, parameter 1, shape |f32[8,128]| at ShapeIndex {}:
 value: <3 q @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 3: size 512, page 0, maybe-live-out:
allocation 4: size SIZE, page 0, preallocated-temp:
 value: <4 early @0> (size=8192,offset=0): f32[16,128]{1,0:T(8,128)}
 value: <5 late{0} (phi) @1> (size=12288,offset=PLACE): f32[24,128]{1,0:T(8,128)}
 value: <6 late{1} @1> (size=12288,offset=PLACE): f32[24,128]{1,0:T(8,128)}
allocation 5: size 999999, color 1, page 0, preallocated-temp:
 value: <7 fast @0> (size=999999,offset=0): f32[9]{0:T(128)S(1)}
"""
LIVE = """HloLiveRange (max 9):
  BufferLiveRange:
    p{}:0-9
    early{}:1-END
    late{0}:3-5
    late{1}:4-6
"""


@pytest.mark.parametrize(
    ("end", "place", "size", "at_peak", "largest"),
    [
        (4, 8192, 20480, 20480, ["f32[24,128]", "f32[16,128]"]),  # both are alive at once
        (2, 0, 12288, 12288, ["f32[24,128]"]),  # the second reuses the first one's memory
        (2, 8192, 20480, 12288, ["f32[24,128]"]),  # the second does not reuse it, which leaves a gap
    ],
)
def test_the_peak_counts_temporaries_that_are_alive_at_once(
    end: int, place: int, size: int, at_peak: int, largest: list[str]
) -> None:
    assignment = ASSIGNMENT.replace("PLACE", str(place)).replace("SIZE", str(size))
    memory = read_memory(assignment, LIVE.replace("END", str(end)), parse(PROGRAM))
    assert memory.arguments == {"state.params": 4096, "batch.targets_BT": 4096}
    assert (memory.outputs, memory.temporaries, memory.at_peak) == (512, size, at_peak)
    assert memory.total == 2 * 4096 + 512 + size
    assert [buffer.array for buffer in memory.largest] == largest
    assert memory.largest[0].made_by == "jit(train_step)/late"
