"""That every rank lives and the run gets on; and where one does not, an end of all, with a word.

In collectives ranks wait for one another, and one that is gone or stuck would keep the others waiting. So each rank has
a thread that signs in the run's store every `BEAT` seconds, and one that judges what the others signed. A run ends, on
all ranks and with exit status 1, where one of them

- has died: its process is gone, as others on its machine see, or it has given no sign for `SILENT` seconds, as when it
  is frozen or its machine is lost;
- has ended with an error, and `ENDED` seconds later the others have not;
- hangs: none has got anything done for `run.hang_minutes` (pulse.py says what counts).

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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_tempo import pulse
from megatron_tempo.errors import Stopped
from megatron_tempo.heartbeat import leave_word
from megatron_tempo.progress import clock

BEAT = 5.0  # seconds from one sign to the next
SILENT = 60.0  # seconds without a sign after which a rank counts as dead
ENDED = 20.0  # seconds that the others have to end by themselves when one has ended with an error

DONE = "done"
_PATIENCE = 10.0  # seconds for what is done at once unless a disk, a pipe or the store is stuck
_PACKAGE = str(Path(__file__).parent)
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


@dataclass(frozen=True, slots=True)
class Sign:
    """What a rank says of itself. `beats` counts its signs; `progress` differs from sign to sign where it gets on.

    >>> Sign(beats=12, host="node7", pid=4242, machine="5f0e pid:[4026531836]", phase="generate", step=11,
    ...      stands="rollout/batches.py:77 in collect", waits=True, progress=1764.2, quiet=3.1)
    """

    beats: int
    host: str
    pid: int
    machine: str  # equal where a process can look for the other's
    phase: str
    step: int  # iterations that are done
    stands: str  # the main thread's innermost line in this package
    waits: bool  # inside which it waits for other ranks
    progress: float
    quiet: float  # seconds since it last got something done
    ended: str | None = None  # `DONE`, or the error that it ended with


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a run. `reason` is for heartbeat.json, `text` for the error output."""

    reason: str
    text: str
    dump: tuple[int, ...] = ()  # ranks that are to show their stacks
    by: int = -1  # the rank that says it


class Judge:
    """Judges by the signs alone: no clock, no store. `now` is any clock's that does not jump, in seconds."""

    def __init__(self, rank: int, world: int, host: int | None, hang: float | None, now: float) -> None:
        """`host`: the rank whose process holds the store; none: the launcher's does. `hang`: in seconds, if any."""
        self._rank, self._host, self._hang = rank, host, hang
        self._beat, self._silent, self._ended = BEAT, SILENT, ENDED
        self._looked = now
        self._slept = 0.0  # the longest that this judge was asleep
        self._signs: dict[int, Sign] = {}
        self._moved = dict.fromkeys(range(world), now)  # when each last signed
        self._progress = now  # when any rank last got something done
        self._failed: dict[int, float] = {}  # since when ranks are known to have ended with an error
        self._gone: dict[int, tuple[float, int]] = {}  # since when processes are gone, and our signs by then
        self._absent: set[int] | None = None  # ranks whose processes were gone when the store ceased to answer

    def look(
        self, now: float, signs: Mapping[int, Sign], gone: Callable[[Sign], bool], *, bereft: bool
    ) -> Verdict | None:
        """`signs` as last read from the store, ours among them: so it is seen whether the store still answers.

        `gone` tells of a sign whose process is no more. `bereft`: a collective has failed here, as it does where
        another rank is gone.
        """
        if now - self._looked > self._silent / 3:
            self._slept = max(self._slept, now - self._looked)
            self._moved, self._progress = dict.fromkeys(self._moved, now), now
        self._looked = now
        for rank, sign in signs.items():
            old = self._signs.get(rank)
            if old is None or sign.beats != old.beats:
                self._moved[rank] = now
            if old is None or sign.progress != old.progress:
                self._progress = now
            if sign.ended is not None and sign.ended != DONE:
                self._failed.setdefault(rank, now)
            self._signs[rank] = sign
        self._note_absent(now, gone)
        if verdict := self._one_failed(now, bereft):
            return verdict
        host = self._signs.get(self._host) if self._host is not None else None
        if host is not None and host.ended is not None and now - self._moved[self._rank] > 3 * self._beat:
            return None  # with it went the store: what the others do is not known, and there is little left to do
        return self._one_gone(now, gone) or self._one_silent(now) or self._hung(now)

    def tells(self) -> bool:
        """Whether this rank speaks where the store cannot say who does: the first on its machine."""
        mine = self._signs.get(self._rank)
        if mine is None:
            return True
        beside = [rank for rank, sign in self._signs.items() if sign.machine == mine.machine and sign.ended is None]
        absent = (self._absent or set()) | {self._host}
        return self._rank == min(rank for rank in beside if rank == self._rank or rank not in absent)

    def _note_absent(self, now: float, gone: Callable[[Sign], bool]) -> None:
        """Early: who is gone later may have spoken before."""
        host = self._signs.get(self._host) if self._host is not None else None
        quiet = now - self._moved[self._rank]
        if quiet == 0:
            self._absent = None
        elif self._absent is None and (quiet > 2 * self._beat or (host is not None and gone(host))):
            self._absent = {rank for rank, sign in self._signs.items() if gone(sign)}

    def _one_failed(self, now: float, bereft: bool) -> Verdict | None:
        for rank, since in self._failed.items():
            if bereft or now - since > self._ended:
                return self._lost(rank, now, f"ended: {self._signs[rank].ended}")
        return None

    def _one_gone(self, now: float, gone: Callable[[Sign], bool]) -> Verdict | None:
        """A process that is gone may have signed off just before: what it signed last is to be read first."""
        ours = self._signs[self._rank].beats if self._rank in self._signs else 0
        for rank, sign in self._signs.items():
            if sign.ended is None and rank != self._rank and gone(sign):
                since, beats = self._gone.setdefault(rank, (now, ours))
                if ours >= beats + 2 or now - since > 2 * self._beat:
                    return self._lost(rank, now, "has died")
        return None

    def _one_silent(self, now: float) -> Verdict | None:
        if now - self._moved[self._rank] > self._silent:  # the store does not answer
            if self._host is None:
                words = f"the launcher's store has not answered for {now - self._moved[self._rank]:.0f} s"
                return Verdict(words, words)
            return self._lost(self._host, now, self._no_sign(now - self._moved[self._host]))
        if now - self._moved[self._rank] > 3 * self._beat:
            return None  # what the others sign is not known either
        for rank, moved in self._moved.items():
            ended = rank in self._signs and self._signs[rank].ended is not None
            if not ended and now - moved > self._silent:
                return self._lost(rank, now, self._no_sign(now - moved))
        return None

    @staticmethod
    def _no_sign(seconds: float) -> str:
        return f"has given no sign for {seconds:.0f} s: it is dead or frozen"

    def _lost(self, rank: int, now: float, what: str) -> Verdict:
        sign = self._signs.get(rank)
        if sign is None:
            words = f"rank {rank} {what}; it never signed"
        else:
            words = f"{_name(rank, sign)} {what}; its last sign, at {_at(now - self._moved[rank])}, was {_place(sign)}"
        if self._slept > self._silent:
            words += f" (this process stood still for {self._slept:.0f} s, so that rank may have given it up)"
        return Verdict(words, words)

    def _hung(self, now: float) -> Verdict | None:
        if self._hang is None or now - self._progress < self._hang:
            return None
        at_work = {rank: sign for rank, sign in self._signs.items() if sign.ended is None}
        order = sorted(at_work.items(), key=lambda item: (item[1].waits, -item[1].quiet, item[0]))
        stuck = [rank for rank, sign in order if not sign.waits]
        who = ", ".join(f"{_name(rank, at_work[rank])}, {_place(at_work[rank])}" for rank in stuck)
        reason = f"nothing was done for run.hang_minutes={self._hang / 60:g}; " + (
            f"not waiting for others, so at fault: {who}" if stuck else "all ranks wait for one another"
        )
        lines = [
            f"  {_name(rank, sign)}: {'waits for others' if sign.waits else 'hangs'}, {_place(sign)}, "
            f"since {_at(sign.quiet)}, {clock(sign.quiet)} ago"
            for rank, sign in order
        ]
        return Verdict(reason, "\n".join([reason, *lines]), tuple(stuck or at_work))


def _name(rank: int, sign: Sign) -> str:
    return f"rank {rank} ({sign.host}, process {sign.pid})"


def _place(sign: Sign) -> str:
    stands = f", at {sign.stands}" if sign.stands else ""
    return f"{f'in {sign.phase}' if sign.phase else 'between phases'}, {sign.step} iterations done{stands}"


def _at(ago: float) -> str:
    """The time of day so many seconds ago, by this machine's clock."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() - ago))


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
        self._beat, self._silent = BEAT, SILENT
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
        pulse.beat()
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
        state = pulse.PULSE
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
