"""Requests to stop a run: USR1 or TERM to any of its processes, or a file in its folder.

A run stops when all ranks are between two phases of an iteration, and saves a checkpoint first, so that the same
command resumes it. A signal may reach only some processes, so the ranks exchange what they received.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

STOP = "stop"  # file in run.dir that requests a stop
STOPPED = "stopped.json"  # file in run.dir: step and reason of the last stop
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequests:
    """Records the signals while it is open. A second TERM ends the process at once.

    with StopRequests(run_dir, grace_seconds=600.0) as stop_requests:
        why = stop_requests.requested(is_writer=rank == 0)  # "USR1", "TERM", "file" or None: the same on all ranks
    """

    def __init__(self, folder: Path, grace_seconds: float | None) -> None:
        """`grace_seconds`: seconds that the cluster gives a run to stop, None if unknown."""
        self._folder, self._grace = folder, grace_seconds
        self._seen = 0  # the signal's number
        self._before: dict[int, object] = {}
        self._last: float | None = None  # time of the last call of `late`
        self._warned = False

    def __enter__(self) -> StopRequests:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # system calls of libraries continue
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, *, is_writer: bool) -> str | None:
        """Who requests a stop, None if nobody does. Collective. Only the writer looks for the file."""
        by_file = 1 if is_writer and (self._folder / STOP).exists() else 0
        highest = torch.tensor(max(self._seen, by_file))
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        number = int(highest)
        if number <= 1:
            return "file" if number else None
        return signal.Signals(number).name.removeprefix("SIG")

    def late(self) -> str | None:
        """A warning if the time since the last call exceeds the grace: a stop would have come too late. At most once;
        otherwise None."""
        now = time.monotonic()
        waited, self._last = now - (self._last or now), now
        if self._grace is None or waited <= self._grace or self._warned:
            return None
        self._warned = True
        return (
            f"warning: cluster.slurm.grace_seconds={self._grace:g} is too short: this run could stop only after "
            f"{waited:.0f} s. SLURM may kill it before it has saved a checkpoint; it would then resume from the "
            f"checkpoint before. Raise the field."
        )

    def acknowledge(self, step: int, why: str) -> None:
        """Write `STOPPED` and delete `STOP`. On a full disk, warn."""
        record = {"step": step, "why": why, "time": round(time.time(), 3)}
        try:
            (self._folder / STOP).unlink(missing_ok=True)
            (self._folder / STOPPED).write_text(json.dumps(record) + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s)", self._folder / STOPPED, error)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = number
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
