"""Reads the compiler's schedules of kernels, and counts tiles."""

import pytest

from benchmarks.attention_blocks import PAIRS, Bundles, parse_bundles, tiles, total

BUNDLES = """
= control target key start
LB: loop body

     0   :  { %s0 = inlined_call_operand }
   0x1 LB: > { %22 = sbr.rel (%p1) target = $region2 }
   0x2   : > {}
   0x3   : > {}
   0x4   : > {}
   0x5   : > {}
   0x6   : > { %v1 = vmatmul.bf16 }
   0x7   : > { %v2 = vadd.f32 }
   0x8 PF: > { %23 = sbr.rel (%p2) target = $region3 }
   0x9   : > {}
   0xa   : > {}
   0xb   : > {}
   0xc   : > {}
   0xd   : > { %v3 = vmatmul.bf16 }
   0xe   : > { %v4 = vmatmul.bf16 }
   0xf   : > { %v5 = vadd.f32 }
  0x10 PF: > { %s1 = sadd.s32 }
"""
USAGE = "== CAPACITY:\nMATMUL, VALU\n 4 4\n== UTILIZATION:\n" + "\n".join(
    f"{int(at in (6, 13, 14))} 0" for at in range(17)
)


def test_tiles_are_the_stretches_that_use_the_matrix_unit() -> None:
    assert parse_bundles(BUNDLES, USAGE) == Bundles(even=2, mixed=3, step=12)


def test_a_kernel_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="unpack"):
        parse_bundles(BUNDLES, USAGE.replace("\n1 0", "\n0 0", 1))


@pytest.mark.parametrize("length", [1024, 4096])
def test_the_total_counts_every_tile(length: int) -> None:
    """A bundle per pair of a query and a key, whatever the blocks, forward twice and backward once."""
    for pair in PAIRS:
        size = pair[0] * pair[1]
        one = Bundles(even=size, mixed=size, step=0)
        assert sum(tiles(length, pair)) == length**2 // size
        assert total(length, pair, {"forward": one, "backward": one}) == 3 * length**2
