"""The server adapter and the engine precision that a configuration asks for."""

from __future__ import annotations

from megatron_tempo.config.choices import EngineKind, EnginePrecision
from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.schema import Config
from megatron_tempo.rollout.server_adapter import ServerAdapter


def server_adapter_of(config: Config, *, cpu: bool) -> ServerAdapter:
    """The adapter for the servers of `rollout.engine`."""
    from megatron_tempo.rollout.sglang import Sglang
    from megatron_tempo.rollout.vllm import Vllm

    kinds: dict[EngineKind | Extension, type[Sglang | Vllm]] = {EngineKind.sglang: Sglang, EngineKind.vllm: Vllm}
    rollout = config.rollout
    return kinds[rollout.engine](cpu=cpu, tensor=rollout.servers.tensor, sleeps=rollout.is_colocated)


def engine_precision(config: Config) -> EnginePrecision:
    servers = config.rollout.servers if config.rollout.is_served else None
    return (servers and servers.precision) or EnginePrecision[config.run.precision.numbers.name]
