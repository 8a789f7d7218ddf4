"""Accelerator types and topologies of TPU slices that can be rented."""

import re

import pytest

from common.errors import UserError
from experiments.launching.slices import accelerator_type, rentable


@pytest.mark.parametrize(
    ("name", "form", "chips"),
    [  # from the tables in Cloud TPU's documentation
        ("v4-8", "v4:2x2x1", 4),
        ("v4-4096", "v4:8x16x16", 2048),
        ("v5litepod-1", "v5e:1x1", 1),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-64", "v5p:2x4x4", 32),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("v6e-16", "v6e:4x4", 16),
    ],
)
def test_accelerator_types_and_grids_name_the_same_slices(name, form, chips):
    found = rentable(name, 1)
    assert (str(found), found.chips) == (form, chips)
    assert rentable(form, 1) == found
    assert accelerator_type(found) == name == accelerator_type(rentable(form, 3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-60", "nearest: v5p:2x4x4"),
        ("v6p-8", "did you mean 'v6e'?"),
        ("v6e-16 --quiet", "must be CHIP:GRID"),
        ("v5p:4x8x4", "nearest: v5p:4x4x8"),
        ("v6e", "must be CHIP:GRID"),
        ("v5p:4x4x16", "has no accelerator type; nearest: v5p:4x8x8 (v5p-512)"),
        ("tpu7x:2x2x1", "the Cloud TPU API, which both engines use, has no tpu7x; it has v4, v5e, v5p, v6e"),
    ],
)
def test_a_slice_that_cannot_be_rented_is_refused(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        rentable(name, 1)
