"""Keeps everything but a rehearsal from running on the null GPU.

What computes asks `refuse_null_gpu`. The library is recognised by a function that only it has, whoever loaded it and
under whatever name. A rehearsal says so in its own process (`rehearse`): no variable of a shell, which might be left
over from one, can say it.
"""

from __future__ import annotations

import ctypes
import sys

from megatron_tempo.errors import InputError

MARKER = "MEGATRON_TEMPO_NULLGPU"  # tells a process that its device was given to it by `environment`
BANNER = """
##########################################################################
##  NULL GPU: a rehearsal. This CUDA device computes nothing.           ##
##  Every loss, answer and weight of this process is meaningless.       ##
##########################################################################
"""

_rehearsing = False


def is_loaded() -> bool:
    """Whether this process has the null GPU, by `environment` or by an LD_PRELOAD of somebody's own."""
    try:
        return hasattr(ctypes.CDLL(None), "nullgpu_is_loaded")
    except (OSError, TypeError):  # no dlopen of the process itself: not Linux
        return False


def rehearse() -> None:
    """Declares this process a rehearsal, with a banner on standard error. Raises InputError without the null GPU."""
    global _rehearsing  # a fact about the process
    if not is_loaded():
        raise InputError("this process has no null GPU: start a rehearsal by megatron-tempo rehearse")
    _rehearsing = True
    print(BANNER, file=sys.stderr, flush=True)


def is_rehearsal() -> bool:
    """Whether this process was declared a rehearsal."""
    return _rehearsing


def refuse_null_gpu(work: str) -> None:
    """Raises InputError if `work`, such as "train", would run on the null GPU outside of a rehearsal."""
    if is_loaded() and not _rehearsing:
        raise InputError(
            f"{work}: this process has the null GPU, a CUDA device that computes nothing (LD_PRELOAD has "
            "libnullgpu.so): all results would be meaningless. unset LD_PRELOAD LD_LIBRARY_PATH, and run the "
            "command again; for a rehearsal, use megatron-tempo rehearse"
        )
