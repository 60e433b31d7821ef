"""A method: REINFORCE with a leave-one-out baseline (RLOO, arXiv 2402.14740).

    stage2.method=import:leave_one_out:method stage2.unlabelled_prompts=0

The advantage of a response is its verdict minus the mean verdict of the other responses to the same prompt. Verdicts
may be graded. A setting of its own is given as if it were a field of the stage:

    stage2.advantage_limit=0.5
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tempo.config.method_settings import MethodSettings, Needs, Prompts
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts


@dataclass(slots=True)
class LeaveOneOutSettings(MethodSettings):
    """Optional: fields of `stage1` and `stage2` that this method adds. Each has a default; a ValueError rejects one."""

    advantage_limit: float | None = None  # advantages are cut off at this size; None: at none

    def __post_init__(self) -> None:
        if self.advantage_limit is not None and self.advantage_limit <= 0:
            raise ValueError(f"advantage_limit is {self.advantage_limit}, and must be above 0")


class LeaveOneOut:
    """`needs` says which prompts the actor and the critic are trained on. Here: no critic, so the run builds none."""

    needs = Needs(actor=Prompts.labelled, critic=None)
    settings = LeaveOneOutSettings

    def iterate(self, learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
        """One update of the actor. Returns metrics for metrics.jsonl. `iteration` counts from 0 in its stage.

        All ranks call this with the same rollouts, on the CPU. The learner distributes the work.
        """
        batch = rollouts.labelled
        assert batch is not None, "needs asks for labelled prompts"
        assert batch.correct is not None, "labelled prompts are verified"
        limit = stage.settings_as(LeaveOneOutSettings).advantage_limit
        advantages = leave_one_out(batch.correct, batch.group)
        if limit is not None:
            advantages = advantages.clamp(-limit, limit)
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
