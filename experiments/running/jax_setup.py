"""Settings of JAX and of logging for commands that compile."""

import logging
import os

import jax
from rich.logging import RichHandler

from common.data.cache import default_cache_dir
from experiments.running.console import Harmless


def set_up_jax() -> None:
    """Keeps compiled programs on disk, so that a resumed run starts at once, and makes logged text harmless.

    The folder is `$JAX_COMPILATION_CACHE_DIR`, or one in our cache.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default_cache_dir() / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    handler = RichHandler(show_path=False)
    handler.setFormatter(Harmless("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("absl", "asyncio"):  # Orbax logs the stack traces of failures that it raises as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
