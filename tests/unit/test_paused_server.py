"""Requests to a vLLM 0.33 whose generation is paused: it rejects them until it is resumed. 0.32 keeps them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.rollout import dispatcher
from megatron_tempo.rollout.answer_formats import is_unavailable
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.fleet import Fleet
from megatron_tempo.rollout.replica import Answered, Failed, GenerationJob
from megatron_tempo.rollout.vllm import Vllm
from tests.support.answers import Answer, Said, answering, vllm_body
from tests.support.completions import plain
from tests.support.one_server import fleet_of

SECONDS = 60.0
SAMPLING = Sampling(1.0, 3)
# vLLM 0.33.0: `_reject_add_while_paused` (v1/engine/core.py) answers with a `RequestError` of this message, retryable;
# outputs.py makes a `RetryableRequestError` of it, whose status is 503 (exceptions.py), and
# entrypoints/serve/exception_handling/error_response.py this body. The code "engine_paused" is not part of it.
PAUSED = {
    "error": {
        "message": "Generation is paused. Please retry after it resumes.",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
}
# `QueueOverflowError` of the same version: `err_type = HTTPStatus(exc.http_status).phrase`.
FULL = {"error": {"message": "The engine is currently busy", "type": "Service Unavailable", "param": None, "code": 503}}
ENDED = Answer(json.dumps(vllm_body([Said([8, 9], [-2.0, -3.0], [("0", 0, 2)], "stop")])).encode())
BEGUN = Answer(json.dumps(vllm_body([Said([7], [-1.0], [("0", 0, 1)], "abort")])).encode())


class Vllm33:
    """The pausing of vLLM 0.33: what is there is aborted, what comes is rejected. `before(path)` is called first."""

    def __init__(self) -> None:
        self.paused = threading.Event()
        self.journal: list[str] = []  # paths, and the outcome of each request
        self.before: Callable[[str], None] = lambda path: None
        self.generates: Callable[[list[int]], Answer | None] = lambda prompt: ENDED  # None: until it is aborted

    def __call__(self, path: str, body: Any) -> Answer:
        path = path.split("?mode=keep")[0]
        self.before(path)
        if path == "/inference/v1/generate":
            return self._generate(body["token_ids"])
        if path == "/pause?mode=abort":
            self.paused.set()
        elif path == "/resume":
            self.paused.clear()
        self.journal.append(path)
        return Answer(b"{}")

    def _generate(self, prompt: list[int]) -> Answer:
        if self.paused.is_set():
            self.journal.append(f"{prompt} rejected")
            return Answer(json.dumps(PAUSED).encode(), 503)
        answer = self.generates(prompt)
        if answer is None:
            assert self.paused.wait(SECONDS)
        self.journal.append(f"{prompt} {'aborted' if answer is None else 'answered'}")
        return BEGUN if answer is None else answer


@contextmanager
def answering_fleet(server: Vllm33, config: ServersConfig | None = None) -> Iterator[Fleet]:
    """A fleet of this server, whose journal begins after its weights came."""
    with answering(server) as listener, fleet_of(Vllm(cpu=True, tensor=1), listener.url, config) as fleet:
        server.journal.clear()
        yield fleet


def answered(fleet: Fleet, job: GenerationJob) -> list[Any]:
    event = fleet.next(job, SECONDS)
    assert isinstance(event, Answered)
    return [plain(one) for one in event.completions]


def test_a_request_that_meets_the_interruption_waits_without_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    """One was being answered, the other comes to the server when it is paused already."""
    server = Vllm33()
    asked = threading.Semaphore(0)

    def late(path: str) -> None:
        if path == "/inference/v1/generate":
            asked.release()

    def generates(prompt: list[int]) -> Answer | None:
        return None if prompt == [1] else ENDED

    server.before, server.generates = late, generates
    with answering_fleet(server) as fleet:
        job = fleet.submit([Request((1,), 1, 0)], SAMPLING, GenerationJob(is_ahead=True))
        assert asked.acquire(timeout=SECONDS)

        def blocked(path: str) -> None:
            if path == "/inference/v1/generate":
                asked.release()
                assert server.paused.wait(SECONDS)

        server.before = blocked
        fleet.submit([Request((2,), 1, 0)], SAMPLING, job)
        assert asked.acquire(timeout=SECONDS)
        fleet.interrupt(job)
        assert fleet.waiting(job) == [1], "it has no token yet"
        assert sorted(server.journal[1:3]) == ["[1] aborted", "[2] rejected"]
        server.before, server.generates = late, lambda prompt: ENDED
        fleet.go_on(job)
        rows = sorted(answered(fleet, job) for _ in range(2))
        assert fleet._replicas[0].life == 0, "it has not failed"
    assert rows == [[((7, 8, 9), (-1.0, -2.0, -3.0), "stop", ((0, 3),))], [((8, 9), (-2.0, -3.0), "stop", ((0, 2),))]]
    assert not caplog.records


def test_no_request_is_sent_to_a_server_that_is_being_interrupted() -> None:
    """Another job's request that is on it is asked again, from the beginning, and a new one waits."""
    server = Vllm33()
    asked, other = threading.Semaphore(0), GenerationJob()
    server.generates = lambda prompt: None

    def noted(path: str) -> None:
        if path == "/inference/v1/generate":
            asked.release()
        if path == "/pause?mode=abort":
            fleet.submit([Request((3,), 1, 0)], SAMPLING, other)
        if path == "/resume":
            server.generates = lambda prompt: ENDED
            server.journal.append("no request before")

    with answering_fleet(server) as fleet:
        server.before = noted
        job = fleet.submit([Request((1,), 1, 0)], SAMPLING, GenerationJob(is_ahead=True))
        fleet.submit([Request((2,), 1, 0)], SAMPLING, other)
        assert asked.acquire(timeout=SECONDS)
        assert asked.acquire(timeout=SECONDS)
        fleet.interrupt(job)
        rows = [answered(fleet, other) for _ in range(2)]
        assert (other.left, job.left, fleet._replicas[0].life) == (0, 1, 0)
    assert rows == [[((8, 9), (-2.0, -3.0), "stop", ((0, 2),))]] * 2
    first, last = server.journal.index("/pause?mode=abort"), server.journal.index("/resume")
    assert not [line for line in server.journal[first:last] if "rejected" in line]
    assert sorted(line for line in server.journal[last:] if "answered" in line) == ["[2] answered", "[3] answered"]


@pytest.mark.parametrize("says", [PAUSED, FULL])
def test_a_server_that_somebody_else_paused_is_asked_again(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr(dispatcher, "AGAIN_SECONDS", 0.001)
    server, left = Vllm33(), [2]

    def generates(prompt: list[int]) -> Answer:
        left[0] -= 1
        return ENDED if left[0] < 0 else Answer(json.dumps(says).encode(), 503)

    server.generates = generates
    with answering_fleet(server) as fleet:
        job = fleet.submit([Request((1,), 1, 0)], SAMPLING)
        assert answered(fleet, job) == [((8, 9), (-2.0, -3.0), "stop", ((0, 2),))]
        assert (left, fleet._replicas[0].life) == ([-1], 0)


def test_asking_again_ends_with_the_time_for_an_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatcher, "AGAIN_SECONDS", 0.001)
    server = Vllm33()
    server.generates = lambda prompt: Answer(json.dumps(PAUSED).encode(), 503)
    with answering_fleet(server, ServersConfig(answer_seconds=0.05, restarts=0)) as fleet:
        event = fleet.next(fleet.submit([Request((1,), 1, 0)], SAMPLING), SECONDS)
        assert isinstance(event, Failed)
    words = caplog.records[0].getMessage()
    assert "Generation is paused" in words
    assert "for rollout.servers.answer_seconds=0.05" in words


@pytest.mark.parametrize("text", ["", "upstream is down", '{"error": "Dead"}', '{"error": {"type": "Other"}}'])
def test_another_503_is_a_fault(text: str) -> None:
    assert not is_unavailable(text)
