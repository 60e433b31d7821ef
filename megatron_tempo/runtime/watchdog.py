"""Detects dead or hung ranks and aborts the job with one diagnostic.

In a collective, ranks wait for one another: one that is dead or stuck keeps the others waiting. So each rank has a
thread that writes a heartbeat to the run's store every `BEAT` seconds, and one that checks the others' heartbeats. The
run ends, on all ranks and with exit status 1, if a rank

- has died: its process is gone, as others on its machine see, or it has sent no heartbeat for `SILENT` seconds, as when
  it is frozen or its machine is lost;
- has ended with an error, and `ENDED` seconds later the others have not;
- hangs: no rank has made progress for `run.hang_minutes` (progress_marker.py says what counts).

The first rank that finds it reports it, once: which rank, where, since when. Only durations by the detector's own clock
count, since clocks of machines differ. A detector that was itself suspended, as all are on a suspended machine, counts
from zero.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_tempo.config.resume import checkpoint_folders
from megatron_tempo.errors import Stopped
from megatron_tempo.observability.heartbeat import write_final_heartbeat
from megatron_tempo.runtime import failure_detector, progress_marker
from megatron_tempo.runtime.device_wait import waits_for_device
from megatron_tempo.runtime.failure_detector import DONE, Diagnosis, FailureDetector, RankHeartbeat
from megatron_tempo.runtime.folder_lock import machine

_PATIENCE = 10.0  # seconds for an action that takes no time unless a disk, a pipe or the store is stuck
_PACKAGE = str(Path(__file__).parents[1])
# Code that waits for other processes: the file, and the function unless it is the whole file.
_WAITING = (
    ("/torch/distributed/distributed_c10d.py", ""),
    ("/megatron/core/pipeline_parallel/p2p_communication.py", ""),
    ("/megatron/core/distributed/param_and_grad_buffer.py", "finish_grad_sync"),
    ("/megatron/core/distributed/param_and_grad_buffer.py", "finish_param_sync"),
    (f"{_PACKAGE}/weights/stream.py", "_wait"),
)
_DIAGNOSIS = "diagnosis"

_T = TypeVar("_T")


class Watchdog:
    """Sends this rank's heartbeats and checks the others' while it is open. Ends the process if the run is lost.

    with Watchdog(run_dir, hang_minutes=30.0):  # inside the default process group
        ...
    """

    def __init__(
        self, folder: Path, hang_minutes: float | None, collectives: Callable[[], Mapping[str, int]] = dict
    ) -> None:
        """`folder`: the run's. `hang_minutes`: None to detect no hangs. `collectives`: how many this
        process has begun in each of its process groups; called from another thread."""
        self._folder, self._rank, self._world = folder, dist.get_rank(), dist.get_world_size()
        # Under torchrun the launcher's process holds the store, else the first rank's.
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._host = None if launched else 0
        self._detector = FailureDetector(
            self._rank, self._world, self._host, hang_minutes and hang_minutes * 60, now=time.monotonic()
        )
        self._needed = self._world > 1 or hang_minutes is not None
        self._collectives = collectives
        self._beat, self._silent = failure_detector.BEAT, failure_detector.SILENT
        self._own = RankHeartbeat(0, socket.gethostname(), os.getpid(), machine(), "", 0, "", False, 0.0, 0.0)
        self._ended: str | None = None
        self._heartbeats: dict[int, RankHeartbeat] = {}
        self._read: set[int] = set()  # ranks whose heartbeats have been read in the store
        self._store: dist.Store | None = None
        self._prefix = ""
        self._received: Diagnosis | None = None  # of another rank
        self._collective_failed = False
        self._rounds = 0
        self._wake, self._over = threading.Event(), threading.Event()
        self._main: int | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        """Start the threads. Collective."""
        progress_marker.mark()
        self._main = threading.get_ident()
        if not self._needed:
            return self
        if self._world > 1:
            # All ranks are known from the start. A launcher's store may contain heartbeats of an earlier start.
            shares: list[Any] = [None] * self._world
            dist.all_gather_object(shares, (secrets.token_hex(8), self._own))
            self._heartbeats = {rank: heartbeat for rank, (_, heartbeat) in enumerate(shares)}
            self._prefix = f"watchdog/{shares[0][0]}"
            self._store = self._connected()
        for name, run in (("heartbeats", self._run_heartbeats), ("failure detector", self._run_detector)):
            self._threads.append(threading.Thread(target=run, name=name, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._needed:
            return
        if error is None or isinstance(error, Stopped):
            self._finish(DONE)
            return
        if self._world > 1 and of_a_collective(error):
            # Most likely another rank is gone. The detector finds it within this time and ends this process.
            self._collective_failed = True
            self._over.wait(self._silent + 4 * self._beat)
        self._finish(f"{type(error).__name__}: {error}".split("\n", 1)[0])

    # Heartbeats

    def _connected(self) -> dist.Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        seconds = timedelta(seconds=self._silent)
        store = dist.TCPStore(address, port, is_master=False, timeout=seconds, wait_for_workers=False)
        return dist.PrefixStore(self._prefix, store)

    def _run_heartbeats(self) -> None:
        while not self._over.is_set():
            self._wake.clear()
            self._beat_once()
            self._wake.wait(self._beat)

    def _beat_once(self) -> None:
        """Send a heartbeat and read the others'. A store that does not answer blocks this thread only."""
        own = self._own = self._now()
        if self._world == 1:
            self._heartbeats = {0: own}
        else:
            try:
                if self._store is None:
                    self._store = self._reconnected()
                if self._store is not None:
                    self._exchange(self._store, own)
            except RuntimeError:  # of torch, for a lost connection
                self._store = None
        self._rounds += 1

    def _exchange(self, store: dist.Store, own: RankHeartbeat) -> None:
        store.set(f"{self._rank}", json.dumps(asdict(own)))
        # Reading a missing key would block until it is set.
        self._read |= {rank for rank in range(self._world) if rank not in self._read and store.check([f"{rank}"])}
        ranks = sorted(self._read)
        read = store.multi_get([f"{rank}" for rank in ranks])
        heartbeats = {rank: RankHeartbeat(**json.loads(text)) for rank, text in zip(ranks, read, strict=True)}
        self._heartbeats = self._heartbeats | heartbeats  # a new dict: the detector may be reading the old one
        if store.check([_DIAGNOSIS]):
            self._received = _diagnosis_of(store.get(_DIAGNOSIS))

    def _reconnected(self) -> dist.Store | None:
        """A new connection, None if nobody listens. torch's own attempts would write pages to stderr."""
        with suppress(OSError):
            address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            socket.create_connection(address, timeout=self._beat).close()
            return self._connected()
        return None

    def _now(self) -> RankHeartbeat:
        location, is_waiting = _location_of(self._main)
        state = progress_marker.MARKER
        return replace(
            self._own,
            count=self._own.count + 1,
            phase=state.phase,
            step=state.step,
            location=location,
            is_waiting=is_waiting,
            progress=state.last,
            idle_seconds=time.monotonic() - state.last,
            ended=self._ended,
            collectives=dict(self._collectives()),
        )

    def _finish(self, ending: str) -> None:
        """Send the last heartbeat. The rank that holds the store stays until the others have read it or have ended."""
        self._ended = ending
        before = self._rounds + 1  # the current round may have begun without it
        deadline = time.monotonic() + _PATIENCE
        while self._rounds <= before and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.01)
        if self._host == self._rank:
            counts_seen = {rank: heartbeat.count for rank, heartbeat in self._heartbeats.items()}
            deadline = time.monotonic() + (self._silent if ending == DONE else 4 * self._beat)
            while not self._all_know(counts_seen, done=ending == DONE) and time.monotonic() < deadline:
                self._wake.set()
                time.sleep(0.02)
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(_PATIENCE)
        self._store = None

    def _all_know(self, counts_seen: dict[int, int], *, done: bool) -> bool:
        others = [(rank, heartbeat) for rank, heartbeat in self._heartbeats.items() if rank != self._rank]
        return all(
            heartbeat.ended is not None
            or _is_gone(self._own, heartbeat)
            or (not done and heartbeat.count >= counts_seen.get(rank, 0) + 2)
            for rank, heartbeat in others
        )

    # Failure detection

    def _run_detector(self) -> None:
        while not self._over.wait(self._beat) and self._ended is None:
            diagnosis = self._received or self._detector.check(
                time.monotonic(), self._heartbeats, self._gone, collective_failed=self._collective_failed
            )
            if diagnosis is not None and self._ended is None:
                self._end(diagnosis)

    def _gone(self, heartbeat: RankHeartbeat) -> bool:
        return _is_gone(self._own, heartbeat)

    def _end(self, diagnosis: Diagnosis) -> None:
        """Report the diagnosis and end this process. Each report has a time limit, since its output may be stuck."""
        first = _within(_PATIENCE, lambda: self._claim(diagnosis)) if self._store is not None else None
        if first is None:
            should_report = self._detector.should_report()
        else:
            should_report, diagnosis = first.by == self._rank, first
        hint = _resume_hint(self._folder)
        _within(_PATIENCE, lambda: self._report(diagnosis, hint, should_report))
        if self._host == self._rank and self._world > 1:
            time.sleep(2 * self._beat)  # until the others have read it in the store
        if should_report or self._rank == 0:
            # Last: until here, other threads of the first rank may still write the file.
            first_rank = self._heartbeats.get(0, self._own)
            why, host, pid = diagnosis.reason + hint, first_rank.host, first_rank.pid
            _within(_PATIENCE, lambda: write_final_heartbeat(self._folder, why, host, pid))
        os._exit(1)

    def _claim(self, diagnosis: Diagnosis) -> Diagnosis:
        """The diagnosis of the rank that was first."""
        assert self._store is not None
        return _diagnosis_of(
            self._store.compare_set(_DIAGNOSIS, "", json.dumps(asdict(replace(diagnosis, by=self._rank))))
        )

    def _report(self, diagnosis: Diagnosis, hint: str, should_report: bool) -> None:
        if should_report:
            os.write(2, f"\nerror: {diagnosis.text}{hint}\n".encode())
        if self._rank in diagnosis.dump:
            os.write(2, f"stacks of rank {self._rank}, process {os.getpid()}:\n".encode())
            faulthandler.dump_traceback(file=2, all_threads=True)
        sys.stdout.flush()
        sys.stderr.flush()


def of_a_collective(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is what torch raises when another rank is gone."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _diagnosis_of(text: bytes) -> Diagnosis:
    fields = json.loads(text)
    return Diagnosis(fields["reason"], fields["text"], tuple(fields["dump"]), fields["by"])


def _resume_hint(run: Path) -> str:
    with suppress(OSError):
        if saved := checkpoint_folders(run):
            return f"; rerun the same command to resume from {saved[-1]}"
    return ""


def _within(seconds: float, make: Callable[[], _T]) -> _T | None:
    """The result of `make`; None if it fails or takes longer."""
    made: list[_T] = []

    def run() -> None:
        with suppress(RuntimeError, OSError, ValueError):
            made.append(make())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return made[0] if made else None


def _location_of(thread: int | None) -> tuple[str, bool]:
    """The innermost line of this package that a thread executes, and whether it waits there: for ranks or for a GPU."""
    frame = sys._current_frames().get(thread or 0)
    is_waiting = frame is not None and waits_for_device(frame)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        is_waiting = is_waiting or any(file.endswith(path) and name in ("", function) for path, name in _WAITING)
        # Skip comprehensions and the hook that torch calls for each of its functions (models/device.py).
        if file.startswith(_PACKAGE) and not function.startswith(("<", "__torch")):
            return f"{file.removeprefix(_PACKAGE).lstrip('/')}:{frame.f_lineno} in {function}", is_waiting
        frame = frame.f_back
    return "", is_waiting


def _is_gone(own: RankHeartbeat, heartbeat: RankHeartbeat) -> bool:
    """Whether a rank's process is known to have exited."""
    if not own.machine or own.machine != heartbeat.machine:
        return False
    try:
        state = Path(f"/proc/{heartbeat.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"
