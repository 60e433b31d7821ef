"""SCRL (arXiv 2603.19880): a label where the vote is clear, and answers that are rare and uncertain are taken as wrong.

    p_j = n_j / N            share of answer a_j among the N responses to x;  p_(1), p_(2): the two largest
    y+ = a_(1)               if p_(1) >= positive_share and p_(1) - p_(2) > positive_margin, else none
                                                                     ("Selective Positive Pseudo-Labeling")
    h_i                      mean over the tokens of response i of the entropy of pi_old, in nats
    H_j, H                   mean of h_i over the responses with answer a_j, and over all N
    N- = {a_j : p_j < negative_share and H_j >= H}             ("Entropy-Gated Negative Pseudo-Labeling")
    R_i = p(a_i) [a_i = y+] + (p(a_i) - negative_share) [a_i in N-] - entropy_penalty (H(a_i) - H)
                                                                     ("Dynamic Reward Shaping")

Advantages as in GRPO. As in TTRL, `vote_responses` are sampled and vote, and the first `responses_per_prompt` are
trained on (the paper: 64 and 32, or 32 and 16). Responses without an answer count in N, and are a class that is never a
label; the paper's formula says nothing of them, and its code gives them -1. A masked response is not one of the N. A
length penalty is added to R_i.
"""

from __future__ import annotations

from megatron_tempo.algorithm.groups import first_of_each, group_advantages, pseudo_labels
from megatron_tempo.config.method_settings import ScrlSettings
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts, trainable


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """A vote on the unlabelled rollouts, and one update of the actor."""
    assert rollouts.unlabelled is not None
    polled = trainable(rollouts.unlabelled, stage)
    if len(polled) == 0:
        return {"actor/rows": 0.0}
    assert polled.answer_class is not None
    settings, entropy = stage.settings_as(ScrlSettings), learner.entropies(polled)
    right, wrong, share, excess = pseudo_labels(
        polled.answer_class,
        polled.group,
        entropy,
        positive=settings.positive_share,
        margin=settings.positive_margin,
        negative=settings.negative_share,
    )
    shaped = right * share + wrong * (share - settings.negative_share) - settings.entropy_penalty * excess
    prompts = len(polled.group.unique())
    metrics = {
        "labels/positive": len(polled.group[right].unique()) / prompts,
        "labels/negative": float(wrong.double().mean()),
        "answers/token_entropy": float(entropy.mean()),
    }
    rows = first_of_each(polled.group, stage.responses_per_prompt)
    batch = polled.select(rows)
    metrics["reward/unlabelled"] = float(shaped[rows].mean())
    rewards, penalty = learner.penalise(shaped[rows].float(), batch, stage)
    advantages = group_advantages(rewards, batch.group, divide=settings.group_std)
    return metrics | penalty | learner.reinforce(batch, advantages, stage)
