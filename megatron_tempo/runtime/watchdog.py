"""That every rank lives and the run gets on; and where one does not, an end of all, with a word.

In collectives ranks wait for one another, and one that is gone or stuck would keep the others waiting. So each rank has
a thread that signs in the run's store every `BEAT` seconds, and one that judges what the others signed. A run ends, on
all ranks and with exit status 1, where one of them

- has died: its process is gone, as others on its machine see, or it has given no sign for `SILENT` seconds, as when it
  is frozen or its machine is lost;
- has ended with an error, and `ENDED` seconds later the others have not;
- hangs: none has got anything done for `run.hang_minutes` (progress_marker.py says what counts).

The first that sees it says so, once: which rank, where, since when. Only durations by the judge's own clock count,
since clocks of machines differ; and a judge that was itself asleep, as all are on a machine that was suspended, counts
anew.
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_tempo.errors import Stopped
from megatron_tempo.observability.heartbeat import leave_word
from megatron_tempo.runtime import diagnosis, progress_marker
from megatron_tempo.runtime.diagnosis import DONE, Judge, Sign, Verdict

_PATIENCE = 10.0  # seconds for what is done at once unless a disk, a pipe or the store is stuck
_PACKAGE = str(Path(__file__).parents[1])
# Where a process waits for others: the file, and the function if not all of it.
_WAITING = (
    ("/torch/distributed/distributed_c10d.py", ""),
    ("/megatron/core/pipeline_parallel/p2p_communication.py", ""),
    ("/megatron/core/distributed/param_and_grad_buffer.py", "finish_grad_sync"),
    ("/megatron/core/distributed/param_and_grad_buffer.py", "finish_param_sync"),
    (f"{_PACKAGE}/weights/stream.py", "_wait"),
)
_VERDICT = "verdict"

_T = TypeVar("_T")


class Liveness:
    """While it is open this rank signs, and judges the others. It ends the process where the run is lost.

    with Liveness(run_dir, hang_minutes=30.0):  # inside the default process group
        ...
    """

    def __init__(self, folder: Path, hang_minutes: float | None) -> None:
        """`folder` is the run's. `hang_minutes`: none: a hang is not looked for."""
        self._folder, self._rank, self._world = folder, dist.get_rank(), dist.get_world_size()
        # Under torchrun the launcher's process holds the store, else the first rank's.
        launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._host = None if launched else 0
        self._judge = Judge(
            self._rank, self._world, self._host, hang_minutes and hang_minutes * 60, now=time.monotonic()
        )
        self._needed = self._world > 1 or hang_minutes is not None
        self._beat, self._silent = diagnosis.BEAT, diagnosis.SILENT
        self._own = Sign(0, socket.gethostname(), os.getpid(), _machine(), "", 0, "", False, 0.0, 0.0)
        self._ended: str | None = None
        self._signs: dict[int, Sign] = {}
        self._read: set[int] = set()  # ranks whose signs have been read in the store
        self._store: dist.Store | None = None
        self._prefix = ""
        self._found: Verdict | None = None  # another rank's
        self._bereft = False
        self._rounds = 0
        self._wake, self._over = threading.Event(), threading.Event()
        self._main: int | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Liveness:
        """Collective."""
        progress_marker.beat()
        self._main = threading.get_ident()
        if not self._needed:
            return self
        if self._world > 1:
            # Who they are is known from the first. A launcher's store may hold an earlier start's signs.
            shares: list[Any] = [None] * self._world
            dist.all_gather_object(shares, (secrets.token_hex(8), self._own))
            self._signs = {rank: sign for rank, (_, sign) in enumerate(shares)}
            self._prefix = f"liveness/{shares[0][0]}"
            self._store = self._connected()
        for name, run in (("signs", self._sign_on), ("judge", self._judge_on)):
            self._threads.append(threading.Thread(target=run, name=name, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._needed:
            return
        if error is None or isinstance(error, Stopped):
            self._sign_off(DONE)
            return
        if self._world > 1 and of_a_collective(error):
            # Most likely another rank is gone. The judge will know it within this time, and end this process.
            self._bereft = True
            self._over.wait(self._silent + 4 * self._beat)
        self._sign_off(f"{type(error).__name__}: {error}".split("\n", 1)[0])

    # Signing

    def _connected(self) -> dist.Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        seconds = timedelta(seconds=self._silent)
        store = dist.TCPStore(address, port, is_master=False, timeout=seconds, wait_for_workers=False)
        return dist.PrefixStore(self._prefix, store)

    def _sign_on(self) -> None:
        while not self._over.is_set():
            self._wake.clear()
            self._sign()
            self._wake.wait(self._beat)

    def _sign(self) -> None:
        """Sign, and read the others' signs. A store that does not answer holds this thread up, and no other."""
        own = self._own = self._now()
        if self._world == 1:
            self._signs = {0: own}
        else:
            try:
                if self._store is None:
                    self._store = self._again()
                if self._store is not None:
                    self._exchange(self._store, own)
            except RuntimeError:  # torch's, for a connection that is lost
                self._store = None
        self._rounds += 1

    def _exchange(self, store: dist.Store, own: Sign) -> None:
        store.set(f"{self._rank}", json.dumps(asdict(own)))
        # To read what is not there would be to wait for it.
        self._read |= {rank for rank in range(self._world) if rank not in self._read and store.check([f"{rank}"])}
        ranks = sorted(self._read)
        read = store.multi_get([f"{rank}" for rank in ranks])
        signs = {rank: Sign(**json.loads(text)) for rank, text in zip(ranks, read, strict=True)}
        self._signs = self._signs | signs  # a new one: the judge may be reading the old one
        if store.check([_VERDICT]):
            self._found = _verdict(store.get(_VERDICT))

    def _again(self) -> dist.Store | None:
        """A new connection, if anybody listens; torch's own tries write pages to the error output."""
        with suppress(OSError):
            address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            socket.create_connection(address, timeout=self._beat).close()
            return self._connected()
        return None

    def _now(self) -> Sign:
        stands, waits = _stands(self._main)
        state = progress_marker.PULSE
        return replace(
            self._own,
            beats=self._own.beats + 1,
            phase=state.phase,
            step=state.step,
            stands=stands,
            waits=waits,
            progress=state.last,
            quiet=time.monotonic() - state.last,
            ended=self._ended,
        )

    def _sign_off(self, word: str) -> None:
        """The last sign. Who holds the store stays until the others have read it, or have ended too."""
        self._ended = word
        before = self._rounds + 1  # the round under way may have begun without it
        deadline = time.monotonic() + _PATIENCE
        while self._rounds <= before and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.01)
        if self._host == self._rank:
            told = {rank: sign.beats for rank, sign in self._signs.items()}
            deadline = time.monotonic() + (self._silent if word == DONE else 4 * self._beat)
            while not self._all_know(told, done=word == DONE) and time.monotonic() < deadline:
                self._wake.set()
                time.sleep(0.02)
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(_PATIENCE)
        self._store = None

    def _all_know(self, told: dict[int, int], *, done: bool) -> bool:
        others = [(rank, sign) for rank, sign in self._signs.items() if rank != self._rank]
        return all(
            sign.ended is not None or _is_gone(self._own, sign) or (not done and sign.beats >= told.get(rank, 0) + 2)
            for rank, sign in others
        )

    # Judging

    def _judge_on(self) -> None:
        while not self._over.wait(self._beat) and self._ended is None:
            verdict = self._found or self._judge.look(time.monotonic(), self._signs, self._gone, bereft=self._bereft)
            if verdict is not None and self._ended is None:
                self._end(verdict)

    def _gone(self, sign: Sign) -> bool:
        return _is_gone(self._own, sign)

    def _end(self, verdict: Verdict) -> None:
        """Say what there is to say, and end this process. What says it may itself be stuck, so it has its time."""
        first = _within(_PATIENCE, lambda: self._claim(verdict)) if self._store is not None else None
        if first is None:
            tells = self._judge.tells()
        else:
            tells, verdict = first.by == self._rank, first
        again = _again_from(self._folder)
        _within(_PATIENCE, lambda: self._tell(verdict, again, tells))
        if self._host == self._rank and self._world > 1:
            time.sleep(2 * self._beat)  # until the others have read it in the store
        if tells or self._rank == 0:
            # At the very end: the first rank's own thread may still write the file, or its main one what it made of it.
            _within(_PATIENCE, lambda: leave_word(self._folder, verdict.reason + again))
        os._exit(1)

    def _claim(self, verdict: Verdict) -> Verdict:
        """The verdict of whoever was first."""
        assert self._store is not None
        return _verdict(self._store.compare_set(_VERDICT, "", json.dumps(asdict(replace(verdict, by=self._rank)))))

    def _tell(self, verdict: Verdict, again: str, tells: bool) -> None:
        if tells:
            os.write(2, f"\nerror: {verdict.text}{again}\n".encode())
        if self._rank in verdict.dump:
            os.write(2, f"the stacks of rank {self._rank}, process {os.getpid()}:\n".encode())
            faulthandler.dump_traceback(file=2, all_threads=True)
        sys.stdout.flush()
        sys.stderr.flush()


def of_a_collective(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is what torch raises where another rank is gone."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _verdict(text: bytes) -> Verdict:
    found = json.loads(text)
    return Verdict(found["reason"], found["text"], tuple(found["dump"]), found["by"])


def _again_from(run: Path) -> str:
    found = sorted(path for path in (run / "checkpoints").glob("step_*") if not path.suffix)
    return f"; the same command goes on from {found[-1]}" if found else ""


def _within(seconds: float, make: Callable[[], _T]) -> _T | None:
    """What a function makes; None where it fails or takes longer."""
    made: list[_T] = []

    def run() -> None:
        with suppress(RuntimeError, OSError, ValueError):
            made.append(make())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return made[0] if made else None


def _stands(thread: int | None) -> tuple[str, bool]:
    """The innermost line of this package in which a thread is, and whether it waits for other ranks from there."""
    frame, waits = sys._current_frames().get(thread or 0), False
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        waits = waits or any(file.endswith(path) and name in ("", function) for path, name in _WAITING)
        # Neither comprehensions nor what torch calls for each of its functions (models/device.py).
        if file.startswith(_PACKAGE) and not function.startswith(("<", "__torch")):
            return f"{file.removeprefix(_PACKAGE).lstrip('/')}:{frame.f_lineno} in {function}", waits
        frame = frame.f_back
    return "", waits


def _machine() -> str:
    """Equal for processes that see one another below /proc; empty where that tells nothing."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_gone(own: Sign, sign: Sign) -> bool:
    """Whether it is known that a rank's process is no more."""
    if not own.machine or own.machine != sign.machine:
        return False
    try:
        state = Path(f"/proc/{sign.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"
