"""Requests to a server that are added, cancelled and interrupted while others are being answered."""

from __future__ import annotations

import json
import threading
from typing import Any

from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.partial_requests import grown
from megatron_tempo.rollout.replica import Answered, Ask, GenerationJob
from megatron_tempo.rollout.request_queue import RequestQueue
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.types import UNFINISHED, Completion
from tests.support.answers import Answer, Said, answering, sglang_body
from tests.support.completions import plain
from tests.support.one_server import fleet_of, update

SECONDS = 60.0
SAMPLING = Sampling(1.0, 3)


def body(*said: Said) -> Answer:
    return Answer(json.dumps(sglang_body(said)).encode())


def test_an_interrupted_response_goes_on_from_where_it_was() -> None:
    """Of two responses one has ended. The other one's tokens are then a part of the prompt."""
    asked, interrupted = threading.Semaphore(0), threading.Event()
    bodies: list[Any] = []

    def answer(path: str, given: Any) -> Answer:
        if path == "/abort_request":
            assert given == {"abort_all": True}
            interrupted.set()
        if path != "/generate":
            return Answer(b"{}")
        bodies.append((given["input_ids"], given["sampling_params"]["n"], given["sampling_params"]["max_new_tokens"]))
        asked.release()
        if len(bodies) == 1:
            assert interrupted.wait(SECONDS)
            return body(Said([5, 6], [-0.5, -0.25], [("0", 0, 2)], "stop"), Said([7], [-1.0], [("0", 0, 1)], "abort"))
        return body(Said([8, 9], [-2.0, -3.0], [("1", 0, 2)], "length"))

    with answering(answer) as server, fleet_of(Sglang(cpu=True, tensor=1), server.url) as fleet:
        job = fleet.submit([Request((1,), samples=2, seed=0)], SAMPLING, GenerationJob(is_ahead=True))
        assert asked.acquire(timeout=SECONDS)
        assert fleet.waiting(job) == []
        fleet.interrupt(job)
        assert (job.left, job.events.empty()) == (1, True)
        fleet.submit([Request((2,), samples=1, seed=0)], SAMPLING, job)
        assert fleet.waiting(job) == [1], "it has no token yet"
        update(fleet, 1)
        assert len(bodies) == 1
        fleet.go_on(job)
        events = {
            event.number: event for event in (fleet.next(job, SECONDS) for _ in range(2)) if isinstance(event, Answered)
        }
        assert job.left == 0
    assert bodies[0] == ([[1]], 2, 3)
    assert sorted(bodies[1:]) == [([[1, 7]], 1, 2), ([[2]], 1, 3)]
    assert [plain(one) for one in events[0].completions] == [
        ((5, 6), (-0.5, -0.25), "stop", ((0, 2),)),
        ((7, 8, 9), (-1.0, -2.0, -3.0), "length", ((0, 1), (1, 2))),
    ]
    assert [plain(one) for one in events[1].completions] == [((8, 9), (-2.0, -3.0), "length", ((1, 2),))]


def test_a_request_that_is_not_wanted_any_more_makes_room() -> None:
    go_on, asked = threading.Event(), threading.Semaphore(0)

    def answer(path: str, given: Any) -> Answer:
        if path != "/generate":
            return Answer(b"{}")
        asked.release()
        if given["input_ids"] == [[1]]:
            assert go_on.wait(SECONDS)
        return body(Said([8], [-2.0], [("0", 0, 1)], "length"))

    with answering(answer) as server, fleet_of(Sglang(cpu=True, tensor=1), server.url) as fleet:
        try:
            job = fleet.submit([Request((1,), samples=1, seed=0)] * 2, SAMPLING, GenerationJob(is_ahead=True))
            assert all(asked.acquire(timeout=SECONDS) for _ in range(2))
            fleet.cancel(job, [0, 1, 7])
            assert (job.left, fleet.health()[0].requests) == (0, 0)
            fleet.submit([Request((2,), samples=1, seed=0)], SAMPLING, job)
            event = fleet.next(job, SECONDS)
            assert isinstance(event, Answered)
            assert event.number == 2, "numbers continue"
        finally:
            go_on.set()


def asks(job: GenerationJob, *numbers: int) -> list[Ask]:
    return [Ask(job, number, Request((1,), 1, 0), SAMPLING, 0) for number in numbers]


def test_requests_that_the_trainer_waits_for_go_first() -> None:
    queue, ahead, evaluation = RequestQueue(), GenerationJob(is_ahead=True), GenerationJob()
    queue.add(ahead, asks(ahead, 0, 1))
    queue.add(evaluation, asks(evaluation, 0, 1))
    queue.add(ahead, asks(ahead, 2))
    queue.put_back(asks(ahead, 3, 4))
    order = [queue.next() for _ in range(len(queue))]
    assert [(ask.job is ahead, ask.number) for ask in order] == [
        (True, 3),
        (True, 4),
        (False, 0),
        (False, 1),
        (True, 0),
        (True, 1),
        (True, 2),
    ]


def test_requests_of_a_paused_job_are_kept_from_servers() -> None:
    queue, job, other = RequestQueue(), GenerationJob(is_ahead=True), GenerationJob()
    job.asked = 2
    queue.add(job, asks(job, 0, 1))
    queue.add(other, asks(other, 0))
    queue.pause(job)
    queue.add(job, asks(job, 2))
    assert (len(queue), [ask.number for ask in job.parked]) == (1, [0, 1, 2])
    assert queue.unbegun(job) == [0, 1, 2]
    queue.go_on(job)
    assert (len(queue), job.parked, job.is_paused) == (4, [], False)


def test_the_versions_of_a_response_that_grew() -> None:
    begun = Completion([1, 2, 3], [0.0] * 3, UNFINISHED, ((4, 1), (5, 2)))  # type: ignore[arg-type]
    assert grown(begun, 5, 4) == ((4, 1), (5, 3))
    assert grown(begun, 6, 4) == ((4, 1), (5, 2), (6, 1))
    assert grown(begun, 6, 3) == ((4, 1), (5, 2))
    assert grown(None, 6, 3) == ((6, 3),)
