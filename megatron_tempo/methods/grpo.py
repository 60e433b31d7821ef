"""GRPO on verified answers (DeepSeekMath, arXiv 2402.03300, 4.1.2 "Outcome Supervision RL with GRPO").

The reward of a response is its verdict. All its tokens have the advantage (r_i - mean(r)) / std(r) over its prompt
group. With `group_std=false`, it is not divided by std(r) (Dr. GRPO, arXiv 2503.20783). A group's mean and std are of
the responses that are trained on: without masked ones, and with the length penalty in r_i.
"""

from __future__ import annotations

from megatron_tempo.algorithm.groups import group_advantages
from megatron_tempo.config.method_settings import GrpoSettings
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts, trainable


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """One update of the actor on labelled rollouts."""
    assert rollouts.labelled is not None
    settings, batch = stage.settings_as(GrpoSettings), trainable(rollouts.labelled, stage)
    assert batch.correct is not None
    rewards, metrics = learner.penalise(batch.correct, batch, stage)
    advantages = group_advantages(rewards, batch.group, divide=settings.group_std)
    return metrics | learner.reinforce(batch, advantages, stage)
