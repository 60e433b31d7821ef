"""The interface of rollout engines.

Implementations: `embedded.py`; `servers.py`, for any number of servers; `imported.py`, for the user's own.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from megatron_tempo.config.schema import EvaluationConfig, RolloutConfig
from megatron_tempo.kernels.truncation import Truncation
from megatron_tempo.rollout.verifying_nodes import VerifyingNodes
from megatron_tempo.types import Completion, EngineHealth, TokenCount, Weights


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be answered `samples` times.

    With the embedded engine, equal seeds give equal completions, whatever other requests there are. Servers get seeds
    where `Sampling.seeded`; else they draw their own random numbers.

    >>> Request(token_ids=(5, 7, 8), samples=8, seed=3)
    """

    token_ids: tuple[int, ...]
    samples: int
    seed: int
    begun: tuple[Completion, ...] = ()  # the samples so far, if they are to continue; ended ones stay as they are
    # the embedded engine returns a response as "unfinished" after this many more tokens; None: it generates to the end
    pause_after: int | None = None
    experts_from: int = 0  # the first token of the prompt whose experts are wanted, if any are


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings. A response ends at an end token, at a stop string, or at `max_tokens` response tokens.

    Tokens are drawn from softmax(logits / temperature) over the tokens that min-p, top-k and top-p leave, applied in
    this order (`kernels.truncation`). Log-probabilities are of this truncated distribution. At a temperature of 0 the
    most probable token is taken, and log-probabilities are those at a temperature of 1.

    >>> Sampling(0.6, max_tokens=16384, top_p=0.95, top_k=20, stop=("</answer>",))
    """

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # the response ends with the token that completes one of them, which is part of it
    seeded: bool = False  # servers draw by the requests' seeds
    with_experts: bool = False  # completions have the experts that the engine's routers chose

    @staticmethod
    def of(settings: RolloutConfig | EvaluationConfig, max_tokens: int, *, with_experts: bool = False) -> Sampling:
        """The sampling of training responses, or of an evaluation's."""
        return Sampling(
            settings.temperature,
            max_tokens,
            settings.top_p,
            settings.top_k,
            settings.min_p,
            tuple(settings.stop or ()),
            settings.seed is not None,
            with_experts,
        )

    @property
    def truncation(self) -> Truncation | None:
        """What restricts the tokens that may be drawn; None: nothing."""
        if not self.temperature or (self.top_p >= 1 and self.top_k is None and self.min_p <= 0):
            return None
        return Truncation(self.top_p, self.top_k, self.min_p)


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """The argument of a user's engine (docs/extending.md)."""

    model: Path  # Hugging Face folder: configuration, tokenizer, end tokens. `load_weights` provides the weights
    device: torch.device
    dtype: torch.dtype  # of the weights that `load_weights` gets
    folder: Path  # below `run.dir`, for what the engine writes; it need not exist
    config: RolloutConfig  # `batch_rows` and so on
    log: logging.Logger  # its warnings are shown by `status` and the report too


# Gets the number of a request and its completions. It returns at once.
Arrived = Callable[[int, Sequence[Completion]], None]


class EngineWork:
    """When an engine had requests that it had not answered, as this rank knows. Callable from any thread.

    Times are seconds of `time.monotonic`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._begun: dict[int, float] = {}  # when the requests under way were submitted, by number
        self._ended: list[tuple[float, float]] = []

    def begin(self) -> int:
        """Requests are submitted now. Returns their number, for `end`."""
        with self._lock:
            number = next(self._numbers)
            self._begun[number] = time.monotonic()
            return number

    def end(self, number: int, at: float | None = None) -> None:
        """The last of these requests is answered, at this time or now. Nothing happens if they have ended before."""
        with self._lock:
            if (begun := self._begun.pop(number, None)) is not None:
                self._ended.append((begun, time.monotonic() if at is None else at))

    def spans(self, since: float = -math.inf) -> list[tuple[float, float]]:
        """(begin, end) of all requests that end after `since`; those under way end now. Earlier ones are forgotten."""
        with self._lock:
            self._ended = [span for span in self._ended if span[1] > since]
            return [*self._ended, *((begun, time.monotonic()) for begun in self._begun.values())]

    def end_with_slowest(self) -> None:
        """Let this rank's last requests end when the last rank's did: each rank may have an engine. Collective.

        Clocks of two machines are not compared: a rank says how long ago its engine ended. So the ranks must have
        waited for one another just before.
        """
        now = time.monotonic()
        ago = torch.tensor(now - self._ended[-1][1] if self._ended else math.inf, dtype=torch.float64)
        dist.all_reduce(ago, dist.ReduceOp.MIN)
        with self._lock:
            if self._ended:
                self._ended[-1] = (self._ended[-1][0], max(self._ended[-1][1], now - float(ago)))


class TrainerGpus(Protocol):
    """The trainer's side of the GPUs that it shares with servers by turns. Not collective."""

    def lend(self) -> None:
        """Give the memory of all models back to the device. Until `take_back`, only weights to be sent may return."""
        ...

    def take_back(self) -> None:
        """The servers sleep: models may be loaded again."""
        ...


class Engine(Protocol):
    """Generates with the weights that it loaded last. All methods are collective, unless they say otherwise.

    `counted`: what went through its model, as far as it knows. `replicas`: how many copies of the model answer.
    `work`: when it had requests.
    """

    counted: TokenCount
    replicas: int
    work: EngineWork

    @property
    def asleep(self) -> bool:
        """Whether it has given its memory to the trainer, and with it its weights: `load_weights` wakes it.

        The same on every rank. Always False unless `rollout.placement=colocated`.
        """
        ...

    def sleep(self) -> None:
        """Give the memory of the GPUs to the trainer, if they are colocated. It does nothing otherwise, or if asleep.

        No request may be under way. Raises EngineError if no engine is left.
        """
        ...

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Begin to answer requests, the same on every rank. It must be awake, with weights.

        Returns an iterator of (index of the request, its completions) as they end, each on one rank. Every rank must
        read it to its end. The iterator raises EngineError if no engine is left to answer.
        """
        ...

    def load_weights(self, weights: Weights, version: int) -> None:
        """Load the weights of `version`. It may be called while requests are being answered. It wakes an engine.

        Raises ValueError or EngineError if a tensor is missing or does not fit.
        """
        ...

    def differences(self, weights: Weights) -> list[tuple[str, float]] | None:
        """Tensors that differ between engine and `weights`, the worst first, with the relative difference.

        The difference is NaN if only the checksums are known. Returns None if the engine cannot compare.
        """
        ...

    def health(self) -> list[EngineHealth]:
        """The state of the models that answer, as this rank knows it. Not collective; callable from any thread."""
        ...

    def close(self) -> None: ...


class AnswerStream(Protocol):
    """Requests to an engine that are added while others are being answered. All methods are collective."""

    def add(self, requests: Sequence[Request]) -> None:
        """Begin to answer more requests. Their numbers follow those of the earlier ones, from 0."""
        ...

    def read(self, enough: Callable[[], bool]) -> Iterator[tuple[int, list[Completion]]]:
        """Answers on the first rank, as they arrive, until `enough` says so there. Every rank must read to the end.

        Raises EngineError if no engine is left to answer.
        """
        ...

    def waiting(self) -> list[int]:
        """Requests without a token yet, on the first rank, as far as it knows; none on others. Not collective."""
        ...

    def interrupt(self) -> None:
        """End generation now. Unfinished responses keep their tokens, and continue with the next `read`."""
        ...

    def cancel(self, numbers: Collection[int]) -> None:
        """End the work on requests whose answers are not wanted any more. Answers that have arrived may still come."""
        ...

    def close(self) -> None:
        """End the work on all requests."""
        ...


@runtime_checkable
class AnswersByServer(Protocol):
    """An engine of servers, each of which can be asked on its own.

    `gate`: is called, on every rank, when restarted servers have the weights, before they answer anything. It asks them
    by `probe`, and raises EngineError if they are not to answer. None: they answer at once. `resynced` counts how often
    wrong weights were sent again.
    """

    gate: Callable[[], None] | None
    resynced: int

    def probe(
        self, requests: Sequence[Request], sampling: Sampling, *, restarted: bool
    ) -> dict[int, list[list[Completion]]]:
        """Let every server, or only those before the gate, answer all requests. The answers by server. Collective.

        The first rank has the answers, the others an empty list for each server. A server that fails is left out.
        """
        ...


@runtime_checkable
class AnswersOnFirstRank(Protocol):
    """An engine whose answers come to the first rank alone. `nodes`: those that verify them; None if there is one."""

    nodes: VerifyingNodes | None

    def start(
        self, requests: Sequence[Request], sampling: Sampling, arrived: Arrived | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """As `Engine.start`. `arrived` is called with each answer when it arrives, in another thread."""
        ...


@runtime_checkable
class StreamsAnswers(AnswersOnFirstRank, Protocol):
    """Such an engine that generates while nobody reads its answers."""

    def stream(self, sampling: Sampling, arrived: Arrived) -> AnswerStream:
        """An empty stream of requests. `arrived`: as in `start`. Collective."""
        ...
