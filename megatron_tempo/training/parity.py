"""Checks that the engine and the actor compute the same log-probabilities."""

from __future__ import annotations

import math

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError
from megatron_tempo.models.actor import Actor
from megatron_tempo.rollout.build import engine_precision
from megatron_tempo.training.rollout_requests import RolloutRequests
from megatron_tempo.types import Weights

# Nats, by the number of sides that compute in FP8. docs/gpu.md derives them.
TOLERANCES = (0.05, 0.1, 0.15)


def check_parity(requests: RolloutRequests, actor: Actor, weights: Weights, step: int) -> None:
    """Let the engine answer a few prompts and compare its log-probabilities with the actor's. Collective.

    Raises EngineError if they differ by more than `rollout.parity_tolerance`: the run would train on rollouts of
    another policy than the actor.
    """
    batch = requests.sample_for_parity(step)
    requests.engine.sleep()  # a colocated one: the actor needs its GPUs
    gap, _ = actor.gap_to_engine(batch, actor.logprobs(batch))
    tolerance, origin = _tolerance(requests.config)
    if not gap <= tolerance:
        tokens = int(batch.response_lengths.sum())
        raise EngineError(
            f"the engine's log-probabilities are {gap:.2g} nats from the actor's, a mean over {tokens} tokens, but "
            f"rollout.parity_tolerance={tolerance:g}{origin}: {_cause(requests.engine.differences(weights))}"
        )


def _tolerance(config: Config) -> tuple[float, str]:
    """The tolerance in nats. If it is the default, also a text: of which precisions."""
    if config.rollout.parity_tolerance is not None:
        return config.rollout.parity_tolerance, ""
    trainer, engine = config.run.precision, engine_precision(config)
    sides = (trainer in RECIPES) + (engine is EnginePrecision.fp8)
    return TOLERANCES[sides], f" (default for {trainer.name} in the trainer, {engine.name} in the engine)"


def _cause(differences: list[tuple[str, float]] | None) -> str:
    """The likely cause of a gap, from the tensors that differ in the engine."""
    if differences is None:
        return "its tensors cannot be compared here, so its weights, temperature or reading of config.json may be wrong"
    if not differences:
        return "every tensor is as it should be, so its temperature or its reading of config.json is wrong"
    name, difference = differences[0]
    size = "" if math.isnan(difference) else f", off by {difference:.1%} of its size"
    return f"{len(differences)} of its tensors are not the actor's, the worst {name}{size}"
