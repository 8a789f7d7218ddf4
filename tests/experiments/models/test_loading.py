"""Loading a trained model by its path, as a notebook does: on a run directory that an earlier version wrote."""

from pathlib import Path

import jax
import pytest

from common.errors import UserError
from common.files import read_rows
from common.train.run_files import RunFiles
from experiments.models.loading import load

KEPT = Path(__file__).parents[2] / "data/run_schema_1/gpt"


def test_a_run_generates_what_it_generated() -> None:
    policy = load(KEPT)
    samples = read_rows(KEPT / RunFiles.SAMPLES)
    texts = policy.generate([sample["inputs"] for sample in samples], max_new_tokens=4)
    assert texts == [sample["prediction"] for sample in samples]
    assert policy.config.kind == "gpt" and policy.mesh.size == jax.device_count()
    assert policy.tokenizer.decode(policy.tokenizer.encode("three and six")) == "three and six"
    assert load(policy.origin).origin == policy.origin
    assert repr(policy) == f"<{KEPT}@4: {policy.config.param_count():,} parameters, computes in float32>"


def test_the_dtype_can_be_chosen() -> None:
    assert load(KEPT, dtype="bfloat16").execution.dtype == "bfloat16"
    with pytest.raises(UserError, match="dtype 'float23': did you mean 'float32'"):
        load(KEPT, dtype="float23")  # type: ignore[arg-type]


def test_other_paths_are_errors() -> None:
    with pytest.raises(UserError, match=r"is a whole study's directory: name one of its runs, .*gpt"):
        load(KEPT.parent)
    with pytest.raises(UserError, match="does not exist: did you mean .*gpt'"):
        load(KEPT.parent / "gtp")
