"""Requests to stop a run: USR1, TERM or INT (Ctrl-C) to any of its processes, or a file in its folder.

A run stops when all ranks are between two phases of an iteration, and saves a checkpoint first, so that the same
command resumes it. A signal may reach only some processes, so the ranks exchange what they received.

Python runs a signal's handler between two of its own instructions. A rank that waits in C executes none. So a thread
also receives each signal, through the wakeup file descriptor, and can end the process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from megatron_tempo.files import replace_file

log = logging.getLogger(__name__)

STOP = "stop"  # file in run.dir that requests a stop
STOPPED = "stopped.json"  # file in run.dir: step and reason of the last stop
ONE_REQUEST = 1.0  # seconds: a launcher repeats the signal that it received together with its processes
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_ENDING = (signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """Records the signals while it is open.

    with StopRequests(run_dir, grace_seconds=600.0) as stop_requests, process_group(), stop_requests.agreed():
        why = stop_requests.requested(is_writer=rank == 0)  # "USR1", "TERM", "INT", "file" or None, on all ranks

    Before the ranks can agree, and the second time, TERM and INT end the process at once, with the exit status of a
    shell: 143 and 130. INT stays ignored where it was, as behind nohup.
    """

    def __init__(self, folder: Path, grace_seconds: float | None) -> None:
        """`grace_seconds`: seconds that the cluster gives a run to stop, None if unknown."""
        self._folder, self._grace = folder, grace_seconds
        self._seen = 0  # the signal's number
        self._before: dict[int, object] = {}
        self._agrees = False  # the ranks can tell each other
        self._first: float | None = None  # time of the first TERM or INT
        self._pipe: tuple[int, int] | None = None  # receives the numbers of signals
        self._earlier_pipe = -1  # the wakeup file descriptor before this one
        self._last: float | None = None  # time of the last call of `late`
        self._warned = False

    def __enter__(self) -> StopRequests:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._earlier_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True).start()
        for number in _SIGNALS:
            if number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # system calls of libraries continue
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._earlier_pipe)
        assert self._pipe is not None
        os.close(self._pipe[1])  # which ends the thread

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Inside, the ranks can agree to stop. Requires the process group."""
        self._agrees = True
        yield

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
        """A warning, at most once, if the time since the last call exceeds the grace period: a stop would be too late.
        None otherwise."""
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
            replace_file(self._folder / STOPPED, json.dumps(record) + "\n", fsync=True)
        except OSError as error:
            log.warning("%s cannot be written (%s)", self._folder / STOPPED, error)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = number

    def _listen(self, pipe: int) -> None:
        while received := os.read(pipe, 1):
            if received[0] in _ENDING:
                self._on_signal(signal.Signals(received[0]))
        os.close(pipe)

    def _on_signal(self, number: signal.Signals) -> None:
        now, name = time.monotonic(), number.name.removeprefix("SIG")
        if not self._agrees:
            _end(number, f"stopped by {name} before the run began")
        elif self._first is None:
            self._first = now
            if number == signal.SIGINT and sys.stderr.isatty():
                _write(f"{name}: the run stops, with a checkpoint, where it next can; again: at once")
        elif now - self._first > ONE_REQUEST:
            _end(number, f"ended at once by a second {name}: the same command resumes from the last checkpoint")


@contextmanager
def ctrl_c(*, raises: bool) -> Iterator[None]:
    """Set what INT does inside, unless it is ignored: raise KeyboardInterrupt, or end the process at once and silently.

    The latter also reaches a process that waits in C, such as for other ranks to start.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler if raises else signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def _end(number: signal.Signals, why: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        _write(why)
    os._exit(128 + number)


def _write(line: str) -> None:
    os.write(2, f"{line}\n".encode())
