import numpy as np
import pytest

from common.errors import UserError
from common.weights.mapping import LISTED, LoadRule, Table, match

SIZES = {"D": 6, "H": 2, "G": 2, "C": 4, "V": 5}
TABLE = Table(
    rules=(
        LoadRule("embedding/table_VD", "embed", "V D", aliases=("head",)),
        LoadRule("layers/query_DHC", "block.{layer}.q", "(H C) D"),
        LoadRule("layers/key_DGC", "block.{layer}.fused", "D (G C)", part=0),
        LoadRule("layers/out_HCD", "block.{layer}.fused", "D (H C)", part=1),
        LoadRule("layers/bias_HC", "block.{layer}.bias", "(H C)", part=0),
        LoadRule("layers/second_GC", "block.{layer}.bias", "(G C)", part=1),
    ),
    sizes=SIZES,
    layers={"layers": 2},
)


class InMemory:
    where = "folder"

    def __init__(self, shapes):
        self.tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def shapes():
    return {key: tensor.shape for key, tensor in TABLE.tensors().items()}


def test_letters_determine_shapes():
    assert TABLE.leaves()["layers/query_DHC"] == (2, 6, 2, 4)
    assert shapes()["block.1.q"] == (8, 6)
    assert shapes()["block.0.fused"] == (6, 16)
    assert shapes()["block.0.bias"] == (16,)


def test_layouts_match_their_definition():
    """Entry by entry."""
    tensor = TABLE.tensors()["block.0.q"].pieces[0]
    stored = np.arange(48).reshape(8, 6)
    ours = tensor.to_leaf(stored)
    assert all(ours[d, h, c] == stored[h * 4 + c, d] for d in range(6) for h in range(2) for c in range(4))
    assert np.array_equal(tensor.to_foreign(ours), stored)
    fused = np.arange(96).reshape(6, 16)
    key, out = TABLE.tensors()["block.0.fused"].pieces
    assert (key.offset, out.offset) == (0, 8)
    assert out.to_leaf(fused[:, 8:])[1, 2, 3] == fused[3, 8 + 1 * 4 + 2]
    assert np.array_equal(out.to_foreign(out.to_leaf(fused[:, 8:])), fused[:, 8:])


@pytest.mark.parametrize("start", [0, 4])
def test_a_block_of_rows_is_a_slice_of_the_leaf(start):
    piece = TABLE.tensors()["block.0.q"].pieces[0]
    stored = np.arange(48).reshape(8, 6)
    assert (piece.row_size, piece.row_axis) == (4, 1)
    part = piece.to_leaf(stored[start : start + 4])
    assert np.array_equal(part, piece.to_leaf(stored)[:, start // 4 : start // 4 + 1])


def test_one_error_lists_all_wrong_keys():
    found = shapes()
    del found["block.1.q"], found["embed"]
    found |= {"block.0.q": (6, 8), "block.2.q": (8, 6), "extra": (1,)}
    with pytest.raises(UserError) as error:
        match(TABLE, InMemory(found))
    assert str(error.value) == (
        "folder does not have this model's keys; 2 missing: block.1.q, embed; 2 unexpected: block.2.q, extra; "
        "1 of another shape: block.0.q is [6, 8], expected [8, 6]"
    )


def test_long_lists_are_cut_and_the_rest_counted():
    names = [f"x{i:03}" for i in range(LISTED + 7)]
    with pytest.raises(UserError) as error:
        match(TABLE, InMemory(shapes() | dict.fromkeys(names, (1,))))
    message = str(error.value)
    assert f"{LISTED + 7} unexpected: x000, x001" in message
    assert "x019, and 7 more" in message
    assert "x020" not in message


@pytest.mark.parametrize(("names", "read", "aliases"), [(["embed"], "embed", {}), (["head"], "head", {})])
def test_a_tensor_is_found_under_its_key_or_an_alias(names, read, aliases):
    found = shapes()
    size = found.pop("embed")
    assert match(TABLE, InMemory(found | dict.fromkeys(names, size))).tensors[read].key == "embed"


def test_copies_of_a_tensor_are_aliases():
    found = match(TABLE, InMemory(shapes() | {"head": (5, 6)}))
    assert found.aliases == {"head": "embed"}
    with pytest.raises(UserError, match=r"head is \[6, 5\]"):
        match(TABLE, InMemory(shapes() | {"head": (6, 5)}))
