"""TTRL (arXiv 2504.16084): the majority's answer is taken for the label.

    y = the answer that most of a prompt's responses give      ("Majority Voting Reward Function")
    R(y_i) = 1 where a response's answer is y, else 0;  advantages as of GRPO

`vote_responses` are sampled and vote; the first `responses_per_prompt` of them are learnt from. (The paper: 64 and 32.)
"""

from __future__ import annotations

from megatron_tempo.algorithm.groups import first_of_each, group_advantages, votes
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """A vote on the unlabelled rollouts, and one update of the actor."""
    polled = rollouts.unlabelled
    assert polled is not None
    assert polled.answer_class is not None
    won, agreement = votes(polled.answer_class, polled.group)
    metrics = {
        "vote/agreement": float(agreement.mean()),
        "vote/answered": float((polled.answer_class >= 0).float().mean()),
    }
    rows = first_of_each(polled.group, stage.responses_per_prompt)
    batch, rewards = polled.select(rows), won[rows]
    metrics["reward/unlabelled"] = float(rewards.mean())
    return metrics | learner.reinforce(batch, group_advantages(rewards, batch.group, divide=stage.group_std), stage)
