"""Mathematical answers, compared by the math-verify library in worker processes.

A response is hostile text: `9**9**9**9` keeps sympy busy forever, or until the memory is exhausted. So a worker has
limits on memory, processor time and processes, and each item a limit on wall time. An item that breaks one gets 0 and
is counted, and its worker continues with a fresh process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    """Workers that take items from one queue. They start when first needed and live until `close`."""

    def __init__(self, workers: int, seconds: float) -> None:
        if workers < 1 or seconds <= 0:
            raise ValueError(f"workers={workers}, seconds={seconds}; give at least one worker and some time")
        self._seconds = seconds
        self._workers = [Worker(seconds) for _ in range(workers)]

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
        return Classes(self._workers[0], self._seconds).numbers(read)

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
        for worker in self._workers:
            worker.close()

    def _map(self, work: Callable[[Worker, _T], _R], items: Sequence[_T]) -> list[_R]:
        """The results of `work` for each item, on the next free worker."""
        results: dict[int, _R] = {}
        stop = threading.Event()
        jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(items)):
            jobs.put(i)

        def serve(worker: Worker) -> None:
            while not stop.is_set():
                try:
                    i = jobs.get_nowait()
                except queue.Empty:
                    return
                results[i] = work(worker, items[i])

        with ThreadPoolExecutor(max_workers=len(self._workers)) as threads:
            try:
                for done in [threads.submit(serve, worker) for worker in self._workers[: len(items)]]:
                    done.result()
            finally:
                stop.set()
        return [results[i] for i in range(len(items))]
