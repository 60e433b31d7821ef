"""The share of an iteration in which neither a model nor the engine worked, with a clock that the test sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import torch.distributed as dist

from megatron_tempo.config.schema import MetricsConfig, ServersConfig
from megatron_tempo.observability import metrics as metrics_module
from megatron_tempo.observability.console import step_line
from megatron_tempo.observability.idle import PhaseSpan, Span, idle_share
from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.rollout import dispatcher
from megatron_tempo.rollout import engine as engine_module
from megatron_tempo.rollout import fleet as fleet_module
from megatron_tempo.rollout.answer_reader import CannotAnswer
from megatron_tempo.rollout.engine import EngineWork
from megatron_tempo.rollout.server_adapter import Call
from tests.support.ranks import run_ranks


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (metrics_module, engine_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


CASES: dict[str, tuple[list[PhaseSpan], list[Span], float]] = {
    "nothing worked": ([], [], 1.0),
    "a model": ([("actor", 2, 5)], [], 0.7),
    "the engine": ([("generate", 0, 8)], [(1, 6)], 0.5),
    "a phase in which no model computes": ([("generate", 0, 8), ("checkpoint", 8, 10)], [], 1.0),
    "both at once": ([("actor", 2, 5)], [(0, 4)], 0.5),
    "one after the other": ([("generate", 0, 4), ("actor", 6, 9)], [(1, 3)], 0.5),
    "a sync with requests under way": ([("sync", 4, 6)], [(0, 10)], 0.2),
    "a sync while a model computes": ([("sync", 4, 6), ("values", 4, 5)], [], 0.9),
    "a sync inside of generation": ([("generate/sync", 4, 6), ("generate", 0, 10)], [(0, 10)], 0.2),
    "a phase of a user's method": ([("distil", 2, 5)], [], 0.7),
    "a phase inside of another": ([("actor/inner", 2, 3), ("actor", 2, 5)], [], 0.7),
    "a checkpoint while the engine works": ([("checkpoint", 0, 5)], [(0, 10)], 0.0),
    "spans of the records before and after": ([("actor", -5, 1)], [(9, 20)], 0.8),
    "two jobs of the engine at once": ([], [(0, 6), (4, 8)], 0.2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_share_of_a_window_of_ten_seconds(case: str) -> None:
    phases, engine, expected = CASES[case]
    assert idle_share((0, 10), phases, engine) == pytest.approx(expected)


def test_a_window_without_length() -> None:
    assert idle_share((3, 3), [("actor", 2, 5)], []) == 0.0


def test_an_iteration_record_and_its_console_line(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Two iterations. The second one's requests are answered while the first trains, and its sync pauses them."""
    record = {"stage": "stage2", "method": "tempo"}
    work = EngineWork()
    with Metrics(tmp_path, MetricsConfig(progress=False), is_writer=True) as metrics, caplog.at_level("INFO"):
        metrics.watch(list, work.spans)
        with metrics.phase("generate"):
            clock.now += 1  # prompts are drawn
            first = work.begin()
            clock.now += 4
            work.end(first)
            clock.now += 2  # the tail: verification, the batch
            second = work.begin()
        clock.now += 1
        with metrics.phase("actor"):
            clock.now += 2
        metrics.step({**record, "iteration": 1, "step": 1})  # 10 s: 1 + 2 s without both
        with metrics.phase("sync"):
            clock.now += 3
        with metrics.phase("generate"):
            clock.now += 4
            work.end(second, clock.now - 2)  # the answer came two seconds before it was looked at
        with metrics.phase("actor"):
            clock.now += 3
        metrics.step({**record, "iteration": 2, "step": 2})  # 10 s: 3 + 2 s without both
    lines = read_metrics(tmp_path)
    assert [line["seconds"] for line in lines] == [10.0, 10.0]
    assert [line["idle_share"] for line in lines] == [0.3, 0.5]
    assert "idle 50%" in step_line(lines[1], 70, 9.0, 100)
    shown = [message for message in caplog.messages if message.startswith("stage2")]
    assert ["idle 30%" in shown[0], "idle 50%" in shown[1]] == [True, True]


def test_an_evaluation_begins_another_window(tmp_path: Path, clock: Clock) -> None:
    scores: dict[str, Any] = {"avg": 0.5, "avg_se": 0.1, "avg_k": 1, "pass": {}, "pass_se": {}, "questions": 1}
    with Metrics(tmp_path, MetricsConfig(progress=False), is_writer=True) as metrics:
        with metrics.phase("evaluate"):
            clock.now += 50
        place = {"set": "a", "point": "during", "stage": "stage1", "iteration": 0, "step": 0}
        metrics.evaluation(place | scores)
        with metrics.phase("critic"):
            clock.now += 6
        clock.now += 2
        metrics.step({"stage": "stage1", "method": "ppo", "iteration": 1, "step": 1})
    (line,) = read_metrics(tmp_path)
    assert (line["seconds"], line["idle_share"]) == (8.0, 0.25)


def test_the_requests_of_an_engine(clock: Clock) -> None:
    work = EngineWork()
    first, second = work.begin(), work.begin()
    clock.now += 5
    work.end(first, clock.now - 1)
    work.end(first)  # again, as a job that is forgotten after its last answer: nothing happens
    assert sorted(work.spans()) == [(100.0, 104.0), (100.0, 105.0)], "the second is under way"
    work.end(second)
    assert sorted(work.spans(since=104.0)) == [(100.0, 105.0)]
    assert work.spans() == [(100.0, 105.0)], "what ended before is forgotten"


def _engines_of_two_ranks() -> None:
    """Rank 0's engine ends 30 s ago, rank 1's 10 s ago. The clocks of the two ranks differ by an hour."""
    dist.init_process_group("gloo")
    clock = Clock()
    clock.now += 3600.0 * dist.get_rank()
    engine_module.time = clock  # type: ignore[assignment]
    work, start = EngineWork(), clock.now
    number = work.begin()
    clock.now += 60.0
    work.end(number, clock.now - (30.0, 10.0)[dist.get_rank()])
    work.end_with_slowest()
    assert work.spans() == [(start, start + 50.0)]


def _one_engine() -> None:
    """Only rank 0 knows of requests, as with servers."""
    dist.init_process_group("gloo")
    clock = Clock()
    engine_module.time = clock  # type: ignore[assignment]
    work = EngineWork()
    if dist.get_rank() == 0:
        work.end(work.begin(), 107.0)
    clock.now += 60.0
    work.end_with_slowest()
    assert work.spans() == ([(100.0, 107.0)] if dist.get_rank() == 0 else [])


@pytest.mark.parametrize("check", [_engines_of_two_ranks, _one_engine])
def test_the_engine_that_ends_last_counts(check: Any, tmp_path: Path) -> None:
    run_ranks(check, 2, tmp_path)


class Answers:
    """An adapter, a transport and a reader of answers: a server that takes three seconds to answer."""

    name = answer_format = "stub"
    routing = None

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def generate(self, *_: Any) -> Call:
        return Call("/generate", {})

    def before_update(self) -> list[Call]:
        return []

    def after_update(self, version: int) -> list[Call]:
        return [Call("/updated", {})]

    def resume(self) -> list[Call]:
        return [Call("/resume", {})]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={})

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def ask(self, *_: Any, **_more: Any) -> Any:
        self._clock.now += 3.0
        return SimpleNamespace(received=self._clock.now)


class Comes:
    async def start(self, index: int) -> str:
        return "http://node:30000"


@pytest.fixture
def fleet(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, EngineWork]]:
    monkeypatch.setattr(fleet_module, "time", clock)
    answers, work = Answers(clock), EngineWork()
    client = httpx.AsyncClient
    monkeypatch.setattr(
        fleet_module.httpx,
        "AsyncClient",
        lambda **given: client(**given, transport=httpx.MockTransport(answers)),
    )
    monkeypatch.setattr(fleet_module, "AnswerReader", lambda *_: answers)
    fleet = fleet_module.Fleet(cast(Any, answers), ServersConfig(), Comes(), 1, "key", [0], 10, work)
    fleet.open()
    fleet.end_update(fleet.begin_update(empty_only=False), {}, 0, {})
    yield fleet, work
    fleet.close()


def _answered(fleet: Any, requests: int) -> list[Any]:
    """The events of a job that asks for `requests` answers."""
    job = fleet.submit(
        [SimpleNamespace(token_ids=(1,), samples=1, begun=())] * requests,
        SimpleNamespace(max_tokens=4, with_experts=False),
    )
    events = []
    while job.left or not job.events.empty():
        events.append(fleet.next(job, 60.0))
        assert events[-1] is not fleet_module.Event.nothing, "no answer within a minute"
        if isinstance(events[-1], fleet_module.Failed):
            break
    fleet.finish(job)
    return events


def test_parsing_an_answer_is_not_the_engine_at_work(
    fleet: tuple[Any, EngineWork], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, work = fleet

    def parse(*_: Any) -> list[Any]:
        clock.now += 2.0
        return []

    monkeypatch.setattr(dispatcher, "checked_completions", parse)
    begun = clock.now
    assert len(_answered(asked, 1)) == 1
    assert work.spans() == [(begun, begun + 3.0)], "the answer came after 3 s, and was read for 2 s"


def test_requests_that_no_server_answers_end(
    fleet: tuple[Any, EngineWork], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, work = fleet

    def refuse(*_: Any) -> list[Any]:
        raise CannotAnswer("too long")

    monkeypatch.setattr(dispatcher, "checked_completions", refuse)
    begun = clock.now
    assert isinstance(_answered(asked, 1)[-1], fleet_module.Failed)
    clock.now += 100.0
    assert work.spans() == [(begun, begun + 3.0)], "nothing is under way any more"
