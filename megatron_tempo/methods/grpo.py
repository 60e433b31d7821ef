"""GRPO on verified answers (DeepSeekMath, arXiv 2402.03300, 4.1.2 "Outcome Supervision RL with GRPO").

The reward of a response is its verdict. All its tokens have the advantage (r_i - mean(r)) / std(r) over its prompt
group. With `group_std=false`, it is not divided by std(r) (Dr. GRPO, arXiv 2503.20783).
"""

from __future__ import annotations

from megatron_tempo.algorithm.groups import group_advantages
from megatron_tempo.config.stages import GrpoSettings, StageConfig
from megatron_tempo.methods.learner import Learner, Rollouts


def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
    """One update of the actor on labelled rollouts."""
    batch = rollouts.labelled
    assert batch is not None
    assert batch.correct is not None
    settings = stage.settings_as(GrpoSettings)
    return learner.reinforce(batch, group_advantages(batch.correct, batch.group, divide=settings.group_std), stage)
