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
    serving = "serving"
    gone = "gone"  # given up


class Starter(Protocol):
    """Source of servers: `SupervisedServers` starts them, `ExternalServers` waits for running ones."""

    async def start(self, index: int) -> str:
        """Start a server and return its address once it is ready. Raises EngineError."""
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
    asks: dict[asyncio.Task[None], Ask] = field(default_factory=dict)

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
    """The requests of one `submit`."""

    def __init__(self, requests: int, oldest: int, work: int, arrived: Arrived | None = None) -> None:
        """`oldest`: the version of the weights at its start. `work`: its number in the engine's `EngineWork`.
        `arrived`: is called with each answer, in the event loop."""
        self.left = requests
        self.arrived = arrived
        self.oldest = oldest
        self.work = work
        self.received = 0.0  # when the last answer so far began to arrive, by `time.monotonic`
        self.events: queue.SimpleQueue[Answered | Failed | Event] = queue.SimpleQueue()


@dataclass(slots=True, eq=False)
class Ask:
    job: GenerationJob
    number: int
    request: Request
    sampling: Sampling
