"""One-shot entropy minimisation (arXiv 2505.20282): the loss is the entropy of the policy's own tokens.

    H_t = -sum_v pi(v | y_<t, x) log pi(v | y_<t, x)
    L(x) = 1/|I| sum over I of H_t,   I the tokens that the policy generated     ("EM loss")

There is no reward: the gradient goes through H_t. It is the entropy term of the policy loss with the coefficient -1,
and advantages of 0. pi is at the sampling temperature, as in the paper. The loss is a mean over the tokens of each
response, then over responses. A masked response is left out. A KL term may be added.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """One update of the actor on unlabelled rollouts."""
    batch = rollouts.unlabelled
    assert batch is not None
    minimising = replace(stage, actor=replace(stage.actor, entropy_coef=-1.0))
    return learner.reinforce(batch, torch.zeros(len(batch)), minimising)
