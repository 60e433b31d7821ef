"""Servers that die, hang, answer nonsense, or are lost for good: what is lost, and how long it takes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.replica import State, Target
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.training.context import RunContext
from megatron_tempo.training.setup import build_actor, engine_weights
from megatron_tempo.types import Bucket, Completion, Share, Weights
from megatron_tempo.weights.export import weights_of
from megatron_tempo.weights.pieces import PlannedBucket
from tests.engines.servers import (
    ENGINES,
    REQUESTS,
    answers,
    assert_said_by,
    config_of,
    group_of,
    opened,
    write_model,
)
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

HANG_SECONDS = 8.0
CONCURRENCY = 4
MANY = [Request((1, 2, i), samples=8, seed=0) for i in range(48)]
LONG = Sampling(1.0, max_tokens=64)


@dataclass(frozen=True)
class Fault:
    """What became of a fault: seconds until it was told of, what was told, seconds until all was as before."""

    seen: float
    messages: list[str]
    healed: float


class Disturbed:
    """Weights in small buckets; something is done when the second one is sent."""

    sends, copies, copy = True, 1, 0

    def __init__(self, weights: Weights, disturb: Callable[[], None]) -> None:
        self._weights, self._disturb = weights, disturb

    def everywhere(self, *, parts: bool = False) -> Iterator[Bucket]:
        return self._weights.everywhere(parts=parts)

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        for number, bucket in enumerate(self._weights.from_stages(shared=shared, parts=parts, share=share)):
            if number == 1:
                self._disturb()
            yield bucket


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """How long it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "it does not come to pass"
        time.sleep(0.05)
    return time.monotonic() - begun


def healthy(engine: ServersEngine, weights: Weights) -> None:
    """Until every server serves: one that has come back gets the weights with the next answers."""
    begun = time.monotonic()
    while any(replica.state is not State.serving for replica in engine._first._replicas):
        assert time.monotonic() - begun < 240
        answers(engine, REQUESTS[:1], Sampling(1.0, 1))
        time.sleep(0.2)


def while_generating(
    engine: ServersEngine, weights: Weights, messages: list[str], disturb: Callable[[], None]
) -> Fault:
    """Disturb in the middle of many requests; all of them must be answered once."""
    messages.clear()
    seen: list[float] = []
    watcher = threading.Thread(target=lambda: (wait_until(lambda: bool(messages), 120), seen.append(time.monotonic())))
    completed: dict[int, list[Completion]] = {}
    begun = 0.0
    for number, completions in engine.start(MANY, LONG):
        if not completed:  # each server has `CONCURRENCY` requests, and most wait
            begun = time.monotonic()
            disturb()
            watcher.start()
        assert number not in completed
        completed[number] = completions
    watcher.join()
    assert sorted(completed) == list(range(len(MANY)))
    assert all(len(completions) == 8 for completions in completed.values())
    first = list(messages)
    healthy(engine, weights)
    return Fault(seen[0] - begun, first, time.monotonic() - begun)


def scenario(kind: EngineKind, model: Path, run: Path) -> dict[str, object]:
    config = config_of(kind, model, run)
    config.rollout.servers.replicas, config.rollout.servers.concurrency = 2, CONCURRENCY
    config.rollout.servers.hang_seconds, config.rollout.servers.restarts = HANG_SECONDS, 4
    messages: list[str] = []
    result: dict[str, object] = {}
    with opened(config, messages) as (context, engine):
        actor = build_actor(context)
        weights = engine_weights(actor, context)
        engine.load_weights(weights, 0)

        def kill(number: int) -> Callable[[], None]:
            return lambda: os.killpg(group_of(engine, 0), number)

        result["killed"] = while_generating(engine, weights, messages, kill(signal.SIGKILL))
        result["hung"] = while_generating(engine, weights, messages, kill(signal.SIGSTOP))
        result["nonsense"] = while_generating(engine, weights, messages, lambda: spoil(engine, context, actor))

        messages.clear()
        small = weights_of(actor.model, context.config)
        pieces = [piece for bucket in small._buckets[False] for message in bucket.messages for piece in message]
        small._buckets = {key: [PlannedBucket(((one,),), (one.mapping,)) for one in pieces] for key in (False, True)}
        begun = time.monotonic()
        engine.load_weights(Disturbed(small, kill(signal.SIGKILL)), 1)
        seen, first = time.monotonic() - begun, list(messages)
        engine.load_weights(weights, 2)
        completions = answers(engine, REQUESTS, Sampling(0.7, 8))
        healthy(engine, weights)
        result["killed in an update"] = Fault(seen, first, time.monotonic() - begun)
        result["completions after it"] = completions
        result["completions of both"] = answers(engine, REQUESTS, Sampling(0.7, 8))
    return result


def spoil(engine: ServersEngine, context: RunContext, actor: object) -> None:
    """Put NaN into a server's weights behind the engine's back."""
    replica = engine._first._replicas[0]
    link = engine._senders._links[Target(replica.index, replica.life, replica.url)]
    bucket = [("model.norm.weight", torch.full((32,), torch.nan))]
    for call in engine._adapter.before_update():
        link._client.post(call.path, json=call.body)
    link.send(bucket, engine._version, False).result()
    for call in [*engine._adapter.after_update(engine._version), *engine._adapter.resume()]:
        link._client.post(call.path, json=call.body)


@pytest.mark.parametrize("kind", ENGINES)
def test_no_answer_is_lost_or_comes_twice(tmp_path: Path, kind: EngineKind) -> None:
    model = write_model(tmp_path / "model")
    (result,) = run_ranks(scenario, 1, tmp_path / "ranks", kind, model, tmp_path / "run", timeout=800)
    print({name: fault for name, fault in result.items() if isinstance(fault, Fault)})
    assert "did not answer" in result["killed"].messages[0]
    assert "unfinished requests are asked again" in result["killed"].messages[0]
    assert "Timeout" not in result["killed"].messages[0], "a closed connection is seen, not waited for"
    assert "makes no progress" in result["hung"].messages[0]
    assert f"hang_seconds={HANG_SECONDS:g}" in result["hung"].messages[0]
    assert "makes no sense" in result["nonsense"].messages[0]
    assert "weight update" in result["killed in an update"].messages[0]
    assert "Timeout" not in result["killed in an update"].messages[0]
    for name in ("completions after it", "completions of both"):
        assert_said_by(model, result[name], 2, 0.7)
