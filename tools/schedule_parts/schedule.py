"""Iterations of a run: the group buffer decides, servers generate, the trainer trains, and the seconds are counted.

Disaggregated, servers generate while the trainer trains, as far ahead as `max_staleness` allows; at a weight sync both
stop for as long as it takes. Colocated, generation ends when the buffer has an iteration's groups, and the same GPUs
train. All times come from the caller, so the same code runs hand-made numbers and the planner's.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megatron_tempo.config.choices import StaleGroups
from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.plan.decoding import DecodeCosts
from megatron_tempo.rollout import group_buffer
from megatron_tempo.rollout.group_buffer import GroupBuffer, needs_within
from schedule_parts.server import Group, Row, Server

Batch = dict[Prompts, list[Group]]


@dataclass(frozen=True, slots=True)
class Engine:
    """The servers of a schedule."""

    costs: DecodeCosts
    servers: int
    tensor: int  # GPUs of a server
    capacity: float  # tokens in the cache of a server
    concurrency: int = 64  # requests of a server at a time
    headroom: float = 0.0  # as of a `Server`


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is simulated.

    `groups`: prompts of an iteration by half. `draw`: a group, by its number, half and how often it was asked before.
    `train`: seconds in which the trainer's GPUs compute on a batch. `turns`: seconds in which they move models between
    host and GPU; `sync`: seconds of a weight sync.
    """

    engine: Engine
    trainers: int  # GPUs
    groups: dict[Prompts, int]
    draw: Callable[[int, Prompts, int], Group]
    train: Callable[[Batch], float]
    turns: float = 0.0
    sync: float = 0.0
    colocated: bool = False
    max_staleness: int = 0
    runs_on: bool = True  # unfinished groups continue when the batch is full
    stale_groups: StaleGroups = StaleGroups.wait


@dataclass(slots=True)
class Spent:
    """GPU seconds of one side."""

    busy: float = 0.0
    moving: float = 0.0  # weights and models on their way
    idle: float = 0.0

    @property
    def total(self) -> float:
        return self.busy + self.moving + self.idle


@dataclass(slots=True)
class Iteration:
    """One iteration. Colocated, `engine` and `trainer` are the shares of the same GPUs' time in the two phases."""

    seconds: float = 0.0
    generating: float = 0.0  # seconds in which the trainer waits for responses
    engine: Spent = field(default_factory=Spent)
    trainer: Spent = field(default_factory=Spent)
    tokens: float = 0.0  # of the responses that it is trained on
    staleness: Counter[int] = field(default_factory=Counter)  # tokens by updates between making and use
    thrown_away: float = 0.0  # tokens
    again: float = 0.0  # tokens computed again, by prefill
    row_seconds: float = 0.0  # of rows that servers run at a time

    @property
    def gpu_seconds(self) -> float:
        return self.engine.total + self.trainer.total

    @property
    def idle(self) -> float:
        return self.engine.idle + self.trainer.idle


class Simulation:
    """Run a schedule with `iterations` iterations in all; `iterate` is one of them."""

    def __init__(self, schedule: Schedule, iterations: int) -> None:
        engine = schedule.engine
        self.schedule, self.iterations, self.version = schedule, iterations, 0
        self.servers = [Server(engine.costs, engine.capacity, engine.headroom) for _ in range(engine.servers)]
        self.buffer: GroupBuffer[Group] = GroupBuffer(schedule.max_staleness, schedule.stale_groups, schedule.runs_on)
        self._asked: dict[Group, group_buffer.Group[Group]] = {}
        self._where: dict[Group, Server] = {}
        self._pending: deque[Group] = deque()
        self._stopped: deque[Row] = deque()
        self._needed = {half: [count] * iterations for half, count in schedule.groups.items()}

    def run(self) -> Iterator[Iteration]:
        for _ in range(self.iterations):
            yield self.iterate()

    def iterate(self) -> Iteration:
        schedule, record, before = self.schedule, Iteration(), [self._clocks(server) for server in self.servers]
        needs = needs_within(self.version, self.iterations, schedule.max_staleness, self._needed)
        for group in self._pending:  # what no server has begun will be made by these weights
            self._asked[group].oldest = self.version
        record.thrown_away += self._expire(needs)
        self._ask(needs)
        batch, record.generating = self._wait(needs)
        compute, moving = schedule.train(batch), schedule.turns + schedule.sync
        if schedule.colocated:
            self._stopped = deque(row for server in self.servers for row in server.stop())
        else:
            self._pass(compute + schedule.turns)
            for server in self.servers:
                server.pause(schedule.sync)
            self._pass(schedule.sync)
        self._count(record, batch)
        self.version += 1
        for server in self.servers:
            server.renew(self.version)
        record.seconds = record.generating + compute + moving
        record.trainer = Spent(schedule.trainers * compute, schedule.trainers * moving)
        self._account(record, before)
        return record

    def _clocks(self, server: Server) -> tuple[float, ...]:
        server.settle()
        return server.busy, server.moving, server.idle, server.again, server.row_seconds

    def _account(self, record: Iteration, before: list[tuple[float, ...]]) -> None:
        engine = self.schedule.engine
        for server, old in zip(self.servers, before, strict=True):
            busy, moving, idle, again, rows = (new - was for new, was in zip(self._clocks(server), old, strict=True))
            record.engine.busy += engine.tensor * busy
            record.engine.moving += engine.tensor * moving
            record.engine.idle += engine.tensor * idle
            record.again += again
            record.row_seconds += rows
        if self.schedule.colocated:
            without = self.schedule.trainers - engine.servers * engine.tensor  # GPUs that have no server
            record.engine.idle += without * record.generating
        else:
            record.trainer.idle = self.schedule.trainers * record.generating

    # Asking

    def _expire(self, needs: group_buffer.Needs) -> float:
        """Tokens that are thrown away with the groups that are stale."""
        stale = self.buffer.stale(self.version, needs)
        thrown = 0.0
        for entry in stale:
            group = entry.item
            thrown += sum(self._cancel(group, row) for row in group.rows)
            self._asked.pop(group)
            self._where.pop(group, None)
            if group in self._pending:
                self._pending.remove(group)
        for entry in self.buffer.expire(stale, self.version):
            entry.item = self.schedule.draw(entry.number, entry.half, entry.times)
            self._enter(entry)
        return thrown

    def _cancel(self, group: Group, row: Row) -> float:
        if row in self._stopped:
            self._stopped.remove(row)
        elif row.made < row.length and group in self._where:
            self._where[group].cancel(row)
        return row.made

    def _ask(self, needs: group_buffer.Needs) -> None:
        """Rows that were stopped continue first. New groups of both halves are asked by turns."""
        while self._stopped:
            row = self._stopped.popleft()
            self._where[row.group].submit(row)
        lists = []
        for half in self.schedule.groups:
            first = self.buffer.next_number(half)
            count = self.buffer.room(half, needs)
            items = [self.schedule.draw(number, half, 0) for number in range(first, first + count)]
            lists.append(self.buffer.add(half, items, self.version))
        for entry in itertools.chain.from_iterable(itertools.zip_longest(*lists)):
            if entry is not None:
                self._enter(entry)
        self._dispatch()

    def _enter(self, entry: group_buffer.Group[Group]) -> None:
        self._asked[entry.item] = entry
        self._pending.append(entry.item)

    def _dispatch(self) -> None:
        """Send waiting requests to the servers with the fewest rows, up to `concurrency` requests each."""
        load = Counter(map(id, self._where.values()))
        while self._pending:
            free = [server for server in self.servers if load[id(server)] < self.schedule.engine.concurrency]
            if not free:
                return
            server, group = min(free, key=lambda server: server.rows), self._pending.popleft()
            self._where[group] = server
            load[id(server)] += 1
            for row in group.rows:
                server.submit(row)

    # Time

    def _wait(self, needs: group_buffer.Needs) -> tuple[Batch, float]:
        """Generate until the buffer has the iteration's groups. Servers that sleep between iterations do not leave a
        group unfinished unless it may continue."""
        waited, collects = 0.0, self.schedule.colocated and not self.schedule.runs_on
        while (chosen := self.buffer.chosen(self.version, needs)) is None or (collects and self._where):
            waited += self._pass(math.inf)
        groups = {half: [entry.item for entry in entries] for half, entries in chosen.items()}
        for entries in chosen.values():
            self.buffer.take(entries)
        for group in itertools.chain.from_iterable(groups.values()):
            del self._asked[group]
        return groups, waited

    def _pass(self, seconds: float) -> float:
        """Let this time pass, or the time until a group is complete. Returns the seconds that did."""
        passed = 0.0
        while True:
            step = min((server.next_event() for server in self.servers), default=math.inf)
            assert step < math.inf or seconds < math.inf, "the buffer waits for groups that nobody generates"
            step = min(step, seconds - passed)
            passed += step
            done = [self._finish(row) for server in self.servers for row in server.advance(step)]
            if passed >= seconds or (any(done) and seconds == math.inf):
                return passed

    def _finish(self, row: Row) -> bool:
        """A row has ended. Returns whether its group is complete."""
        group = row.group
        group.unfinished -= 1
        if group.unfinished:
            return False
        oldest = min(row.runs[0][0] for row in group.rows)
        self.buffer.finish(self._asked[group], oldest, sum(row.length for row in group.rows))
        del self._where[group]
        self._dispatch()
        return True

    def _count(self, record: Iteration, batch: Batch) -> None:
        for row in (row for groups in batch.values() for group in groups for row in group.rows):
            record.tokens += row.length
            for version, tokens in row.runs:
                record.staleness[self.version - version] += tokens
