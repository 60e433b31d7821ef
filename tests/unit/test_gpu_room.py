"""When servers on the trainer's GPUs may take memory, and that requests wait for complete weights."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rollout import fleet as fleet_module
from megatron_tempo.rollout import server_calls
from megatron_tempo.rollout.answer_checks import checked
from megatron_tempo.rollout.engine import EngineWork
from megatron_tempo.rollout.gpu_room import GpuRoom
from megatron_tempo.rollout.replica import Event, State
from megatron_tempo.rollout.server_adapter import Call


def test_it_closes_when_those_that_take_memory_are_done() -> None:
    async def story() -> list[str]:
        room, said, go_on = GpuRoom(), [], asyncio.Event()

        async def start() -> None:
            said.append("starts")
            await go_on.wait()
            said.append("is up")

        async def waits() -> None:
            await room.wait()
            said.append("may start")

        task = room.begin(start())
        closing = asyncio.ensure_future(room.close())
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(waits())
        await asyncio.sleep(0)
        assert room.in_use
        assert not closing.done()
        go_on.set()
        await closing
        said.append("closed")
        await asyncio.sleep(0)
        assert not room.in_use
        room.open()
        await waiting
        await task
        return said

    assert asyncio.run(story()) == ["starts", "is up", "closed", "may start"]


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, json={"status": "awake", "tags": ["weights"]}),
        httpx.Response(200, json={}),
        httpx.Response(200, text="sleeping"),
        httpx.Response(500, json={"error": {"message": "CUDA Error: out of memory"}}),
    ],
)
def test_an_answer_that_is_not_the_expected_one_is_a_refusal(answer: httpx.Response) -> None:
    call = Call("/wake_up?tags=weights", {}, {"status": "sleeping"})
    with pytest.raises(EngineError, match="/wake_up"):
        checked(answer, call)
    assert checked(httpx.Response(200, json={"status": "sleeping", "more": 1}), call).status_code == 200


class Server:
    """Two servers' adapter, HTTP transport and starter. `refuses`: paths that are answered with 500."""

    name, answer_format, memory_option = "Fake", "fake", "--share"

    def __init__(self) -> None:
        self.refuses: set[str] = set()
        self.log: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Any method of an adapter: one call of its name."""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_: [Call(f"/{name}", {})]

    def checksums(self) -> None:
        return None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.log.append(f"{request.url.host}{request.url.path}")
        return httpx.Response(500 if request.url.path in self.refuses else 200, json={})

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def start(self, index: int) -> str:
        self.log.append(f"start {index}")
        return f"http://s{index}:1"

    async def end(self, index: int) -> None:
        self.log.append(f"end {index}")

    def taken(self) -> list[str]:
        log, self.log = self.log, []
        return log


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Server]]:
    """A fleet of two colocated servers."""
    server, client = Server(), httpx.AsyncClient
    monkeypatch.setattr(
        server_calls.httpx, "AsyncClient", lambda **given: client(**given, transport=httpx.MockTransport(server))
    )
    monkeypatch.setattr(fleet_module, "AnswerReader", lambda *_: server)
    work, config = EngineWork(), ServersConfig(restarts=1)
    fleet = fleet_module.Fleet(cast(Any, server), config, server, 2, "key", [0], 10, work, sleeps=True)
    yield fleet, server
    fleet.close()


def states(fleet: Any) -> list[State]:
    return [replica.state for replica in fleet._replicas]


def update(fleet: Any, failed: dict[int, str] | None = None, *, empty_only: bool = False) -> None:
    fleet.end_update(fleet.begin_update(empty_only=empty_only), failed or {}, 1, {})


def test_servers_sleep_at_once_and_serve_only_with_all_weights(two: tuple[Any, Server]) -> None:
    fleet, server = two
    fleet.open()
    assert states(fleet) == [State.asleep] * 2
    assert [health.state for health in fleet.health()] == ["asleep", "asleep"]
    server.taken()
    targets = fleet.begin_update(empty_only=False)
    assert states(fleet) == [State.waking] * 2
    assert [line for line in server.taken() if line.startswith("s0")] == ["s0/wake_weights", "s0/before_update"]
    job = fleet.submit([SimpleNamespace(token_ids=(1,), samples=1)], SimpleNamespace(max_tokens=4))
    assert not any(replica.asks for replica in fleet._replicas), "not before the weights are complete"
    fleet.finish(job)
    fleet.end_update(targets, {}, 1, {})
    assert states(fleet) == [State.serving] * 2
    own = [line for line in server.taken() if line.startswith("s0")]
    assert own == ["s0/after_update", "s0/wake_cache", "s0/resume"]
    fleet.sleep()
    assert states(fleet) == [State.asleep] * 2
    assert sorted(server.taken()) == ["s0/sleep", "s1/sleep"]
    fleet.sleep()
    assert server.taken() == [], "they sleep already"


def test_a_server_that_failed_in_an_update_gets_no_request_and_is_ended(two: tuple[Any, Server]) -> None:
    fleet, server = two
    fleet.open()
    update(fleet, {1: "failed in a weight update"})
    assert states(fleet)[0] is State.serving
    fleet.sleep()  # waits for the restart that has begun
    log = server.taken()
    assert log.index("end 1") < log.index("start 1", log.index("end 1"))
    assert log[-1] == "s0/sleep" or "s1/sleep" in log[log.index("end 1") :]
    assert states(fleet) == [State.asleep] * 2


def test_an_update_that_stops_half_way_leaves_nothing_awake(two: tuple[Any, Server]) -> None:
    fleet, server = two
    fleet.open()
    fleet.begin_update(empty_only=False)  # and then the stream of weights fails on a rank
    server.taken()
    fleet.sleep()
    assert server.taken().count("end 0") == 1
    assert set(states(fleet)) == {State.starting}, "they start when there is room again"
    fleet.begin_update(empty_only=False)
    assert "start 0" not in server.taken()


def test_a_server_that_does_not_sleep_is_ended_before_the_trainer_goes_on(two: tuple[Any, Server]) -> None:
    fleet, server = two
    fleet.open()
    update(fleet)
    server.refuses = {"/sleep"}
    server.taken()
    fleet.sleep()
    log = server.taken()
    assert {"end 0", "end 1"} <= set(log)
    assert not any(line.startswith("start") for line in log)
    assert set(states(fleet)) == {State.starting}


def test_servers_that_cannot_wake_are_given_up_with_the_option_to_change(two: tuple[Any, Server]) -> None:
    fleet, server = two
    fleet.open()
    server.refuses = {"/wake_cache"}
    update(fleet)
    fleet._room.open()
    for _ in range(2):
        fleet.sleep()  # waits for what starts
        update(fleet)
    assert fleet.none_is_left()
    assert "does not get its GPU's memory back" in fleet.loss()
    assert "rollout.servers.arguments=['--share=" in fleet.loss()


def test_a_start_that_does_not_sleep_is_refused(two: tuple[Any, Server]) -> None:
    fleet, server = two
    server.refuses = {"/sleep"}
    with pytest.raises(InputError, match=r"Fake server 0 .* does not sleep"):
        fleet.open()


def test_one_that_sleeps_waits_for_the_next_update_while_others_serve(two: tuple[Any, Server]) -> None:
    fleet, _ = two
    fleet.open()
    update(fleet)
    one, other = fleet._replicas
    one.state = State.asleep  # as after a restart
    job = SimpleNamespace(events=SimpleNamespace(get=lambda timeout: Event.weights_wanted))
    assert fleet.next(job, 0.0) is Event.nothing
    other.state = State.asleep
    assert fleet.next(job, 0.0) is Event.weights_wanted
