"""Requests to servers that are added while others are being answered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from megatron_tempo.rollout.engine import Arrived, Request, Sampling
from megatron_tempo.rollout.fleet import Fleet
from megatron_tempo.rollout.replica import GenerationJob
from megatron_tempo.types import Completion

# The engine's loop over a job's answers, in which all ranks take part until the first one has enough.
Answers = Callable[[GenerationJob | None, Callable[[], bool] | None], Iterator[tuple[int, list[Completion]]]]


class ServedStream:
    """An `AnswerStream`. `fleet`: on the first rank, where the requests are."""

    def __init__(self, fleet: Fleet | None, sampling: Sampling, arrived: Arrived, answers: Answers) -> None:
        self._fleet, self._sampling, self._answers = fleet, sampling, answers
        self._job = None if fleet is None else GenerationJob(arrived, is_ahead=True)

    def add(self, requests: Sequence[Request]) -> None:
        if self._fleet is not None and self._job is not None:
            self._fleet.submit(requests, self._sampling, self._job)

    def read(self, enough: Callable[[], bool]) -> Iterator[tuple[int, list[Completion]]]:
        if self._fleet is not None and self._job is not None:
            self._fleet.go_on(self._job)
        return self._answers(self._job, enough)

    def interrupt(self) -> None:
        if self._fleet is not None and self._job is not None:
            self._fleet.interrupt(self._job)

    def waiting(self) -> list[int]:
        return [] if self._fleet is None or self._job is None else self._fleet.waiting(self._job)

    def cancel(self, numbers: Collection[int]) -> None:
        if self._fleet is not None and self._job is not None and numbers:
            self._fleet.cancel(self._job, numbers)

    def close(self) -> None:
        if self._fleet is not None and self._job is not None:
            self._fleet.finish(self._job)
