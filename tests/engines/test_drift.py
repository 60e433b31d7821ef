"""Real servers whose installed weights are damaged, whose loaders are broken, and that are restarted."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.errors import DriftError
from megatron_tempo.rollout.engine import Sampling
from megatron_tempo.rollout.read_back import SELECTIONS
from megatron_tempo.rollout.replica import Target
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.rollout.sglang_checksums import gpu_hash
from megatron_tempo.training.setup import build_actor, engine_weights
from megatron_tempo.types import Bucket, Weights
from tests.engines.servers import (
    ENGINES,
    REQUESTS,
    answers,
    assert_said_by,
    config_of,
    group_of,
    interpreter_of,
    opened,
    write_model,
)
from tests.support.matrix import matrix
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MLP, NORM = "model.layers.1.mlp", "model.layers.2.self_attn.k_norm.weight"
# Runs in vLLM's workers, instead of our extension of them.
BROKEN = '''
import torch
from vllm_read_back import _computed
from vllm_worker import WorkerExtension
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm


class Broken(WorkerExtension):
    def damage(self, name, row):
        """Another number in what a layer computes with, where only its kernel has the weight."""
        layer = self.model_runner.model.get_submodule(name)
        weight = _computed(layer, layer.input_size_per_partition)
        weight[row, 0] += 1e-3
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)

    def break_loader(self, fault, name):
        """From now on a loader that says that it has loaded everything."""
        model = self.model_runner.model
        load, first = model.load_weights, {}

        def broken(tensors):
            given = []
            for own, tensor in tensors:
                if fault == "swaps":
                    own = own.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj")
                elif own == name:
                    tensor = first.setdefault(own, tensor.clone())  # of the first sync
                given.append((own, tensor))
            return load(given)

        model.load_weights = broken
'''


def call(engine: ServersEngine, path: str, body: dict[str, Any]) -> None:
    replica = engine._first._replicas[0]
    assert replica.client is not None
    response = httpx.post(f"{replica.url}{path}", json=body, headers=dict(replica.client.headers), timeout=60)
    assert response.status_code == 200, response.text


def install(engine: ServersEngine, bucket: Bucket) -> None:
    """Send a server tensors behind the engine's back."""
    replica = engine._first._replicas[0]
    link = engine._senders._links[Target(replica.index, replica.life, replica.url)]
    for one in engine._adapter.before_update():
        call(engine, one.path, one.body or {})
    link.send(bucket, engine._version, False).result()
    for one in [*engine._adapter.after_update(engine._version), *engine._adapter.resume()]:
        call(engine, one.path, one.body or {})


def faults_of_vllm(model: Path, run: Path) -> dict[str, Any]:
    config = config_of(EngineKind.vllm, model, run)
    servers = config.rollout.servers
    servers.arguments = [*servers.arguments, "--worker-extension-cls=broken_worker.Broken"]
    python = run / "engine/0/python"
    python.mkdir(parents=True)
    (python / "broken_worker.py").write_text(BROKEN)
    result: dict[str, Any] = {}
    with opened(config, []) as (context, engine):
        actor = build_actor(context)
        weights = engine_weights(actor, context)
        engine.load_weights(weights, 0)
        result["right"] = engine.differences(weights)
        # Row 70 of the fused gate_up_proj is row 6 of up_proj; row 200 of qkv_proj is row 8 of v_proj.
        for layer, row in ((f"{MLP}.gate_up_proj", 70), ("model.layers.0.self_attn.qkv_proj", 200)):
            call(engine, "/collective_rpc", {"method": "damage", "args": [layer, row]})
        result["damaged"] = [name for name, _ in engine.differences(weights)]
        engine.load_weights(weights, 1)
        result["sent again"] = engine.differences(weights)
        for number, fault in enumerate(("keeps", "swaps")):
            call(engine, "/collective_rpc", {"method": "break_loader", "args": [fault, NORM]})
            syncs, message = 0, ""
            while not message and syncs < 2 * SELECTIONS:
                syncs += 1
                for parameter in actor.model.net.parameters():
                    parameter.detach().mul_(1.0625)
                message = drift(engine, weights, 2 + 100 * number + syncs)
            result[fault] = (syncs, message, [name for name, _ in engine.differences(weights)])
    return result


def drift(engine: ServersEngine, weights: Weights, version: int) -> str:
    """What is said of a sync after which the engine has other weights; nothing if it has the right ones."""
    try:
        engine.load_weights(weights, version)
    except DriftError as error:
        return str(error)
    return ""


def test_vllm_shows_what_its_kernels_hold_and_not_what_arrived(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (result,) = run_ranks(faults_of_vllm, 1, tmp_path / "ranks", model, tmp_path / "run", timeout=400)
    assert result["right"] == result["sent again"] == []
    assert sorted(result["damaged"]) == ["model.layers.0.self_attn.v_proj.weight", f"{MLP}.up_proj.weight"]
    syncs, message, names = result["keeps"]
    assert 1 < syncs <= SELECTIONS + 1, (
        "the first sync with it is right; a share of the tensors is read back after each"
    )
    assert "does not hold the actor's weights: 1 of" in message
    assert message.endswith(f"first {NORM}")
    assert names == [NORM]
    _, message, names = result["swaps"]
    assert "does not hold the actor's weights" in message
    assert {f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight", NORM} <= set(names)
    assert all("gate_proj" in name or "up_proj" in name or name == NORM for name in names)


def faults_of_sglang(model: Path, run: Path, tensor: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if tensor > 1:
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tensor)))
    config = config_of(EngineKind.sglang, model, run)
    config.rollout.servers.tensor = tensor
    with opened(config, []) as (context, engine):
        weights = engine_weights(build_actor(context), context)
        engine.load_weights(weights, 0)
        result["right"] = engine.differences(weights)
        tensors = {name: tensor.clone() for bucket in weights.everywhere() for name, tensor in bucket}
        gate, up = f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"
        tensors[NORM][3] += 1e-3
        install(engine, [(gate, tensors[up]), (up, tensors[gate]), (NORM, tensors[NORM])])
        result["damaged"] = [name for name, _ in engine.differences(weights)]
        engine.load_weights(weights, 1)
        result["sent again"] = engine.differences(weights)
    return result


@pytest.mark.parametrize("tensor", [1, 2])
def test_sglang_shows_what_is_installed(tmp_path: Path, tensor: int) -> None:
    model = write_model(tmp_path / "model")
    (result,) = run_ranks(faults_of_sglang, 1, tmp_path / "ranks", model, tmp_path / "run", tensor, timeout=400)
    assert result["right"] == result["sent again"] == []
    ranks = ["", ""] if tensor == 1 else [" (tensor rank 0)", " (tensor rank 1)"]
    wrong = (f"{MLP}.gate_up_proj.weight", NORM)
    assert set(result["damaged"]) == {f"{name}{rank}" for name in wrong for rank in ranks}


HASHES = """
import importlib.util, pathlib, re, sys, torch
source, copy = map(pathlib.Path, sys.argv[1:])
copy.write_text(re.sub(r"assert \\w+\\.is_cuda.*", "pass", source.read_text()))
spec = importlib.util.spec_from_file_location("hashes", copy)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for numel in (1, 3, 16384, 16386, 40000):
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).bfloat16()
    print(f"{module.gpu_tensor_hash(tensor):016x}")
"""


def test_the_checksum_of_sglang_on_gpus_is_its_own_kernels(tmp_path: Path) -> None:
    """SGLang's Triton kernel, run by Triton's interpreter."""
    python = interpreter_of(EngineKind.sglang)
    (source,) = python.parents[1].glob("lib/python*/site-packages/sglang/kernels/ops/memory/gpu_tensor_hash.py")
    command = [python, "-W", "ignore", "-c", HASHES, source, tmp_path / "hashes.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    made = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 3, 16384, 16386, 40000)]
    assert done.stdout.split() == [gpu_hash(tensor.bfloat16()) for tensor in made]


def restarted(kind: EngineKind, model: Path, run: Path) -> dict[str, Any]:
    """One of two servers dies with requests; it is asked on its own when it is back, before it answers others."""
    config = config_of(kind, model, run)
    config.rollout.servers.replicas = 2
    sampling = Sampling(0.7, 8)
    result: dict[str, Any] = {"gated": []}
    with opened(config, []) as (context, engine):
        engine.load_weights(engine_weights(build_actor(context), context), 0)
        result["all"] = engine.probe(REQUESTS, sampling, restarted=False)

        def gate() -> None:
            replicas = engine._first._replicas
            states = [(replica.waits, replica.held, len(replica.asks) > 0) for replica in replicas]
            result["gated"].append((states[1], engine.probe(REQUESTS, sampling, restarted=True)))

        engine.gate = gate
        threading.Timer(0.2, os.killpg, (group_of(engine, 1), signal.SIGKILL)).start()
        while not result["gated"]:
            answers(engine, REQUESTS, Sampling(0.7, 64))
        result["after"] = engine.probe(REQUESTS, sampling, restarted=False)
        result["nobody"] = engine.probe(REQUESTS, sampling, restarted=True)

        def refusing() -> None:
            raise DriftError("it is garbled")

        engine.gate = refusing
        os.killpg(group_of(engine, 0), signal.SIGKILL)
        result["refused"] = until_refused(engine)
    return result


def until_refused(engine: ServersEngine) -> str:
    while True:
        try:
            answers(engine, REQUESTS, Sampling(0.7, 64))
        except DriftError as error:
            return str(error)


@pytest.mark.parametrize("kind", matrix(ENGINES, [EngineKind.sglang]))
def test_a_restarted_server_is_asked_on_its_own_before_it_answers(tmp_path: Path, kind: EngineKind) -> None:
    model = write_model(tmp_path / "model")
    (result,) = run_ranks(restarted, 1, tmp_path / "ranks", kind, model, tmp_path / "run", timeout=500)
    assert sorted(result["all"]) == sorted(result["after"]) == [0, 1]
    ((state, probed),) = result["gated"]
    assert state == (True, True, False)
    assert list(probed) == [1]
    assert result["nobody"] == {}
    assert result["refused"] == "it is garbled"
    for of in (*result["all"].values(), *probed.values(), *result["after"].values()):
        assert_said_by(model, dict(enumerate(of)), 0, 0.7)


def under_load(kind: EngineKind, model: Path, run: Path, updates: int) -> dict[str, Any]:
    """Updates while requests run. After each a share is read back; at the end everything, and what it says."""
    config = config_of(kind, model, run)
    messages: list[str] = []
    with opened(config, messages) as (context, engine):
        actor = build_actor(context)
        weights = engine_weights(actor, context)
        engine.load_weights(weights, 0)
        mixed, running = 0, engine.start(REQUESTS * 4, Sampling(0.7, 64))
        for version in range(1, updates + 1):
            for parameter in actor.model.net.parameters():
                parameter.detach().mul_(2.0 if version % 2 else 0.5)  # exact
            engine.load_weights(weights, version)
            for _, completions in running:
                mixed += sum(len(completion.versions) > 1 for completion in completions)
                break
            else:
                running = engine.start(REQUESTS * 4, Sampling(0.7, 64))
        list(running)
        differences = engine.differences(weights)
        said = answers(engine, REQUESTS, Sampling(0.7, 8))
    return {"messages": messages, "mixed": mixed, "differences": differences, "said": said}


@pytest.mark.parametrize("kind", ENGINES)
def test_updates_under_load_leave_no_drift(tmp_path: Path, kind: EngineKind) -> None:
    """UPDATES=200 is the number in docs/engines.md."""
    updates = int(os.environ.get("UPDATES", "32"))
    assert updates % 2 == 0, "the last weights are the folder's"
    model = write_model(tmp_path / "model")
    (result,) = run_ranks(under_load, 1, tmp_path / "ranks", kind, model, tmp_path / "run", updates, timeout=550)
    print(f"{updates} updates: {result['mixed']} responses of several versions")
    assert result["messages"] == []
    assert result["differences"] == []
    assert result["mixed"] > 0
    assert_said_by(model, result["said"], updates, 0.7)
