"""Rules on the experts that an engine returns for the replay of its routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_tempo.config.choices import Device, EngineKind, RouterReplay
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config

# Options of vLLM 0.32 with which it refuses to return experts (`config/vllm.py`).
_WITHOUT_PREFIX_CACHE = "--no-enable-prefix-caching"
_PIPELINE = ("--pipeline-parallel-size", "-pp")


def check(config: Config, shapes: Mapping[str, ModelShape]) -> Iterator[Problem]:
    """`shapes`: of the models that could be read, by field."""
    shape, rollout, value = shapes.get("model.path"), config.rollout, config.model.router_replay
    if shape is None or shape.experts is None or value is RouterReplay.off or rollout.engine is not EngineKind.vllm:
        return
    field, off = "model.router_replay", "model.router_replay=off"
    if config.run.device is Device.cpu:
        wrong = "vLLM's servers on a CPU do not return the experts that their routers chose"
        yield Problem(field, value.name, wrong, f"{off}, or rollout.engine=embedded or sglang")
    given = rollout.servers.arguments
    if _WITHOUT_PREFIX_CACHE in given:
        wrong = f"vLLM returns experts only with its prefix cache, which {_WITHOUT_PREFIX_CACHE} switches off"
        yield Problem("rollout.servers.arguments", given, wrong, f"leave {_WITHOUT_PREFIX_CACHE} out, or {off}")
    if any(word.partition("=")[0] in _PIPELINE for word in given):
        wrong = "vLLM does not return experts with pipeline parallelism"
        yield Problem("rollout.servers.arguments", given, wrong, f"use rollout.servers.tensor instead, or {off}")
