"""Rules that join the models' shapes, the lengths and the parallel layout."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules.model import ModelShape
from megatron_tempo.config.schema import Config


def divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def data_parallel(config: Config, world_size: int | None) -> int | None:
    """Replicas of the model, or none where the number of processes is unknown or does not fit the layout."""
    world = config.parallel.world_size if world_size is None else world_size
    model = config.parallel.ranks_of_a_replica
    return world // model if world is not None and model > 0 and world > 0 and world % model == 0 else None


def check(config: Config, shapes: dict[str, ModelShape], world_size: int | None) -> Iterator[Problem]:
    yield from _processes(config, world_size)
    if config.parallel.sequence and config.parallel.tensor == 1:
        wrong = "sequence parallelism lives inside tensor-parallel groups, and parallel.tensor is 1"
        yield Problem("parallel.sequence", True, wrong, "parallel.sequence=false, or parallel.tensor=2 or more")
    for field, shape in shapes.items():
        yield from _tensor(config, field, shape)
        yield from _pipeline(config, field, shape)
        yield from _lengths(config, field, shape)


def _processes(config: Config, launched: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    if launched is not None and parallel.world_size is not None and launched != parallel.world_size:
        wrong = f"{launched} processes were launched"
        yield Problem("parallel.world_size", parallel.world_size, wrong, f"parallel.world_size={launched} or null")
    world = parallel.world_size if launched is None else launched
    model = parallel.ranks_of_a_replica
    if world is not None and min(parallel.tensor, parallel.pipeline, parallel.context) > 0 and world % model:
        wrong = f"is not a multiple of parallel.tensor * parallel.pipeline * parallel.context = {model}"
        fix = f"launch {model} processes or a multiple, or lower parallel.tensor, parallel.pipeline or parallel.context"
        yield Problem("parallel.world_size", world, wrong, fix)


def _tensor(config: Config, field: str, shape: ModelShape) -> Iterator[Problem]:
    tensor = config.parallel.tensor
    sizes = {
        "attention heads": shape.num_attention_heads,
        "key-value heads": shape.num_key_value_heads,
        "feed-forward units": shape.intermediate_size,
    }
    uneven = [f"{size} {name}" for name, size in sizes.items() if tensor > 0 and size % tensor]
    if uneven:
        fits = ", ".join(map(str, divisors(math.gcd(*sizes.values()))))
        wrong = f"does not divide the {' and the '.join(uneven)} of {field}"
        yield Problem("parallel.tensor", tensor, wrong, f"parallel.tensor=one of {fits}")


def _pipeline(config: Config, field: str, shape: ModelShape) -> Iterator[Problem]:
    pipeline, layers = config.parallel.pipeline, shape.num_hidden_layers
    if pipeline > 0 and layers % pipeline:
        fits = ", ".join(map(str, divisors(layers)))
        wrong = f"does not divide the {layers} layers of {field}"
        yield Problem("parallel.pipeline", pipeline, wrong, f"parallel.pipeline=one of {fits}")


def _lengths(config: Config, field: str, shape: ModelShape) -> Iterator[Problem]:
    most, prompt = shape.max_position_embeddings, config.rollout.max_prompt_tokens
    responses = {
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "evaluation.max_response_tokens": config.evaluation.max_response_tokens,
    }
    for name, response in responses.items():
        if response is not None and prompt + response > most:
            wrong = f"with rollout.max_prompt_tokens={prompt} it exceeds the {most} positions of {field}"
            fix = f"{name}={most - prompt} or less" if prompt < most else f"rollout.max_prompt_tokens below {most}"
            yield Problem(name, response, wrong, fix)
