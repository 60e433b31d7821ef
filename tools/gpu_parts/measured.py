"""Time and memory of a call, and how far tensors are apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

REPEATS = 5


def apart(found: Tensor, exact: Tensor) -> float:
    """The length of the difference over the length of `exact`, in float64. NaN if either has one."""
    wanted = exact.double()
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-300))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median seconds of a call after one that is not timed, which compiles."""
    times = []
    for _ in range(1 + repeats):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes on the GPU at the call's peak in addition to those before it; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
