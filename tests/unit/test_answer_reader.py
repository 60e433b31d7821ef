"""The process that reads servers' answers: the answers themselves, its end, and requests that are open when it dies."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from megatron_tempo.errors import EngineError
from megatron_tempo.rollout import answer_reader, answer_worker
from megatron_tempo.rollout.answer_frames import AnswerReply, RequestOrder, WorkerSettings, packed, receive
from megatron_tempo.rollout.answer_reader import AnswerReader, CannotAnswer
from megatron_tempo.rollout.answer_worker import AnswerWorker, Room
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.fleet import Fleet
from megatron_tempo.rollout.replica import Answered, Failed, GenerationJob, State
from megatron_tempo.rollout.sglang import Sglang
from tests.support.answers import BODIES, Answer, Said, answering
from tests.support.completions import plain
from tests.support.logged import logged
from tests.support.one_server import opened_fleet

SAID = [Said([5, 6, 7], [-0.5, -0.25, -1.0], [("0", 0, 3)]), Said([8], [-2.0], [("0", 0, 1)], "length")]
GOOD = {kind: json.dumps(body(SAID)).encode() for kind, body in BODIES.items()}
SECONDS = 60.0  # for what takes milliseconds: the machine may be busy
ASKED = {"input_ids": [[1, 2]]}


def run(work: Callable[[AnswerReader], Coroutine[Any, Any, None]], kind: str = "sglang") -> None:
    """Do some work with an open reader, within a time limit."""

    async def whole() -> None:
        reader = AnswerReader(kind, "the-key", SECONDS)
        await reader.open()
        try:
            await work(reader)
        finally:
            await reader.close()
        assert reader.process is not None
        assert reader.process.poll() is not None, "the process ends with its reader"

    asyncio.run(asyncio.wait_for(whole(), 2 * SECONDS))


def pid_of(reader: AnswerReader) -> int:
    assert reader.process is not None
    return reader.process.pid


ANSWERS: dict[str, tuple[Answer, str]] = {
    "busy": (Answer(b"busy", 503), "answered /generate with 503: busy"),
    "a long error": (Answer(b"\xff" + b"e" * 9999, 500), f"answered /generate with 500: \ufffd{'e' * 499}"),
    "cut": (Answer(GOOD["sglang"], cut=50), "did not answer: RemoteProtocolError "),
    "no JSON": (Answer(b"<html>"), "gave a response that makes no sense: JSON is malformed"),
    "another form": (Answer(b'[{"output_ids": [1]}]'), "missing required field `meta_info` - at `$[0]`"),
    "nested": (Answer(b'{"choices": ' + b"[" * 100_000), "gave a response that makes no sense: "),
    "a refusal": (Answer(b'{"success": false, "message": "paused"}'), "refused /generate: paused"),
    "an invalid request": (Answer(b"too long", 400), "answered /generate with 400: too long"),
    "too large": (Answer(b"too long", 413), "answered /generate with 413: too long"),
}


def test_what_a_server_answers_comes_as_arrays_or_as_its_error() -> None:
    """Through one process, many at a time."""
    by_path = {f"/{i}": answer for i, (answer, _) in enumerate(ANSWERS.values())}

    def answer(path: str, body: Any) -> Answer:
        return Answer(GOOD["sglang"]) if path == "/good" else by_path[path]

    with answering(answer) as server:

        async def work(reader: AnswerReader) -> None:
            paths = ["/good", *by_path] * 3
            asks = [reader.ask(server.url, path, ASKED) for path in paths]
            outcomes = await asyncio.gather(*asks, return_exceptions=True)
            for i, outcome in enumerate(outcomes):
                number = i % (1 + len(by_path)) - 1
                if number < 0:
                    assert isinstance(outcome, answer_reader.RawAnswers), outcome
                    assert outcome.tokens.tolist() == [5, 6, 7, 8]
                    assert outcome.logprobs.tolist() == [-0.5, -0.25, -1.0, -2.0]
                    assert [(row.tokens, row.reason, row.versions) for row in outcome.rows] == [
                        (3, "stop", [(0, 3)]),
                        (1, "length", [(0, 1)]),
                    ]
                    continue
                case, (given, words) = list(ANSWERS.items())[number]
                assert isinstance(outcome, EngineError), case
                assert words.replace("/generate", paths[i]) in str(outcome), case
                assert isinstance(outcome, CannotAnswer) == (given.status in (400, 413)), case

        run(work)
    assert {key for _, key, _ in server.requests} == {"Bearer the-key"}
    assert all(body == ASKED for _, _, body in server.requests)


def test_an_answer_of_vllm_from_an_address_with_a_slash_and_one_that_nobody_is_at() -> None:
    with answering(lambda path, body: Answer(GOOD["vllm"])) as server:

        async def work(reader: AnswerReader) -> None:
            answers = await reader.ask(server.url + "/", "/generate", ASKED)
            assert answers.tokens.tolist() == [5, 6, 7, 8]
            with socket.socket() as nobody:
                nobody.bind(("127.0.0.1", 0))
                for url in (f"http://127.0.0.1:{nobody.getsockname()[1]}", "http://[", "nothing"):
                    with pytest.raises(EngineError, match=r"^(did not answer: |gave an answer that cannot be read: )"):
                        await reader.ask(url, "/generate", ASKED)

        run(work, "vllm")
    assert [path for path, _, _ in server.requests] == ["/generate"]


def test_answers_of_no_responses_and_of_no_tokens_and_when_they_came() -> None:
    bodies = iter([b"[]", json.dumps(BODIES["sglang"]([Said([], [], [])])).encode()])
    sent: list[float] = []

    def answer(path: str, body: Any) -> Answer:
        sent.append(time.monotonic())
        return Answer(next(bodies))

    with answering(answer) as server:

        async def work(reader: AnswerReader) -> None:
            for rows in (0, 1):
                answers = await reader.ask(server.url, "/generate", ASKED)
                assert (len(answers.rows), len(answers.tokens), len(answers.logprobs)) == (rows, 0, 0)
                assert sent[-1] <= answers.received <= time.monotonic()

        run(work)


def test_a_request_that_is_abandoned_is_abandoned_at_the_server_too() -> None:
    """And its answer, should it come, is nobody else's."""
    begun, may_go_on = threading.Event(), threading.Event()

    def answer(path: str, body: Any) -> Answer:
        if path == "/slow":
            begun.set()
            assert may_go_on.wait(SECONDS)
        return Answer(GOOD["sglang"])

    with answering(answer) as server:

        async def work(reader: AnswerReader) -> None:
            slow = asyncio.create_task(reader.ask(server.url, "/slow", {}))
            assert await asyncio.to_thread(begun.wait, SECONDS)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            assert (await reader.ask(server.url, "/generate", ASKED)).tokens.tolist() == [5, 6, 7, 8]
            await asyncio.to_thread(
                _until, lambda: len(_connections(pid_of(reader), server.url)) <= 1
            )  # the good one's
            may_go_on.set()
            assert (await reader.ask(server.url, "/generate", ASKED)).tokens.tolist() == [5, 6, 7, 8]
            assert reader._pending == {}

        run(work)


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(round(SECONDS / 0.02)):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it does not come to pass")


def _connections(pid: int, url: str) -> list[Any]:
    """The established connections of a process to a server."""
    port = int(url.rpartition(":")[2])
    to_server = [one for one in psutil.Process(pid).net_connections("tcp") if one.raddr and one.raddr.port == port]
    return [one for one in to_server if one.status == psutil.CONN_ESTABLISHED]


def test_a_killed_process_is_replaced_and_its_requests_are_asked_again() -> None:
    asked = threading.Semaphore(0)
    killed = threading.Event()

    def answer(path: str, body: Any) -> Answer:
        asked.release()
        assert killed.wait(SECONDS)
        return Answer(GOOD["sglang"])

    with answering(answer) as server, logged(logging.WARNING) as messages:

        async def work(reader: AnswerReader) -> None:
            pid = pid_of(reader)
            asks = [asyncio.create_task(reader.ask(server.url, f"/{i}", {})) for i in range(3)]
            for _ in asks:
                assert await asyncio.to_thread(asked.acquire, timeout=SECONDS)
            os.kill(pid, signal.SIGKILL)
            for _ in asks:
                assert await asyncio.to_thread(asked.acquire, timeout=SECONDS)
            killed.set()
            for answers in await asyncio.gather(*asks):
                assert answers.tokens.tolist() == [5, 6, 7, 8]
            assert pid_of(reader) != pid

        run(work)
    assert sorted(path for path, _, _ in server.requests) == ["/0", "/0", "/1", "/1", "/2", "/2"]
    assert messages == [
        "the process that reads the servers' answers was killed by SIGKILL; its 3 unfinished requests are asked again"
    ]


def test_a_process_that_dies_of_an_answer_again_and_again_fails_its_requests() -> None:
    pids: list[int] = []

    def answer(path: str, body: Any) -> Answer:
        os.kill(pids[-1], signal.SIGKILL)
        return Answer(GOOD["sglang"], cut=0)

    with answering(answer) as server, logged(logging.WARNING) as messages:

        async def work(reader: AnswerReader) -> None:
            pids.append(pid_of(reader))
            start = answer_reader._start

            def started(connection: socket.socket) -> subprocess.Popen[bytes]:
                process = start(connection)
                pids.append(process.pid)
                return process

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(answer_reader, "_start", started)
                for _ in range(2):  # the second one at once
                    with pytest.raises(CannotAnswer, match=r"died 3 times in a row and was killed by SIGKILL: if not"):
                        await reader.ask(server.url, "/generate", ASKED)

        run(work)
    assert len(server.requests) == len(pids) == answer_reader.DEATHS
    assert len(messages) == answer_reader.DEATHS - 1


def test_a_process_that_cannot_start_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        answer_reader,
        "_start",
        lambda connection: subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"]),
    )

    async def opened() -> None:
        reader = AnswerReader("sglang", "key", SECONDS)
        try:
            await reader.open()
        finally:
            await reader.close()

    with pytest.raises(EngineError, match=r"died 3 times in a row and ended with exit code 3"):
        asyncio.run(opened())


def test_a_process_that_cannot_be_made_fails_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the machine has no memory or no file descriptor left."""

    def start(connection: socket.socket) -> subprocess.Popen[bytes]:
        raise OSError(12, "Cannot allocate memory")

    async def opened() -> None:
        reader = AnswerReader("sglang", "key", SECONDS)
        try:
            await reader.open()
        finally:
            await reader.close()

    monkeypatch.setattr(answer_reader, "_start", start)
    with pytest.raises(EngineError, match=r"cannot be kept: OSError\(12, 'Cannot allocate memory'\)"):
        asyncio.run(opened())


def test_a_process_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    start, usual, pids = answer_reader._start, answer_reader.HANG_SECONDS, []
    monkeypatch.setattr(answer_reader, "PING_SECONDS", 0.01)

    def started(connection: socket.socket) -> subprocess.Popen[bytes]:
        monkeypatch.setattr(answer_reader, "HANG_SECONDS", usual)
        process = start(connection)
        pids.append(process.pid)
        return process

    def answer(path: str, body: Any) -> Answer:
        if len(pids) == 1:
            monkeypatch.setattr(answer_reader, "HANG_SECONDS", 0.1)
            os.kill(pids[0], signal.SIGSTOP)
        return Answer(GOOD["sglang"])

    monkeypatch.setattr(answer_reader, "_start", started)
    with answering(answer) as server, logged(logging.WARNING) as messages:

        async def work(reader: AnswerReader) -> None:
            assert (await reader.ask(server.url, "/generate", ASKED)).tokens.tolist() == [5, 6, 7, 8]

        run(work)
    assert len(pids) == len(server.requests) == 2
    assert messages == [
        "the process that reads the servers' answers has not responded for 0.1 s",
        "the process that reads the servers' answers was killed by SIGKILL; its 1 unfinished requests are asked again",
    ]


def test_signals_for_the_trainer_leave_it_alone() -> None:
    """Slurm sends SIGTERM to every process of a job, and the trainer then saves a checkpoint."""
    with answering(lambda path, body: Answer(GOOD["sglang"])) as server, logged(logging.WARNING) as messages:

        async def work(reader: AnswerReader) -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(pid_of(reader), number)
                await reader.ask(server.url, "/generate", ASKED)

        run(work)
    assert messages == []


TRAINER = """
import asyncio, os, sys, time
from megatron_tempo.rollout.answer_reader import AnswerReader

async def main():
    reader = AnswerReader("sglang", "key", 60.0)
    await reader.open()
    held = 0
    if sys.argv[1] == "forked":
        held = os.fork()
        if held == 0:
            time.sleep(100)
    print(reader.process.pid, held, flush=True)
    await asyncio.sleep(100)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["alone", "forked"])
def test_it_ends_with_a_trainer_that_is_killed(how: str) -> None:
    """Also where a child of the trainer holds the connection."""
    with subprocess.Popen([sys.executable, "-c", TRAINER, how], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid, child = map(int, trainer.stdout.readline().split())
        worker = os.pidfd_open(pid)
        trainer.kill()
    try:
        assert select.select([worker], [], [], SECONDS)[0], "it still runs"
    finally:
        os.close(worker)
        if child:
            os.kill(child, signal.SIGKILL)


# Bounded memory


def test_room_bounds_what_is_held_but_lets_a_larger_one_in_alone() -> None:
    async def work() -> None:
        room = Room(100)
        await room.take(60)
        waiting = [asyncio.create_task(room.take(amount)) for amount in (60, 500, 40)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [False, False, True]
        await room.give(40)
        waiting[0].cancel()
        await room.give(60)
        await asyncio.wait_for(waiting[1], SECONDS)
        small = asyncio.create_task(room.take(1))
        await asyncio.sleep(0)
        assert not small.done()
        await room.give(500)
        await asyncio.wait_for(small, SECONDS)

    asyncio.run(work())


def test_answers_wait_in_the_servers_while_nobody_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten answers, of which two have room: the bodies of the others are not read until arrays are taken."""
    tokens = [150_000] * 30_000  # 240 kB of arrays, more than a socket holds
    body = json.dumps(BODIES["sglang"]([Said(tokens, [-0.5] * len(tokens), [("0", 0, len(tokens))])])).encode()
    monkeypatch.setattr(answer_worker, "ROOM", 2 * len(body))
    read: list[str] = []

    async def stream(path: str) -> AsyncIterator[bytes]:
        read.append(path)
        yield body

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Length": str(len(body))}, content=stream(request.url.path))

    async def work() -> None:
        ours, theirs = socket.socketpair()
        for connection in (ours, theirs):
            connection.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        worker = AnswerWorker(theirs, WorkerSettings(0, "sglang", "key", SECONDS))
        worker._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        serving = asyncio.create_task(worker.serve())
        loop = asyncio.get_running_loop()
        for number in range(10):
            for piece in packed(RequestOrder(number, f"http://server/{number}"), b""):
                await loop.sock_sendall(ours, piece)
        while len(worker._tasks) < 10 or len(read) < 2:
            await asyncio.sleep(0)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert len(read) == 2
        frames = [await receive(ours, AnswerReply) for _ in range(11)]
        assert sorted(reply.number for reply, _ in filter(None, frames)) == list(range(-1, 10))
        assert [len(raw) for _, raw in filter(None, frames)] == [0] + [8 * len(tokens)] * 10
        assert len(read) == 10
        ours.close()
        await serving
        theirs.close()

    asyncio.run(asyncio.wait_for(work(), SECONDS))


# In a fleet


@pytest.fixture
def held() -> Iterator[tuple[threading.Event, threading.Semaphore]]:
    """Answers wait for the first; the second counts the requests."""
    event = threading.Event()
    yield event, threading.Semaphore(0)
    event.set()


def test_a_fleet_loses_no_answer_and_no_server_when_the_reader_is_killed(
    held: tuple[threading.Event, threading.Semaphore],
) -> None:
    go_on, asked = held

    def answer(path: str, body: Any) -> Answer:
        if path != "/generate":
            return Answer(b"{}")
        asked.release()
        assert go_on.wait(SECONDS)
        return Answer(GOOD["sglang"])

    with answering(answer) as server, logged(logging.WARNING) as messages:
        fleet = opened_fleet(Sglang(cpu=True, tensor=1), server.url)
        try:
            job = fleet.submit([Request((1,), samples=2, seed=0)] * 3, Sampling(1.0, 3))
            for _ in range(3):
                assert asked.acquire(timeout=SECONDS)
            os.kill(pid_of(fleet._reader), signal.SIGKILL)
            for _ in range(3):
                assert asked.acquire(timeout=SECONDS)
            go_on.set()
            events = [fleet.next(job, SECONDS) for _ in range(3)]
            replica = fleet._replicas[0]
            assert (replica.state, replica.restarts, replica.life) == (State.serving, 0, 0)
        finally:
            fleet.close()
    answered = [event for event in events if isinstance(event, Answered)]
    assert sorted(event.number for event in answered) == [0, 1, 2]
    for event in answered:
        assert [plain(one) for one in event.completions] == [
            ((5, 6, 7), (-0.5, -0.25, -1.0), "stop", ((0, 3),)),
            ((8,), (-2.0,), "length", ((0, 1),)),
        ]
    assert len(messages) == 1


def test_a_fleet_tells_of_each_answer_when_it_arrives() -> None:
    arrived: list[tuple[int, Any]] = []
    with answering(lambda path, body: Answer(GOOD["sglang"] if path == "/generate" else b"{}")) as server:
        fleet = opened_fleet(Sglang(cpu=True, tensor=1), server.url)
        try:
            asked = [Request((1,), samples=2, seed=0)] * 3
            job = GenerationJob(lambda number, of: arrived.append((number, of)))
            fleet.submit(asked, Sampling(1.0, 3), job)
            events = [fleet.next(job, SECONDS) for _ in range(3)]
        finally:
            fleet.close()
    assert arrived == [(event.number, event.completions) for event in events if isinstance(event, Answered)]
    assert len(arrived) == 3


def test_a_fleet_whose_reader_cannot_be_kept_fails_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_reader, "DEATHS", 1)
    fleets: list[Fleet] = []

    def answer(path: str, body: Any) -> Answer:
        if path == "/generate":
            os.kill(pid_of(fleets[0]._reader), signal.SIGKILL)
        return Answer(b"{}")

    with answering(answer) as server:
        fleet = opened_fleet(Sglang(cpu=True, tensor=1), server.url)
        fleets.append(fleet)
        try:
            job = fleet.submit([Request((1,), samples=2, seed=0)] * 3, Sampling(1.0, 3))
            event = fleet.next(job, SECONDS)
            assert isinstance(event, Failed)
            assert event.why.startswith("the process that reads the servers' answers died 1 times in a row")
            assert fleet._replicas[0].state is State.serving
        finally:
            fleet.close()


def test_the_module_runs_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def nothing(reader: AnswerReader) -> None:
        """It has opened."""

    run(nothing)


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    bench = importlib.import_module("bench_answers")
    results = bench.main(["--answers=2", "--samples=2", "--tokens=40", "--in-a-thread=1", "--engine=vllm"])
    assert results["in a process"]["worker_ns_a_token"] >= 0.0 == results["in a thread"]["worker_ns_a_token"]
    assert all(numbers["longest_gap_ms"] > 0 for numbers in results.values())
