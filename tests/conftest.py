"""Strict JAX on eight CPU devices, and a cache of the session's own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if (shared := Path(__file__).parents[2] / "shared/data").is_dir():
    os.environ.setdefault("TWINSTACK_SHARED_DATA", str(shared))
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # where libtpu is installed, it would ask for a TPU by the network

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where TWINSTACK_CACHE points while tests run: built data, tokenizers and plans are shared by the tests only."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINSTACK_CACHE", str(path))
        yield path
