"""What this process is doing, and when it last got something done: by this a hang is told from long work (watchdog.py).

Whatever may take minutes says `beat()` for each part that is done, from any thread: a micro-batch, a token of the
embedded engine, an answer or a verdict, a bucket of weights, a file. A wait that has a limit of its own, such as that
for a server to start, may say it while it waits. It costs one reading of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Pulse:
    """`last`: of this process's monotonic clock. `step`: the iterations that are done."""

    last: float
    phase: str = ""
    step: int = 0


PULSE = Pulse(time.monotonic())


def beat() -> None:
    """Something is done."""
    PULSE.last = time.monotonic()


@contextmanager
def phase(name: str, step: int) -> Iterator[None]:
    """Names what is done inside, behind so many iterations."""
    outer = PULSE.phase
    PULSE.phase, PULSE.step = name, step
    beat()
    try:
        yield
    finally:
        PULSE.phase = outer
        beat()
