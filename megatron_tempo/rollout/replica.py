"""A server as the first rank sees it, and the requests and events of a job."""

from __future__ import annotations

import asyncio
import queue
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import httpx

from megatron_tempo.rollout.engine import Arrived, Request, Sampling
from megatron_tempo.types import Completion


class State(Enum):
    starting = "starting"
    empty = "empty"  # ready, without the weights
    asleep = "asleep"  # the trainer has its memory; it has no weights
    waking = "waking"  # its weights have their memory back, with undefined contents
    serving = "serving"
    gone = "gone"  # given up


class Starter(Protocol):
    """Source of servers: `SupervisedServers` starts them, `ExternalServers` waits for running ones."""

    async def start(self, index: int) -> str:
        """Start a server and return its address once it is ready. Raises EngineError."""
        ...

    async def end(self, index: int) -> None:
        """End a server, so that its memory is free. It may have ended already."""
        ...


@dataclass(slots=True, eq=False)
class Replica:
    index: int
    state: State = State.starting
    life: int = 0  # counts its starts: results for an earlier life are ignored
    restarts: int = 0  # since it last went through a whole iteration
    url: str = ""
    client: httpx.AsyncClient | None = None
    held: bool = False  # for a weight update
    interrupted: bool = False  # it is ending the generation of its requests
    waits: bool = False  # restarted, with the weights: it answers nothing until it has passed the gate
    asks: dict[asyncio.Task[None], Ask] = field(default_factory=dict)

    @property
    def takes_requests(self) -> bool:
        return self.state is State.serving and not self.held and not self.interrupted

    @property
    def load(self) -> int:
        """Responses under way."""
        return sum(ask.request.samples for ask in self.asks.values())


@dataclass(frozen=True, slots=True)
class Target:
    """A server that is to get weights."""

    index: int
    life: int
    url: str


@dataclass(frozen=True, slots=True)
class Answered:
    number: int  # of the request
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Failed:
    why: str


class Event(Enum):
    """What a job waits for in addition to answers."""

    weights_wanted = "weights_wanted"  # a server is back without the weights
    nothing = "nothing"  # for a while: the wait timed out


class GenerationJob:
    """The requests of one or several `submit`s, whose answers are read together."""

    def __init__(self, arrived: Arrived | None = None, *, is_ahead: bool = False) -> None:
        """`arrived`: is called with each answer, in the event loop. `is_ahead`: requests of other jobs go first."""
        self.is_ahead = is_ahead
        self.asked = 0  # requests so far: the number of the next one
        self.left = 0
        self.is_paused = False
        self.parked: list[Ask] = []  # unfinished requests while it is paused
        self.arrived = arrived
        self.work = -1  # the number in the engine's `EngineWork` of what is left
        self.received = 0.0  # when the last answer so far began to arrive, by `time.monotonic`
        self.events: queue.SimpleQueue[Answered | Failed | Event] = queue.SimpleQueue()


@dataclass(slots=True, eq=False)
class Ask:
    job: GenerationJob
    number: int
    request: Request
    sampling: Sampling
    oldest: int  # the version of the weights when it was sent
