"""The weights that real servers get, and what they then say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from megatron_tempo.config.choices import EngineKind, RouterReplay, Transport
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.rollout.engine import Sampling
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.training.setup import build_actor, engine_weights
from megatron_tempo.weights.export import mappings_of
from megatron_tempo.weights.stream import WeightStream
from tests.engines.servers import PROMPTS, REQUESTS, answers, assert_said_by, config_of, group_of, opened, write_model
from tests.support.matrix import matrix
from tests.support.ranks import run_ranks

BUCKET = 6_000  # bytes
pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def after_syncs(
    kind: EngineKind, models: list[Path], run: Path, transport: Transport, tensor: int, stages: int, temperature: float
) -> list[Any]:
    """What the engine says with the weights of each model in turn, from two tensor ranks and two stages or copies.

    Buckets are smaller than the vocabulary and most matrices of the tiny models.
    """
    config = config_of(kind, models[0], run)
    config.parallel.tensor, config.parallel.pipeline = 2, stages
    if read_model_shape(models[0]).experts is not None:
        config.parallel.expert, config.parallel.expert_tensor, config.parallel.sequence = 4, 1, True
        config.model.router_replay = RouterReplay.off  # vLLM returns experts on GPUs only
    config.rollout.servers.transport, config.rollout.servers.tensor = transport, tensor
    completions, messages = [], []
    with opened(config, messages) as (context, engine):
        for version, path in enumerate(models):
            config.model.path = str(path)
            model = build_actor(context).model
            weights = WeightStream(model.net, model.layout, mappings_of(model.net, model.layout), BUCKET)
            engine.load_weights(weights, version)
            completions.append(answers(engine, REQUESTS, Sampling(temperature, max_tokens=8)))
        if kind is EngineKind.vllm and transport is Transport.group and tensor > 1:
            assert_sliced(engine, models[0])
            assert engine.differences(weights) == []  # of all tensors, as they arrived and as they are installed
    assert messages == []
    return completions


def assert_sliced(engine: ServersEngine, model: Path) -> None:
    """The workers say of every matrix which block they need, and none needs all of it, but for routers."""
    matrices = {
        name: tensor.shape for name, tensor in load_file(model / "model.safetensors").items() if tensor.ndim == 2
    }
    for link in engine._senders._links.values():
        for place in link.places:
            assert place.keys() == matrices.keys()
            cut = {name: shape for name, shape in matrices.items() if not name.endswith(".mlp.gate.weight")}
            assert all((place[name].rows, place[name].columns) != shape for name, shape in cut.items())


# Four ranks: with one stage, there are two copies of the model, each of which sends a part.
CASES = [
    (EngineKind.sglang, Transport.group, 1, "untied", 2),
    (EngineKind.sglang, Transport.shared, 1, "tied", 1),
    (EngineKind.sglang, Transport.shared, 1, "olmo3", 2),
    (EngineKind.sglang, Transport.group, 1, "olmo3", 1),
    (EngineKind.vllm, Transport.group, 1, "tied", 2),
    (EngineKind.vllm, Transport.shared, 1, "untied", 2),
    (EngineKind.vllm, Transport.group, 2, "tied", 1),
    (EngineKind.vllm, Transport.shared, 2, "untied", 1),
    (EngineKind.vllm, Transport.shared, 1, "olmo3", 2),
    (EngineKind.vllm, Transport.group, 2, "olmo3", 2),
    (EngineKind.sglang, Transport.group, 1, "experts", 1),
    (EngineKind.vllm, Transport.group, 1, "experts", 1),
    (EngineKind.vllm, Transport.group, 2, "experts", 1),
    (EngineKind.sglang, Transport.shared, 1, "qwen2", 2),
    (EngineKind.vllm, Transport.group, 2, "qwen2", 2),
    (EngineKind.sglang, Transport.group, 1, "llama", 1),
    (EngineKind.vllm, Transport.shared, 1, "llama", 2),
]


FEW = [
    (EngineKind.sglang, Transport.group, 1, "untied", 2),
    (EngineKind.sglang, Transport.group, 1, "experts", 1),
    (EngineKind.sglang, Transport.shared, 1, "qwen2", 2),
    (EngineKind.vllm, Transport.group, 1, "tied", 2),
    (EngineKind.vllm, Transport.group, 1, "experts", 1),
    (EngineKind.vllm, Transport.group, 2, "olmo3", 2),
    (EngineKind.vllm, Transport.shared, 1, "llama", 2),
    (EngineKind.vllm, Transport.shared, 2, "untied", 1),
]


@pytest.mark.parametrize(("kind", "transport", "tensor", "model", "stages"), matrix(CASES, FEW))
def test_after_each_sync_it_speaks_with_the_new_weights(
    tmp_path: Path, kind: EngineKind, transport: Transport, tensor: int, model: str, stages: int
) -> None:
    models = [write_model(tmp_path / f"model{seed}", model, seed=seed) for seed in (0, 1)]
    arguments = (kind, models, tmp_path / "run", transport, tensor, stages, 0.7)
    by_rank = run_ranks(after_syncs, 4, tmp_path / "ranks", *arguments, timeout=500)
    for version, path in enumerate(models):
        by_number = {number: completions for rank in by_rank for number, completions in rank[version].items()}
        assert_said_by(path, by_number, version, 0.7)
        texts = {
            tuple(completion.token_ids.tolist()) for completions in by_number.values() for completion in completions
        }
        assert len(texts) > len(PROMPTS)


def many_syncs(kind: EngineKind, model: Path, run: Path, transport: Transport) -> dict[str, Any]:
    """Memory of the trainer and of the server's processes after 40 and 240 updates, each compared by checksums."""
    config = config_of(kind, model, run)
    config.rollout.servers.transport = transport
    messages: list[str] = []
    resident: list[tuple[int, int]] = []
    with opened(config, messages) as (context, engine):
        actor = build_actor(context)
        weights = engine_weights(actor, context)
        server = psutil.Process(group_of(engine, 0))
        for version in range(241):
            engine.load_weights(weights, version)
            for parameter in actor.model.net.parameters():
                parameter.detach().neg_()
            if version in (40, 240):
                processes = [server, *server.children(recursive=True)]
                resident.append((psutil.Process().memory_info().rss, sum(p.memory_info().rss for p in processes)))
        # The last weights had the signs of the folder's.
        completions = answers(engine, REQUESTS, Sampling(0.7, 8))
    return {"messages": messages, "resident": resident, "completions": completions}


@pytest.mark.parametrize(
    ("kind", "transport"),
    matrix(
        [(EngineKind.sglang, Transport.group), (EngineKind.vllm, Transport.shared)],
        [(EngineKind.sglang, Transport.group)],
    ),
)
def test_200_syncs_leave_nothing_behind(tmp_path: Path, kind: EngineKind, transport: Transport) -> None:
    model = write_model(tmp_path / "model")
    (result,) = run_ranks(many_syncs, 1, tmp_path / "ranks", kind, model, tmp_path / "run", transport, timeout=500)
    assert result["messages"] == []
    (trainer, servers), (trainer_later, servers_later) = result["resident"]
    print(f"200 syncs: trainer {(trainer_later - trainer) >> 10} kB more, server {(servers_later - servers) >> 10} kB")
    assert trainer_later - trainer < 16 << 20
    assert servers_later - servers < 32 << 20
    assert_said_by(model, result["completions"], 240, 0.7)
