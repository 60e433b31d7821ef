"""Requests to stop a run: USR1 or TERM to any of its processes, or a file in its folder.

A run stops where all ranks stand between two phases of an iteration, with a checkpoint, so that the same command
resumes it. A signal may reach only some processes, so the ranks ask one another.
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

STOP = "stop"  # below run.dir: somebody wants the run to stop
STOPPED = "stopped.json"  # below run.dir: the last one that did, at which step and why
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequests:
    """While it is open the signals are taken note of. A second TERM ends the process at once.

    with StopRequests(run_dir, grace_seconds=600.0) as stop_requests:
        why = stop_requests.requested(is_writer=rank == 0)  # "USR1", "TERM", "file" or None: the same on all ranks
    """

    def __init__(self, folder: Path, grace_seconds: float | None) -> None:
        """`grace_seconds`: how long a run has to stop, if that is known."""
        self._folder, self._grace = folder, grace_seconds
        self._seen = 0  # the signal's number
        self._before: dict[int, object] = {}
        self._last: float | None = None  # of the calls of `late`
        self._warned = False

    def __enter__(self) -> StopRequests:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # libraries' calls go on as if nothing had come
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, *, is_writer: bool) -> str | None:
        """Who asks for a stop, if anybody does. Collective. The writer alone looks for the file."""
        by_file = 1 if is_writer and (self._folder / STOP).exists() else 0
        highest = torch.tensor(max(self._seen, by_file))
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        number = int(highest)
        if number <= 1:
            return "file" if number else None
        return signal.Signals(number).name.removeprefix("SIG")

    def late(self) -> str | None:
        """What to warn of, once, where a stop would have had to wait for longer than the grace since the last call."""
        now = time.monotonic()
        waited, self._last = now - (self._last or now), now
        if self._grace is None or waited <= self._grace or self._warned:
            return None
        self._warned = True
        return (
            f"warning: it took {waited:.0f} s until this run could have stopped, and "
            f"cluster.slurm.grace_seconds={self._grace:g}: told to stop, it may be ended before it has saved, and go "
            f"on from the checkpoint before; raise it"
        )

    def acknowledge(self, step: int, why: str) -> None:
        """Say in the folder that the run has stopped, and that the wish is fulfilled; a full disk is warned of."""
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
