"""How the C library hands out memory, for a process that computes on a CPU."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MOST = 2**31 - 1  # a C int: 2 GB of free memory at the end of the heap; what is free beyond that is returned


def keep_freed_memory() -> None:
    """Let the process reuse the memory of freed tensors. Does nothing without glibc, or if the user has set its malloc.

    glibc takes a block of more than 32 MB (at first: 128 KB) from the kernel, and returns it when it is freed. So each
    layer's tensors are new pages, which the kernel fills with zeros at their first use.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST)
