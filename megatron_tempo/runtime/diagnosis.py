"""Decides from the ranks' signs and a clock whether a run is lost: a rank is dead, has failed, or all hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_tempo.observability.progress import clock

BEAT = 5.0  # seconds from one sign to the next
SILENT = 60.0  # seconds without a sign after which a rank counts as dead
ENDED = 20.0  # seconds that the others have to end by themselves when one has ended with an error
DONE = "done"


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


def _at(ago: float) -> str:
    """The time of day so many seconds ago, by this machine's clock."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() - ago))


def _name(rank: int, sign: Sign) -> str:
    return f"rank {rank} ({sign.host}, process {sign.pid})"


def _place(sign: Sign) -> str:
    stands = f", at {sign.stands}" if sign.stands else ""
    return f"{f'in {sign.phase}' if sign.phase else 'between phases'}, {sign.step} iterations done{stands}"
