"""TEMPO (arXiv 2604.19295), Algorithm 1: test-time training as expectation-maximisation.

E-step   labelled prompts, verified:  critic: minimise mean (V(x, y_1:t) - I)^2        (Eq. 6)
         (with `estep_when_ece_above`, only if the critic's calibration error on them has passed that bound)
M-step   unlabelled prompts:          R = V(x, y_1:T);  A_t = R - V(x, y_<t)           (Eq. 11)
                                      actor: sequence-clipped policy gradient on A_t   (Eq. 12)

With `pessimism`, R is a lower confidence bound of two critics: those before and after the E-step.

A length penalty is added to R, not to the critic's targets. V(x, y_1:T) stays the probability of a correct response, by
which calibration measures it. A critic that learnt the penalty would predict it at the end of a long response, where it
is added once more.
"""

from __future__ import annotations

from megatron_tempo.algorithm.outcomes import lower_bound, value_targets
from megatron_tempo.config.method_settings import TempoSettings, ValueTiming
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts
from megatron_tempo.types import Batch


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """One E-step and one M-step. During the critic's warm-up, only the E-step."""
    settings = stage.settings_as(TempoSettings)
    labelled, unlabelled = rollouts.labelled, rollouts.unlabelled
    batch = unlabelled  # the rows that the actor is trained on
    if unlabelled is not None and settings.actor_on_labelled:
        assert labelled is not None
        batch = Batch.join(unlabelled, labelled)
    metrics: dict[str, float] = {}

    early = settings.value_timing is ValueTiming.before_estep
    both = settings.pessimism > 0 and stage.critic_learns(iteration)
    asked = [learner.values(batch)] if batch is not None and (early or both) else []

    if stage.critic_learns(iteration):
        assert labelled is not None
        metrics |= learner.recalibrate(labelled, stage, iteration)

    if batch is None or unlabelled is None:  # the critic's warm-up
        return metrics
    if both or not early:
        asked.append(learner.values(batch))
    values = asked[0 if early else -1]
    judged = [learner.final_values(batch, one, settings.baseline) for one in asked]
    rewards, found = lower_bound(judged, settings.pessimism)
    metrics["reward/unlabelled_value"] = float(rewards[: len(unlabelled)].mean())
    if settings.actor_on_labelled:
        assert labelled is not None
        assert labelled.correct is not None
        rewards[len(unlabelled) :] = value_targets(labelled.correct, stage.critic.targets)
    rewards, penalty = learner.penalise(rewards, batch, stage)
    return metrics | found | penalty | learner.improve_actor(batch, values, rewards, stage)
