"""A server with continuous batching, as a fluid: between two events each running row gains a token per decoding step,
and a step costs what `megatron_tempo.plan.decoding` says for the rows and tokens of that moment.

Rows wait for room in the cache. A row is admitted if it fits and all running rows could still gain `headroom` tokens.
If the cache is full nevertheless, the newest row gives its room back and is computed again later (vLLM's preemption by
recomputation). Prefill stops decoding. The prompt of a group is computed once on a server, as with a prefix cache.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field

from megatron_tempo.plan.decoding import DecodeCosts

_TINY = 1e-9  # tokens: what floating point leaves of a finished row


@dataclass(slots=True, eq=False)
class Row:
    """A response. `runs`: the tokens that it has of each version of the weights, oldest first."""

    group: Group
    length: int  # tokens that it will have
    runs: list[tuple[int, float]] = field(default_factory=list)
    made: float = 0.0  # tokens that it has; of a running row: when it was admitted or weights changed last
    marked: float = 0.0  # tokens in `runs`

    @property
    def tokens(self) -> float:
        return self.group.prompt + self.made

    def mark(self, made: float, version: int) -> None:
        """Note that it has `made` tokens, the new ones by this version."""
        self.made = made
        if made > self.marked:
            before = self.runs.pop()[1] if self.runs and self.runs[-1][0] == version else 0.0
            self.runs.append((version, before + made - self.marked))
            self.marked = made


@dataclass(slots=True, eq=False)
class Group:
    """A prompt with its responses."""

    number: int
    labelled: bool
    prompt: int  # tokens
    rows: list[Row] = field(default_factory=list)
    unfinished: int = 0

    @classmethod
    def of(cls, number: int, labelled: bool, prompt: int, lengths: list[int]) -> Group:
        group = cls(number, labelled, prompt, unfinished=len(lengths))
        group.rows = [Row(group, length) for length in lengths]
        return group


@dataclass(slots=True, eq=False)
class Server:
    """One server. `capacity`: tokens that its cache holds. Its clock is the caller's: it is told how far to go."""

    costs: DecodeCosts
    capacity: float
    headroom: float = 0.0  # tokens by which each running row can grow when another one is admitted
    version: int = 0
    busy: float = 0.0  # seconds of prefill and decoding
    moving: float = 0.0  # seconds in which weights are received
    idle: float = 0.0  # seconds without a row
    row_seconds: float = 0.0  # of running rows, while the server decodes
    again: float = 0.0  # tokens computed again: after a preemption, or when a stopped response continues
    waiting: deque[Row] = field(default_factory=deque)
    running: dict[Row, float] = field(default_factory=dict)  # row: progress at which it had no token
    _progress: float = 0.0  # decoding steps so far
    _cached: float = 0.0
    _inside: float = 0.0
    _short: set[Row] = field(default_factory=set)  # running rows that are shorter than the window
    _lag: float = 0.0  # seconds that have passed and are not yet accounted for
    _due: float | None = None  # seconds until the next event, if it is known
    _stalled: float = 0.0  # seconds of prefill to come
    _paused: float = 0.0  # seconds of a weight sync to come
    # Progress, order, row, whether it ends, and its entry in `running`: if there is another one, it has left since.
    _events: list[tuple[float, int, Row, bool, float]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _prefilled: set[Group] = field(default_factory=set)

    @property
    def rows(self) -> int:
        return len(self.running) + len(self.waiting)

    def submit(self, row: Row) -> None:
        assert row.group.prompt + row.length <= self.capacity, "the row never fits in the cache"
        self.settle()
        self.waiting.append(row)

    def next_event(self) -> float:
        """Seconds until a row ends, leaves or may be admitted; infinite without rows."""
        if self._due is None:
            self._admit()
            moment = self._duration(self._steps_to_event()) if self.running else math.inf
            self._due = self._paused + self._stalled + moment
        return self._due

    def advance(self, seconds: float) -> list[Row]:
        """Let this time pass, at most until the next event. Returns the rows that end with it."""
        due = self.next_event()
        self._lag += seconds
        self._due = due - seconds
        return [] if seconds < due * (1 - 1e-12) else self.settle(happens=True)

    def settle(self, *, happens: bool = False) -> list[Row]:
        """Account for the time that has passed. Returns the rows that end; `happens`: the next event is due."""
        seconds, self._lag, self._due = self._lag, 0.0, None
        paused = self._spend("_paused", seconds)
        self.moving += paused
        seconds -= paused
        if not self.running:
            self.idle += seconds
            return []
        self.busy += seconds
        seconds -= self._spend("_stalled", seconds)
        steps = self._steps_to_event()
        if not happens:
            steps = min(steps, self._steps_in(seconds))
        self.row_seconds += seconds * len(self.running)
        self._progress += steps
        self._cached += steps * len(self.running)
        self._inside += steps * len(self._short)
        return self._happen() if happens else []

    def pause(self, seconds: float) -> None:
        """A weight sync: nothing is decoded for this long. In-flight rows continue with the cache that they have."""
        self.settle()
        self._paused += seconds

    def renew(self, version: int) -> None:
        """Tokens from now on are of this version of the weights."""
        self.settle()
        for row, start in self.running.items():
            row.mark(self._progress - start, self.version)
        self.version = version

    def stop(self) -> list[Row]:
        """End generation and empty the cache. Returns the rows that have not ended, with the tokens that they have."""
        self.settle()
        for row, start in self.running.items():
            row.mark(self._progress - start, self.version)
        left = [*self.running, *self.waiting]
        self.running, self.waiting, self._events = {}, deque(), []
        self._short, self._prefilled = set(), set()
        self._cached = self._inside = self._stalled = 0.0
        return left

    def cancel(self, row: Row) -> None:
        """Forget a row that is not wanted any more."""
        self.settle()
        if row in self.running:
            row.mark(self._progress - self.running[row], self.version)
            self._leave(row)
        else:
            self.waiting.remove(row)

    def _spend(self, name: str, seconds: float) -> float:
        spent = min(seconds, getattr(self, name))
        setattr(self, name, getattr(self, name) - spent)
        return spent

    def _admit(self) -> None:
        while self.waiting:
            row = self.waiting[0]
            ahead = self.headroom * len(self.running)
            if self.running and self._cached + row.tokens + ahead + 1 > self.capacity:
                return
            self.waiting.popleft()
            shared = row.group in self._prefilled
            self._prefilled.add(row.group)
            self._stalled += self.costs.row * (row.made + (0 if shared else row.group.prompt))
            self.again += row.made
            start = self.running[row] = self._progress - row.made
            self._cached += row.tokens
            self._inside += self.costs.inside(row.tokens)
            heapq.heappush(self._events, (start + row.length, next(self._order), row, True, start))
            if self.costs.window is None:
                self._short.add(row)
            elif row.tokens < self.costs.window:
                self._short.add(row)
                at = start + self.costs.window - row.group.prompt
                heapq.heappush(self._events, (at, next(self._order), row, False, start))

    def _steps_to_event(self) -> float:
        while self.running.get(self._events[0][2]) != self._events[0][4]:
            heapq.heappop(self._events)  # of a row that has left
        room = max(0.0, self.capacity - self._cached) / len(self.running)
        return max(0.0, min(self._events[0][0] - self._progress, room))

    def _happen(self) -> list[Row]:
        """What is due: rows that end or outgrow the window; and the newest row leaves if the cache is full."""
        ended = []
        while self._events and self._events[0][0] <= self._progress + _TINY:
            _, _, row, is_end, start = heapq.heappop(self._events)
            if self.running.get(row) != start:
                continue
            if is_end:
                self._leave(row)
                row.mark(float(row.length), self.version)
                ended.append(row)
            else:
                self._short.discard(row)
        if len(self.running) > 1 and self._cached + _TINY * len(self.running) >= self.capacity:
            row = next(reversed(self.running))
            row.mark(self._progress - self.running[row], self.version)
            self._leave(row)
            self.waiting.appendleft(row)
        return ended

    def _leave(self, row: Row) -> None:
        tokens = row.group.prompt + self._progress - self.running.pop(row)
        self._cached -= tokens
        self._inside -= self.costs.inside(tokens)
        self._short.discard(row)
        if not self.running:  # nothing is left of rounding
            self._cached = self._inside = 0.0

    def _line(self) -> tuple[float, float, float]:
        """Seconds of a step now, by which they grow with each step, and their least."""
        costs, rows = self.costs, len(self.running)
        now = costs.weights + costs.full * self._cached + costs.windowed * self._inside
        return now, costs.full * rows + costs.windowed * len(self._short), rows * costs.row

    def _duration(self, steps: float) -> float:
        """Seconds of the next steps: the integral of the larger of a line and a constant."""
        now, slope, least = self._line()
        flat = 0.0 if now >= least else steps if slope <= 0 else min(steps, (least - now) / slope)
        rest = steps - flat
        start = max(now, least) if flat == 0 else now + slope * flat
        return least * flat + rest * start + slope * rest**2 / 2

    def _steps_in(self, seconds: float) -> float:
        """The inverse of `_duration`."""
        now, slope, least = self._line()
        if now < least:
            flat = math.inf if slope <= 0 else (least - now) / slope
            if seconds <= flat * least:
                return seconds / least
            return flat + _root(least, slope, seconds - flat * least)
        return _root(now, slope, seconds)


def _root(start: float, slope: float, seconds: float) -> float:
    """x with start x + slope x^2 / 2 = seconds, in a form that does not cancel."""
    if start <= 0 and slope <= 0:
        return 0.0
    return 2 * seconds / (start + math.sqrt(start**2 + 2 * slope * seconds))
