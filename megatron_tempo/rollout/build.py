"""The server adapter and the engine precision that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from megatron_tempo.config.choices import EngineKind, EnginePrecision
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.config.routing import recorded_routing
from megatron_tempo.config.sampled import stop_strings, truncates
from megatron_tempo.config.schema import Config
from megatron_tempo.rollout.server_adapter import ServerAdapter


def server_adapter_of(config: Config, *, cpu: bool, trains: bool = True) -> ServerAdapter:
    """The adapter for the servers of `rollout.engine`. `trains`: whether experts that they return may be replayed."""
    from megatron_tempo.rollout.sglang import Sglang
    from megatron_tempo.rollout.vllm import Vllm

    rollout = config.rollout
    tensor, sleeps, routing = rollout.servers.tensor, rollout.is_colocated, recorded_routing(config) if trains else None
    if rollout.engine is EngineKind.vllm:
        stops, longest = bool(stop_strings(config)), _longest_row(config)
        return Vllm(cpu=cpu, tensor=tensor, sleeps=sleeps, stops=stops, routing=routing, longest=longest)
    shortened = truncates(rollout) or truncates(config.evaluation)
    shape = read_model_shape(Path(config.model.path))
    count = None if shape.experts is None else shape.experts.count
    facts = {"key_heads": shape.groups, "experts": count}
    return Sglang(cpu=cpu, tensor=tensor, sleeps=sleeps, truncates=shortened, routing=routing, **facts)


def _longest_row(config: Config) -> int:
    """The most tokens of a prompt and its response, in training and in evaluations."""
    response = max(config.rollout.max_response_tokens, config.evaluation.max_response_tokens or 0)
    positions = read_model_shape(Path(config.model.path)).max_positions
    return min(config.rollout.max_prompt_tokens + response, positions)


def engine_precision(config: Config) -> EnginePrecision:
    servers = config.rollout.servers if config.rollout.is_served else None
    return (servers and servers.precision) or EnginePrecision[config.run.precision.numbers.name]
