"""How servers begin and end, whom they answer, and what is said of weights that are not the actor's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_tempo.config.choices import EngineKind, EnginePrecision
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.engine import Sampling
from megatron_tempo.rollout.server import Server
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.vllm import Vllm
from megatron_tempo.training.setup import build_actor, engine_weights
from megatron_tempo.types import Bucket, Weights
from tests.engines.servers import ENGINES, REQUESTS, ROOT, answers, assert_said_by, config_of, opened, write_model
from tests.support.matrix import matrix
from tests.support.ranks import run_ranks
from tests.support.weights import Given

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NAME = "model.layers.2.mlp.down_proj.weight"
# What changes weights or says what they are, by the engines' own documents.
DOORS = {
    EngineKind.sglang: ["/generate", "/update_weights_from_disk", "/update_weights_from_tensor", "/pause_generation"],
    EngineKind.vllm: ["/inference/v1/generate", "/v1/completions", "/update_weights", "/pause", "/collective_rpc"],
}


def refusal(engine: ServersEngine, weights: Weights, version: int) -> str:
    try:
        engine.load_weights(weights, version)
    except EngineError as error:
        return str(error)
    return ""


def spoilt(kind: EngineKind, model: Path, run: Path) -> dict[str, Any]:
    """What is said of updates that leave out a tensor, name one wrongly, or bring a wrong one; and to strangers."""
    config = config_of(kind, model, run)
    config.rollout.servers.checksums_every = 1
    config.rollout.servers.restarts = 0
    messages: list[str] = []
    result: dict[str, Any] = {}
    with opened(config, messages) as (context, engine):
        right = engine_weights(build_actor(context), context)
        bucket: Bucket = [pair for part in right.everywhere() for pair in part]
        engine.load_weights(right, 0)
        result["right"] = engine.differences(right)
        url = engine._first._replicas[0].url
        result["strangers"] = {path: httpx.post(f"{url}{path}", json={}).status_code for path in DOORS[kind]}
        moved = [(name, tensor * 1.5 if name == NAME else tensor) for name, tensor in bucket]
        engine.load_weights(Given([moved]), 1)
        result["moved"] = engine.differences(right)
        result["left out"] = refusal(engine, Given([[pair for pair in bucket if pair[0] != NAME]]), 2)
        wrong = NAME.replace("2", "9")
        result["renamed"] = refusal(engine, Given([[(wrong if n == NAME else n, t) for n, t in bucket]]), 3)
    return result | {"messages": messages}


@pytest.mark.parametrize("kind", ENGINES)
def test_wrong_weights_are_named_and_strangers_are_not_answered(tmp_path: Path, kind: EngineKind) -> None:
    model = write_model(tmp_path / "model")
    (result,) = run_ranks(spoilt, 1, tmp_path / "ranks", kind, model, tmp_path / "run", timeout=500)
    assert result["right"] == []
    assert set(result["strangers"].values()) == {401}
    ((name, apart),) = result["moved"]
    assert name == NAME
    if kind is EngineKind.vllm:
        assert apart == pytest.approx(0.5)
    assert "does not hold the actor's weights" in result["left out"]
    assert "layers.2.mlp.down_proj" in result["left out"]
    assert "down_proj" in result["renamed"] or any("weight update" in words for words in result["messages"])
    assert result["renamed"]


@pytest.mark.parametrize("kind", matrix(ENGINES, [EngineKind.vllm]))
def test_no_server_outlives_a_trainer_that_is_killed(tmp_path: Path, kind: EngineKind) -> None:
    """A server that starts as it does for a user: cold, with processes of its own."""
    model = write_model(tmp_path / "model")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megatron_tempo.config.schema import EngineKind\n"
        "from tests.engines.servers import config_of, interpreter_of, opened\n"
        f"kind = EngineKind.{kind.name}\n"
        "config = config_of(kind, Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "config.rollout.servers.python = str(interpreter_of(kind))\n"
        "with opened(config, []) as (context, engine):\n"
        "    print(engine._supervisor._servers[0].process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(model), str(tmp_path / "run")]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    server = int(trainer.stdout.readline())
    group = os.getpgid(server)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and alive(group):
        time.sleep(0.2)
    assert not alive(group)


def alive(group: int) -> bool:
    """Whether any process of the group is left that is not a zombie."""
    states = subprocess.run(["ps", "-o", "pgid=,stat=", "-e"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in states.splitlines()]
    return any(int(pgid) == group and not state.startswith("Z") for pgid, state in rows)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_model_that_it_cannot_serve_is_told_of_before_anything_is_trained(tmp_path: Path, kind: EngineKind) -> None:
    model = write_model(tmp_path / "model")
    config = (model / "config.json").read_text().replace("Qwen3ForCausalLM", "Qwen3ForNobody")
    (model / "config.json").write_text(config)
    with pytest.raises(AssertionError, match=r"(?s)ended with exit code.*ForNobody.*the end of|the end of.*ForNobody"):
        run_ranks(spoilt, 1, tmp_path / "ranks", kind, model, tmp_path / "run", timeout=500)


def on_found_servers(kind: EngineKind, model: Path, run: Path) -> list[Any]:
    """A run on a server that was started by somebody else, twice: its second trainer finds what the first left."""
    config = config_of(kind, model, run)
    servers = config.rollout.servers
    key = run.with_suffix(".key")
    key.write_text("a key of theirs\n")
    adapter = (Sglang if kind is EngineKind.sglang else Vllm)(cpu=True, tensor=1)
    theirs = Server(adapter, servers, model, run / "theirs", "a key of theirs", EnginePrecision.fp32, "")
    try:
        theirs.wait()
        servers.addresses, servers.key_file = [theirs.url], str(key)
        replies: list[Any] = []
        for version in (3, 7):
            with opened(config, []) as (context, engine):
                assert engine._adapter.takes_parts, "a server that says that it has our plugin"
                engine.load_weights(engine_weights(build_actor(context), context), version)
                replies.append(answers(engine, REQUESTS, Sampling(0.7, 8)))
        servers.addresses, servers.start_seconds = [theirs.url.replace("127.0.0.1", "127.0.0.2")], 2.0
        try:
            with opened(config, []):
                pass
        except ValueError as error:
            replies.append(str(error))
        return replies
    finally:
        theirs.close()


@pytest.mark.parametrize("kind", ENGINES)
def test_servers_that_run_already_are_used(tmp_path: Path, kind: EngineKind) -> None:
    model = write_model(tmp_path / "model")
    (result,) = run_ranks(on_found_servers, 1, tmp_path / "ranks", kind, model, tmp_path / "run", timeout=500)
    assert_said_by(model, result[0], 3, 0.7)
    assert_said_by(model, result[1], 7, 0.7)
    assert "no SGLang server at" in result[2] or "no vLLM server at" in result[2]


def on_each_node(model: Path, run: Path) -> list[Any]:
    """Two nodes of one rank each, as far as their variables tell."""
    os.environ["LOCAL_RANK"] = "0"
    config = config_of(EngineKind.sglang, model, run)
    config.rollout.servers.each_node = True
    config.parallel.pipeline = 2
    with opened(config, []) as (context, engine):
        engine.load_weights(engine_weights(build_actor(context), context), 0)
        started = sorted(engine._supervisor._servers) if engine._supervisor is not None else []
        return [engine.replicas, started, answers(engine, REQUESTS, Sampling(0.7, 8))]


def test_each_node_has_its_own_servers(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    ranks = run_ranks(on_each_node, 2, tmp_path / "ranks", model, tmp_path / "run", timeout=500)
    assert [rank[:2] for rank in ranks] == [[2, [0]], [2, [1]]]
    assert_said_by(model, ranks[0][2] | ranks[1][2], 0, 0.7)
