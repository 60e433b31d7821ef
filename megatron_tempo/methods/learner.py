"""The steps that methods combine: fit the critic, compute values, improve the actor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tempo.algorithm.outcomes import mixed_groups, value_targets
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.types import Batch, seed_of


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The responses of an iteration. Labelled rows have verdicts. Unlabelled rows have none; for methods that compare
    answers, they have answer classes."""

    labelled: Batch | None
    unlabelled: Batch | None


@dataclass(frozen=True, slots=True)
class Learner:
    """Actor and critic, and the updates that methods call. `seed` identifies the run, the stage and its iteration."""

    actor: Actor
    critic: Critic | None  # None: no stage of the run has a critic
    reference_logprobs: Callable[[Batch], Tensor]  # reference log-probabilities, for the KL term
    phase: Callable[[str], AbstractContextManager[None]]  # measures the time of the block
    seed: str
    iteration: int  # of the run, from 1 over all stages

    def fit_critic(self, labelled: Batch, stage: StageConfig) -> dict[str, float]:
        """Fit the critic's values to the verdicts (E-step, Eq. 6)."""
        config = stage.critic
        assert self.critic is not None
        assert labelled.correct is not None
        batch = labelled
        if config.drop_uniform_groups:
            batch = labelled.select(mixed_groups(labelled.correct, labelled.group))
        if len(batch) == 0:
            return {"critic/rows": 0.0}
        assert batch.correct is not None
        order = mini_batches(batch, config.mini_batch_prompts, config.epochs, f"{self.seed}/critic")
        with self.phase("critic"):
            targets = value_targets(batch.correct, config.targets)
            metrics = self.critic.update(batch, targets, config, order, self.iteration)
        return metrics | {"critic/rows": float(len(batch))}

    def values(self, batch: Batch) -> Tensor:
        """The critic's values of every token: float32 [T + n]."""
        assert self.critic is not None
        with self.phase("values"):
            return self.critic.values(batch)

    def reinforce(self, batch: Batch, advantages: Tensor, stage: StageConfig) -> dict[str, float]:
        """Clipped policy gradient with one advantage for all tokens of a response. `advantages`: [n]."""
        nothing = torch.zeros(int(batch.response_lengths.sum()) + len(batch))
        return self.improve_actor(batch, nothing, advantages, stage)

    def improve_actor(self, batch: Batch, values: Tensor, rewards: Tensor, stage: StageConfig) -> dict[str, float]:
        """Clipped policy gradient with A_t = R - V (M-step, Eq. 11 and 12). `values`: [T + n], `rewards`: [n]."""
        config, baseline = stage.actor, stage.method_settings.baseline
        with self.phase("logprobs"):
            old = self.actor.logprobs(batch)
            reference = self.reference_logprobs(batch) if config.kl_coef > 0 else None
        experience = Experience(
            old_logprobs=old,
            values=values,
            rewards=rewards,
            engine_logprobs=batch.engine_logprobs,
            reference_logprobs=reference,
        )
        order = mini_batches(batch, config.mini_batch_prompts, config.epochs, f"{self.seed}/actor")
        with self.phase("actor"):
            metrics = self.actor.update(batch, experience, baseline, config, order, self.iteration)
        gap = (old - batch.engine_logprobs).abs()
        return metrics | {"engine/logprob_gap_mean": float(gap.mean()), "engine/logprob_gap_max": float(gap.max())}


def mini_batches(batch: Batch, prompts: int, epochs: int, seed: str) -> list[Tensor]:
    """Row indices (int64) of each mini-batch: `prompts` prompts with all their rows, shuffled again in each epoch.

    The last mini-batch of an epoch is smaller if the number of prompts is not divisible.
    """
    groups = batch.group.unique().tolist()
    rows = {group: (batch.group == group).nonzero().flatten() for group in groups}
    batches = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        order = torch.randperm(len(groups), generator=generator).tolist()
        for start in range(0, len(groups), prompts):
            batches.append(torch.cat([rows[groups[i]] for i in order[start : start + prompts]]))
    return batches
