"""EMPO (arXiv 2504.05812): the reward of a response is the share of its prompt group that has the same meaning.

    c_1, c_2 ...   clusters of the N responses to x by meaning;   p(c_j | x) = |c_j| / N
    r_i = p(c_j | x) of the response's cluster;  advantages as in GRPO
    train on prompts with  entropy_low < H < entropy_high,  H = -sum_j p(c_j | x) log p(c_j | x)

A cluster is a set of answers that the verifier finds equal, as in the paper's mathematics. The paper clusters free text
with a model; this is not implemented. A response without an answer is a cluster of its own, as in the published code. A
masked response is not one of the N. A length penalty is added to r_i.
"""

from __future__ import annotations

import math

from torch import Tensor

from megatron_tempo.algorithm.groups import group_advantages, shares
from megatron_tempo.config.method_settings import EmpoSettings
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts, trainable, trainable_rows
from megatron_tempo.types import Batch


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """One update of the actor on the unlabelled rollouts whose entropy is within bounds, if there are any."""
    assert rollouts.unlabelled is not None
    batch = trainable(rollouts.unlabelled, stage)
    if len(batch) == 0:
        return {"actor/rows": 0.0}
    assert batch.answer_class is not None
    rewards, entropy = shares(batch.answer_class, batch.group)
    settings, kept = stage.settings_as(EmpoSettings), _within(entropy, stage)
    metrics = {
        "reward/unlabelled": float(rewards.mean()),
        "answers/entropy": float(entropy.mean()),
        "answers/rows": float(len(kept)),
    }
    if len(kept) == 0:
        return metrics | {"actor/rows": 0.0}
    rewards, penalty = learner.penalise(rewards, batch, stage)
    advantages = group_advantages(rewards, batch.group, divide=settings.group_std)
    return metrics | penalty | learner.reinforce(batch.select(kept), advantages[kept], stage)


def actor_rows(batch: Batch, stage: StageConfig) -> Tensor:
    """The rows, int64, whose prompt's entropy is within bounds."""
    assert batch.answer_class is not None
    clustered = trainable_rows(batch, stage)
    _, entropy = shares(batch.answer_class[clustered], batch.group[clustered])
    return clustered[_within(entropy, stage)]


def _within(entropy: Tensor, stage: StageConfig) -> Tensor:
    """The rows, int64, with an entropy within bounds."""
    settings = stage.settings_as(EmpoSettings)
    low = -math.inf if settings.entropy_low is None else settings.entropy_low
    high = math.inf if settings.entropy_high is None else settings.entropy_high
    return ((low < entropy) & (entropy < high)).nonzero().flatten()
