"""How engines sleep and wake: by their own handlers and states, without a GPU, and by whole servers on a CPU.

A server on a CPU goes through the states and keeps its memory: vLLM ignores the call in its workers, SGLang has no
memory saver. What a GPU would do with the memory is checked on the engines' own code (`vllm_sleep.py`,
`sglang_sleep.py`) and on a stand-in (`tests/distributed/test_colocated.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from megatron_tempo.config.choices import EngineKind, Placement, Transport
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.answer_checks import checked
from megatron_tempo.rollout.connections import authorised
from megatron_tempo.rollout.engine import Sampling
from megatron_tempo.rollout.server_adapter import Call, ServerAdapter
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.vllm import Vllm
from megatron_tempo.training.setup import build_actor, engine_weights
from megatron_tempo.types import EngineHealth
from tests.engines.servers import (
    ENGINES,
    REQUESTS,
    ROOT,
    answers,
    assert_said_by,
    config_of,
    interpreter_of,
    opened,
    write_model,
)
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ADAPTERS: dict[EngineKind, ServerAdapter] = {
    EngineKind.sglang: Sglang(cpu=True, tensor=1, sleeps=True),
    EngineKind.vllm: Vllm(cpu=True, tensor=1, sleeps=True),
}


def handled(kind: EngineKind, calls: Sequence[Call], *, busy: bool = False) -> dict[str, Any]:
    """What an engine's own handlers make of these calls."""
    script = ROOT / f"tests/engines/{kind.name}_sleep.py"
    given = json.dumps([[call.path, call.body] for call in calls])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "SGLANG_USE_CPU_ENGINE": "1"}
    command = [str(interpreter_of(kind)), str(script), given, str(int(busy))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    told = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert len(told) == 1, done.stderr[-3000:]
    return json.loads(told[0])


def test_vllm_handles_our_calls_in_our_order() -> None:
    vllm = ADAPTERS[EngineKind.vllm]
    calls = [*vllm.sleep(), *vllm.wake_weights(), *vllm.wake_cache()]
    told = handled(EngineKind.vllm, [*calls, *vllm.wake_weights(), *vllm.sleep(), *vllm.wake_cache()])
    for call, (path, status, answer, _) in zip(calls, told["answers"], strict=False):
        assert (path, status) == (call.path, 200)
        assert call.expects.items() <= answer.items()
    slept, woken, cached, reset, again, slept_again, too_early, _ = [answer[3] for answer in told["answers"]]
    assert slept == {"asleep": ["kv_cache", "weights"], "runs": False, "resets": 1}
    assert woken == {"asleep": ["kv_cache"], "runs": False, "resets": 1}, "no request runs before the cache is there"
    assert (cached["asleep"], cached["runs"], reset["resets"]) == ([], True, cached["resets"] + 1)
    # What it is told at the wrong time is answered with 200, and only the status tells.
    assert again == reset
    assert told["answers"][4][1] == 200
    assert not vllm.wake_weights()[0].expects.items() <= told["answers"][4][2].items()
    assert slept_again["asleep"] == ["kv_cache", "weights"]
    assert too_early["asleep"] == ["weights"], "the cache without the weights"
    assert not vllm.wake_cache()[0].expects.items() <= told["answers"][6][2].items()
    # Of a worker's memory at level 2, only graphs and runtime state have a copy on the host.
    assert told["memory"][:3] == [["kept", ["cudagraph", "runtime"]], ["back", ["weights"]], ["back", ["kv_cache"]]]
    assert told["flag"], "--enable-sleep-mode"
    assert not told["cpu"], "on a CPU it refuses that option"


def test_vllm_would_copy_the_weights_at_level_1() -> None:
    told = handled(EngineKind.vllm, [Call("/sleep?level=1", {})])
    assert told["memory"] == [["kept", ["cudagraph", "runtime", "weights"]]]


def test_sglang_handles_our_calls_in_our_order() -> None:
    sglang = ADAPTERS[EngineKind.sglang]
    calls = [*sglang.sleep(), *sglang.wake_weights(), *sglang.wake_cache(), *sglang.resume()]
    told = handled(EngineKind.sglang, calls)
    assert [(path, status) for path, status, _ in told["answers"]] == [(call.path, 200) for call in calls]
    states = [(state["asleep"], state["runs"]) for _, _, state in told["answers"]]
    both = ["kv_cache", "weights"]
    assert states == [
        ([], False),
        ([], False),
        (both, False),
        (["kv_cache"], False),
        ([], False),
        ([], False),
        ([], True),
    ]
    assert told["memory"] == [
        ["pause", "kv_cache"],
        ["pause", "weights"],
        ["resume", "weights"],
        ["resume", "kv_cache"],
    ]
    assert told["barriers_before_an_update_is_answered"] == 1, "all workers have loaded a bucket that is answered"
    assert (told["saver"], told["keeps_weights"]) == (True, False), (
        "--enable-memory-saver, no --enable-weights-cpu-backup"
    )
    assert "torch_memory_saver" in told["without_saver"], "on a CPU it refuses --enable-memory-saver"


def test_sglang_with_a_request_sleeps_only_when_it_is_paused() -> None:
    sglang = ADAPTERS[EngineKind.sglang]
    pause, flush, release = sglang.sleep()
    told = handled(EngineKind.sglang, [flush, release, pause, flush, release, *sglang.wake_cache()], busy=True)
    statuses = [status for _, status, _ in told["answers"]]
    assert statuses == [400, 400, 200, 200, 200, 200, 200]
    assert "only when server is idle" in told["answers"][1][2]["text"]
    assert told["answers"][4][2]["asleep"] == ["kv_cache", "weights"]


def test_sglang_refuses_to_wake_what_does_not_sleep() -> None:
    told = handled(EngineKind.sglang, ADAPTERS[EngineKind.sglang].wake_weights())
    assert [status for _, status, _ in told["answers"]] == [400]


def turns(kind: EngineKind, models: list[Path], run: Path) -> dict[str, Any]:
    """A server that sleeps between the weights of each model: what it says, and what it does asleep."""
    config = config_of(kind, models[0], run)
    config.rollout.placement, config.rollout.servers.transport = Placement.colocated, Transport.shared
    messages: list[str] = []
    result: dict[str, Any] = {"completions": [], "health": []}
    with opened(config, messages) as (context, engine):
        replica = engine._first._replicas[0]
        client = httpx.Client(base_url=replica.url, headers=authorised(engine._first._calls._key), timeout=60.0)
        adapter = ADAPTERS[kind]
        call = adapter.generate(REQUESTS[0], Sampling(0.7, 4), [0])
        for version, path in enumerate(models):
            result["health"].append(engine.health()[0])
            with pytest.raises(httpx.ReadTimeout):  # neither answers asleep; a GPU has nothing to answer with
                client.post(call.path, json=call.body, timeout=httpx.Timeout(60.0, read=3.0))
            config.model.path = str(path)
            actor = build_actor(context)
            weights = engine_weights(actor, context)
            engine.load_weights(weights, version)
            result["health"].append(engine.health()[0])
            result["completions"].append(answers(engine, REQUESTS, Sampling(0.7, 8)))
            assert engine.differences(weights) is None, "there is no room for the weights to compare with"
            engine.sleep()
            actor.model.load()
        if kind is EngineKind.vllm:
            result["asleep"] = client.get("/is_sleeping").json()
        engine.load_weights(weights, len(models))
        if kind is EngineKind.vllm:
            result["awake"] = client.get("/is_sleeping").json()
            wrong = adapter.wake_weights()[0]
            with pytest.raises(EngineError, match="answered /wake_up"):
                checked(client.post(wrong.path, json=wrong.body), wrong)
        engine.sleep()
        client.close()
    return result | {"messages": messages}


@pytest.mark.parametrize("kind", ENGINES)
def test_a_server_that_slept_speaks_with_the_new_weights(tmp_path: Path, kind: EngineKind) -> None:
    models = [write_model(tmp_path / f"model{seed}", seed=seed) for seed in (0, 1, 2)]
    (result,) = run_ranks(turns, 1, tmp_path / "ranks", kind, models, tmp_path / "run", timeout=500)
    assert result["messages"] == []
    for version, path in enumerate(models):
        assert_said_by(path, result["completions"][version], version, 0.7)
    states = [health.state for health in result["health"]]
    assert states == ["asleep", "serving"] * 3
    assert all(isinstance(health, EngineHealth) for health in result["health"])
    if kind is EngineKind.vllm:
        assert (result["asleep"], result["awake"]) == ({"is_sleeping": True}, {"is_sleeping": False})
    assert not torch.cuda.is_available()
