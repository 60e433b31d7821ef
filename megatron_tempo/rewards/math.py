"""Mathematical answers, compared by the math-verify library in worker processes.

A response is hostile text: `9**9**9**9` keeps sympy busy for ever, or until the memory is gone. So a worker has limits
on memory and processor time, and each item a limit on wall time. An item that breaks one gets 0, and its worker a
successor.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import megatron_tempo
from megatron_tempo.runtime import progress_marker

MEMORY_MB = 1024  # address space of a worker, MiB
START_SECONDS = 120.0  # for Python and sympy to load, on a busy machine
END_SECONDS = 2.0  # for an idle worker to end by itself
ANSWER_CHARS = 2000  # longer answers are refused; a longer text in a box is wrong
RESPONSE_CHARS = 20_000  # the end of a response that is looked at


class AnswerPair(Protocol):
    """What is read of an item."""

    @property
    def response(self) -> str: ...

    @property
    def answer(self) -> str: ...


class MathScorer:
    """Workers that take items from one queue. They start when first needed and live until `close`."""

    def __init__(self, workers: int, seconds: float) -> None:
        if workers < 1 or seconds <= 0:
            raise ValueError(f"workers={workers}, seconds={seconds}; give at least one worker and some time")
        self._workers = [Worker(seconds) for _ in range(workers)]

    def check(self, prompt: str, answer: str) -> None:
        if len(answer) > ANSWER_CHARS:
            raise ValueError(f"the answer has {len(answer)} characters; the math verifier takes {ANSWER_CHARS}")

    def score(self, items: Sequence[AnswerPair]) -> list[float]:
        """1.0 where the response's answer equals the item's, else 0.0. RuntimeError where no worker can start."""
        verdicts = [0.0] * len(items)
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
                verdicts[i] = float(worker.correct(items[i].answer, items[i].response[-RESPONSE_CHARS:]))

        busy = self._workers[: len(items)]
        with ThreadPoolExecutor(max_workers=len(self._workers)) as threads:
            try:
                for done in [threads.submit(serve, worker) for worker in busy]:
                    done.result()
            finally:
                stop.set()
        return verdicts

    def classes(self, prompt: str, responses: Sequence[str]) -> list[int | None]:
        """As `_Classes` puts them. RuntimeError where no worker can start."""
        classes = _Classes(self._workers[0])
        return [classes.join(response[-RESPONSE_CHARS:]) for response in responses]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class Worker:
    """One process of `math_worker`, restarted when it died or was killed. To be used by one thread at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def correct(self, answer: str, response: str) -> bool:
        """Whether the response is right. One that takes too long, or kills the worker, is not."""
        reply = self._ask({"answer": answer, "response": response})
        return reply is not None and bool(reply["correct"])

    def compare(self, known: Sequence[str], response: str) -> tuple[int | None, str | None] | None:
        """The place of the first known answer that the response's equals (None: of no one), and the response's answer.

        (None, None): it has no answer. None where they cannot be compared in time.
        """
        reply = self._ask({"known": list(known), "response": response})
        return None if reply is None else (reply["equal"], reply["answer"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The reply, or None to a request that takes too long or too much memory, or kills the worker."""
        progress_marker.mark()
        for _ in range(2):
            process = self._running()
            reply, timed_out = _exchange(process, request, self._seconds)
            if reply is not None:
                if reply["retire"] or timed_out:
                    self.close()
                return None if reply["exhausted"] else reply
            self.close()
            # Killed from outside (by the kernel, for want of memory, perhaps): the item may be innocent, so ask again.
            if timed_out or process.returncode != -signal.SIGKILL:
                return None
        return None

    def close(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        process = _start(self._seconds)
        reply, _ = _exchange(process, None, START_SECONDS)
        if reply is None:
            _end(process)
            raise RuntimeError(
                f"the math worker ended with code {process.returncode} before it was ready; its error is on stderr"
            )
        self._process = process
        return process


class _Classes:
    """The classes of one question's responses, as they come.

    A response joins the first class, the largest tried first, whose first answer math-verify holds equal to its own.
    That is not transitive in all cases, so another order could divide them otherwise. What cannot be read in time has
    no answer. An answer that can be read, but not compared with another one in time, is compared no more.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._answers: list[str] = []  # the first of each class
        self._sizes: list[int] = []
        self._slow: set[int] = set()

    def join(self, response: str) -> int | None:
        """The response's class, an old one or a new one, or None."""
        order = sorted(set(range(len(self._answers))) - self._slow, key=lambda number: (-self._sizes[number], number))
        verdict = self._worker.compare([self._answers[number] for number in order], response)
        if verdict is None:
            order, verdict = self._one_by_one(order, response)
        place, answer = verdict
        if answer is None:
            return None
        if place is not None:
            number = order[place]
        elif answer in self._answers:  # word for word one that is compared no more
            number = self._answers.index(answer)
        else:
            number = len(self._answers)
            self._answers.append(answer)
            self._sizes.append(0)
        self._sizes[number] += 1
        return number

    def _one_by_one(self, order: Sequence[int], response: str) -> tuple[list[int], tuple[int | None, str | None]]:
        """The class that the response belongs to, if any, and what `compare` found: where all at once take too long."""
        alone = self._worker.compare([], response)
        if alone is None:
            return [], (None, None)
        for number in order:
            verdict = self._worker.compare([self._answers[number]], response)
            if verdict is None:
                self._slow.add(number)
            elif verdict[0] is not None:
                return [number], verdict
        return [], alone


def _start(seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_tempo.rewards.math_worker", str(MEMORY_MB), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(megatron_tempo.__file__).parents[1],  # so that `-m` finds this very package
        env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order of terms follows the hashes of strings
        start_new_session=True,  # Ctrl-C is for the trainer, whose end closes the worker's input
    )


def _exchange(
    process: subprocess.Popen[bytes], request: dict[str, Any] | None, seconds: float
) -> tuple[dict[str, Any] | None, bool]:
    """Sends a request, if any, and waits for a reply: (the reply or None where the process ended, timed out)."""
    assert process.stdin is not None
    assert process.stdout is not None
    timed_out = threading.Event()

    def expire() -> None:
        timed_out.set()
        process.kill()  # which ends the reading and writing below

    watchdog = threading.Timer(seconds, expire)
    watchdog.start()
    try:
        if request is not None:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = b""
    finally:
        watchdog.cancel()
        watchdog.join()  # from here on it cannot kill a later item's worker
    return json.loads(line) if line.endswith(b"\n") else None, timed_out.is_set()


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # what it did not read is of no interest any more
        process.stdin.close()
    try:
        process.wait(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
