"""Mathematical answers, compared by the math-verify library in worker processes.

A response is hostile text: `9**9**9**9` keeps sympy busy forever, or until the memory is exhausted. So a worker has
limits on memory, processor time and processes, and each item a limit on wall time. An item that breaks one gets 0 and
is counted, and its worker continues with a fresh process.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from megatron_tempo.rewards.math_classes import Classes
from megatron_tempo.rewards.math_pool import Worker

ANSWER_CHARS = 2000  # longer answers are rejected; a longer text in a box is wrong
RESPONSE_CHARS = 20_000  # the end of a response that is read

_T = TypeVar("_T")
_R = TypeVar("_R")


class AnswerPair(Protocol):
    """The texts of an item that are read."""

    @property
    def response(self) -> str: ...

    @property
    def answer(self) -> str: ...


class MathScorer:
    """Workers that take items from one queue. They start when first needed and live until `close`.

    Several threads may call `score` and `classes` at a time: a worker that has no more items of one call takes those of
    another.
    """

    def __init__(self, workers: int, seconds: float) -> None:
        if workers < 1 or seconds <= 0:
            raise ValueError(f"workers={workers}, seconds={seconds}; give at least one worker and some time")
        self._seconds = seconds
        self._workers = [Worker(seconds) for _ in range(workers)]
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()  # the one that was used last is taken first
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="math")

    def check(self, prompt: str, answer: str) -> None:
        if len(answer) > ANSWER_CHARS:
            raise ValueError(f"the answer has {len(answer)} characters; the math verifier takes {ANSWER_CHARS}")

    def score(self, items: Sequence[AnswerPair]) -> list[float]:
        """1.0 if the response's answer equals the item's, else 0.0. Raises RuntimeError if no worker can start."""

        def judge(worker: Worker, item: AnswerPair) -> float:
            return float(worker.correct(item.answer, item.response[-RESPONSE_CHARS:]))

        return self._map(judge, items)

    def classes(self, prompt: str, responses: Sequence[str]) -> list[int | None]:
        """The classes of `math_classes.Classes`. Raises RuntimeError if no worker can start."""
        read = self._map(lambda worker, response: worker.read(response[-RESPONSE_CHARS:]), responses)
        return self._submit(lambda worker: Classes(worker, self._seconds).numbers(read)).result()

    def has_value(self, answers: Sequence[str]) -> list[bool]:
        """Whether each answer can be parsed. One that cannot equals only its own spelling."""
        return self._map(lambda worker, answer: worker.parsed(answer), answers)

    def take_counts(self) -> dict[str, int]:
        """Items that exceeded the time limit or another limit since the last call; empty before the first item."""
        if not any(worker.has_started for worker in self._workers):
            return {}
        counts = {name: sum(worker.counts[name] for worker in self._workers) for name in ("timeouts", "failures")}
        for worker in self._workers:
            worker.counts.clear()
        return {f"math/{name}": count for name, count in counts.items()}

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _map(self, work: Callable[[Worker, _T], _R], items: Sequence[_T]) -> list[_R]:
        """The results of `work` for each item, on the next free worker."""
        jobs = [self._submit(lambda worker, item=item: work(worker, item)) for item in items]  # type: ignore[misc]
        try:
            return [job.result() for job in jobs]
        finally:
            for job in jobs:
                job.cancel()

    def _submit(self, work: Callable[[Worker], _R]) -> Future[_R]:
        def run() -> _R:
            worker = self._free.get()  # there are as many workers as threads
            try:
                return work(worker)
            finally:
                self._free.put(worker)

        return self._threads.submit(run)
