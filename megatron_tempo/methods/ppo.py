"""PPO on verified answers (stage 1, RLVR): gamma = lambda = 1, so A_t = I - V(x, y_<t).

A length penalty is added to I in A_t, not to the critic's targets: V stays the probability of a correct response.
"""

from __future__ import annotations

from megatron_tempo.algorithm.outcomes import value_targets
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """One update of actor and critic on the same labelled rollouts. During the critic's warm-up, only of the critic.

    Values are computed before the critic is fitted to these rollouts: a baseline fitted to them would be biased.
    """
    batch = rollouts.labelled
    assert batch is not None
    assert batch.correct is not None
    if stage.warms_up(iteration):
        return learner.fit_critic(batch, stage)
    values = learner.values(batch)
    metrics = learner.fit_critic(batch, stage)
    rewards, penalty = learner.penalise(value_targets(batch.correct, stage.critic.targets), batch, stage)
    return metrics | penalty | learner.improve_actor(batch, values, rewards, stage)
