"""The E-step's loss: the critic's values drawn to the verified outcome (TEMPO, Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tempo.algorithm.jagged import row_mean
from megatron_tempo.config.schema import CriticTargets


def value_targets(correct: Tensor, kind: CriticTargets) -> Tensor:
    """The number a response's values are drawn to: I in {0, 1}, or the published code's {-1, 1}. [n] -> [n]."""
    return correct if kind is CriticTargets.zero_one else 2 * correct - 1


def value_loss(values: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """mean_t (V(x, y_1:t) - I)^2 of each row, over t = 0 .. T_i: the value before the first token is a baseline too.

    Args:
        values: [T + n], row after row V(x), V(x, y_1:1) ... V(x, y_1:T_i).
        targets: [n].
        lengths: int64 [n], the T_i.

    Returns: [n]
    """
    return row_mean((values - torch.repeat_interleave(targets, lengths + 1)).square(), lengths + 1)


def mixed_groups(correct: Tensor, group: Tensor) -> Tensor:
    """Rows whose prompt has right and wrong responses both: int64, the row numbers. `correct`, `group`: [n]."""
    size = int(group.max()) + 1 if len(group) else 0
    right = torch.zeros(size).index_add(0, group, correct)
    count = torch.zeros(size).index_add(0, group, torch.ones_like(correct))
    return ((right > 0) & (right < count))[group].nonzero().flatten()
