"""Page faults and resident memory are counted by the kernel, in processes of their own: the settings are for good."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.allocator import keep_freed_memory

ROOT = Path(__file__).parents[2]
MOST, FEW = 16_000, 160
"""The program below uses a block of 64 MiB, which has 16,384 pages of 4 KiB; a few may be the heap's already."""
PROGRAM = """
import ctypes, resource, sys
from common.allocator import keep_freed_memory, release_freed_memory

libc, size = ctypes.CDLL(None), ctypes.c_size_t(2**26)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults_of_a_call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size.value)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(int(keep_freed_memory()), faults_of_a_call(), min(faults_of_a_call() for _ in range(5)))
release_freed_memory(int(sys.argv[1]))
print(faults_of_a_call())
"""


def with_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except ValueError:
        return False


def faults(step: int = 3, **variables: str) -> list[int]:
    """Whether memory is kept; faults of the first call, of a later one, and of one after the release at `step`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(step)],
        env={**kept, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in done.stdout.split()]


@pytest.fixture
def small_pages() -> None:
    """Skips where a block of 64 MiB may take other pages than those that the kernel counts here."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not with_glibc() or os.sysconf("SC_PAGESIZE") != 4096 or (huge.exists() and "[always]" in huge.read_text()):
        pytest.skip("counts pages of 4 KiB that glibc takes")


@pytest.mark.usefixtures("small_pages")
def test_a_block_of_kept_memory_is_faulted_in_once():
    kept, first, later, _ = faults()
    assert kept and first >= MOST and later < FEW


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(
    "variables", [{"MALLOC_ARENA_MAX": "2"}, {"MALLOC_CONF": "x"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]
)
def test_the_users_own_settings_stay(variables):
    kept, _, later, _ = faults(**variables)
    assert not kept and later >= MOST


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(("step", "released"), [(1, True), (6, False), (64, True), (65, False)])
def test_memory_is_released_after_steps_that_are_powers_of_two(step, released):
    *_, after = faults(step)
    assert after >= MOST if released else after < FEW


class Replaced:
    """Stands for the C library; as the whole process's, it has the allocator of another one."""

    def __init__(self, name: str | None):
        library = ctypes.PyDLL(None)
        self.malloc = library.malloc if name else library.calloc

    def mallopt(self, option: int, value: int) -> int:
        raise AssertionError("set an option of an allocator that is not in use")


@pytest.mark.skipif(not with_glibc(), reason="asks for glibc")
def test_another_allocator_is_left_alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(ctypes, "CDLL", Replaced)
    assert not keep_freed_memory()


@pytest.mark.parametrize("error", [ValueError("unrecognized configuration name"), OSError(22, "Invalid argument")])
def test_another_c_library_is_left_alone(monkeypatch, error):
    def confstr(name: str) -> str:
        raise error

    monkeypatch.setattr(os, "confstr", confstr)
    monkeypatch.setattr(ctypes, "CDLL", Replaced)
    monkeypatch.setattr(os, "environ", {})
    assert not keep_freed_memory()
