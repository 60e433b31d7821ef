"""TTRL (arXiv 2504.16084): the majority's answer is used as the label.

    y = the most frequent answer of a prompt group      ("Majority Voting Reward Function")
    R(y_i) = 1 if a response's answer is y, else 0;  advantages as in GRPO

`vote_responses` responses are sampled and vote. The first `responses_per_prompt` of them are trained on. (The paper: 64
and 32.) A masked response neither votes nor is trained on; a length penalty is added to R(y_i), after the vote.
"""

from __future__ import annotations

from torch import Tensor

from megatron_tempo.algorithm.groups import first_of_each, group_advantages, votes
from megatron_tempo.config.method_settings import TtrlSettings
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts, trainable, trainable_rows
from megatron_tempo.types import Batch


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """A vote on the unlabelled rollouts, and one update of the actor."""
    assert rollouts.unlabelled is not None
    polled = trainable(rollouts.unlabelled, stage)
    if len(polled) == 0:
        return {"actor/rows": 0.0}
    assert polled.answer_class is not None
    won, agreement = votes(polled.answer_class, polled.group)
    metrics = {
        "vote/agreement": float(agreement.mean()),
        "vote/answered": float((polled.answer_class >= 0).float().mean()),
    }
    rows = first_of_each(polled.group, stage.responses_per_prompt)
    batch = polled.select(rows)
    metrics["reward/unlabelled"] = float(won[rows].mean())
    rewards, penalty = learner.penalise(won[rows], batch, stage)
    advantages = group_advantages(rewards, batch.group, divide=stage.settings_as(TtrlSettings).group_std)
    return metrics | penalty | learner.reinforce(batch, advantages, stage)


def actor_rows(polled: Batch, stage: StageConfig) -> Tensor:
    """The rows, int64, that are trained on: the first ones of each prompt that vote."""
    voters = trainable_rows(polled, stage)
    return voters[first_of_each(polled.group[voters], stage.responses_per_prompt)]
