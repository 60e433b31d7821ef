"""Rules that combine the models' shapes, the lengths and the parallel layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config, CriticLayoutConfig, ParallelConfig


def divisors(number: int) -> list[int]:
    """The divisors of a number, ascending. The time is proportional to its square root."""
    low = [i for i in range(1, math.isqrt(max(0, number)) + 1) if number % i == 0]
    return low + [number // i for i in reversed(low) if i * i != number]


@dataclass(frozen=True, slots=True)
class Laid:
    """A model's layout, and the fields that define it, by name."""

    parallel: ParallelConfig
    fields: dict[str, str]

    def replicas(self, world_size: int | None) -> int | None:
        """Replicas of the model; None if the number of processes is unknown or does not fit the layout."""
        world = self.parallel.world_size if world_size is None else world_size
        model = self.parallel.ranks_of_a_replica
        return world // model if world is not None and model > 0 and world > 0 and world % model == 0 else None


def laid_of(config: Config, role: str) -> Laid:
    """The layout of the model `role`, actor or critic."""
    names = list(CriticLayoutConfig.__dataclass_fields__)
    own = config.parallel.critic if role == "critic" else CriticLayoutConfig()
    places = {name: "parallel" if getattr(own, name) is None else "parallel.critic" for name in names}
    parallel = config.parallel.of_critic() if role == "critic" else config.parallel
    return Laid(parallel, {name: f"{place}.{name}" for name, place in places.items()})


def folders_of(config: Config) -> dict[str, str]:
    """The field of each model's folder, by role."""
    return {
        "actor": "model.path",
        "critic": "model.path" if config.model.critic_path is None else "model.critic_path",
    }


def check(config: Config, shapes: dict[str, ModelShape], world_size: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    if world_size is not None and parallel.world_size is not None and world_size != parallel.world_size:
        wrong = f"{world_size} processes were launched"
        yield Problem("parallel.world_size", parallel.world_size, wrong, f"parallel.world_size={world_size} or null")
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        wrong = "gathers by the buckets of parallel.overlap_grad_reduce, which is false"
        fix = "parallel.overlap_param_gather=false, or parallel.overlap_grad_reduce=true"
        yield Problem("parallel.overlap_param_gather", True, wrong, fix)
    problems: list[Problem] = []
    for role, folder in folders_of(config).items():
        laid = laid_of(config, role)
        problems += _processes(laid, world_size)
        problems += _sequence(laid)
        if folder in shapes:
            problems += _tensor(laid, folder, shapes[folder])
            problems += _pipeline(laid, folder, shapes[folder])
    yield from dict.fromkeys(problems)  # if both have the same layout, both report the same
    for folder, shape in shapes.items():
        yield from _lengths(config, folder, shape)


def _processes(laid: Laid, launched: int | None) -> Iterator[Problem]:
    parallel = laid.parallel
    world = parallel.world_size if launched is None else launched
    model = parallel.ranks_of_a_replica
    if world is not None and min(parallel.tensor, parallel.pipeline, parallel.context) > 0 and world % model:
        tensor, pipeline, context = (laid.fields[name] for name in ("tensor", "pipeline", "context"))
        wrong = f"is not a multiple of {tensor} * {pipeline} * {context} = {model}"
        fix = f"launch {model} processes or a multiple (parallel.world_size={model * max(1, world // model)})"
        yield Problem("parallel.world_size", world, wrong, fix)


def _sequence(laid: Laid) -> Iterator[Problem]:
    if laid.parallel.sequence and laid.parallel.tensor == 1:
        sequence, tensor = laid.fields["sequence"], laid.fields["tensor"]
        wrong = f"sequence parallelism lives inside tensor-parallel groups, and {tensor} is 1"
        # Only the critic may lack tensor parallelism: it inherits the actor's choice.
        off = "parallel.critic.sequence" if tensor == "parallel.critic.tensor" else sequence
        yield Problem(sequence, True, wrong, f"{off}=false, or {tensor}=2 or more")


def _tensor(laid: Laid, folder: str, shape: ModelShape) -> Iterator[Problem]:
    tensor, field = laid.parallel.tensor, laid.fields["tensor"]
    sizes = {
        "attention heads": shape.heads,
        "key-value heads": shape.groups,
    } | ({"feed-forward units": shape.ffn} if shape.experts is None else {})
    uneven = [f"{size} {name}" for name, size in sizes.items() if tensor > 0 and size % tensor]
    if uneven:
        fits = ", ".join(map(str, divisors(math.gcd(*sizes.values()))))
        wrong = f"does not divide the {' and the '.join(uneven)} of {folder}"
        yield Problem(field, tensor, wrong, f"{field}=one of {fits}")


def _pipeline(laid: Laid, folder: str, shape: ModelShape) -> Iterator[Problem]:
    """Every chunk of every stage has at least one layer."""
    pipeline, field, layers = laid.parallel.pipeline, laid.fields["pipeline"], shape.layers
    chunks, virtual = laid.parallel.virtual_pipeline, laid.fields["virtual_pipeline"]
    if pipeline > layers:
        wrong = f"each stage needs a layer, and {folder} has {layers} layers"
        yield Problem(field, pipeline, wrong, f"{field}={layers} or less")
    elif pipeline == 1 and chunks > 1:
        yield Problem(virtual, chunks, f"it needs several pipeline stages, and {field} is 1", f"{virtual}=1")
    elif pipeline > 0 and pipeline * chunks > layers:
        wrong = f"each chunk of {pipeline} stages needs a layer, and {folder} has {layers} layers"
        yield Problem(virtual, chunks, wrong, f"{virtual}={layers // pipeline} or less")
    elif pipeline > 0 and chunks > 0:
        yield from _ends(laid, folder, layers)


def _ends(laid: Laid, folder: str, layers: int) -> Iterator[Problem]:
    """The layers of the first and of the last stage, where they are given."""
    stages, split, chunks = laid.parallel.pipeline, laid.parallel.pipeline_layers, laid.parallel.virtual_pipeline
    fields = [laid.fields[f"num_layers_in_{end}_pipeline_stage"] for end in ("first", "last")]
    ends = zip(fields, (split.first, split.last), strict=True)
    given = {field: value for field, value in ends if value is not None and value > 0}
    most = layers - (stages - 1) * chunks
    most -= most % chunks
    for field, value in given.items():
        if stages == 1:
            wrong = f"it needs several pipeline stages, and {laid.fields['pipeline']} is 1"
            yield Problem(field, value, wrong, f"{field}=null")
        elif value % chunks:
            wrong = f"does not divide by {laid.fields['virtual_pipeline']}={chunks}"
            yield Problem(field, value, wrong, f"{field}={min(most, value + -value % chunks)}")
        elif value > most:
            each = "one" if chunks == 1 else f"{chunks}"
            wrong = f"each of the other {stages - 1} stages needs {each} of the {layers} layers of {folder}"
            yield Problem(field, value, wrong, f"{field}={most}" + (" or less" if chunks == 1 else ""))
    if len(given) == 2 and stages > 1 and all(value <= most and value % chunks == 0 for value in given.values()):
        yield from _both_ends(given, folder, layers, stages, chunks)


def _both_ends(given: dict[str, int], folder: str, layers: int, stages: int, chunks: int) -> Iterator[Problem]:
    (first, of_first), (last, of_last) = given.items()
    left, between = layers - of_first, (stages - 2) * chunks
    most = left - between - (left - between) % chunks
    wrong = f"{first}={of_first} leaves {left} of the {layers} layers of {folder}"
    if not between and of_last != left:
        # Perhaps no multiple of the chunks is left for the last stage.
        yield Problem(last, of_last, wrong, f"{last}=null" if left % chunks else f"{last}={left}")
    elif of_last > most:
        wrong += f", and each chunk of the stages between them ({between}) needs one"
        yield Problem(last, of_last, wrong, f"{last}={most}" + (" or less" if chunks == 1 else ""))


def _lengths(config: Config, field: str, shape: ModelShape) -> Iterator[Problem]:
    most, prompt = shape.max_positions, config.rollout.max_prompt_tokens
    responses = {
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "evaluation.max_response_tokens": config.evaluation.max_response_tokens,
    }
    for name, response in responses.items():
        if response is not None and prompt + response > most:
            wrong = f"with rollout.max_prompt_tokens={prompt} it exceeds the {most} positions of {field}"
            fixes = [f"{name}={most - prompt} or less"] if prompt < most else []
            fixes += [f"rollout.max_prompt_tokens={most - response} or less"] if response < most else []
            half = max(1, most // 2)
            both = f"rollout.max_prompt_tokens={half} and {name}={half}, or less"
            yield Problem(name, response, wrong, ", or ".join(fixes) or both)
