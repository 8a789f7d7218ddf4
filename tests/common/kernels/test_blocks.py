"""The table of block sizes, and how a call finds its row."""

import jax
import pytest

from common.compute.chips import CHIPS
from common.kernels.block_table import BLOCKS
from common.kernels.blocks import DEFAULT_BLOCK, LANES, best_blocks


def call(chip: str, length: int, head_dim: int, groups: int = 4, dtype: str = "bfloat16") -> tuple[int, int]:
    q = jax.ShapeDtypeStruct((1, length, 4, head_dim), dtype)
    return best_blocks(CHIPS[chip].device_kinds[0], q, jax.ShapeDtypeStruct((1, groups, length, head_dim), dtype))


def test_rows_are_blocks_of_known_chips() -> None:
    for (chip, _, length), block in BLOCKS.items():
        assert chip in CHIPS
        assert all(size % LANES == 0 and size <= length for size in block)


@pytest.mark.parametrize("row", BLOCKS, ids=str)
def test_a_call_finds_its_row(row: tuple[str, int, int]) -> None:
    """The next longer one and the next wider one; a call with fewer key heads or in float32 finds none."""
    chip, head_dim, length = row
    assert call(chip, length, head_dim) == call(chip, length - 1, head_dim - 8) == BLOCKS[row]
    for change in ({"groups": 2}, {"dtype": "float32"}):
        assert call(chip, length, head_dim, **change) == (DEFAULT_BLOCK, DEFAULT_BLOCK)


def test_calls_beyond_the_table() -> None:
    chip, head_dim, length = max(BLOCKS)
    assert call(chip, 2**20, head_dim) == BLOCKS[max(BLOCKS)]
    assert call(chip, length, head_dim + 8) == (DEFAULT_BLOCK, DEFAULT_BLOCK)
