"""What a token was worth: the reward of its response less the critic's value (TEMPO, Eq. 11)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tempo.config.schema import Baseline


def final_values(values: Tensor, lengths: Tensor, baseline: Baseline) -> Tensor:
    """The reward of an unlabelled response: the critic's value of the whole response, V(x, y_1:T).

    Args:
        values: [T + n], row after row V(x), V(x, y_1:1) ... V(x, y_1:T_i).
        lengths: int64 [n], the T_i.
        baseline: `reference` reads one token early, V(x, y_<T), as the published code does.

    Returns: [n]
    """
    ends = (lengths + 1).cumsum(0) - 1
    if baseline is Baseline.reference:
        ends = ends - (lengths > 0).long()
    return values[ends]


def token_advantages(values: Tensor, rewards: Tensor, lengths: Tensor, baseline: Baseline) -> Tensor:
    """A_t = R - V, the value read before the token or, by `paper`, after it (Eq. 11).

    Before the token the baseline does not depend on the token, so the policy gradient stays unbiased.

    Args:
        values: [T + n], row after row V(x), V(x, y_1:1) ... V(x, y_1:T_i).
        rewards: [n], verified or from `final_values`.
        lengths: int64 [n], the T_i.
        baseline: where V is read.

    Returns: [T]
    """
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    before = torch.arange(int(lengths.sum())) + row  # each earlier row holds one value more than it has tokens
    read_at = before + 1 if baseline is Baseline.paper else before
    return rewards[row] - values[read_at]


def whiten(advantages: Tensor, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit variance over all tokens of the batch: [T] -> [T]."""
    if advantages.numel() < 2:
        return advantages - advantages.mean() if advantages.numel() else advantages
    return (advantages - advantages.mean()) / (advantages.std() + eps)
