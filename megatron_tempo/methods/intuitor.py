"""Intuitor (arXiv 2505.19590): the policy's own certainty is the reward.

    u_i = Self-certainty(o_i | q) = 1/|o_i| sum_t KL(U || pi(. | q, o_i,<t))     ("Self-certainty")
        = -1/(|o_i| V) sum_t sum_j log(V pi(j | q, o_i,<t))
    A_i,t = (u_i - mean(u)) / std(u) over the responses to q                      (advantages as in GRPO)

U is uniform over the vocabulary of V tokens. pi is the policy before the update, at the sampling temperature. It costs
one more pass of the actor. A masked response has no reward and is not compared. A length penalty is added to u_i.
"""

from __future__ import annotations

from megatron_tempo.algorithm.groups import group_advantages
from megatron_tempo.config.method_settings import IntuitorSettings
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts, trainable


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """One update of the actor on unlabelled rollouts."""
    assert rollouts.unlabelled is not None
    batch = trainable(rollouts.unlabelled, stage)
    if len(batch) == 0:
        return {"actor/rows": 0.0}
    certainty = learner.self_certainty(batch)
    rewards, penalty = learner.penalise(certainty.float(), batch, stage)
    advantages = group_advantages(rewards, batch.group, divide=stage.settings_as(IntuitorSettings).group_std)
    metrics = {"reward/self_certainty": float(certainty.mean())}
    return metrics | penalty | learner.reinforce(batch, advantages, stage)
