"""TTRL-Guard (arXiv 2605.19444): TTRL that holds back where the majority's answer changes, or has won after a contest.

    L = sum over i not in R of w_i [(1 - beta_i) L_MV(x_i) + beta_i L_min(x_i)]

    FRS (3.2)   w_i: less where the majority's answer flips often, or has never had a rival
    MPS (3.3)   beta_i > 0 after flips; L_min rewards other answers with `minority_share` of the votes or more
    RCSU (3.4)  R: of the questions that had a contest and agree again, each with `skip_probability`, at most
                `skipped_share` of an iteration's questions and at least one

`algorithm.guard` has the rules of w, beta and R, `training.vote_history` the Flip Rate. L_MV is TTRL's loss, L_min the
same with other rewards: their advantages are mixed. A question in R has advantages of 0. The rest is as in TTRL.
"""

from __future__ import annotations

import torch

from megatron_tempo.algorithm.groups import first_of_each, group_advantages, minorities, votes
from megatron_tempo.algorithm.guard import question_weights
from megatron_tempo.config.method_settings import GuardSettings
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts, trainable
from megatron_tempo.types import seed_of


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """A vote on the unlabelled rollouts, and one guarded update of the actor."""
    assert rollouts.unlabelled is not None
    polled, settings = trainable(rollouts.unlabelled, stage), stage.settings_as(GuardSettings)
    if len(polled) == 0:
        return {"actor/rows": 0.0}
    assert polled.answer_class is not None
    won, agreement = votes(polled.answer_class, polled.group)
    lost = minorities(polled.answer_class, polled.group, settings.minority_share)
    visits = None if rollouts.visits is None else [(one.shares, one.flips) for one in rollouts.visits]
    weight, beta = question_weights(visits, polled.group, lost, settings, seed_of(learner.seed, "skip"))
    rows = first_of_each(polled.group, stage.responses_per_prompt)
    batch, std = polled.select(rows), settings.group_std
    (first, penalty), (second, _) = (learner.penalise(of[rows], batch, stage) for of in (won, lost))
    majority, minority = (group_advantages(of, batch.group, divide=std) for of in (first, second))
    present = polled.group.unique()
    metrics = {
        "vote/agreement": float(agreement.mean()),
        "vote/answered": float((polled.answer_class >= 0).float().mean()),
        "reward/unlabelled": float(won[rows].mean()),
        "guard/weight": float(weight[present].mean()),
        "guard/minority": float((weight * beta > 0)[present].float().mean()),
        "guard/left_out": float((weight[present] == 0).float().mean()),
    }
    advantages = weight[batch.group] * torch.lerp(majority, minority, beta[batch.group])
    return metrics | penalty | learner.reinforce(batch, advantages, stage)
