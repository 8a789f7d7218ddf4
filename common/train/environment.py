"""Versions, machine and commit of a run, for reports and to judge whether two runs can agree to the bit."""

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

MACHINE_KEYS = ("platform", "device_kind", "devices", "cpu", "threads", "jax", "jaxlib")
"""Entries of `environment` that, with the program, decide the bits of a run on CPU."""


def environment() -> dict[str, Any]:
    """Describes this process's machine and software as plain JSON."""
    device = jax.devices()[0]
    return {
        **_software(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": _cpu_model(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def _software() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": platform.python_version(), **versions}


@functools.cache
def _commit() -> str:
    """Asks git once: the process runs the code that it has loaded, whatever is committed later."""
    return commit_of(Path(__file__))


@functools.cache
def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


def commit_of(source: Path) -> str:
    """Returns the commit of the repository that tracks `source`, with "-dirty" if it has uncommitted changes.

    Returns "unknown" if no repository tracks the file.
    """
    if not _git(source.parent, "ls-files", "--error-unmatch", source.name):  # installed inside another project
        return "unknown"
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def _git(folder: Path, *arguments: str) -> str:
    """Returns what git prints, or "" if it fails."""
    try:
        found = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
