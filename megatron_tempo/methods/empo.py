"""EMPO (arXiv 2504.05812): a response is worth the share of its prompt's responses that mean the same.

    c_1, c_2 ...   clusters of the N responses to x by meaning;   p(c_j | x) = |c_j| / N
    r_i = p(c_j | x) of the response's cluster;  advantages as of GRPO
    prompts are learnt from where  entropy_low < H < entropy_high,  H = -sum_j p(c_j | x) log p(c_j | x)

The clusters are the answers that the set's verifier holds equal, as in the paper's mathematics. Free text, which the
paper clusters by a model, is not clustered here. A response without an answer is a cluster of its own, as in the
published code.
"""

from __future__ import annotations

import math

from megatron_tempo.algorithm.groups import group_advantages, shares
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """One update of the actor on the unlabelled rollouts whose entropy is within bounds; none where none is."""
    batch = rollouts.unlabelled
    assert batch is not None
    assert batch.answer_class is not None
    rewards, entropy = shares(batch.answer_class, batch.group)
    low = -math.inf if stage.entropy_low is None else stage.entropy_low
    high = math.inf if stage.entropy_high is None else stage.entropy_high
    kept = ((low < entropy) & (entropy < high)).nonzero().flatten()
    metrics = {
        "reward/unlabelled": float(rewards.mean()),
        "answers/entropy": float(entropy.mean()),
        "answers/rows": float(len(kept)),
    }
    if len(kept) == 0:
        return metrics
    advantages = group_advantages(rewards, batch.group, divide=stage.group_std)
    return metrics | learner.reinforce(batch.select(kept), advantages[kept], stage)
