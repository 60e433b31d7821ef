"""Checks that the resources of a process do not grow over iterations."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import psutil
import torch

# Allowed growth of a series from after the warm-up to the end: in its own unit, and as a share of its value. Counts may
# not grow, except Python objects: 100 are one in two iterations. 2 MB are 20 kB per iteration, because the allocator
# needs a while to settle (`SETTLES_LATE`). Seconds are CPU seconds of the process. Other load raises them by a fifth,
# because caches and memory are shared. Wall time is recorded but not checked.
ALLOWED: Mapping[str, tuple[float, float]] = {
    "files": (0, 0),
    "threads": (0, 0),
    "children": (0, 0),
    "tensors": (0, 0),
    "objects": (100, 0),
    "rss_mb": (2.0, 0),
    "cpu_seconds": (0, 0.3),
}
# Memory grows by some MB in the first half of a run, and no Python object or tensor with it: glibc's heaps, one for
# each thread that allocates, become as large as they need to be. With MALLOC_ARENA_MAX=1 it is one MB.
SETTLES_LATE = ("rss_mb",)
EVERY = 10  # count objects only at every tenth sample, because this takes as long as an iteration
_LIBC = ctypes.CDLL(None)


@dataclass
class Trace:
    """Series of this process's resources. Call `sample` at the same point of every iteration."""

    series: dict[str, list[float]] = field(default_factory=dict)
    _cpu: float = field(default_factory=time.process_time)
    _wall: float = field(default_factory=time.monotonic)

    def sample(self) -> None:
        process = psutil.Process()
        numbers = {
            "files": process.num_fds(),
            "threads": process.num_threads(),
            "children": len(process.children(recursive=True)),
            "cpu_seconds": time.process_time() - self._cpu,
            "seconds": time.monotonic() - self._wall,
        }
        if len(self.series.get("files", ())) % EVERY == EVERY - 1:
            gc.collect()
            if hasattr(_LIBC, "malloc_trim"):
                _LIBC.malloc_trim(0)  # memory that is free but not returned to the system is not growth
            numbers["rss_mb"] = process.memory_info().rss / 2**20
            objects = gc.get_objects()
            # gc.get_objects does not return frozen objects. Training freezes all objects that exist when it starts.
            numbers["objects"] = len(objects) + gc.get_freeze_count()
            numbers["tensors"] = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
        for name, number in numbers.items():
            self.series.setdefault(name, []).append(number)
        self._cpu, self._wall = time.process_time(), time.monotonic()  # the sample itself is not counted


def windows(numbers: Sequence[float], *, late: bool = False) -> tuple[float, float]:
    """The medians of the second (`late`: of the fourth) and of the last sixth: of 300 iterations, 51 to 100 (151 to
    200) and 251 to 300."""
    n = len(numbers)
    first = n // 2 if late else n // 6
    return median(numbers[first : first + n // 6]), median(numbers[-(n // 6) :])


def growth(series: Mapping[str, Sequence[float]]) -> list[str]:
    """A message for each series that has grown by more than ALLOWED."""
    growing = []
    for name, (most, share) in ALLOWED.items():
        early, late = windows(series[name], late=name in SETTLES_LATE)
        if late - early > most + share * early:
            growing.append(f"{name}: {early:.6g} after the warm-up, {late:.6g} at the end")
    return growing
