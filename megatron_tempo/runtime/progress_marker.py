"""What this process is doing and when it last made progress. The watchdog tells a hang from long work by it.

Whatever may take minutes calls `mark()` for each part that is done, from any thread: a micro-batch, a token of the
embedded engine, a response or a verdict, a bucket of weights, a file. A wait that has a limit of its own, such as that
for a server to start, may call it while it waits. A call costs one reading of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class ProgressMarker:
    """`last`: of this process's monotonic clock. `step`: the iterations that are done."""

    last: float
    phase: str = ""
    step: int = 0


MARKER = ProgressMarker(time.monotonic())


def mark() -> None:
    """Note that this process has made progress."""
    MARKER.last = time.monotonic()


@contextmanager
def phase(name: str, step: int) -> Iterator[None]:
    """Names what is done inside. `step` iterations are done."""
    outer = MARKER.phase
    MARKER.phase, MARKER.step = name, step
    mark()
    try:
        yield
    finally:
        MARKER.phase = outer
        mark()
