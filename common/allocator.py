"""Keeps freed memory in the process, for programs that XLA runs on CPU.

XLA allocates the temporary buffer of a program anew at every call. glibc maps a buffer over 32 MiB, its greatest
threshold, straight from the kernel and unmaps it when it is freed, so every training step takes a page fault for each
4 KiB of it, and the kernel fills each page with zeros. Neither XLA nor jaxlib has an option to keep the buffer.
"""

import ctypes
import os

OPTIONS = {
    -4: 0,  # M_MMAP_MAX: no allocation is mapped by itself; all come from the heap
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: the heap does not shrink by itself
    -8: 1,  # M_ARENA_MAX: all threads share that heap, since the arena of a thread holds no block over 64 MiB
    -2: 2**26,  # M_TOP_PAD: the heap grows by 64 MiB more than needed
}
"""Values of `mallopt` by option, from glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for the next allocation, and returns whether it does.

    Changes nothing with another C library or another allocator, nor where the user has set glibc's own variables
    (MALLOC_..., GLIBC_TUNABLES). Threads that have allocated before keep their arenas, so this is called before JAX
    starts its own. Freed memory then returns to the system by `release_freed_memory` only.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    if (libc := _glibc()) is None:
        return False
    return all(libc.mallopt(option, value) == 1 for option, value in OPTIONS.items())


def release_freed_memory(step: int) -> None:
    """Returns freed memory to the system after steps 1, 2, 4, 8, ... of this process.

    A heap that never shrinks collects holes as large as a temporary buffer: glibc asks for 96 bytes more than an
    aligned block takes, so the hole that the block leaves is too small for the next. About five come up, most of them
    in the first steps. A release costs the next step the faults that `keep_freed_memory` spares it, so they get rare.
    """
    if step & (step - 1) == 0 and (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Returns the C library if it is glibc and this process allocates by it."""
    try:
        os.confstr("CS_GNU_LIBC_VERSION")  # another C library does not know the name
        libc = ctypes.CDLL("libc.so.6")
    except (ValueError, OSError):
        return None
    own, in_use = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (libc, ctypes.CDLL(None)))
    return libc if own == in_use else None
