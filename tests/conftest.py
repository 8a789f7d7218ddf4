"""Strict JAX on eight CPU devices, programs compiled once and quickly, and a cache of the session's own.

Most of the time of the tests is tracing and compilation. Without the MLIR fusion emitters and without dividing a
program's code among threads, XLA compiles a small training step in 0.3 of the CPU time. Rare garbage collections, and
operations that do not carry the lines of Python that made them, save a tenth of the time of tracing and lowering.
"""

import gc
import os
import platform
import signal
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if (shared := Path(__file__).parents[2] / "shared/data").is_dir():
    os.environ.setdefault("TWINSTACK_SHARED_DATA", str(shared))
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # where libtpu is installed, it would ask for a TPU by the network
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_parallel_codegen_split_count=1",
        # XLA aborts on a flag that it does not know, as later versions do not know this one.
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    )
)
# By the environment, so that the programs that tests start do the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job, whose programs would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

KEPT_SECONDS = 14 * 24 * 3600
"""How long a compiled program that no test reads is kept."""

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """Compiles each program once: all workers, later sessions on this machine and the programs that tests start share a
    cache on disk."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = config.rootpath / ".pytest_cache" / f"xla-{platform.node()}"
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def pytest_collection_finish() -> None:
    """Leaves imported modules and collected tests out of garbage collections, and makes these rare: tracing allocates
    millions of objects that live for long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


def _prune(folder: Path) -> None:
    for path in folder.iterdir():
        if time.time() - path.stat().st_atime > KEPT_SECONDS:
            path.unlink(missing_ok=True)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where TWINSTACK_CACHE points while tests run: built data, tokenizers and plans are shared by the tests only."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINSTACK_CACHE", str(path))
        yield path
