"""What this process is doing and when it last made progress. The watchdog uses it to tell a hang from long work.

Code that may take minutes calls `mark()` after each completed part, from any thread: a micro-batch, a token of the
embedded engine, a response or a verdict, a bucket of weights, a file. A wait with its own time limit, such as for
a server to start, may call it while it waits. A call reads the clock once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class ProgressMarker:
    """`last`: time of the last progress, by this process's monotonic clock. `step`: completed iterations."""

    last: float
    phase: str = ""
    step: int = 0


MARKER = ProgressMarker(time.monotonic())


def mark() -> None:
    """Note that this process has made progress."""
    MARKER.last = time.monotonic()


@contextmanager
def phase(name: str, step: int) -> Iterator[None]:
    """Name the phase that runs inside. `step`: completed iterations."""
    outer = MARKER.phase
    MARKER.phase, MARKER.step = name, step
    mark()
    try:
        yield
    finally:
        MARKER.phase = outer
        mark()
