"""A configuration with as few rows as a rehearsal needs: enough for full micro-batches in every phase."""

from __future__ import annotations

from dataclasses import replace

from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig


def least_rows(config: Config, world: int) -> int:
    """Rows over all replicas that fill the pipeline of either model with full micro-batches, at least two of them."""
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    full = max(1, config.parallel.micro_batch_tokens // longest)
    layouts = [config.parallel, config.parallel.of_critic()]
    return max(world // own.ranks_of_a_replica * full * max(2, own.pipeline) for own in layouts)


def scaled(config: Config, world: int, rows: int | None) -> Config:
    """The configuration with one prompt of each kind and `rows` responses to it, all in one mini-batch.

    `rows`: None for the least. The lengths of the stages stay; a rehearsal runs one iteration of each.
    """
    count = max(2, least_rows(config, world) if rows is None else rows)
    return replace(config, stage1=_scaled(config.stage1, count), stage2=_scaled(config.stage2, count))


def _scaled(stage: StageConfig, rows: int) -> StageConfig:
    settings = stage.settings
    if getattr(settings, "vote_responses", None) is not None:
        settings = replace(settings, vote_responses=rows)  # type: ignore[call-arg]
    if getattr(settings, "estep_when_ece_above", None) is not None:  # made-up values have no calibration to wait for
        settings = replace(settings, estep_when_ece_above=None)  # type: ignore[call-arg]
    return replace(
        stage,
        settings=settings,
        labelled_prompts=1,
        unlabelled_prompts=1,
        responses_per_prompt=rows,
        actor=replace(stage.actor, mini_batch_prompts=len(stage.actor_prompts()), epochs=1),
        critic=replace(stage.critic, mini_batch_prompts=1, epochs=1),
    )


def rehearsed_iteration(stage: StageConfig) -> int:
    """The first iteration, from 0, that has all phases of the stage: after the critic's warm-up, with an E-step."""
    first = stage.critic.warmup_iterations if stage.has_critic else 0
    every = stage.method_settings.estep_every
    return next((i for i in range(first, first + max(every, 1)) if stage.critic_learns(i)), first)
