"""Decides from the ranks' heartbeats and the time which ranks are dead, have failed or hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_tempo.observability.progress import clock

BEAT = 5.0  # seconds between two heartbeats
SILENT = 60.0  # seconds without a heartbeat after which a rank counts as dead
ENDED = 20.0  # seconds that the other ranks have to end by themselves after one has ended with an error
DONE = "done"


@dataclass(frozen=True, slots=True)
class RankHeartbeat:
    """The state of a rank. `progress` changes from one heartbeat to the next when the rank makes progress.

    >>> RankHeartbeat(count=12, host="node7", pid=4242, machine="5f0e pid:[4026531836]", phase="generate", step=11,
    ...      location="rollout/batches.py:77 in collect", is_waiting=True, progress=1764.2, idle_seconds=3.1)
    """

    count: int  # heartbeats of this rank so far
    host: str
    pid: int
    machine: str  # equal for processes that can see each other
    phase: str
    step: int  # completed iterations
    location: str  # the main thread's innermost line in this package
    is_waiting: bool  # waits for other ranks or for its GPU, inside that line
    progress: float
    idle_seconds: float  # seconds since its last progress
    ended: str | None = None  # `DONE`, or the error that ended it
    collectives: Mapping[str, int] = field(default_factory=dict)  # how many it has begun in each process group


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a run is aborted. `reason` is written to heartbeat.json, `text` to stderr."""

    reason: str
    text: str
    dump: tuple[int, ...] = ()  # ranks that print their stacks
    by: int = -1  # the rank that reports it


class FailureDetector:
    """Uses only heartbeats: no clock, no store. `now` is the time of any monotonic clock, in seconds."""

    def __init__(self, rank: int, world: int, host: int | None, hang: float | None, now: float) -> None:
        """`host`: the rank whose process holds the store, None if the launcher's process does. `hang`: seconds without
        progress that count as a hang, None to detect no hangs."""
        self._rank, self._host, self._hang = rank, host, hang
        self._beat, self._silent, self._ended = BEAT, SILENT, ENDED
        self._checked_at = now
        self._slept = 0.0  # longest suspension of this process, in seconds
        self._heartbeats: dict[int, RankHeartbeat] = {}
        self._moved = dict.fromkeys(range(world), now)  # when each rank last sent a heartbeat
        self._progress = now  # when any rank last made progress
        self._failed: dict[int, float] = {}  # when ranks were first known to have ended with an error
        self._gone: dict[int, tuple[float, int]] = {}  # when processes were first gone, and our heartbeat count then
        self._absent: set[int] | None = None  # ranks whose processes were gone when the store stopped answering

    def check(
        self,
        now: float,
        heartbeats: Mapping[int, RankHeartbeat],
        gone: Callable[[RankHeartbeat], bool],
        *,
        collective_failed: bool,
    ) -> Diagnosis | None:
        """The diagnosis, None while the run is sound.

        `heartbeats`: as last read from the store. Our own is among them and shows whether the store still answers.
        `gone`: whether the process of a heartbeat has exited. `collective_failed`: a collective has failed on this
        rank, as happens when another rank is gone.
        """
        if now - self._checked_at > self._silent / 3:
            self._slept = max(self._slept, now - self._checked_at)
            self._moved, self._progress = dict.fromkeys(self._moved, now), now
        self._checked_at = now
        for rank, heartbeat in heartbeats.items():
            old = self._heartbeats.get(rank)
            if old is None or heartbeat.count != old.count:
                self._moved[rank] = now
            if old is None or heartbeat.progress != old.progress:
                self._progress = now
            if heartbeat.ended is not None and heartbeat.ended != DONE:
                self._failed.setdefault(rank, now)
            self._heartbeats[rank] = heartbeat
        self._note_absent(now, gone)
        if diagnosis := self._one_failed(now, collective_failed):
            return diagnosis
        host = self._heartbeats.get(self._host) if self._host is not None else None
        if host is not None and host.ended is not None and now - self._moved[self._rank] > 3 * self._beat:
            return None  # the store went with it: the state of the others is unknown, and little work is left
        return self._one_gone(now, gone) or self._one_silent(now) or self._hung(now)

    def should_report(self) -> bool:
        """Whether this rank reports when the store cannot decide who does: the first rank of each machine does."""
        mine = self._heartbeats.get(self._rank)
        if mine is None:
            return True
        neighbours = [
            rank
            for rank, heartbeat in self._heartbeats.items()
            if heartbeat.machine == mine.machine and heartbeat.ended is None
        ]
        absent = (self._absent or set()) | {self._host}
        return self._rank == min(rank for rank in neighbours if rank == self._rank or rank not in absent)

    def _note_absent(self, now: float, gone: Callable[[RankHeartbeat], bool]) -> None:
        """Note early which processes are gone: one that goes later may have reported before."""
        host = self._heartbeats.get(self._host) if self._host is not None else None
        idle_seconds = now - self._moved[self._rank]
        if idle_seconds == 0:
            self._absent = None
        elif self._absent is None and (idle_seconds > 2 * self._beat or (host is not None and gone(host))):
            self._absent = {rank for rank, heartbeat in self._heartbeats.items() if gone(heartbeat)}

    def _one_failed(self, now: float, collective_failed: bool) -> Diagnosis | None:
        for rank, since in self._failed.items():
            if collective_failed or now - since > self._ended:
                return self._lost(rank, now, f"ended: {self._heartbeats[rank].ended}")
        return None

    def _one_gone(self, now: float, gone: Callable[[RankHeartbeat], bool]) -> Diagnosis | None:
        """A process may have sent a last heartbeat just before it exited. Wait until that would have been read."""
        ours = self._heartbeats[self._rank].count if self._rank in self._heartbeats else 0
        for rank, heartbeat in self._heartbeats.items():
            if heartbeat.ended is None and rank != self._rank and gone(heartbeat):
                since, count = self._gone.setdefault(rank, (now, ours))
                if ours >= count + 2 or now - since > 2 * self._beat:
                    return self._lost(rank, now, "has died")
        return None

    def _one_silent(self, now: float) -> Diagnosis | None:
        if now - self._moved[self._rank] > self._silent:  # the store does not answer
            if self._host is None:
                words = f"the launcher's store has not answered for {now - self._moved[self._rank]:.0f} s"
                return Diagnosis(words, words)
            return self._lost(self._host, now, self._silent_for(now - self._moved[self._host]))
        if now - self._moved[self._rank] > 3 * self._beat:
            return None  # the others' heartbeats are unknown too
        for rank, moved in self._moved.items():
            ended = rank in self._heartbeats and self._heartbeats[rank].ended is not None
            if not ended and now - moved > self._silent:
                return self._lost(rank, now, self._silent_for(now - moved))
        return None

    @staticmethod
    def _silent_for(seconds: float) -> str:
        return f"has sent no heartbeat for {seconds:.0f} s: it is dead or frozen"

    def _lost(self, rank: int, now: float, what: str) -> Diagnosis:
        heartbeat = self._heartbeats.get(rank)
        if heartbeat is None:
            words = f"rank {rank} {what}; it never sent a heartbeat"
        else:
            last = f"last heartbeat at {_at(now - self._moved[rank])}, {_activity(heartbeat)}"
            words = f"{_name(rank, heartbeat)} {what}; {last}"
        if self._slept > self._silent:
            words += (
                f" (this process was suspended for {self._slept:.0f} s, so that rank may have aborted because of it)"
            )
        return Diagnosis(words, words)

    def _hung(self, now: float) -> Diagnosis | None:
        if self._hang is None or now - self._progress < self._hang:
            return None
        at_work = {rank: heartbeat for rank, heartbeat in self._heartbeats.items() if heartbeat.ended is None}
        stuck, ahead, cause = _suspects(at_work)
        order = sorted(at_work.items(), key=lambda item: (item[0] not in stuck, -item[1].idle_seconds, item[0]))
        who = ", ".join(
            f"{_name(rank, heartbeat)}, {_activity(heartbeat)}" for rank, heartbeat in order if rank in stuck
        )
        reason = f"no rank made progress for run.hang_minutes={self._hang / 60:g}; " + (
            f"likely cause, since it {cause}: {who}" if stuck else "all ranks wait for one another"
        )
        lines = [
            f"  {_name(rank, heartbeat)}: {_state(heartbeat, rank in stuck, rank in ahead)}, "
            f"{_activity(heartbeat)}, since {_at(heartbeat.idle_seconds)}, {clock(heartbeat.idle_seconds)} ago"
            for rank, heartbeat in order
        ]
        dump = tuple(rank for rank, _ in order if rank in stuck or not stuck)
        return Diagnosis(reason, "\n".join([reason, *lines]), dump)


def _suspects(at_work: Mapping[int, RankHeartbeat]) -> tuple[set[int], set[int], str]:
    """The ranks that keep the others waiting, those that wait in a collective for others, and why the first do.

    A rank that has begun more collectives of a group than another one waits for it, whatever line it stands at: under
    NCCL it may stand anywhere, because a collective is only queued on the GPU. One that is behind in a group, and ahead
    in none, waits for nobody by this count. It is suspected first if its own line does not wait either, as when it
    hangs on the host. If all lines wait, it is suspected for a hang on its GPU.
    """
    numbers: dict[str, list[int]] = {}
    for heartbeat in at_work.values():
        for group, number in heartbeat.collectives.items():
            numbers.setdefault(group, []).append(number)
    counts = {rank: heartbeat.collectives.items() for rank, heartbeat in at_work.items()}
    ahead = {rank for rank, own in counts.items() if any(n > min(numbers[group]) for group, n in own)}
    behind = {rank for rank, own in counts.items() if any(n < max(numbers[group]) for group, n in own)} - ahead
    free = {rank for rank, heartbeat in at_work.items() if not heartbeat.is_waiting} - ahead
    if free:
        return (behind & free) or free, ahead, "does not wait for other ranks"
    return behind, ahead, "has not begun a collective in which others wait"


def _state(heartbeat: RankHeartbeat, is_suspect: bool, is_ahead: bool) -> str:
    if is_suspect:
        return "hangs"
    return "waits for others" if heartbeat.is_waiting or is_ahead else "does not wait"


def _at(ago: float) -> str:
    """The time of day `ago` seconds before now, by this machine's clock."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() - ago))


def _name(rank: int, heartbeat: RankHeartbeat) -> str:
    return f"rank {rank} ({heartbeat.host}, process {heartbeat.pid})"


def _activity(heartbeat: RankHeartbeat) -> str:
    phase = f"in {heartbeat.phase}" if heartbeat.phase else "between phases"
    location = f", at {heartbeat.location}" if heartbeat.location else ""
    return f"{phase}, {heartbeat.step} iterations done{location}"
