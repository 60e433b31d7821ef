"""The reward of a response, the critic's target for it, and the prompt groups with different verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import CriticTargets


def final_values(values: Tensor, lengths: Tensor, baseline: Baseline) -> Tensor:
    """The reward of an unlabelled response: the critic's value of the whole response, V(x, y_1:T).

    Args:
        values: [T + n]. Row i holds V(x), V(x, y_1:1) ... V(x, y_1:T_i).
        lengths: int64 [n], the T_i.
        baseline: `reference` reads the value one token earlier, V(x, y_<T), as the published code does.

    Returns: [n]
    """
    ends = (lengths + 1).cumsum(0) - 1
    if baseline is Baseline.reference:
        ends = ends - (lengths > 0).long()
    return values[ends]


def lower_bound(judged: Sequence[Tensor], deviations: float) -> tuple[Tensor, dict[str, float]]:
    """The mean of several critics' values less `deviations` standard deviations, [n] each -> [n], and a metric of it.

    The deviations are about the mean of these critics (divided by their number). Of two critics it is half of their
    difference, so 1 gives the lower value, as in clipped double Q-learning (Fujimoto et al. 2018, Eq. 10). One critic's
    values are returned as they are.
    """
    if len(judged) == 1:
        return judged[0], {}
    deviation, mean = torch.std_mean(torch.stack(list(judged)), 0, correction=0)
    return mean - deviations * deviation, {"reward/disagreement": float(deviation.mean())}


def value_targets(correct: Tensor, kind: CriticTargets) -> Tensor:
    """The critic's target for each response: I in [0, 1], or 2 I - 1 as in the published code. [n] -> [n]."""
    return correct if kind is CriticTargets.zero_one else 2 * correct - 1


def mixed_groups(correct: Tensor, group: Tensor) -> Tensor:
    """Indices, int64, of the rows whose prompt group has different verdicts. `correct`, `group`: [n]."""
    size = int(group.max()) + 1 if len(group) else 0
    lowest = torch.ones(size).scatter_reduce(0, group, correct, "amin")
    highest = torch.zeros(size).scatter_reduce(0, group, correct, "amax")
    return (lowest < highest)[group].nonzero().flatten()
