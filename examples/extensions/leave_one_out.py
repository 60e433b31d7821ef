"""A method: REINFORCE with a leave-one-out baseline (RLOO, arXiv 2402.14740).

    stage2.method=import:leave_one_out:method stage2.unlabelled_prompts=0

The advantage of a response is its verdict minus the mean verdict of the other responses to the same prompt. Verdicts
may be graded.
"""

from __future__ import annotations

import torch

from megatron_tempo.config.stages import Needs, Prompts, StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts


class LeaveOneOut:
    """`needs` says which prompts the actor and the critic are trained on. Here: no critic, so the run builds none."""

    needs = Needs(actor=Prompts.labelled, critic=None)

    def iterate(self, learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
        """One update of the actor. Returns metrics for metrics.jsonl. `iteration` counts from 0 in its stage.

        All ranks call this with the same rollouts, on the CPU. The learner distributes the work.
        """
        batch = rollouts.labelled
        assert batch is not None, "needs asks for labelled prompts"
        assert batch.correct is not None, "labelled prompts are verified"
        advantages = leave_one_out(batch.correct, batch.group)
        metrics = learner.reinforce(batch, advantages, stage)  # one clipped policy-gradient update
        return metrics | {"rloo/advantage_max": float(advantages.max())}


def leave_one_out(rewards: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """r_i - mean of the other rewards in its prompt group; 0 for a prompt with one response. [n], [n] -> [n]"""
    _, prompt, size = group.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(size)).index_add(0, prompt, rewards)
    others = (size[prompt] - 1).clamp(min=1)
    advantages = rewards - (total[prompt] - rewards) / others
    return torch.where(size[prompt] > 1, advantages, 0.0)


method = LeaveOneOut()
